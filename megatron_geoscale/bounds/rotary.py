"""Norm bounds that hold under rotary embeddings, for every distance between two tokens (THEORY 3).

The rotation R at some distance can raise ||A^T R B|| far above ||A^T B||. A diagonal D > 0 that is constant on the
rotation's pairs commutes with R, so ||A^T R B|| <= ||D A|| ||D^-1 B|| for every R. Any D is valid; the search for a
good one works on the d_h x d_h Gram matrices (||D A||^2 = lambda_max(D G_A D)) and only what is returned is certified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_geoscale.spectral.gram import (
    GRAM_ROUNDING,
    certified_norm,
    check_shapes,
    gram,
    largest_eigenvalue,
    per_query_head,
    trace,
    unit_trace,
)

# The search minimises a smooth stand-in of ||D A|| ||D^-1 B||, Schatten norms of growing order, by multiplicative steps
# on log D. Order 4 costs a matrix-vector product a step; the last step, of order 8, a matrix product. Together they
# come within 5% of the optimum that a long search with the spectral norm itself finds, on random, low-rank, spiked and
# mismatched heads; more steps, or a second one of order 8, gain nothing.
_ORDER_4_STEPS, _ORDER_4_EXPONENT = 12, 0.25
_ORDER_8_EXPONENT = 0.12
_LARGEST_LOG_SCALE = 40.0  # keeps D finite where a pair of A or B is zero
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Balance:
    """A diagonal D per query head with the certified norms of both sides, for D and for D = I.

    scale: D [n_q, d_h]; query, key: ||D A||, ||D^-1 B|| [n_q]; plain_query, plain_key: ||A||, ||B|| [n_q]. float64.
    """

    scale: Tensor
    query: Tensor
    key: Tensor
    plain_query: Tensor
    plain_key: Tensor

    @property
    def bound(self) -> Tensor:
        """The smaller product of the two: never looser than D = I. [n_q]."""
        return torch.minimum(self.query * self.key, self.plain_query * self.plain_key)


def rotary_pairs(
    head_dim: int, rotary_dim: int, *, interleaved: bool, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Row numbers (first, second), [rotary_dim / 2] each, that RoPE rotates together (THEORY 3).

    Half-split: i and i + rotary_dim/2; interleaved: 2i and 2i + 1. ValueError unless 0 <= rotary_dim <= head_dim, even.
    """
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim must be even and between 0 and the head dimension {head_dim}, got {rotary_dim}.")
    rows = torch.arange(rotary_dim, device=device)
    return (rows[0::2], rows[1::2]) if interleaved else (rows[: rotary_dim // 2], rows[rotary_dim // 2 :])


def rotary_norm_bound(
    w_q: Tensor,
    w_k: Tensor,
    *,
    rotary_dim: int,
    interleaved: bool = False,
    grams: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Upper bound of ||A_h^T R B_g(h)||_2 at any distance: [n_q] float64, never looser than ||A|| ||B|| (THEORY 3).

    w_q: [n_q, d_h, d], w_k: [n_kv, d_h, d]; the first `rotary_dim` rows of a head are rotated, R = I on the others.
    rotary_dim 0 gives the exact norm (raised by what rounding can hide, see `spectral.certified_norm`). R is a
    rotation: multiply by YaRN's mscale^2 for tables that carry it. `grams`: (gram(w_q), gram(w_k)) if the caller has
    them. ValueError for shapes or a rotary_dim that do not fit.
    """
    check_shapes(w_q, w_k)
    g_q, g_k = grams if grams is not None else (gram(w_q), gram(w_k))
    if rotary_dim == 0:
        return certified_norm(w_q, w_k, grams=(g_q, g_k))
    return partial_bound(balance(g_q, g_k, rotary_dim=rotary_dim, interleaved=interleaved), g_q, g_k, rotary_dim)


def partial_bound(balanced: Balance, g_q: Tensor, g_k: Tensor, rotary_dim: int) -> Tensor:
    """The bound from a Balance, or, if rows beyond rotary_dim > 0 are not rotated, their own norm added to the rest.

    ||A^T R B|| <= ||A_r^T R B_r|| + ||A_u^T B_u||, r the rotated and u the unrotated rows, with the second term exact.
    """
    if rotary_dim == g_q.shape[-1]:
        return balanced.bound
    r, u = slice(0, rotary_dim), slice(rotary_dim, None)
    rotated = _certify(g_q[:, r, r], g_k[:, r, r], balanced.scale[:, r]).bound
    unrotated_grams = g_q[:, u, u], g_k[:, u, u]
    return torch.minimum(balanced.bound, rotated + certified_norm(*unrotated_grams, grams=unrotated_grams))


def balance(g_q: Tensor, g_k: Tensor, *, rotary_dim: int, interleaved: bool) -> Balance:
    """Find D for Gram matrices g_q [n_q, d_h, d_h] and g_k [n_kv, d_h, d_h], constant on pairs (THEORY 3)."""
    first, second = rotary_pairs(g_q.shape[-1], rotary_dim, interleaved=interleaved, device=g_q.device)
    return _certify(g_q, g_k, _search(unit_trace(g_q)[0], unit_trace(g_k)[0], first, second))


def certified_gram_norm(g: Tensor) -> Tensor:
    """Upper bound of ||W||_2 from the computed Gram matrix of W: [n, m, m] -> [n]."""
    return (largest_eigenvalue(g) + GRAM_ROUNDING * trace(g)).sqrt()


def pair_norms(g: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Upper bound of ||W_p||_2, W_p the two rows of each pair, from the Gram matrix of W: [n, m, m] -> [n, pairs]."""
    diagonal = g.diagonal(dim1=-2, dim2=-1)
    one, two = diagonal[:, pairs[0]], diagonal[:, pairs[1]]
    spread = torch.hypot(one - two, 2.0 * g[:, pairs[0], pairs[1]])
    return (0.5 * (one + two + spread) + GRAM_ROUNDING * (one + two)).sqrt()


def pair_vector_norms(vectors: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Euclidean norm of each pair of entries: [n, m] -> [n, pairs]."""
    return torch.hypot(vectors[:, pairs[0]], vectors[:, pairs[1]])


def _certify(g_q: Tensor, g_k: Tensor, scale: Tensor) -> Balance:
    def scaled(grams: Tensor, by: Tensor) -> Tensor:
        return certified_gram_norm(by[:, :, None] * grams * by[:, None, :])

    return Balance(
        scale=scale,
        query=scaled(g_q, scale),
        key=scaled(per_query_head(g_k, g_q), 1.0 / scale),
        plain_query=certified_gram_norm(g_q),
        plain_key=per_query_head(certified_gram_norm(g_k), g_q),
    )


def _search(g_q: Tensor, g_k: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """D [n_q, d_h] for Gram matrices of unit trace."""
    g_k = per_query_head(g_k, g_q)

    def pair_mean(values: Tensor) -> Tensor:
        mean = 0.5 * (values[:, first] + values[:, second])
        return values.index_copy(1, first, mean).index_copy(1, second, mean)

    def log_share(weights: Tensor) -> Tensor:
        """log of each pair's share of a Schatten norm's gradient; shares of zero are kept finite."""
        pooled = pair_mean(weights)
        total = pooled.sum(-1, keepdim=True)
        return (pooled / total.where(total > 0, torch.ones_like(total)) + _NEGLIGIBLE).log()

    def order_4(squared: Tensor, by: Tensor) -> Tensor:  # diag((D G D)^2), from G o G
        return by.square() * (squared @ by.square()[:, :, None])[:, :, 0]

    def order_8(grams: Tensor, by: Tensor) -> Tensor:  # diag((D G D)^4)
        total = (by.square() * grams.diagonal(dim1=-2, dim2=-1)).sum(-1, keepdim=True)
        by = by / total.where(total > 0, torch.ones_like(total)).sqrt()  # D G D gets a trace of one
        scaled = by[:, :, None] * grams * by[:, None, :]
        return (scaled @ scaled).square().sum(-1)

    def move(log_scale: Tensor, query: Tensor, key: Tensor, exponent: float) -> Tensor:
        step = exponent * (log_share(key) - log_share(query))
        return (log_scale + step).clamp(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE)

    # D_c = sqrt(||B_c|| / ||A_c||), the norms of the pair's rows.
    diagonal_q, diagonal_k = (g.diagonal(dim1=-2, dim2=-1) for g in (g_q, g_k))
    log_scale = 0.25 * (log_share(diagonal_k) - log_share(diagonal_q))
    squared_q, squared_k = g_q.square(), g_k.square()
    for _ in range(_ORDER_4_STEPS):
        by = log_scale.exp()
        log_scale = move(log_scale, order_4(squared_q, by), order_4(squared_k, 1.0 / by), _ORDER_4_EXPONENT)
    by = log_scale.exp()
    return move(log_scale, order_8(g_q, by), order_8(g_k, 1.0 / by), _ORDER_8_EXPONENT).exp()
