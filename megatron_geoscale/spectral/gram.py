"""Norms of a head's interaction matrix M = A^T B from d_h x d_h Gram matrices, M itself never formed (THEORY 2.2, 2.3).

Computed in float64 (see `projections`). A head's Gram matrix is one matrix product of its own, so its digits do not
depend on how many heads the rank holds. Weights as large as 1e+38 and as small as 1e-38 need no rescaling: their Gram
matrices fit float64, and each is divided by its trace before two of them are multiplied. A head with a non-finite
weight gets a non-finite norm; it stops neither the others nor the program.

On a CPU eigenvalues are LAPACK's. On any other device they come from repeated squaring, matrix products alone: torch's
eigenvalue solvers wait there for the host and treat the matrices of a batch one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRAM_ROUNDING = 2.0**-38
"""What rounding can hide of a computed Gram matrix, as a fraction of its trace. A float64 dot product of d terms errs
by at most d 2^-53 ||row|| ||row'||, so the matrix of the errors has a spectral norm of at most d 2^-53 tr G. 2^-38 is
2^15 units of 2^-53: enough for a product of two Gram matrices with rows of 8192 elements in the worst case (blocked
summation goes far beyond), and the other half for the eigenvalues. Bounds add it, estimates do not; it costs 1e-8
relative on an ordinary head."""
_ROWS_WORTH_BLOCKING, _BLOCK_ROWS = 80, 48
SQUARINGS = 20
"""For an eigenvalue by squaring: the (2^20)-th power overshoots a norm of rank 128 by 128^(2^-21), 2.3e-6 of it."""


def gram(w: Tensor) -> Tensor:
    """G = W W^T per head: w [n, m, d] of any float dtype -> [n, m, m] float64 (THEORY 2.2). ValueError unless 3-D."""
    if w.dim() != 3:
        raise ValueError(f"Projection weights must be [heads, head_dim, hidden], got shape {list(w.shape)}.")
    grams = w.new_empty((w.shape[0], w.shape[1], w.shape[1]), dtype=torch.float64)
    for head, out in zip(
        w.detach(), grams, strict=True
    ):  # head by head: no float64 copy of all weights, no batch-dependent kernel
        wide = head.to(torch.float64)
        if w.device.type != "cpu" or w.shape[1] < _ROWS_WORTH_BLOCKING:
            torch.mm(wide, wide.mT, out=out)
        else:
            _lower_blocks(wide, out)
    return grams


def _lower_blocks(w: Tensor, out: Tensor) -> None:
    """W W^T, the blocks above the diagonal copied from below it: 20 to 30 % faster than all of it, not on a GPU."""
    for first in range(0, len(w), _BLOCK_ROWS):
        stop = first + _BLOCK_ROWS
        torch.mm(w[first:stop], w[:stop].mT, out=out[first:stop, :stop])
        out[:first, first:stop] = out[first:stop, :first].mT


def trace(matrices: Tensor) -> Tensor:
    """Trace of each matrix: [..., m, m] -> [...]."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def largest_eigenvalue(grams: Tensor) -> Tensor:
    """Largest eigenvalue of positive semidefinite matrices: [n, m, m] float64 -> [n], NaN for a non-finite matrix.

    On a CPU LAPACK's; elsewhere an upper bound within 5e-6 of it, see `SQUARINGS`. Neither waits for another device.
    """
    if grams.device.type != "cpu":
        unit, traces = unit_trace(grams)
        return _trace_powers(unit, GRAM_ROUNDING, SQUARINGS)[1].exp() * traces
    finite = torch.isfinite(grams).all(dim=-1).all(dim=-1)
    eigenvalues: Tensor = torch.linalg.eigvalsh(grams.where(finite[:, None, None], torch.zeros_like(grams)))
    return eigenvalues[:, -1].clamp_min(0.0).where(finite, torch.nan)


def spectral_norm(w: Tensor) -> Tensor:
    """||W||_2 per matrix: w [n, m, d] -> [n] float64 (THEORY 2.2)."""
    return largest_eigenvalue(gram(w)).sqrt()


def gram_norm(w_q: Tensor, w_k: Tensor, *, grams: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """||A_h^T B_g(h)||_2 of each query head with its key group, exact up to rounding (THEORY 2.2): [n_q] float64.

    w_q: [n_q, d_h, d], w_k: [n_kv, d_h, d], n_q a multiple of n_kv and the query heads of a group contiguous. `grams`:
    (gram(w_q), gram(w_k)) if the caller has them. ValueError if the shapes do not fit together.

    lambda_max(G_A G_B) is taken from the symmetric F^T G_A F with G_B = F F^T, F from the eigenvectors of G_B and its
    eigenvalues clamped at zero: defined for any rank, where a Cholesky factor or the non-symmetric product is not. The
    relative error is about 1e-16 (||A|| ||B|| / sigma)^2, so it grows for heads that almost cancel, up to an absolute
    error of about 1e-8 ||A|| ||B|| for one that cancels.
    """
    check_shapes(w_q, w_k)
    return norm_of_grams(*(grams if grams is not None else (gram(w_q), gram(w_k))))


def norm_of_grams(g_q: Tensor, g_k: Tensor) -> Tensor:
    """`gram_norm` of weights whose Gram matrices are g_q [n_q, d_h, d_h] and g_k [n_kv, d_h, d_h]: [n_q] float64.

    Not on a CPU it is the upper end of `trace_power_interval` at the power 2^`SQUARINGS`.
    """
    if g_q.device.type != "cpu":
        return trace_power_interval(g_q, g_k, power=1 << SQUARINGS)[1]
    unit_q, trace_q = unit_trace(g_q)
    unit_k, trace_k = unit_trace(g_k)
    finite = torch.isfinite(trace_k)[:, None, None]
    eigenvalues, vectors = torch.linalg.eigh(unit_k.where(finite, torch.zeros_like(unit_k)))
    factor = per_query_head(vectors * eigenvalues.clamp_min(0.0).sqrt()[:, None, :], g_q)
    product = factor.mT @ unit_q @ factor
    # The traces carry a non-finite weight of either side into the result.
    return (largest_eigenvalue(0.5 * (product + product.mT)) * trace_q).sqrt() * per_query_head(trace_k, g_q).sqrt()


def certified_norm(w_q: Tensor, w_k: Tensor, *, grams: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`gram_norm` raised by what rounding can hide (`GRAM_ROUNDING`), an upper bound: [n_q] float64 (THEORY 2.2)."""
    check_shapes(w_q, w_k)
    return certified_norm_of_grams(*(grams if grams is not None else (gram(w_q), gram(w_k))))


def certified_norm_of_grams(g_q: Tensor, g_k: Tensor) -> Tensor:
    """`certified_norm` of weights whose Gram matrices are g_q [n_q, d_h, d_h] and g_k [n_kv, d_h, d_h]: [n_q]."""
    hidden = (GRAM_ROUNDING * trace(g_q)).sqrt() * per_query_head(trace(g_k), g_q).sqrt()
    return torch.hypot(norm_of_grams(g_q, g_k), hidden)


def trace_power_bound(w_q: Tensor, w_k: Tensor, power: int = 32) -> Tensor:
    """Upper bound of ||A_h^T B_g(h)||_2 without eigenvalues: (tr P^m)^(1/2m), P = G_A G_B, m = power (THEORY 2.3).

    w_q: [n_q, d_h, d], w_k: [n_kv, d_h, d] as in `gram_norm` -> [n_q] float64, at most d_h^(1/(2 power)) above the norm
    on ordinary heads. ValueError as `gram_norm`, and unless `power` is a power of two.
    """
    check_shapes(w_q, w_k)
    return trace_power_interval(gram(w_q), gram(w_k), power=power)[1]


def trace_power_interval(g_q: Tensor, g_k: Tensor, *, power: int) -> tuple[Tensor, Tensor]:
    """(lower, upper) bounds of ||A^T B||_2 from Gram matrices, [n_q] float64 each (THEORY 2.3).

    (tr P^m / d_h)^(1/2m) <= ||A^T B|| <= (tr P^m)^(1/2m), the best over m = 1, 2, 4, ... power, with what rounding can
    have done on the outer side of both: for heads that nearly cancel, where P is far from normal, the interval is wide,
    never wrong. g_q: [n_q, d_h, d_h], g_k: [n_kv, d_h, d_h]. ValueError unless `power` is a power of two.
    """
    if power < 1 or power & (power - 1):
        raise ValueError(f"power must be a power of two, got {power}.")
    unit_q, trace_q = unit_trace(g_q)
    unit_k, trace_k = unit_trace(g_k)
    product = unit_q @ per_query_head(unit_k, unit_q)
    unit = trace_q.sqrt() * per_query_head(trace_k, trace_q).sqrt()
    lower, upper = _trace_powers(product, GRAM_ROUNDING, power.bit_length() - 1)
    return (0.5 * lower).exp() * unit, (0.5 * upper).exp() * unit


def _trace_powers(matrix: Tensor, rounding: float, squarings: int) -> tuple[Tensor, Tensor]:
    """(lower, upper) bounds of ln lambda_max of matrices with the spectrum of a positive semidefinite one: [n] each.

    matrix: [n, m, m] float64, off by at most `rounding` in Frobenius norm. It is squared repeatedly and divided by its
    Frobenius norm each time; `error` bounds what rounding has done to the normalised power.
    """
    rank = matrix.shape[-1]
    tiny = torch.finfo(torch.float64).tiny
    # Invariant: P^exponent = exp(log_scale) (matrix + E), ||E||_F <= error.
    size = torch.linalg.matrix_norm(matrix).clamp_min(tiny)
    matrix, error, log_scale = matrix / size[:, None, None], rounding / size, size.log()
    upper = torch.full_like(log_scale, torch.inf)
    lower = torch.full_like(log_scale, -torch.inf)
    for step in range(squarings + 1):
        exponent = 2.0**step
        found, doubt = trace(matrix).clamp_min(0.0), rank**0.5 * error  # |tr E| <= sqrt(rank) ||E||_F
        upper = torch.minimum(upper, ((found + doubt).log() + log_scale) / exponent)
        lower = torch.maximum(lower, (((found - doubt).clamp_min(0.0) / rank).log() + log_scale) / exponent)
        if step == squarings:
            break
        # ||M E + E M||_F <= 2 ||M||_2 ||E||_F, and ||M||_2^2 <= ||M||_1 ||M||_inf: where all eigenvalues are alike,
        # that is far below the Frobenius norm of 1, and without it the error would outgrow the power.
        sums = matrix.abs()
        norm = (sums.sum(-1).amax(-1) * sums.sum(-2).amax(-1)).sqrt().clamp(tiny, 1.0)
        matrix = matrix @ matrix
        size = torch.linalg.matrix_norm(matrix).clamp_min(tiny)
        error = (2.0 * norm * error + error * error + rank * 2.0**-52) / size
        matrix, log_scale = matrix / size[:, None, None], 2.0 * log_scale + size.log()
    return lower, upper


def unit_trace(grams: Tensor) -> tuple[Tensor, Tensor]:
    """(G / tr G, tr G); a zero matrix stays zero."""
    traces = trace(grams)
    return grams / traces.where(traces > 0, torch.ones_like(traces))[:, None, None], traces


def per_query_head(groups: Tensor, heads: Tensor) -> Tensor:
    """Repeat each key group's entry for the query heads of the group: [n_kv, ...] -> [n_q, ...], n_q = len(heads).

    For d_h-sized things; d-wide weights are never expanded.
    """
    return groups.repeat_interleave(heads.shape[0] // groups.shape[0], dim=0)


def check_shapes(w_q: Tensor, w_k: Tensor) -> None:
    """ValueError unless w_q is [n_q, d_h, d] and w_k [n_kv, d_h, d] with n_q a multiple of n_kv."""
    fits = w_q.dim() == w_k.dim() == 3 and w_q.shape[1:] == w_k.shape[1:]
    if not fits or w_k.shape[0] == 0 or w_q.shape[0] % w_k.shape[0]:
        raise ValueError(
            f"Query and key weights must be [n_q, head_dim, hidden] and [n_kv, head_dim, hidden] with n_q a multiple "
            f"of n_kv, got {list(w_q.shape)} and {list(w_k.shape)}."
        )
