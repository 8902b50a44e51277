"""FP8 attention in plain torch, forward and backward, for machines without FP8 kernels.

What Transformer Engine's fused attention casts is cast here, by real conversions to torch's float8 dtypes and back
(FACTS 1): Q, K, V under one scale, the softmax output after dropout, O; in the backward pass dO, dS * softmax_scale
(TE's "dP" slot), and dQ, dK, dV under one scale. Everything between two casts is float32. `EmulatedAttention` is
Megatron-Core's `core_attention`; `fp8_attention` is the same without Megatron's module around it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
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
    fp8_logits: bool = False,
    observe: bool = True,
) -> Tensor:
    """Attention as an FP8 kernel computes it; casts pass gradients straight through.

    query [sq, b, heads, d], key [sk, b, groups, d], value [sk, b, groups, d_v], heads a multiple of groups: query head
    h reads group h // (heads / groups). masked: bool, True where attention is forbidden, broadcastable to
    [b, heads, sq, sk]. dropout: float32 [b, heads, sq, sk], factors for the softmax output, 0 or 1 / (1 - p).
    fp8_logits casts the scaled logits too, those that the mask leaves (the paper's setting, THEORY 5). observe:
    whether the forward casts are reported to `scaler`; the backward ones always are.

    Returns [sq, b, heads, d_v] in the dtype of `query`.
    """
    out: Tensor = _FP8Attention.apply(query, key, value, masked, dropout, softmax_scale, scaler, fp8_logits, observe)
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
        softmax_scale: float,
        scaler: LayerScaler,
        fp8_logits: bool,
        observe: bool,
    ) -> Tensor:
        (sq, batch, heads, _), (sk, _, groups, _) = query.shape, key.shape
        q, k, v = _cast(scaler, "qkv", observe, query.float(), key.float(), value.float())
        q, k, v = _stack(q, groups), _stack(k, groups), _stack(v, groups)

        logits = torch.bmm(q, k.transpose(1, 2)).mul_(softmax_scale).view(batch, heads, sq, sk)
        if fp8_logits:
            if masked is not None:
                # Zeros neither raise an amax nor saturate nor are flushed, so masked logits are not counted.
                logits.masked_fill_(masked, 0.0)
            (logits,) = _cast(scaler, "logits", observe, logits)
        if masked is not None:
            logits.masked_fill_(masked, _MASKED)
        probs = torch.softmax(logits, dim=-1)
        (p,) = _cast(scaler, "s", observe, probs if dropout is None else probs * dropout)

        (o,) = _cast(scaler, "o", observe, _unstack(torch.bmm(p.view(q.size(0), -1, sk), v), batch, heads))

        ctx.save_for_backward(q, k, v, probs, p, masked, dropout)
        ctx.softmax_scale, ctx.scaler, ctx.groups = softmax_scale, scaler, groups
        return o.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probs, p, masked, dropout = ctx.saved_tensors
        scaler, groups = ctx.scaler, ctx.groups
        batch, heads, _, sk = probs.shape

        (do,) = _cast(scaler, "do", True, grad.float())
        do = _stack(do, groups)
        dv = torch.bmm(p.view(q.size(0), -1, sk).transpose(1, 2), do)
        dp = torch.bmm(do, v.transpose(1, 2)).view_as(probs)
        if dropout is not None:
            dp.mul_(dropout)
        ds = probs * (dp - (probs * dp).sum(dim=-1, keepdim=True))
        if masked is not None:
            # Only a row with every key masked needs this: its probabilities are not zero.
            ds.masked_fill_(masked, 0.0)
        (ds,) = _cast(scaler, "dp", True, ds.mul_(ctx.softmax_scale))
        ds = ds.view(q.size(0), -1, sk)
        dq = torch.bmm(ds, k)
        dk = torch.bmm(ds.transpose(1, 2), q)

        dqkv = _unstack(dq, batch, heads), _unstack(dk, batch, groups), _unstack(dv, batch, groups)
        # Autograd converts them to the dtypes of the inputs.
        return *_cast(scaler, "dqkv", True, *dqkv), None, None, None, None, None, None


def _cast(scaler: LayerScaler, slot: str, observe: bool, *tensors: Tensor) -> list[Tensor]:
    """Cast `tensors` under the slot's one scale and report them as one cast."""
    scale = scaler.scale(slot, *tensors)
    casts = [cast(tensor, scale, SLOT_FORMATS[slot]) for tensor in tensors]
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

    Whoever attaches scales sets the attributes: `scaler`, without which a forward raises RuntimeError; `fp8_logits`;
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
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **other: Any,
    ) -> None:
        super().__init__(config)
        _refuse(config, layer_number, attention_type, other)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scaler: LayerScaler | None = None
        self.fp8_logits = False
        self.measure_sqnr = False
        self.sqnr_powers: Powers | None = None

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
            fp8_logits=self.fp8_logits,
            observe=observe,
        )
        if self.measure_sqnr and observe:
            with torch.no_grad():
                reference = _uncast_attention(query, key, value, self.softmax_scale, masked, dropout)
                powers = signal_and_noise(reference, out)
                old = self.sqnr_powers
                self.sqnr_powers = (
                    powers if old is None else Powers(old.signal + powers.signal, old.noise + powers.noise)
                )
        return out.flatten(2)

    def reset_sqnr(self) -> None:
        """Forget the powers that `measure_sqnr` added up."""
        self.sqnr_powers = None

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: scales are computed from the weights, never loaded."""
        return {}

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


def _refuse(config: TransformerConfig, layer_number: int, attention_type: str, other: dict[str, Any]) -> None:
    """ValueError, in one sentence, for a configuration that `EmulatedAttention` does not compute."""
    obstacles = {
        f"{attention_type} attention": attention_type == "cross",
        "--context-parallel-size above 1": config.context_parallel_size > 1,
        "--window-size": is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number),
        f"--softmax-type {config.softmax_type}": config.softmax_type != "vanilla",
        "--apply-query-key-layer-scaling": config.apply_query_key_layer_scaling,
        "--qk-clip": config.qk_clip,
        "--log-max-attention-logit": config.log_max_attention_logit,
        "--multi-latent-attention": any(value is not None for value in other.values()),
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


def _uncast_attention(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, masked: Tensor | None, dropout: Tensor | None
) -> Tensor:
    """What `fp8_attention` approximates, in float32."""
    batch, heads, groups = query.size(1), query.size(2), key.size(2)
    q, k, v = (_stack(x.float(), groups) for x in (query, key, value))
    logits = torch.bmm(q, k.transpose(1, 2)).mul_(softmax_scale).view(batch, heads, query.size(0), key.size(0))
    if masked is not None:
        logits.masked_fill_(masked, _MASKED)
    probs = torch.softmax(logits, dim=-1)
    if dropout is not None:
        probs = probs * dropout
    return _unstack(torch.bmm(probs.view(q.size(0), -1, key.size(0)), v), batch, heads)
