"""A layer's stored attention tensors as the bounds want them, wherever they come from: a module or a file (THEORY 1).

Pure functions of tensors. Whoever reads weights folds them here, so that equal weights give equal bits.
"""

from __future__ import annotations

import math

import torch

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.spectral.projections import Projections, fold_norm, offset_size, scale_rotated

Projection = tuple[torch.Tensor, torch.Tensor | None]
"""Weight [n, head_dim, d] and bias [n, head_dim] or None, of any float dtype."""


def effective_gain(weight: torch.Tensor, *, zero_centered: bool) -> torch.Tensor:
    """The gain that a norm's weight stands for, float64: 1 + weight where it is zero-centred, as in Megatron's 1p."""
    return weight.double() + 1.0 if zero_centered else weight.double()


def fold_attention(
    query: Projection,
    key: Projection,
    value: Projection,
    *,
    gain: torch.Tensor,
    shift: torch.Tensor | None,
    rotary_dim: int = 0,
    rotary_scale: float = 1.0,
) -> Projections:
    """One layer's heads with the norm in front of them folded in, float64 (THEORY 1).

    gain: [d] float64, see `effective_gain`; shift: [d] or None. `rotary_scale`: what RoPE's cosines and sines are
    multiplied by (YaRN's mscale), on the first `rotary_dim` rows of each query and key head.
    """
    folded, sizes = [], []
    for weight, bias in (query, key, value):
        folded += fold_norm(weight, bias, gain=gain, shift=shift)
        if shift is not None or bias is not None:
            sizes.append(offset_size(weight, bias, shift=shift))
    p = Projections(*folded, offset_size=torch.stack(sizes).amax() if sizes else None)
    return p if rotary_scale == 1.0 else scale_rotated(p, rotary_dim, rotary_scale)


def fold_head_norm(
    gain: torch.Tensor, shift: torch.Tensor | None, *, rotary_dim: int = 0, rotary_scale: float = 1.0
) -> HeadNorm:
    """The norm of one head's query or key, with RoPE's factor in it. gain: [head_dim] float64, shift: same or None."""
    factor = torch.ones_like(gain)
    factor[:rotary_dim] = rotary_scale
    return HeadNorm(gain * factor, None if shift is None else shift.double() * factor)


def drop_output_gates(rows: torch.Tensor, *, heads_per_group: int, head_dim: int) -> torch.Tensor:
    """Rows of `linear_qkv`, weight or bias, without those of the output gates.

    With a gate Megatron orders a group's rows as its query heads, their gates, its key, its value.
    """
    n = heads_per_group
    grouped = rows.unflatten(0, (-1, 2 * n + 2, head_dim))
    return torch.cat([grouped[:, :n], grouped[:, 2 * n :]], dim=1).flatten(0, 2)


def yarn_scale(factor: float, *, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """What YaRN multiplies RoPE's cosines and sines by when it stretches positions by `factor`: 0.1 ln(factor) + 1
    (arXiv:2309.00071, equation 22), with the weights that DeepSeek gave its logarithms."""

    def weighted(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    return weighted(mscale) / weighted(mscale_all_dim)
