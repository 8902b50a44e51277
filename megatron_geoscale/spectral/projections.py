"""One attention layer's projections per head, with the norm in front of them folded in (THEORY 1).

Everything in `spectral` and `bounds` computes in float64, whatever the dtype of the weights, for three reasons. A
bound that rounding can undercut certifies nothing; weights of 1e-30 and 1e+30 are squared twice on the way to a norm
and would leave the range of float32; and a result that is rounded to float32 at the end is the same whatever the
number of heads in the batch, because the order in which float64 sums are taken changes only digits that are dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """Folded projections of one layer (or of a rank's share of its heads): float64, heads of a group contiguous.

    q: [n_q, d_h, d]; k, v: [n_kv, d_h, d]; biases [n, d_h], or None where the layer has neither a projection bias nor
    a norm shift.
    """

    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    offset_size: Tensor | None = None
    """0-dim: the largest `offset_size` of the three, None without biases."""


def split_linear_qkv(
    weight: Tensor, bias: Tensor | None, *, num_groups: int, heads_per_group: int, head_dim: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Take Megatron's fused projection apart: (w_q, b_q, w_k, b_k, w_v, b_v), in the dtype of `weight`.

    weight: [num_groups * (heads_per_group + 2) * head_dim, d], bias: [the same rows] or None. Megatron interleaves the
    rows per query group: the group's query heads, then its key, then its value. `num_groups` counts the groups of this
    shard. Returns w_q [num_groups * heads_per_group, head_dim, d], w_k and w_v [num_groups, head_dim, d], and biases
    [n, head_dim] or None. ValueError if the rows do not add up.
    """
    rows = num_groups * (heads_per_group + 2) * head_dim
    if weight.dim() != 2 or weight.shape[0] != rows:
        raise ValueError(
            f"linear_qkv weight has shape {list(weight.shape)}, but {num_groups} groups of {heads_per_group} query "
            f"heads with head dimension {head_dim} need {rows} rows."
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"linear_qkv bias has shape {list(bias.shape)}, but its weight has {rows} rows.")

    def split(rows_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped = rows_of.reshape(num_groups, heads_per_group + 2, head_dim, *rows_of.shape[1:])
        return grouped[:, :heads_per_group].flatten(0, 1), grouped[:, -2], grouped[:, -1]

    w_q, w_k, w_v = split(weight)
    b_q, b_k, b_v = split(bias) if bias is not None else (None, None, None)
    return w_q, b_q, w_k, b_k, w_v, b_v


def fold_norm(
    w: Tensor, b: Tensor | None, *, gain: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fold the norm's gain and shift into a projection (THEORY 1): (A, a) with W norm(h) + b = A xhat + a, in float64.

    w: [n, d_h, d], b: [n, d_h] or None; gain, shift: [d] or None (a zero-centred gain is passed as 1 + weight).
    A: [n, d_h, d]; a: [n, d_h], or None if there is neither bias nor shift.

    LayerNorm's xhat has mean zero, so A could lose its common mode (THEORY 1). It keeps it: a mean that is subtracted
    in floating point is not zero afterwards, and weights whose common mode is large would break the bound.
    """
    weight = w.detach().to(torch.float64, copy=True)  # the only d-wide copy: its pages cost more than its arithmetic
    offset = None if b is None else b.detach().to(torch.float64)
    if shift is not None:
        from_shift = weight @ shift.detach().to(torch.float64)
        offset = from_shift if offset is None else offset + from_shift
    return weight if gain is None else weight.mul_(gain.detach().to(torch.float64)), offset


def scale_rotated(p: Projections, rotary_dim: int, factor: float) -> Projections:
    """`p` with the first `rotary_dim` rows of queries and keys multiplied by `factor`, in place: what RoPE does whose
    cosines and sines carry a factor, YaRN's mscale (THEORY 3)."""
    for rows in (p.q, p.k, p.q_bias, p.k_bias):
        if rows is not None:
            rows[:, :rotary_dim] *= factor
    return p if p.offset_size is None else replace(p, offset_size=p.offset_size * max(1.0, factor))


def offset_size(w: Tensor, b: Tensor | None, *, shift: Tensor | None) -> Tensor:
    """Largest |W| |shift| + |b| of a row, 0-dim float64: the magnitudes that an offset a = W shift + b is the sum of.

    Arguments as in `fold_norm`. Where they cancel, rounding leaves an error of their size and not of a's.
    """
    size = w.new_zeros(w.shape[:-1], dtype=torch.float64)
    if shift is not None:
        size = w.detach().to(torch.float64).abs() @ shift.detach().to(torch.float64).abs()
    if b is not None:
        size = size + b.detach().to(torch.float64).abs()
    return size.amax()


def input_norm_bound(hidden_size: int) -> float:
    """sqrt(d), the largest ||xhat||_2 that RMSNorm and LayerNorm give, for any epsilon >= 0 (THEORY 1).

    Rounding of what they compute is `bounds.rounding_allowance`.
    """
    return math.sqrt(hidden_size)
