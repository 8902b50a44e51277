"""Scales of the three backward slots from one look at dO, before the backward pass runs (THEORY 5.1, 5.3).

A fused kernel must know the scales of dO, dS and dQ, dK, dV beforehand. dO is there: its amax and its row norms are one
cheap pass. The others are bounded from them, the table's bounds, and, where the forward pass told it, the amax of the
Q, K, V that it cast. Everything stays on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_geoscale.scaling.formats import E4M3, E5M2, max_abs, scale_from_amax
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.rounding import (
    E4M3_ROUNDING,
    E4M3_SUBNORMAL,
    E5M2_ROUNDING,
    E5M2_SUBNORMAL,
    FP32_SLACK,
    absolute_error,
    cast_row_sum,
    entry_allowance,
    norm_allowance,
    offset_error,
)
from megatron_geoscale.scaling.slots import SLOTS
from megatron_geoscale.scaling.table import BOUNDS

_LOST_SQUARE = 2.0**-63
"""Entries below it may vanish from a norm that is computed in float32, whose squares are normal from 2**-126 on."""


class GradientSizes(NamedTuple):
    """What is observed of dO, 0-dim float64 each."""

    amax: Tensor
    """Largest |entry|."""
    row_norm: Tensor
    """Bound on the largest 2-norm of one head's vector at one token."""
    norm_sum: Tensor
    """Bound on the largest sum of these norms over the queries that one key meets: a sequence, all heads of a group."""


def gradient_sizes(do: Tensor, heads_per_group: int) -> GradientSizes:
    """One look at dO [s, b, heads, d_v], any float dtype. A NaN or an infinity in dO is one in the sizes."""
    length, _, _, width = do.shape
    amax = max_abs(do).double()
    # Where squares leave float32's range the norm is infinite or too small: sqrt(d_v) amax is a bound then.
    norms = torch.linalg.vector_norm(do, dim=-1, dtype=torch.float32)
    largest, lost = width**0.5 * amax, width**0.5 * _LOST_SQUARE
    sums = norms.sum(dim=0, dtype=torch.float64).unflatten(-1, (-1, heads_per_group)).sum(-1)
    rows = length * heads_per_group
    return GradientSizes(
        amax=amax,
        row_norm=torch.minimum(norms.amax().double() + lost, largest),
        norm_sum=torch.minimum(sums.amax() + rows * lost, rows * largest),
    )


class CastSizes(NamedTuple):
    """Bounds on what the backward pass multiplies dO and dS with, as cast; 0-dim float64 each."""

    query: Tensor
    """An entry of q8; likewise `key`."""
    key: Tensor
    value_norm: Tensor
    """The 2-norm of one head's v8."""
    output_subnormal: Tensor
    """Largest error of an entry of O whose cast is subnormal."""


def cast_sizes(bounds: Tensor, scales: Tensor, geometry: AttentionGeometry, amax_qkv: Tensor | None) -> CastSizes:
    """From one layer's rows of the table: bounds float64 [len(BOUNDS)], scales [len(SLOTS)].

    amax_qkv: 0-dim, the largest |entry| of the Q, K and V of this forward pass, which tightens the bounds that the
    weights give. Casts saturate, so no entry is beyond 448 / scale, even where a calibrated scale is too large.
    """
    bound = dict(zip(BOUNDS, bounds.double().unbind(), strict=True))
    scale = dict(zip(SLOTS, scales.double().unbind(), strict=True))
    offset, subnormal = offset_error(bound["offset_size"], geometry), E4M3_SUBNORMAL / scale["qkv"]

    def cast_entry(name: str) -> Tensor:
        entry = bound[name] * entry_allowance(geometry) + offset
        if amax_qkv is not None:
            entry = torch.minimum(entry, amax_qkv.double())
        return torch.minimum(entry * (1.0 + E4M3_ROUNDING) + subnormal, E4M3.max / scale["qkv"])

    value_norm = bound["value_norm"] * norm_allowance(geometry) * (1.0 + E4M3_ROUNDING)
    value_norm = value_norm + absolute_error(offset, subnormal, geometry)
    return CastSizes(
        query=cast_entry("amax_q"),
        key=cast_entry("amax_k"),
        value_norm=torch.minimum(value_norm, geometry.widest_vector**0.5 * cast_entry("amax_v")),
        output_subnormal=E4M3_SUBNORMAL / scale["o"],
    )


def backward_scales(
    sizes: GradientSizes,
    cast: CastSizes,
    geometry: AttentionGeometry,
    *,
    num_queries: int,
    num_keys: int,
    value_dim: int,
    heads_per_group: int,
) -> Tensor:
    """float32 [3], in the order of BACKWARD_SLOTS: powers of two that no value of the slot exceeds (THEORY 5.3)."""
    keep = 1.0 - geometry.dropout
    rows, width = num_queries * heads_per_group, value_dim**0.5
    room = 1.0 + FP32_SLACK

    do_scale = scale_from_amax(sizes.amax, E5M2, power_of_two=True)
    subnormal = width * E5M2_SUBNORMAL / do_scale.double()
    row_norm = (1.0 + E5M2_ROUNDING) * sizes.row_norm + subnormal
    norm_sum = (1.0 + E5M2_ROUNDING) * sizes.norm_sum + rows * subnormal

    # Per unit of |dO_i|: |dP_ij| <= value, and the row's mean of dP, which kernels take from dO and the cast O, is off
    # by `shift` at most. Then |dS_ij| <= P (2 (1 - P) value + shift), and the sum of a row's |dS_ij| is value + shift.
    value = cast.value_norm / keep
    shift = value * (cast_row_sum(num_keys) * (1.0 + E4M3_ROUNDING) - 1.0) + width * cast.output_subnormal
    worst = (0.5 + shift / (4.0 * value).clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    peak = worst * (2.0 * (1.0 - worst) * value + shift)
    gradient_scale = geometry.softmax_scale * geometry.logit_multiplier * room

    dp_scale = scale_from_amax(_in_float32(gradient_scale * row_norm * peak), E5M2, power_of_two=True)
    grown, subnormal = gradient_scale * (1.0 + E5M2_ROUNDING), E5M2_SUBNORMAL / dp_scale.double()
    dq = (grown * row_norm * (value + shift) + num_keys * subnormal) * cast.key
    dk = (grown * norm_sum * peak + rows * subnormal) * cast.query
    dv = norm_sum / keep
    joint = torch.maximum(torch.maximum(dq, dk), dv) * room
    return torch.stack([do_scale, dp_scale, scale_from_amax(_in_float32(joint), E5M2, power_of_two=True)])


def _in_float32(bound: Tensor) -> Tensor:
    """A finite bound beyond float32's largest is as good as that; not to be taken for an infinite amax."""
    return torch.where(bound.isfinite(), bound.clamp(max=torch.finfo(torch.float32).max), bound)
