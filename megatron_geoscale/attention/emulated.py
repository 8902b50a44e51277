"""FP8 attention in plain torch, forward and backward, for machines without FP8 kernels.

What Transformer Engine's fused attention casts is cast here, by real conversions to torch's float8 dtypes and back
(FACTS 1): Q, K, V under one scale, the softmax output after dropout, O; in the backward pass dO, dS * softmax_scale
(TE's "dP" slot), and dQ, dK, dV under one scale. Everything between two casts is float32. `EmulatedAttention` is
Megatron-Core's `core_attention`; `fp8_attention` is the same without Megatron's module around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_geoscale.scaling.formats import SLOT_FORMATS, Powers, cast, signal_and_noise
from megatron_geoscale.scaling.slots import LayerScaler

_MASKED = torch.finfo(torch.float32).min  # finite: a row with every key masked becomes uniform, not NaN


def fp8_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaler: LayerScaler,
    softmax_scale: float,
    masked: Tensor | None = None,
    dropout: Tensor | None = None,
    sink: Tensor | None = None,
    logit_multiplier: float = 1.0,
    fp8_logits: bool = False,
    observe: bool = True,
    overflow: str = "saturate",
) -> Tensor:
    """Attention as an FP8 kernel computes it; casts pass gradients straight through.

    query [sq, b, heads, d], key [sk, b, groups, d], value [sk, b, groups, d_v], heads a multiple of groups: query head
    h reads group h // (heads / groups). masked: bool, True where attention is forbidden, broadcastable to
    [b, heads, sq, sk]. dropout: float32 [b, heads, sq, sk], factors for the softmax output, 0 or 1 / (1 - p). sink:
    [heads], a logit per head that only adds to the softmax's denominator. logit_multiplier: what q.k * softmax_scale is
    multiplied by inside the softmax (query-key layer scaling). fp8_logits casts q.k * softmax_scale too, where the mask
    leaves it (the paper's setting, THEORY 5). observe: whether the forward casts are reported to `scaler`; the backward
    ones always are. overflow: as in `formats.cast`.

    Returns [sq, b, heads, d_v] in the dtype of `query`.
    """
    scales = (softmax_scale, logit_multiplier)
    cast_to = partial(_cast, scaler, overflow)
    out: Tensor = _FP8Attention.apply(query, key, value, masked, dropout, sink, scales, cast_to, fp8_logits, observe)
    return out


class _FP8Attention(torch.autograd.Function):
    """Queries of one group are stacked, [b * groups, heads/groups * sq, d]: one batched product serves the group, K and
    V are never repeated, and the products of the backward pass sum over the group by themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masked: Tensor | None,
        dropout: Tensor | None,
        sink: Tensor | None,
        scales: tuple[float, float],
        cast_to: Callable[..., list[Tensor]],
        fp8_logits: bool,
        observe: bool,
    ) -> Tensor:
        (sq, batch, heads, _), (sk, _, groups, _) = query.shape, key.shape
        q, k, v = cast_to("qkv", observe, query.float(), key.float(), value.float())
        q, k, v = _stack(q, groups), _stack(k, groups), _stack(v, groups)
        softmax_scale, logit_multiplier = scales

        logits = torch.bmm(q, k.transpose(1, 2)).mul_(softmax_scale).view(batch, heads, sq, sk)
        if fp8_logits:
            if masked is not None:
                # Zeros neither raise an amax nor saturate nor are flushed, so masked logits are not counted.
                logits.masked_fill_(masked, 0.0)
            (logits,) = cast_to("logits", observe, logits)
        if logit_multiplier != 1.0:
            logits.mul_(logit_multiplier)
        probs, to_sink = _softmax(logits, masked, sink)
        (p,) = cast_to("s", observe, probs if dropout is None else probs * dropout)

        (o,) = cast_to("o", observe, _unstack(torch.bmm(p.view(q.size(0), -1, sk), v), batch, heads))

        ctx.save_for_backward(q, k, v, probs, p, masked, dropout, to_sink)
        ctx.gradient_scale, ctx.cast_to, ctx.groups = softmax_scale * logit_multiplier, cast_to, groups
        return o.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probs, p, masked, dropout, to_sink = ctx.saved_tensors
        cast_to, groups = ctx.cast_to, ctx.groups
        batch, heads, _, sk = probs.shape

        (do,) = cast_to("do", True, grad.float())
        do = _stack(do, groups)
        dv = torch.bmm(p.view(q.size(0), -1, sk).transpose(1, 2), do)
        dp = torch.bmm(do, v.transpose(1, 2)).view_as(probs)
        if dropout is not None:
            dp.mul_(dropout)
        mean = (probs * dp).sum(dim=-1, keepdim=True)
        ds = probs * (dp - mean)
        dsink = None if to_sink is None else -(to_sink * mean).sum(dim=(0, 2, 3))
        if masked is not None:
            # Only a row with every key masked needs this: its probabilities are not zero.
            ds.masked_fill_(masked, 0.0)
        (ds,) = cast_to("dp", True, ds.mul_(ctx.gradient_scale))
        ds = ds.view(q.size(0), -1, sk)
        dq = torch.bmm(ds, k)
        dk = torch.bmm(ds.transpose(1, 2), q)

        dqkv = _unstack(dq, batch, heads), _unstack(dk, batch, groups), _unstack(dv, batch, groups)
        # Autograd converts them to the dtypes of the inputs.
        return *cast_to("dqkv", True, *dqkv), None, None, dsink, None, None, None, None


def _softmax(logits: Tensor, masked: Tensor | None, sink: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Probabilities [b, heads, sq, sk] and those of the sink [b, heads, sq, 1]; `logits` are masked in place."""
    if masked is not None:
        logits.masked_fill_(masked, _MASKED)
    if sink is None:
        return torch.softmax(logits, dim=-1), None
    column = sink.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    both = torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)
    return both[..., :-1].contiguous(), both[..., -1:].contiguous()


def _cast(scaler: LayerScaler, overflow: str, slot: str, observe: bool, *tensors: Tensor) -> list[Tensor]:
    """Cast `tensors` under the slot's one scale and report them as one cast."""
    scale = scaler.scale(slot, *tensors)
    casts = [cast(tensor, scale, SLOT_FORMATS[slot], overflow=overflow) for tensor in tensors]
    if observe:
        amax, saturated, flushed = (torch.stack(column) for column in list(zip(*casts))[1:])
        scaler.observe(slot, amax.amax(), saturated.sum(), flushed.sum())
    return [c.values for c in casts]


def _stack(x: Tensor, groups: int) -> Tensor:
    """[s, b, heads, d] -> [b * groups, heads/groups * s, d]."""
    s, batch, heads, d = x.shape
    return x.view(s, batch, groups, heads // groups, d).permute(1, 2, 3, 0, 4).reshape(batch * groups, -1, d)


def _unstack(x: Tensor, batch: int, heads: int) -> Tensor:
    """The reverse of `_stack`."""
    return x.reshape(batch, heads, -1, x.size(-1)).permute(2, 0, 1, 3).contiguous()


class EmulatedAttention(MegatronModule):
    """FP8 attention as Megatron-Core's `core_attention`, for self-attention and context parallel size 1.

    Sliding windows, softmax sinks and query-key layer scaling are those of the config. A window takes keys away from
    what the mask allows, so a causal mask stays causal, as in Transformer Engine. A learnable sink is the parameter
    `softmax_offset`, [local heads], named, initialised and saved as megatron-core's. Under layer scaling
    `softmax_scale` is divided by the layer number, and `logit_multiplier` is that number.

    Whoever attaches scales sets the attributes: `scaler`, without which a forward raises RuntimeError; `fp8_logits`,
    `overflow`;
    and `measure_sqnr`, under which each forward also computes its attention without casts and adds the powers of signal
    and noise to `sqnr_powers` until `reset_sqnr`.

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
        )
        if self.measure_sqnr and observe:
            with torch.no_grad():
                scale = self.softmax_scale * self.logit_multiplier
                reference = _uncast_attention(query, key, value, scale, masked, dropout, self._sink(query))
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


def _uncast_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    masked: Tensor | None,
    dropout: Tensor | None,
    sink: Tensor | None,
) -> Tensor:
    """What `fp8_attention` approximates, in float32."""
    batch, heads, groups = query.size(1), query.size(2), key.size(2)
    q, k, v = (_stack(x.float(), groups) for x in (query, key, value))
    logits = torch.bmm(q, k.transpose(1, 2)).mul_(scale).view(batch, heads, query.size(0), key.size(0))
    probs, _ = _softmax(logits, masked, sink)
    if dropout is not None:
        probs = probs * dropout
    return _unstack(torch.bmm(probs.view(q.size(0), -1, key.size(0)), v), batch, heads)
