"""What rounding and casts can add to the bounds of exact arithmetic, before a slot's own cast (THEORY 5.2, 5.3)."""

from __future__ import annotations

import torch

from megatron_geoscale.bounds.tensors import FLOAT32_ROUNDOFF, rounding_allowance
from megatron_geoscale.scaling.formats import E4M3
from megatron_geoscale.scaling.geometry import AttentionGeometry

E4M3_ROUNDING = 2.0**-4
"""Largest relative error of a cast to a normal E4M3 number: half a unit in the last of 3 mantissa bits."""
E5M2_ROUNDING = 2.0**-3
E4M3_SUBNORMAL = 2.0**-10
"""Largest error of a cast to a subnormal E4M3 number, in scaled units: half of the smallest, 2**-9."""
E5M2_SUBNORMAL = 2.0**-17
FP32_SLACK = 2.0**-10
"""Relative room for the float32 sums of attention itself, at most a few thousand terms of roundoff 2**-24 each."""


def offset_error(offset_size: torch.Tensor, geometry: AttentionGeometry) -> torch.Tensor:
    """What rounding may add to an entry of Q, K or V beyond the part relative to its bound, where the norm's shift and
    the biases cancel; RoPE may turn two such errors into one."""
    return 2.0**0.5 * (entry_allowance(geometry) - 1.0) * offset_size


def entry_allowance(geometry: AttentionGeometry) -> float:
    """How far a computed entry of Q, K or V may exceed its bound: `rounding_allowance`, and where the projection runs
    in FP8 the casts of its inputs and of its weights, relative to the same products of norms."""
    casts = (1.0 + E4M3_ROUNDING) ** 2 if geometry.fp8_projection else 1.0
    return casts * rounding_allowance(geometry.hidden_size, unit_roundoff=geometry.unit_roundoff)


def norm_allowance(geometry: AttentionGeometry) -> float:
    """How far the 2-norm of a computed query, key or value vector may exceed its bound: roundings as for entries, and
    those relative to |W| |x|, the float32 sums over d and the casts of W, whose errors add up over the d_h rows to
    ||A||_F <= sqrt(d_h) ||A||_2."""
    by_weight = 2.0 * geometry.hidden_size * FLOAT32_ROUNDOFF + (E4M3_ROUNDING if geometry.fp8_projection else 0.0)
    return entry_allowance(geometry) + geometry.widest_vector**0.5 * by_weight


def absolute_error(
    entry_error: torch.Tensor, subnormal: torch.Tensor, geometry: AttentionGeometry
) -> torch.Tensor:
    """What a computed and cast vector's 2-norm may be off by apart from its relative error: so much in each entry."""
    return geometry.widest_vector**0.5 * ((1.0 + E4M3_ROUNDING) * entry_error + subnormal)


def cast_row_sum(num_keys: int) -> float:
    """Largest sum of a row of cast softmax outputs, of sum 1 before: each can gain 1/16, or half a subnormal."""
    return (1.0 + E4M3_ROUNDING) + num_keys * E4M3_SUBNORMAL / E4M3.max
