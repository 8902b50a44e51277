"""Transformer Engine's fused FP8 attention on scales from the weights: Megatron-Core's `core_attention` on a GPU.

TE scales FP8 attention by delayed scaling: each cast has a *slot*, an amax history and a scale that TE updates from it.
Here the slots stay, so TE's own code runs as it is (versions 2.9 to 2.20), and are taken over:

- the quantizers of QKV, S, O, dO, dP and dQKV read their scale from the engine's memory and leave their amax there
  (`scaling.kernel_slots`). The memory is never moved, and a refresh changes it on the device;
- a sentinel stands where TE remembers that a module is in its global amax buffers. So ours is never in them: no
  reduction carries its amax, no update changes its scale;
- nothing of it is in a checkpoint, and what a stock checkpoint holds is ignored: scales follow from the weights;
- the recipe is our own, in an autocast round this attention alone. Linear layers keep theirs, or run in BF16.

What holds by construction, because a forward pass writes no scale and the scales change between steps only:
activation recompute, full and selective, casts the second time as it did the first; the microbatches of a step, under
pipeline parallelism and with interleaved chunks too, share one set of scales; CUDA graphs read the current scales at
each replay, since addresses stay and no host code has to run; under context parallelism all ranks, which exchange
tensors as FP8 numbers without scales, have the same ones, being functions of the same weights.

The backward pass has no history either: a hook on the attention's output takes the gradient dO before TE casts it, and
sets the three backward scales of this very pass, on the device (`scaling.backward_scales`). Each pass sets its own just
before its kernels, on their stream, so other microbatches do not disturb it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformer_engine.common.recipe import DelayedScaling, Format
from transformer_engine.pytorch.distributed import in_fp8_activation_recompute_phase
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_geoscale.attention.te_contract import (
    SENTINEL,
    attention_quantizers,
    buffer_key,
    fill_empty_stash,
    require_names,
    require_slots,
)
from megatron_geoscale.scaling.kernel_slots import KernelSlots
from megatron_geoscale.scaling.slot_scales import TableScaler

RECIPE = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=1, amax_compute_algo="most_recent", fp8_dpa=True)
"""What makes TE give attention delayed-scaling slots. One object, so that TE never sees it change; the history has one
row, because TE cannot change its length in an attention module (`adjust_amax_history_length` raises there)."""
BACKWARD_SWITCH = "NVTE_FP8_DPA_BWD"
"""TE reads it in every forward pass; 0 leaves the backward pass in BF16."""


class TransformerEngineAttention(TEDotProductAttention):
    """`core_attention` in TE's fused FP8 kernels, with scales from the engine. Arguments as `TEDotProductAttention`.

    Whoever attaches scales sets `scaler` and then calls `take_over`; without it a forward pass raises RuntimeError.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, **options
        )
        # Not every version of TE keeps it; `scaling.layers` reads it.
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(self.hidden_size_per_attention_head_k)
        self.scaler: TableScaler | None = None
        self._slots: KernelSlots | None = None
        self._row = max(1, layer_number) - 1
        self._taken: dict[str, Any] = {}
        self._hooked = False

    def take_over(self, slots: KernelSlots, *, backward: str = "bound") -> None:
        """Let the quantizers use `slots` instead of TE's memory. `backward`: `GeoScaleConfig.backward`.

        After the model is on its device; `scaler` must be set. Raises RuntimeError where this TE's attention is not
        built as this module needs it, naming what is missing, and ValueError where the environment forbids FP8.
        """
        switch = "0" if backward == "bf16" else "1"
        if os.environ.setdefault(BACKWARD_SWITCH, switch) != switch:
            raise ValueError(f"{BACKWARD_SWITCH}={os.environ[BACKWARD_SWITCH]} contradicts --geoscale-backward "
                             f"{backward}: unset it")
        require_names(self)
        self.fp8_meta[buffer_key()] = SENTINEL
        with fp8_attention_autocast():
            self.init_fp8_metadata(num_gemms=3)
        require_slots(self)
        for slot, quantizer in attention_quantizers(self).items():
            quantizer.scale, quantizer.amax = slots.scale(self._row, slot), slots.amax_of(self._row, slot)
        self._taken = {direction: self.quantizers[direction] for direction in ("scaling_fwd", "scaling_bwd")}
        self._slots, self._hooked = slots, backward == "bound"
        slots.hooked_backward |= self._hooked

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **options: Any,
    ) -> Tensor:
        """As `TEDotProductAttention.forward`: query [sq, b, heads, d], key and value [sk, b, groups, d] and [.., d_v],
        returns [sq, b, heads * d_v]. Raises ValueError for what TE would compute in BF16."""
        if self._slots is None:
            raise RuntimeError(f"attention layer {self.layer_number} ran before scales were attached to it")
        if packed_seq_params is not None:
            raise ValueError("packed sequences are not supported by --geoscale-attention te")
        if attention_bias is not None:
            raise ValueError("an attention bias is not supported by --geoscale-attention te")
        if in_fp8_activation_recompute_phase():
            fill_empty_stash(self)
        with fp8_attention_autocast():
            out: Tensor = super().forward(query, key, value, attention_mask, attn_mask_type, **options)
        if any(self.quantizers[direction] is not taken for direction, taken in self._taken.items()):
            raise RuntimeError(f"Transformer Engine has replaced the FP8 state of attention layer {self.layer_number}: "
                               "its scales are no longer those of --geoscale-recipe")
        self._slots.expect(self._row)
        if self._hooked and out.requires_grad:
            # Of this pass, before the kernel of another microbatch can overwrite it.
            amax_qkv = None if self._context_groups() else self._slots.amax_of(self._row, "qkv").clone()[0]
            out.register_hook(partial(self._before_backward, value.shape[-1], key.size(0), amax_qkv))
        return out

    @torch.no_grad()
    def _before_backward(self, value_dim: int, num_keys: int, amax_qkv: Tensor | None, grad: Tensor) -> None:
        """Scale the backward casts by the gradient that they are about to see: grad [sq, b, heads * value_dim]."""
        assert self.scaler is not None and self._slots is not None
        groups = self._context_groups()
        ranks = math.prod(dist.get_world_size(group) for group in groups)
        do = grad.unflatten(-1, (-1, value_dim))
        scales = self.scaler.backward_scales(do, num_keys=num_keys * ranks, amax_qkv=amax_qkv)
        for group in groups:  # gradients travel between the ranks as FP8 numbers, without their scale
            dist.all_reduce(scales, op=dist.ReduceOp.MIN, group=group)
        if ranks > 1 and "a2a" in (self.cp_comm_type or ""):
            scales[2] /= 2.0 ** math.ceil(math.log2(ranks))  # dK and dV then sum over the queries of all ranks
        self._slots.set_backward_scales(self._row, scales)

    def _context_groups(self) -> list[dist.ProcessGroup]:
        if self.config.context_parallel_size == 1:
            return []
        return list(self.cp_group) if isinstance(self.cp_group, list) else [self.cp_group]

    def get_extra_state(self) -> Tensor:
        """Nothing, in the form that TE's attention gives it while FP8 is off: the keys of checkpoints stay alike."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Ignore the amax history that a checkpoint of TE's own attention may hold."""

    def adjust_amax_history_length(self, length: int, fwd: bool | None = None) -> None:
        """Nothing: the history has one row, and TE's graph capture would ask for the linear layers' length."""


@contextlib.contextmanager
def fp8_attention_autocast() -> Iterator[None]:
    """`RECIPE`, for what runs inside.

    Leaving TE's outermost autocast reduces and updates every delayed scale of the model, which is the business of the
    autocast round the linear layers; where there is none, layers that run in BF16 among others in FP8, a disabled one
    takes the outermost place and does nothing.
    """
    outer = contextlib.nullcontext() if FP8GlobalStateManager.is_fp8_enabled() else te.autocast(enabled=False)
    with outer, te.autocast(enabled=True, recipe=RECIPE):
        yield
