"""Bounds on the entries of Q, K and V and on the length of V's vectors, which set their FP8 scales (THEORY 5.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_geoscale.bounds.rotary import certified_gram_norm, pair_norms, pair_vector_norms, rotary_pairs
from megatron_geoscale.spectral.gram import GRAM_ROUNDING

FLOAT32_ROUNDOFF = 2.0**-24
_ROUNDINGS = 8


def entry_bound(
    gram: Tensor, b: Tensor | None, *, rotary_dim: int, interleaved: bool = False, input_norm: float
) -> Tensor:
    """Largest magnitude of an entry of R (W xhat + b) per head, at any position: [n] float64 (THEORY 5.1).

    gram: W W^T [n, d_h, d_h], b: [n, d_h] or None, W and b folded (`spectral.fold_norm`). Queries and keys after RoPE:
    an entry of a rotated pair is at most the length of the pair, m ||W_p||_2 + ||b_p||, m = `input_norm`. An unrotated
    row, and all of V's (rotary_dim 0): m ||row|| + |b|. For isotropic tokens pass `isotropic_input_norm` as
    `input_norm`. ValueError for a rotary_dim that does not fit.
    """
    pairs = rotary_pairs(gram.shape[-1], rotary_dim, interleaved=interleaved, device=gram.device)
    rotated = input_norm * pair_norms(gram, pairs)
    fixed = input_norm * (gram.diagonal(dim1=-2, dim2=-1)[:, rotary_dim:] * (1.0 + GRAM_ROUNDING)).sqrt()
    if b is not None:
        # The factor covers the rounding of the sums and of the pairs' lengths.
        rotated = (rotated + pair_vector_norms(b, pairs)) * (1.0 + GRAM_ROUNDING)
        fixed = (fixed + b[:, rotary_dim:].abs()) * (1.0 + GRAM_ROUNDING)
    return torch.cat([rotated, fixed], dim=-1).amax(-1)


def vector_norm_bound(gram: Tensor, b: Tensor | None, *, input_norm: float, split_at: int = 0) -> Tensor:
    """Largest Euclidean norm of W xhat + b per head: m ||W||_2 + ||b||, [n] float64 (THEORY 5.1, the dP slot).

    Arguments as in `entry_bound`; rotation does not change it. split_at: the first so many rows have an input of their
    own, so that both parts can be at their longest at once (multi-latent attention's keys).
    """
    if split_at:
        parts = [
            vector_norm_bound(gram[:, rows, rows], None if b is None else b[:, rows], input_norm=input_norm)
            for rows in (slice(0, split_at), slice(split_at, None))
        ]
        return torch.hypot(*parts)
    bound = input_norm * certified_gram_norm(gram)
    return bound if b is None else (bound + torch.linalg.vector_norm(b, dim=-1)) * (1.0 + GRAM_ROUNDING)


def isotropic_input_norm(hidden_size: int, *, num_entries: int, delta: float) -> float:
    """min(sqrt(d), sqrt(2 ln(2 N / delta))), the `input_norm` of isotropic tokens for `entry_bound` (THEORY 5.1).

    An entry at its position is one fixed linear functional of xhat, which exceeds t times its norm with probability at
    most 2 exp(-t^2 / 2) if xhat is uniform on the sphere of radius sqrt(d). `num_entries`: the N entries (token, row,
    layer) to cover with failure probability `delta`. Not for `vector_norm_bound`. ValueError for sizes or a delta
    out of range.
    """
    if hidden_size < 1 or num_entries < 1 or not 0.0 < delta < 1.0:
        raise ValueError(
            f"Need hidden_size >= 1, num_entries >= 1 and 0 < delta < 1, got {hidden_size}, {num_entries} and {delta}."
        )
    return min(math.sqrt(hidden_size), math.sqrt(2.0 * math.log(2.0 * num_entries / delta)))


def rounding_allowance(hidden_size: int, *, unit_roundoff: float) -> float:
    """(1 + u)^8 / (1 - d 2^-24)^2: how far values that the layer computes may exceed a bound of exact arithmetic.

    u is the unit roundoff of the layer's dtype (2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32). Between the
    residual stream and an entry of Q, K or V lie at most eight roundings to that dtype: the norm's quotient and its
    gain, the matrix product's output, the bias, and RoPE's cosine or sine, product, sum and result. Two sums of d terms
    are accumulated in float32: the norm's sum of squares and the matrix product, each with a relative error of
    gamma_d = d 2^-24 / (1 - d 2^-24). All of it is relative to the bound, though an error in w.x is relative to
    sum |w_i x_i| and one in a rotated pair to |q_1 cos| + |q_2 sin|: both are at most what Cauchy-Schwarz gives, the
    products of norms of which the bounds consist. ValueError if d is so large that nothing can be said.
    """
    if not 0 < hidden_size * FLOAT32_ROUNDOFF < 1 or not 0.0 <= unit_roundoff < 1.0:
        raise ValueError(
            f"Need 0 < hidden_size < 2**24 and 0 <= unit_roundoff < 1, got {hidden_size} and {unit_roundoff}."
        )
    return float((1.0 + unit_roundoff) ** _ROUNDINGS / (1.0 - hidden_size * FLOAT32_ROUNDOFF) ** 2)
