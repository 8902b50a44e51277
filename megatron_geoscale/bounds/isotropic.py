"""The `rank_aware` recipe: bounds that hold for all isotropic tokens of a sequence except with probability delta.

Four things can go wrong, and delta is split over them in quarters, so that their union stays within it (THEORY 4.6):

| event | arguments | probability |
|---|---|---|
| a logit i != j above alpha of 4.1 | `rank_aware(delta / 4)` | delta / 4, its typicality included |
| a logit i = j above 4.5 | `diagonal(delta / 2)`, which spends half of what it is given | delta / 4 |
| an entry of Q, K or V above 5.1 | `isotropic_input_norm(delta / 4)`; O averages V, no event of its own | delta / 4 |
| the length of a query, key or value vector | gamma of lemma 3 for 3 N_tok vectors, `delta / 2`, likewise | delta / 4 |

Nothing here is certified: for tokens of another distribution delta means nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_geoscale.bounds import alpha
from megatron_geoscale.bounds.tensors import isotropic_input_norm
from megatron_geoscale.spectral.gram import GRAM_ROUNDING, certified_norm_of_grams, per_query_head, trace
from megatron_geoscale.spectral.moments import Moments


@dataclass(frozen=True)
class IsotropicConstants:
    """What does not depend on the weights: one set for all layers of a model."""

    alpha: float
    """Of the logits i != j (4.1)."""
    diagonal_log: float
    """t of 4.5."""
    entry_norm: float
    """`input_norm` of `bounds.entry_bound`."""
    length_norm: float
    """`input_norm` of `bounds.vector_norm_bound`."""


def isotropic_constants(
    hidden_size: int, head_dim: int, *, num_pairs: float, num_tokens: float, delta: float
) -> IsotropicConstants:
    """The four constants for which all bounds together fail with probability `delta`, split as the module says.

    num_pairs: (i, j, head, layer); num_tokens: (token, head, layer). ValueError as `bounds.alpha`.
    """
    rank = min(head_dim, hidden_size)
    gamma = alpha.typicality_gamma(rank, num_tokens=3 * num_tokens, delta=delta / 2)
    return IsotropicConstants(
        alpha=alpha.rank_aware(hidden_size, head_dim, num_pairs=num_pairs, num_tokens=num_tokens, delta=delta / 4),
        diagonal_log=math.log(4.0 * num_tokens / (delta / 2)),
        entry_norm=isotropic_input_norm(hidden_size, num_entries=math.ceil(3 * num_tokens * head_dim), delta=delta / 4),
        length_norm=math.sqrt(min(float(hidden_size), gamma * rank)),
    )


def rank_aware_logit_bound(
    moments: Moments,
    *,
    certified: tuple[Tensor, Tensor],
    constants: IsotropicConstants,
    softmax_scale: float,
    input_norm: float,
    hidden_size: int,
) -> Tensor:
    """Bound of |S_ij|, i = j included, of each query head: [n_q] float64, never above the certified one.

    The maximum of alpha m^2 sigma_bound, whose sigma holds at any rotation, and the diagonal bound of 4.5, where two
    equal positions are not rotated against each other, times c; plus the bias terms of the certified bound, which
    isotropy does not touch. certified: (sigma_bound, logit_bound) of `certified_logit_bound` for the same `moments`
    and constants. ValueError as `diagonal_bound`.
    """
    sigma_bound, logit_bound = certified
    worst = input_norm**2 * sigma_bound
    diagonal = diagonal_bound(
        moments, diagonal_log=constants.diagonal_log, input_norm=input_norm, hidden_size=hidden_size
    )
    core = torch.maximum(constants.alpha * worst, diagonal)
    return logit_bound - softmax_scale * (worst - torch.minimum(core, worst))


def diagonal_bound(moments: Moments, *, diagonal_log: float, input_norm: float, hidden_size: int) -> Tensor:
    """(m^2 / d) (|tr M| + 2 ||M_s||_F sqrt(t) + 2 sigma t), t = `diagonal_log`, m = `input_norm`: [n_q] (THEORY 4.5).

    Bounds |xhat^T M xhat|, M = A^T B unrotated, or m^2 sigma if that is less. tr M = tr C and ||M_s||_F^2 =
    (||M||_F^2 + tr C^2) / 2 with C = B A^T; what rounding can hide of a head that cancels is added. ValueError for
    moments without `cross`.
    """
    if moments.cross is None:
        raise ValueError("The diagonal bound needs Moments.cross: make the moments with with_cross=True.")
    g_q, g_k, cross = moments.q, per_query_head(moments.k, moments.q), moments.cross
    product = trace(g_q) * trace(g_k)
    tr_m = trace(cross).abs() + GRAM_ROUNDING * product.sqrt()
    squared = 0.5 * ((g_q * g_k).sum((-2, -1)) + (cross * cross.mT).sum((-2, -1)))
    symmetric = (squared.clamp_min(0.0) + GRAM_ROUNDING * product).sqrt()
    sigma = certified_norm_of_grams(moments.q, moments.k)
    bound = tr_m + 2.0 * symmetric * math.sqrt(diagonal_log) + 2.0 * diagonal_log * sigma
    return input_norm**2 * torch.minimum(bound / hidden_size, sigma)
