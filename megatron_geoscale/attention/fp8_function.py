"""The arithmetic of FP8 attention in plain torch, forward and backward, without Megatron's module around it.

What Transformer Engine's fused attention casts is cast here, by real conversions to torch's float8 dtypes and back
(FACTS 1): Q, K, V under one scale, the softmax output after dropout, O; in the backward pass dO, dS * softmax_scale
(TE's "dP" slot), and dQ, dK, dV under one scale. Everything between two casts is float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_geoscale.scaling.formats import SLOT_FORMATS, cast, max_abs
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
    fp8_backward: bool = True,
) -> Tensor:
    """Attention as an FP8 kernel computes it; casts pass gradients straight through.

    query [sq, b, heads, d], key [sk, b, groups, d], value [sk, b, groups, d_v], heads a multiple of groups: query head
    h reads group h // (heads / groups). masked: bool, True where attention is forbidden, broadcastable to
    [b, heads, sq, sk]. dropout: float32 [b, heads, sq, sk], factors for the softmax output, 0 or 1 / (1 - p). sink:
    [heads], a logit per head that only adds to the softmax's denominator. logit_multiplier: what q.k * softmax_scale is
    multiplied by inside the softmax (query-key layer scaling). fp8_logits casts q.k * softmax_scale too, where the mask
    leaves it (the paper's setting, THEORY 5). observe: whether the forward casts are reported to `scaler`; the backward
    ones always are. overflow: as in `formats.cast`. fp8_backward: False leaves the backward pass without casts, on the
    original Q, K, V, as Transformer Engine's NVTE_FP8_DPA_BWD=0 (see `_uncast_gradients`).

    Returns [sq, b, heads, d_v] in the dtype of `query`.
    """
    scales = (softmax_scale, logit_multiplier)
    casts = _Casts(scaler, overflow)
    out: Tensor = _FP8Attention.apply(
        query, key, value, masked, dropout, sink, scales, casts, fp8_logits, observe, fp8_backward
    )
    return out


class _Casts(NamedTuple):
    """How tensors are cast."""

    scaler: LayerScaler
    overflow: str

    def __call__(self, slot: str, observe: bool, *tensors: Tensor) -> list[Tensor]:
        """Cast `tensors` under the slot's one scale and report them as one cast."""
        scale = self.scaler.scale(slot, *tensors)
        casts = [cast(tensor, scale, SLOT_FORMATS[slot], overflow=self.overflow) for tensor in tensors]
        if observe:
            amax, saturated, flushed = (torch.stack(column) for column in list(zip(*casts))[1:])
            self.scaler.observe(slot, amax.amax(), saturated.sum(), flushed.sum())
        return [c.values for c in casts]


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
        cast_to: _Casts,
        fp8_logits: bool,
        observe: bool,
        fp8_backward: bool,
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
        used = None if fp8_backward else logits.clone()
        probs, to_sink = _softmax(logits, masked, sink)
        (p,) = cast_to("s", observe, probs if dropout is None else probs * dropout)

        (o,) = cast_to("o", observe, _unstack(torch.bmm(p.view(q.size(0), -1, sk), v), batch, heads))

        out = o.to(query.dtype)
        if fp8_backward:
            amax_qkv = max_abs(query, key, value)
            ctx.save_for_backward(q, k, v, p, amax_qkv, probs, masked, dropout, to_sink)
        else:
            ctx.save_for_backward(query, key, value, used, out, probs, masked, dropout, to_sink)
        ctx.gradient_scale, ctx.cast_to, ctx.groups = softmax_scale * logit_multiplier, cast_to, groups
        ctx.fp8_backward = fp8_backward
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _fp8_gradients if ctx.fp8_backward else _uncast_gradients
        dq, dk, dv, dsink = gradients(ctx, grad, *ctx.saved_tensors)
        # Autograd converts them to the dtypes of the inputs.
        return dq, dk, dv, None, None, dsink, None, None, None, None, None


def _fp8_gradients(
    ctx: Any,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    amax_qkv: Tensor,
    probs: Tensor,
    masked: Tensor | None,
    dropout: Tensor | None,
    to_sink: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """dQ, dK, dV and the sink's gradient with every cast; q, k, v stacked and as cast, p the cast softmax output."""
    cast_to, groups = ctx.cast_to, ctx.groups
    batch, heads, _, sk = probs.shape
    do = grad.float()
    cast_to.scaler.before_backward(do, num_keys=sk, amax_qkv=amax_qkv)

    (do,) = cast_to("do", True, do)
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
    return *cast_to("dqkv", True, *dqkv), dsink


def _uncast_gradients(
    ctx: Any,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    used: Tensor,
    out: Tensor,
    probs: Tensor,
    masked: Tensor | None,
    dropout: Tensor | None,
    to_sink: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same from what TE saves for a BF16 backward pass after an FP8 forward one: Q, K, V before their cast, O after
    it, and the softmax statistics of the FP8 logits (`FusedAttnFunc.forward`, `f16_tensors`, in
    transformer_engine/pytorch/attention/dot_product_attention/backends.py, 2.9 to 2.20). So the probabilities are
    exp(own logits - log-sum of the `used` ones), whose rows sum to 1 only nearly, and P and dS are rounded to the
    model's precision before their products.
    """
    groups, dtype = ctx.groups, query.dtype
    batch, heads, _, sk = probs.shape
    q, k, v, do, o = (_stack(x.float(), groups) for x in (query, key, value, grad, out))
    moved = torch.bmm(q, k.transpose(1, 2)).mul_(ctx.gradient_scale).view_as(probs).sub_(used)
    if masked is not None:
        moved.masked_fill_(masked, 0.0)
    probs = probs.log().add_(moved).exp_()  # as a product, 0 times infinity could come up

    p = (probs if dropout is None else probs * dropout).to(dtype).float()
    dv = torch.bmm(p.view(q.size(0), -1, sk).transpose(1, 2), do)
    dp = torch.bmm(do, v.transpose(1, 2)).view_as(probs)
    if dropout is not None:
        dp.mul_(dropout)
    mean = (do * o).sum(dim=-1).view(batch, heads, -1, 1)
    dsink = None if to_sink is None else -(to_sink * mean).sum(dim=(0, 2, 3))
    ds = probs * (dp - mean)
    if masked is not None:
        ds.masked_fill_(masked, 0.0)
    ds = ds.mul_(ctx.gradient_scale).to(dtype).float().view(q.size(0), -1, sk)
    dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
    return _unstack(dq, batch, heads), _unstack(dk, batch, groups), _unstack(dv, batch, groups), dsink


def _softmax(logits: Tensor, masked: Tensor | None, sink: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Probabilities [b, heads, sq, sk] and those of the sink [b, heads, sq, 1]; `logits` are masked in place."""
    if masked is not None:
        logits.masked_fill_(masked, _MASKED)
    if sink is None:
        return torch.softmax(logits, dim=-1), None
    column = sink.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    both = torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)
    return both[..., :-1].contiguous(), both[..., -1:].contiguous()


def _stack(x: Tensor, groups: int) -> Tensor:
    """[s, b, heads, d] -> [b * groups, heads/groups * s, d]."""
    s, batch, heads, d = x.shape
    return x.view(s, batch, groups, heads // groups, d).permute(1, 2, 3, 0, 4).reshape(batch * groups, -1, d)


def _unstack(x: Tensor, batch: int, heads: int) -> Tensor:
    """The reverse of `_stack`."""
    return x.reshape(batch, heads, -1, x.size(-1)).permute(2, 0, 1, 3).contiguous()


def uncast_attention(
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
