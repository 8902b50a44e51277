"""alpha: by what factor isotropic tokens keep a head's logits below the worst case c d sigma (THEORY 4).

Every function returns an alpha in (0, 1] such that |xhat_i^T M xhat_j| <= alpha d sigma for all tokens it covers,
except with probability `delta`, if the normalised tokens are independent and uniform on the sphere of radius sqrt(d).
Real tokens are not, so none of these is certified. 1 is the certified value, and the cap. `num_pairs` counts the
(i, j, head, layer) to cover, `num_tokens` the (token, head, layer). All but `diagonal` speak of i != j only: take the
maximum of one of them and `diagonal` (THEORY 4.5). ValueError, in one sentence, for an argument out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_TOLERANCE = 1e-12  # of gamma and of ln alpha
_NEGLIGIBLE_LOG = 45.0  # what is e^-45 of an integral is left out
_ROUNDING = 1e-6  # by which norms computed in other ways may break the inequalities between them


def typicality_gamma(head_dim: int, *, num_tokens: float, delta: float) -> float:
    """gamma > 1: ||V^T xhat||^2 <= gamma r for all tokens, r = head_dim, except with probability delta/2 (THEORY 4.1).

    Solves num_tokens exp(-(r/2) (gamma - 1 - ln gamma)) = delta/2.
    """
    _check(head_dim=head_dim, num_tokens=num_tokens, delta=delta)
    target = 2.0 * math.log(2.0 * num_tokens / delta) / head_dim
    # gamma - 1 - ln gamma >= gamma/2 - ln 2, so the root lies below 2 (target + ln 2).
    return _solve(lambda gamma: gamma - 1.0 - math.log(gamma) - target, 1.0, 2.0 * (target + math.log(2.0)) + 1.0)


def rank_aware(hidden_size: int, head_dim: int, *, num_pairs: float, num_tokens: float, delta: float) -> float:
    """sqrt(2 gamma r ln(4 N / delta)) / d, the paper's alpha (THEORY 4.1); half of delta pays for gamma."""
    _check(hidden_size=hidden_size, head_dim=head_dim, num_pairs=num_pairs, num_tokens=num_tokens, delta=delta)
    rank = min(head_dim, hidden_size)
    gamma = typicality_gamma(rank, num_tokens=num_tokens, delta=delta)
    return min(1.0, math.sqrt(2.0 * gamma * rank * math.log(4.0 * num_pairs / delta)) / hidden_size)


def rank_agnostic(hidden_size: int, *, num_pairs: float, delta: float) -> float:
    """sqrt(2 ln(4 N / delta) / d): what is left without knowing the rank, for comparison (THEORY 4.2).

    2 N exp(-d alpha^2 / 2) = delta/2: the same half of delta as `rank_aware` spends on its pairs.
    """
    _check(hidden_size=hidden_size, num_pairs=num_pairs, delta=delta)
    return min(1.0, math.sqrt(2.0 * math.log(4.0 * num_pairs / delta) / hidden_size))


def exact_isotropic(hidden_size: int, head_dim: int, *, num_pairs: float, delta: float) -> float:
    """The alpha at which N times the exact tail of the worst M (r equal singular values) is delta (THEORY 4.3)."""
    _check(hidden_size=hidden_size, head_dim=head_dim, num_pairs=num_pairs, delta=delta)
    if hidden_size == 1:
        return 1.0  # the sphere is two points
    target = math.log(delta) - math.log(num_pairs)
    rank = min(head_dim, hidden_size)
    # Solved for ln alpha: alpha can be as small as 1/d or as large as 1.
    root = _solve(lambda log_alpha: target - _log_tail(math.exp(log_alpha), hidden_size, rank), math.log(1e-9), 0.0)
    return math.exp(root)


def stable_rank_aware(
    hidden_size: int,
    *,
    sigma: float,
    frobenius: float,
    schatten4: float,
    num_pairs: float,
    num_tokens: float,
    delta: float,
) -> float:
    """sqrt(2 T ln(4 N / delta)) / (d sigma), T >= ||M xhat||^2 from the head's own spectrum (THEORY 4.4).

    T = ||M||_F^2 + 2 ||M^T M||_F sqrt(t) + 2 sigma^2 t with t = ln(2 N_tok / delta). sigma, frobenius, schatten4: the
    norms (sum s^p)^(1/p) of M for p = infinity, 2 and 4, so ||M^T M||_F = schatten4^2; they must be ordered
    0 < sigma <= schatten4 <= frobenius. Under RoPE pass bounds on the rotated norms.
    """
    _check(hidden_size=hidden_size, num_pairs=num_pairs, num_tokens=num_tokens, delta=delta)
    grown = 1.0 + _ROUNDING
    if not (0.0 < sigma <= schatten4 * grown and schatten4 <= frobenius * grown and math.isfinite(frobenius)):
        raise ValueError(
            f"Norms of one matrix must be ordered 0 < sigma <= schatten4 <= frobenius, got {sigma}, {schatten4} and "
            f"{frobenius}."
        )
    t = math.log(2.0 * num_tokens / delta)
    relative = (frobenius / sigma) ** 2 + 2.0 * (schatten4 / sigma) ** 2 * math.sqrt(t) + 2.0 * t
    return min(1.0, math.sqrt(2.0 * relative * math.log(4.0 * num_pairs / delta)) / hidden_size)


def diagonal(
    hidden_size: int, *, sigma: float, trace: float, symmetric_frobenius: float, num_tokens: float, delta: float
) -> float:
    """(|tr M| + 2 ||M_s||_F sqrt(t) + 2 sigma t) / (d sigma), t = ln(4 N_tok / delta): logits with i = j (THEORY 4.5).

    M_s = (M + M^T) / 2; tr M = <A, B>_F and ||M_s||_F^2 = (||M||_F^2 + tr C^2) / 2 with C = B A^T. A token is not
    independent of itself, so no other alpha here covers these logits, and tied W_Q = W_K breaks them.
    """
    _check(hidden_size=hidden_size, num_tokens=num_tokens, delta=delta)
    if not (0.0 < sigma < math.inf and 0.0 <= symmetric_frobenius < math.inf and math.isfinite(trace)):
        raise ValueError(
            f"Need finite norms with sigma > 0 and symmetric_frobenius >= 0, got sigma {sigma}, symmetric_frobenius "
            f"{symmetric_frobenius} and trace {trace}."
        )
    t = math.log(4.0 * num_tokens / delta)
    bound = abs(trace) / sigma + 2.0 * symmetric_frobenius / sigma * math.sqrt(t) + 2.0 * t
    return min(1.0, bound / hidden_size)


def _check(*, delta: float, **counts: float) -> None:
    for name, count in counts.items():
        if not 1 <= count < math.inf:
            raise ValueError(f"{name} must be a number of at least 1, got {count}.")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be a probability between 0 and 1, exclusive, got {delta}.")


def _solve(increasing: Callable[[float], float], low: float, high: float) -> float:
    """The upper end of the bisected bracket of an increasing function's root: on the safe side of it."""
    while high - low > _TOLERANCE:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if increasing(middle) >= 0.0 else (middle, high)
    return high


def _log_tail(alpha: float, hidden_size: int, rank: int) -> float:
    """ln P(|xhat_i^T M xhat_j| > alpha d sigma), M of `rank` equal singular values sigma, d = hidden_size >= 2 (4.3).

    ||V^T xhat_j||^2 / d is b ~ Beta(r/2, (d-r)/2), and given b the logit is d sigma sqrt(b) times one coordinate of a
    unit vector, of density proportional to (1 - t^2)^((d-3)/2). With b = 1/(1 + e^-z) and t = tanh y both densities are
    log-concave on the whole line, b^(r/2) (1-b)^((d-r)/2) dz and sech^(d-1)(y) dy, and everything is summed as
    logarithms: tails of 1e-20 and less keep their digits.
    """
    r, d = rank, hidden_size
    if r == d:
        return _log_coordinate_tail(torch.tensor([alpha], dtype=torch.float64), d).item()
    half_r, half_rest = 0.5 * r, 0.5 * (d - r)
    log_beta = math.lgamma(half_r) + math.lgamma(half_rest) - math.lgamma(half_r + half_rest)
    # Zero below b = alpha^2, the integrand starts there like (z - low)^((d-1)/2): z = low + w^2 makes that smooth.
    low = 2.0 * math.log(alpha) - math.log1p(-min(alpha * alpha, 1.0 - 1e-15))

    def integrand(w: torch.Tensor) -> torch.Tensor:
        z = low + w.square()
        log_b, log_rest = -torch.nn.functional.softplus(-z), -torch.nn.functional.softplus(z)
        level = (math.log(alpha) - 0.5 * log_b).exp()
        return half_r * log_b + half_rest * log_rest - log_beta + _log_coordinate_tail(level, d) + (2.0 * w).log()

    # The mode lies near b = r/d for shallow tails and near b = alpha for deep ones (rank 1: exactly, as d grows).
    # Beyond it the density of z falls like exp(-half_rest z) at least, after a Gaussian of variance 1/half_r +
    # 1/half_rest; the integrand's mass lies in a narrow part of this range that a first pass finds.
    not_b = (1.0 - min(alpha, 1.0 - 1e-15)) * (1.0 - r / d)
    beyond = _NEGLIGIBLE_LOG / half_rest + 10.0 * math.sqrt(1.0 / half_r + 1.0 / half_rest)
    start, end = 0.0, math.sqrt(max(math.log1p(-not_b) - math.log(not_b) - low, 0.0) + beyond)
    nodes, _ = _gauss_legendre(start, end, panels=24)
    values = integrand(nodes)
    inside = nodes[values > values.max() - _NEGLIGIBLE_LOG]
    step = (end - start) / 24
    start, end = max(start, inside[0].item() - step), min(end, inside[-1].item() + step)
    nodes, log_weights = _gauss_legendre(start, end, panels=24)
    return torch.logsumexp(log_weights + integrand(nodes), 0).item()


def _log_coordinate_tail(level: torch.Tensor, d: int) -> torch.Tensor:
    """ln P(|t| > level) for a coordinate t of a uniform unit vector in d >= 2 dimensions: float64 [n] -> [n]."""
    start = torch.atanh(level.clamp(max=1.0 - 1e-16))
    slope = (d - 1) * level
    # From the start sech^(d-1) falls at least as fast as exp(-slope s) and as sech^(d-1)(s), for ln cosh is convex.
    widest = math.acosh(math.exp(_NEGLIGIBLE_LOG / (d - 1)))
    length = (_NEGLIGIBLE_LOG / slope).clamp(max=widest)
    nodes, log_weights = _gauss_legendre(0.0, 1.0, panels=2)
    y = start[:, None] + length[:, None] * nodes
    log_sech = math.log(2.0) - y - torch.log1p(torch.exp(-2.0 * y))
    log_norm = math.log(2.0) + math.lgamma(0.5 * d) - math.lgamma(0.5) - math.lgamma(0.5 * (d - 1))
    log_integral = torch.logsumexp(log_weights + length.log()[:, None] + (d - 1) * log_sech, dim=1)
    return log_norm + log_integral


def _gauss_legendre(low: float, high: float, *, panels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and log weights of composite 20-point Gauss-Legendre quadrature on [low, high], float64."""
    # Golub-Welsch: the nodes are the eigenvalues of the Jacobi matrix, the weights come from its eigenvectors.
    k = torch.arange(1, 20, dtype=torch.float64)
    off_diagonal = k / (4.0 * k * k - 1.0).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    width = (high - low) / panels
    starts = low + width * torch.arange(panels, dtype=torch.float64)
    points = (starts[:, None] + 0.5 * width * (nodes + 1.0)).flatten()
    return points, (width * vectors[0].square()).log().repeat(panels)
