"""bounds/alpha.py: THEORY 4's figures, scipy as oracle, Monte Carlo, and the tied diagonal."""

import math
from itertools import pairwise

import pytest
import torch

from megatron_geoscale.bounds import alpha
from megatron_geoscale.bounds.alpha import _log_coordinate_tail, _log_tail

DELTA = 1e-6
# layers, heads, d, d_h, L -> d/(gamma r), rank-aware, rank-agnostic, exact (THEORY 4)
MODELS = {
    "gpt2-xl": ((48, 25, 1600, 64, 1024), (8.4, 0.0735, 0.2126, 0.0470)),
    "mistral-7b": ((32, 32, 4096, 128, 4096), (13.9, 0.0369, 0.1376, 0.0255)),
    "llama-2-13b": ((40, 40, 5120, 128, 4096), (17.3, 0.0297, 0.1238, 0.0206)),
    "llama-2-70b": ((80, 64, 8192, 128, 4096), (27.3, 0.0190, 0.0993, 0.0131)),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_figures_of_the_paper_and_of_theory(model):
    (layers, heads, d, d_h, length), (ratio, aware, agnostic, exact) = MODELS[model]
    pairs, tokens = layers * heads * length**2, layers * heads * length
    gamma = alpha.typicality_gamma(d_h, num_tokens=tokens, delta=DELTA)
    assert d / (gamma * d_h) == pytest.approx(ratio, abs=0.05)
    assert alpha.rank_aware(d, d_h, num_pairs=pairs, num_tokens=tokens, delta=DELTA) == pytest.approx(aware, abs=5e-5)
    assert alpha.rank_agnostic(d, num_pairs=pairs, delta=DELTA) == pytest.approx(agnostic, abs=5e-5)
    assert alpha.exact_isotropic(d, d_h, num_pairs=pairs, delta=DELTA) == pytest.approx(exact, abs=5e-5)


@pytest.mark.parametrize("head_dim", [1, 16, 128, 4096])
@pytest.mark.parametrize("num_tokens", [1, 1e6, 1e12])
def test_gamma_solves_its_equation_from_the_safe_side(head_dim, num_tokens):
    gamma = alpha.typicality_gamma(head_dim, num_tokens=num_tokens, delta=DELTA)
    log_failure = math.log(num_tokens) - head_dim / 2 * (gamma - 1 - math.log(gamma))
    assert log_failure == pytest.approx(math.log(DELTA / 2), rel=1e-6)
    assert log_failure <= math.log(DELTA / 2) + 1e-10


@pytest.mark.parametrize("d", [2, 3, 8, 100, 4096])
def test_coordinate_tail_against_scipy(d):
    stats = pytest.importorskip("scipy.stats")
    levels = torch.tensor([1e-4, 0.01, 0.1, 0.3], dtype=torch.float64)
    expected = stats.beta(0.5, (d - 1) / 2).logsf(levels.numpy() ** 2)
    torch.testing.assert_close(_log_coordinate_tail(levels, d), torch.from_numpy(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("d, r", [(2, 1), (8, 4), (64, 1), (64, 63), (64, 64), (256, 32), (1600, 64), (4096, 128)])
@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_exact_tail_against_scipy_quadrature(d, r, level):
    stats, integrate = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.integrate")
    coordinate = stats.beta(0.5, (d - 1) / 2)
    if r == d:
        expected = coordinate.logsf(level**2)
    else:
        share = stats.beta(r / 2, (d - r) / 2)
        start = level**2
        middle = max(r / d, 1.0001 * start)
        edges = [start, middle, min(2 * middle, (1 + middle) / 2), 1.0]
        parts = [
            integrate.quad(lambda b: share.pdf(b) * coordinate.sf(start / b), *span, epsabs=0, epsrel=1e-9, limit=300)[
                0
            ]
            for span in pairwise(edges)
        ]
        expected = math.log(sum(parts))
    assert _log_tail(level, d, r) == pytest.approx(expected, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize(
    "d, r, pairs, delta", [(2, 1, 3, 0.1), (3, 3, 10, 1e-2), (16, 4, 1e8, DELTA), (1600, 64, 1e8, DELTA)]
)
def test_exact_alpha_spends_delta_and_no_more(d, r, pairs, delta):
    value = alpha.exact_isotropic(d, r, num_pairs=pairs, delta=delta)
    log_failure = math.log(pairs) + _log_tail(value, d, r)
    assert log_failure == pytest.approx(math.log(delta), abs=1e-6) and log_failure <= math.log(delta) + 1e-9


def sphere(count, d, generator):
    x = torch.randn(count, d, generator=generator)
    return x / x.norm(dim=-1, keepdim=True) * math.sqrt(d)


@pytest.mark.parametrize("d, r", [(64, 8), (256, 64)])
def test_monte_carlo_of_a_million_pairs(d, r):
    """2,048 tokens, 2e6 ordered pairs of different tokens, M of r equal singular values: the worst case for a rank."""
    g = torch.Generator().manual_seed(d)
    u, v = (torch.linalg.qr(torch.randn(d, r, generator=g))[0] for _ in range(2))
    queries, keys = sphere(1024, d, g), sphere(1024, d, g)
    ratio = ((queries @ u) @ (keys @ v).T).abs() / d
    pairs = ratio.numel()
    assert pairs >= 1e6
    delta = 1e-3
    arguments = {"num_pairs": pairs, "delta": delta}
    exact = alpha.exact_isotropic(d, r, **arguments)
    aware = alpha.rank_aware(d, r, num_tokens=1024, **arguments)
    norms = {"sigma": 1.0, "frobenius": r**0.5, "schatten4": r**0.25}
    stable = alpha.stable_rank_aware(d, num_tokens=1024, **norms, **arguments)
    assert ratio.max() <= exact <= min(aware, stable)
    # The exact tail is a probability, not only a bound: it predicts how often a level is exceeded.
    for level in (0.5 * exact, 0.7 * exact):
        expected = pairs * math.exp(_log_tail(level, d, r))
        assert (ratio > level).sum().item() == pytest.approx(expected, rel=0.25, abs=4 * math.sqrt(expected))


def test_stable_rank_beats_rank_where_the_spectrum_decays():
    d, r = 1024, 64
    s = torch.arange(r, dtype=torch.float64).mul(-0.15).exp()
    norms = {"sigma": 1.0, "frobenius": s.norm().item(), "schatten4": s.pow(4).sum().pow(0.25).item()}
    counts = {"num_pairs": 1e6, "num_tokens": 1e3, "delta": 1e-3}
    value = alpha.stable_rank_aware(d, **norms, **counts)
    assert value < 0.9 * alpha.rank_aware(d, r, **counts)
    scaled = {name: 1e-20 * norm for name, norm in norms.items()}
    assert alpha.stable_rank_aware(d, **scaled, **counts) == pytest.approx(value, rel=1e-9)
    g = torch.Generator().manual_seed(5)
    u, v = (torch.linalg.qr(torch.randn(d, r, generator=g))[0] for _ in range(2))
    ratio = ((sphere(1024, d, g) @ u) * s.float()) @ (sphere(1024, d, g) @ v).T / d
    assert ratio.abs().max() <= value


def test_tied_weights_break_the_off_diagonal_alphas_and_not_the_diagonal_one():
    """THEORY 4.5: W_Q = W_K orthonormal, d = 1600, r = 64. Logits with i = j exceed what 4.1 and 4.3 allow."""
    d, r, tokens = 1600, 64, 20_000
    g = torch.Generator().manual_seed(1)
    w = torch.linalg.qr(torch.randn(d, r, generator=g))[0]
    largest = max((sphere(2000, d, g) @ w).square().sum(-1).max().item() for _ in range(tokens // 2000))
    pairs, covered = 48 * 25 * 1024**2, 48 * 25 * 1024
    aware = alpha.rank_aware(d, r, num_pairs=pairs, num_tokens=covered, delta=DELTA)
    exact = alpha.exact_isotropic(d, r, num_pairs=pairs, delta=DELTA)
    assert aware * d == pytest.approx(117.6, abs=0.2) and exact * d == pytest.approx(75.2, abs=0.2)
    assert largest > exact * d
    norms = {"sigma": 1.0, "trace": float(r), "symmetric_frobenius": math.sqrt(r)}
    diagonal = alpha.diagonal(d, num_tokens=covered, delta=DELTA, **norms)
    assert largest <= diagonal * d
    assert diagonal > aware  # so the maximum of the two is what must be used
    tail = torch.distributions.Gamma(r / 2, 0.5)  # ||V^T xhat||^2 is nearly chi-square with r degrees of freedom
    assert tail.log_prob(torch.tensor(aware * d)).exp() * covered > 1e-3  # exceeded far more often than delta = 1e-6


def test_alphas_are_capped_at_the_certified_value():
    counts = {"num_pairs": 1e9, "num_tokens": 1e6, "delta": 1e-9}
    assert alpha.rank_aware(16, 16, **counts) == 1.0
    assert alpha.rank_aware(16, 256, **counts) == 1.0  # head_dim above hidden_size: the rank is hidden_size
    assert alpha.rank_agnostic(4, num_pairs=1e9, delta=1e-9) == 1.0
    assert alpha.exact_isotropic(1, 1, num_pairs=1e9, delta=1e-9) == 1.0
    assert alpha.stable_rank_aware(4, sigma=1.0, frobenius=1.0, schatten4=1.0, **counts) == 1.0
    assert alpha.diagonal(4, sigma=1.0, trace=0.0, symmetric_frobenius=1.0, num_tokens=1e6, delta=1e-9) == 1.0
    assert 0.9 < alpha.exact_isotropic(4, 4, num_pairs=1e9, delta=1e-9) <= 1.0


NORMS = {"sigma": 1.0, "frobenius": 2.0, "schatten4": 1.5}


@pytest.mark.parametrize(
    "call",
    [
        lambda: alpha.typicality_gamma(0, num_tokens=1, delta=0.1),
        lambda: alpha.typicality_gamma(8, num_tokens=0, delta=0.1),
        lambda: alpha.rank_aware(8, 4, num_pairs=1, num_tokens=1, delta=0.0),
        lambda: alpha.rank_aware(8, 4, num_pairs=math.inf, num_tokens=1, delta=0.1),
        lambda: alpha.rank_agnostic(8, num_pairs=1, delta=1.0),
        lambda: alpha.exact_isotropic(8, 4, num_pairs=math.nan, delta=0.1),
        lambda: alpha.stable_rank_aware(8, num_pairs=1, num_tokens=1, delta=0.1, **{**NORMS, "sigma": 0.0}),
        lambda: alpha.stable_rank_aware(8, num_pairs=1, num_tokens=1, delta=0.1, **{**NORMS, "schatten4": 2.1}),
        lambda: alpha.diagonal(8, sigma=0.0, trace=0.0, symmetric_frobenius=0.0, num_tokens=1, delta=0.1),
        lambda: alpha.diagonal(8, sigma=1.0, trace=math.nan, symmetric_frobenius=0.0, num_tokens=1, delta=0.1),
    ],
)
def test_bad_arguments_are_one_sentence(call):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
