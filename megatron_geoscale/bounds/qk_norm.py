"""Bounds for queries and keys that are normalised per head before RoPE (THEORY 3, QK-norm). Pure functions of tensors.

The norm in front of attention then says nothing, and neither do W_Q and W_K: q = R (gain * n + shift) with ||n||_2 <=
sqrt(d_h) for RMSNorm, LayerNorm and L2Norm, any epsilon >= 0 and any input. What scales a pair of rows that RoPE
rotates together is the larger of its two gains. Everything is float64, and holds for every input at every position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_geoscale.bounds.rotary import rotary_pairs


@dataclass(frozen=True)
class HeadNorm:
    """A norm over the d_h entries of one head, the same for all heads: gain [d_h], shift [d_h] or None; float64.

    A zero-centred gain is given as 1 + weight, L2Norm's as ones. Several layers' norms are stacked, [layers, d_h];
    every function here then returns [layers] instead of 0-dim.
    """

    gain: Tensor
    shift: Tensor | None = None


def normalised_logit_bound(
    query: HeadNorm, key: HeadNorm, *, softmax_scale: float, rotary_dim: int, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """(sigma_bound, logit_bound), 0-dim each: |S_ij| <= logit_bound for all inputs and positions (THEORY 3, QK-norm).

    With g_q[p] the largest |gain| of the queries on pair p, a[p] the length of their shift there, and g_k, b likewise:
    sigma_bound = max_p g_q[p] g_k[p], logit_bound = c (d_h sigma_bound + sqrt(d_h) (||g_q b|| + ||g_k a||) + a.b). An
    unrotated row is a pair of its own; the unrotated shifts' product is exact. ValueError if rotary_dim does not fit.
    """
    g_q, g_k = (_gains(norm, rotary_dim, interleaved) for norm in (query, key))
    a, b = (_shifts(norm, rotary_dim, interleaved) for norm in (query, key))
    head_dim = query.gain.shape[-1]
    sigma_bound = (g_q * g_k).amax(-1)
    cross = torch.linalg.vector_norm(g_q * b, dim=-1) + torch.linalg.vector_norm(g_k * a, dim=-1)
    shifts = (a * b)[..., : rotary_dim // 2].sum(-1)
    if query.shift is not None and key.shift is not None:
        shifts = shifts + (query.shift[..., rotary_dim:] * key.shift[..., rotary_dim:]).sum(-1).abs()
    return sigma_bound, softmax_scale * (head_dim * sigma_bound + math.sqrt(head_dim) * cross + shifts)


def normalised_entry_bound(norm: HeadNorm, *, rotary_dim: int, interleaved: bool = False) -> Tensor:
    """Largest magnitude of an entry of R (gain * n + shift), at any position: 0-dim (THEORY 5.1).

    At most the length of its pair, sqrt(d_h) g[p] + ||shift[p]||. ValueError if rotary_dim does not fit.
    """
    gains, shifts = (of(norm, rotary_dim, interleaved) for of in (_gains, _shifts))
    return (math.sqrt(norm.gain.shape[-1]) * gains + shifts).amax(-1)


def normalised_vector_norm_bound(norm: HeadNorm) -> Tensor:
    """Largest Euclidean norm of gain * n + shift, rotated or not: sqrt(d_h) max |gain| + ||shift||, 0-dim."""
    bound = math.sqrt(norm.gain.shape[-1]) * norm.gain.abs().amax(-1)
    return bound if norm.shift is None else bound + torch.linalg.vector_norm(norm.shift, dim=-1)


def _gains(norm: HeadNorm, rotary_dim: int, interleaved: bool) -> Tensor:
    """The largest |gain| of each rotated pair, then each other row's."""
    gain = norm.gain.abs()
    first, second = rotary_pairs(gain.shape[-1], rotary_dim, interleaved=interleaved, device=gain.device)
    return torch.cat([torch.maximum(gain[..., first], gain[..., second]), gain[..., rotary_dim:]], dim=-1)


def _shifts(norm: HeadNorm, rotary_dim: int, interleaved: bool) -> Tensor:
    """The length of the shift on each rotated pair, then each other row's; zeros where there is none."""
    shift = torch.zeros_like(norm.gain) if norm.shift is None else norm.shift
    first, second = rotary_pairs(shift.shape[-1], rotary_dim, interleaved=interleaved, device=shift.device)
    return torch.cat([torch.hypot(shift[..., first], shift[..., second]), shift[..., rotary_dim:].abs()], dim=-1)
