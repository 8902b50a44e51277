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
    certified_norm_of_grams,
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
        return certified_norm_of_grams(g_q, g_k)
    return partial_bound(balance(g_q, g_k, rotary_dim=rotary_dim, interleaved=interleaved), g_q, g_k, rotary_dim)


def partial_bound(balanced: Balance, g_q: Tensor, g_k: Tensor, rotary_dim: int) -> Tensor:
    """The bound from a Balance, or, if rows beyond rotary_dim > 0 are not rotated, their own norm added to the rest.

    ||A^T R B|| <= ||A_r^T R B_r|| + ||A_u^T B_u||, r the rotated and u the unrotated rows, with the second term exact.
    """
    if rotary_dim == g_q.shape[-1]:
        return balanced.bound
    r = slice(0, rotary_dim)
    rotated = _certify(g_q[:, r, r], g_k[:, r, r], balanced.scale[:, r])
    return torch.minimum(balanced.bound, split_bound(rotated, g_q, g_k, rotary_dim))


def split_bound(rotated: Balance, g_q: Tensor, g_k: Tensor, rotary_dim: int) -> Tensor:
    """The sum of `partial_bound`, from a Balance of the rotated rows alone. It is the only one of the two bounds that
    holds where the rotated and the other rows of B have inputs of their own: no D over all rows covers both."""
    u = slice(rotary_dim, None)
    return rotated.bound + certified_norm_of_grams(g_q[:, u, u], g_k[:, u, u])


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
        return by[:, :, None] * grams * by[:, None, :]

    grams = scaled(g_q, scale), scaled(per_query_head(g_k, g_q), 1.0 / scale), g_q, g_k
    norms = certified_gram_norm(torch.cat(grams))
    query, key, plain_query, plain_key = torch.split(norms, [len(g) for g in grams])
    return Balance(
        scale=scale, query=query, key=key, plain_query=plain_query, plain_key=per_query_head(plain_key, g_q)
    )


def _search(g_q: Tensor, g_k: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """D [n_q, d_h] for Gram matrices of unit trace.

    D has one entry for each pair and each unrotated row; the search knows only these classes of rows. Everything is
    stacked, [query or key side, n_q, ...], for on small heads its time is that of launching operators.
    """
    rotated, rows = 2 * len(first), g_q.shape[-1]

    def pool(values: Tensor, dim: int) -> Tensor:
        """Sums over the rows of each class."""
        pairs = values.index_select(dim, first) + values.index_select(dim, second)
        return pairs if rotated == rows else torch.cat([pairs, values.narrow(dim, rotated, rows - rotated)], dim)

    def both(query: Tensor, key: Tensor) -> Tensor:
        return torch.stack([query, per_query_head(key, query)])

    def log_share(sums: Tensor) -> Tensor:
        """log of a row's share of a Schatten norm's gradient, from the sums over classes; zeros are kept finite."""
        total = sums.sum(-1, keepdim=True)
        return (sums * share / total.where(total > 0, torch.ones_like(total)) + _NEGLIGIBLE).log()

    def move(log_scale: Tensor, sums: Tensor, exponent: float) -> Tensor:
        query, key = log_share(sums).unbind()
        return (log_scale + exponent * (key - query)).clamp(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE)

    share = pool(g_q.new_ones(rows), 0).reciprocal()
    one = g_q.new_ones(1, 1)
    sides = torch.stack([one, -one])  # D for the queries, D^-1 for the keys; made on the device, without a copy to it

    # D_c = sqrt(||B_c|| / ||A_c||), the norms of the pair's rows.
    diagonal = both(g_q.diagonal(dim1=-2, dim2=-1), g_k.diagonal(dim1=-2, dim2=-1))
    log_scale = move(torch.zeros_like(share), pool(diagonal, -1), 0.25)
    squared = both(*(pool(pool(g.square(), -2), -1) for g in (g_q, g_k)))
    for _ in range(_ORDER_4_STEPS):  # diag((D G D)^2), from G o G
        weights = (2.0 * sides * log_scale).exp()
        log_scale = move(log_scale, weights * (squared @ weights[..., None])[..., 0], _ORDER_4_EXPONENT)

    class_of = torch.arange(rows, device=first.device)
    class_of[first] = class_of[second] = torch.arange(len(first), device=first.device)
    class_of[rotated:] -= len(first)
    by = (sides * log_scale[:, class_of]).exp()
    total = (by.square() * diagonal).sum(-1, keepdim=True)
    by = by / total.where(total > 0, torch.ones_like(total)).sqrt()  # D G D gets a trace of one
    scaled = by[..., :, None] * both(g_q, g_k) * by[..., None, :]
    sums = pool((scaled @ scaled).square().sum(-1), -1)  # diag((D G D)^4)
    return move(log_scale, sums, _ORDER_8_EXPONENT)[:, class_of].exp()
