"""FP8 attention as Megatron-Core's `core_attention`, for machines without FP8 kernels; the arithmetic is
attention/fp8_function.py's."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_geoscale.attention.fp8_function import fp8_attention, uncast_attention
from megatron_geoscale.scaling.formats import Powers, signal_and_noise
from megatron_geoscale.scaling.slots import LayerScaler


class EmulatedAttention(MegatronModule):
    """FP8 attention as Megatron-Core's `core_attention`, for self-attention and context parallel size 1.

    Sliding windows, softmax sinks and query-key layer scaling are those of the config. A window takes keys away from
    what the mask allows, so a causal mask stays causal, as in Transformer Engine. A learnable sink is the parameter
    `softmax_offset`, [local heads], named, initialised and saved as megatron-core's. Under layer scaling
    `softmax_scale` is divided by the layer number, and `logit_multiplier` is that number.

    Whoever attaches scales sets the attributes: `scaler`, without which a forward raises RuntimeError; `fp8_logits`,
    `overflow`, `fp8_backward`; and `measure_sqnr`, under which each forward also computes its attention without casts
    and adds the powers of signal and noise to `sqnr_powers` until `reset_sqnr`.

    A cast is reported once for each forward, recomputed or not: activation recompute runs a first forward without
    gradients, which in training mode reports nothing. (torch's non-reentrant checkpoint, which Megatron does not use,
    runs both with gradients and would count twice.)

    Raises ValueError, naming the flag, for what it does not compute: see `_refuse`, and in a forward packed sequences,
    attention bias, and a missing mask where the mask type is neither causal nor none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        """`k_channels` and `v_channels` are what multi-latent attention says of its heads; the tensors say it too."""
        super().__init__(config)
        _refuse(config, attention_type)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.logit_multiplier = float(self.layer_number) if config.apply_query_key_layer_scaling else 1.0
        self.softmax_scale /= self.logit_multiplier
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window_size = config.window_size if windowed else None
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scaler: LayerScaler | None = None
        self.fp8_logits = False
        self.overflow = "saturate"
        self.fp8_backward = True
        self.measure_sqnr = False
        self.sqnr_powers: Powers | None = None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
            self._tp_group = groups.tp
            heads = config.num_attention_heads // self._tp_group.size()
            offset = torch.empty(heads, device=torch.cuda.current_device(), dtype=config.params_dtype)
            self.softmax_offset = torch.nn.Parameter(offset)
            # Heads are sharded: without the mark each rank's gradient would count as a copy of the first rank's.
            tensor_parallel.set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
            if config.perform_initialization:
                config.init_method(self.softmax_offset)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [sq, b, heads, d], key and value [sk, b, groups, d], attention_mask bool, True where forbidden,
        broadcastable to [b, heads, sq, sk], or None for the mask type's own. Returns [sq, b, heads * d]."""
        if packed_seq_params is not None:
            raise ValueError("packed sequences are not supported by --geoscale-attention emulated")
        if attention_bias is not None:
            raise ValueError("an attention bias is not supported by --geoscale-attention emulated")
        if self.scaler is None:
            raise RuntimeError(f"attention layer {self.layer_number} ran before scales were attached to it")
        masked = attention_mask
        if masked is None:
            masked = _default_mask(attn_mask_type or self.attn_mask_type, query.size(0), key.size(0), query.device)
        if self.window_size is not None:
            outside = _outside_window(self.window_size, query.size(0), key.size(0), query.device)
            masked = outside if masked is None else masked | outside
        dropout = self._dropout_factors((query.size(1), query.size(2), query.size(0), key.size(0)), query.device)

        # Decided here, because inside a Function gradients are always off.
        observe = torch.is_grad_enabled() or not self.training
        out = fp8_attention(
            query,
            key,
            value,
            scaler=self.scaler,
            softmax_scale=self.softmax_scale,
            masked=masked,
            dropout=dropout,
            sink=self._sink(query),
            logit_multiplier=self.logit_multiplier,
            fp8_logits=self.fp8_logits,
            observe=observe,
            overflow=self.overflow,
            fp8_backward=self.fp8_backward,
        )
        if self.measure_sqnr and observe:
            with torch.no_grad():
                scale = self.softmax_scale * self.logit_multiplier
                reference = uncast_attention(query, key, value, scale, masked, dropout, self._sink(query))
                powers = signal_and_noise(reference, out)
                old = self.sqnr_powers
                self.sqnr_powers = (
                    powers if old is None else Powers(old.signal + powers.signal, old.noise + powers.noise)
                )
        return out.flatten(2)

    def reset_sqnr(self) -> None:
        """Forget the powers that `measure_sqnr` added up."""
        self.sqnr_powers = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A learnable sink, as megatron-core's own attention saves it; scales come from the weights, never a file."""
        if self.softmax_offset is None:
            return {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=None if metadata is None else metadata.get("dp_cp_group"),
        )

    def _sink(self, query: Tensor) -> Tensor | None:
        """The sink's logit of each head of `query` [s, b, heads, d]: 0 off by one."""
        if self.config.softmax_type == "off-by-one":
            return query.new_zeros(query.size(2))
        return self.softmax_offset

    def _dropout_factors(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        p = self.attention_dropout
        if not self.training or p == 0.0:
            return None
        factors = torch.empty(shape, dtype=torch.float32, device=device)
        # As Megatron's own attention: heads are sharded, so each tensor parallel rank draws from its own stream. Under
        # sequence parallelism Megatron has forked already.
        if self.config.sequence_parallel:
            factors.bernoulli_(1.0 - p)
        else:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                factors.bernoulli_(1.0 - p)
        return factors.mul_(1.0 / (1.0 - p))


def _refuse(config: TransformerConfig, attention_type: str) -> None:
    """ValueError, in one sentence, for a configuration that `EmulatedAttention` does not compute."""
    obstacles = {
        f"{attention_type} attention": attention_type == "cross",
        "--context-parallel-size above 1": config.context_parallel_size > 1,
        "--qk-clip": config.qk_clip,
        "--log-max-attention-logit": config.log_max_attention_logit,
    }
    for what, present in obstacles.items():
        if present:
            raise ValueError(f"{what} is not supported by --geoscale-attention emulated")


def _default_mask(mask_type: AttnMaskType, sq: int, sk: int, device: torch.device) -> Tensor | None:
    """The mask that a mask type implies, [sq, sk], True where forbidden; the last query sees every key."""
    if mask_type == AttnMaskType.no_mask:
        return None
    if mask_type != AttnMaskType.causal:
        raise ValueError(f"attention mask type {mask_type.name} needs an attention_mask, and None was given")
    return torch.ones(sq, sk, dtype=torch.bool, device=device).triu(1 + sk - sq)


def _outside_window(window: tuple[int, int], sq: int, sk: int, device: torch.device) -> Tensor:
    """True where a key lies more than window[0] before the query or window[1] behind it, [sq, sk]; -1 is no limit."""
    ahead = torch.arange(sk, device=device) - torch.arange(sk - sq, sk, device=device)[:, None]
    before, behind = (limit if limit >= 0 else sk for limit in window)
    return (ahead < -before) | (ahead > behind)
