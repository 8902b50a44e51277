"""The isotropic alphas at their own game: do they fail as rarely as they say, for tokens uniform on the sphere?

Each run samples one sequence, over a million pairs, and asks whether any pair exceeds alpha d sigma. delta is large and
the runs are many, so an alpha that fails too often is caught, and each test shows by how much an alpha would have to
be too small to be.
"""

import math

import pytest
import torch

from megatron_geoscale.bounds import alpha

DELTA, RUNS, LENGTH = 0.3, 40, 1024
COUNTS = {"num_pairs": LENGTH**2, "num_tokens": LENGTH, "delta": DELTA}


def most_failures(delta, runs=RUNS):
    """What chance allows at failure probability `delta`: the mean and three standard deviations."""
    return delta * runs + 3 * math.sqrt(delta * (1 - delta) * runs)


def sphere(count, d, generator):
    x = torch.randn(count, d, generator=generator)
    return x * (math.sqrt(d) / x.norm(dim=-1, keepdim=True))


def orthonormal_rows(r, d, generator):
    return torch.linalg.qr(torch.randn(d, r, generator=generator))[0].T


def rotate(x):
    """RoPE, interleaved pairs, base 10000, at positions 0, 1, ...: x [positions, d_h]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    frequencies = 10000.0 ** (-torch.arange(pairs.shape[-1], dtype=torch.float64) / pairs.shape[-1])
    angles = torch.arange(len(x))[:, None] * frequencies
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).float()


def maxima(logits_over_d):
    """The largest magnitude of each run's matrix: a generator of [L, L] -> [runs]."""
    return torch.stack([ratio.abs().max() for ratio in logits_over_d])


@pytest.mark.parametrize("d, r", [(64, 8), (256, 64)])
@pytest.mark.parametrize("rotary", [False, True])
def test_off_diagonal_alphas_fail_no_more_often_than_delta(d, r, rotary):
    """M of r equal singular values, the worst of its rank; rotated, A^T R B keeps them at every distance."""
    g = torch.Generator().manual_seed(d + rotary)

    def runs():
        for _ in range(RUNS):
            q, k = (sphere(LENGTH, d, g) @ orthonormal_rows(r, d, g).T for _ in range(2))
            yield (rotate(q) @ rotate(k).T if rotary else q @ k.T) / d

    largest = maxima(runs())
    exact = alpha.exact_isotropic(d, r, num_pairs=LENGTH**2, delta=DELTA)
    assert (largest > exact).sum() <= most_failures(DELTA)
    for looser in (
        alpha.rank_aware(d, r, **COUNTS),
        alpha.rank_agnostic(d, num_pairs=LENGTH**2, delta=DELTA),
        alpha.stable_rank_aware(d, sigma=1.0, frobenius=r**0.5, schatten4=r**0.25, **COUNTS),
    ):
        assert looser > exact and (largest > looser).sum() <= most_failures(DELTA)
    assert (largest > exact).any()  # exact spends its delta,
    assert (largest > 0.85 * exact).sum() > 0.9 * RUNS  # and any alpha 15% smaller fails nearly always


def test_stable_rank_aware_fails_no_more_often_than_delta():
    d, r = 256, 64
    g = torch.Generator().manual_seed(1)
    s = torch.arange(r, dtype=torch.float32).mul(-0.1).exp()

    def runs():
        for _ in range(RUNS):
            q, k = (sphere(LENGTH, d, g) @ orthonormal_rows(r, d, g).T for _ in range(2))
            yield (q * s) @ k.T / d

    largest = maxima(runs())
    norms = {"sigma": 1.0, "frobenius": s.norm().item(), "schatten4": s.pow(4).sum().pow(0.25).item()}
    stable = alpha.stable_rank_aware(d, **norms, **COUNTS)
    assert stable < 0.9 * alpha.rank_aware(d, r, **COUNTS)
    assert (largest > stable).sum() <= most_failures(DELTA)
    assert (largest > 0.38 * stable).sum() > 0.9 * RUNS


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tied_weights_need_the_diagonal_alpha(sign):
    """THEORY 4.5, W_K = +-W_Q, all pairs of each sequence, i = j among them."""
    d, r = 256, 64
    g = torch.Generator().manual_seed(2)

    def runs():
        for _ in range(RUNS):
            q = sphere(LENGTH, d, g) @ orthonormal_rows(r, d, g).T
            yield sign * q @ q.T / d

    norms = {"sigma": 1.0, "trace": sign * r, "symmetric_frobenius": r**0.5}
    diagonal = alpha.diagonal(d, num_tokens=LENGTH, delta=DELTA, **norms)
    off_diagonal = alpha.exact_isotropic(d, r, num_pairs=LENGTH**2, delta=DELTA), alpha.rank_aware(d, r, **COUNTS)
    ratios = list(runs())
    largest = maxima(ratios)
    for broken in off_diagonal:
        assert (largest > broken).all()
        assert (largest > max(broken, diagonal)).sum() <= most_failures(1.5 * DELTA)
    for ratio in ratios:
        ratio.fill_diagonal_(0.0)
    assert (maxima(ratios) > off_diagonal[0]).sum() <= most_failures(DELTA)  # only i = j breaks them


def test_the_diagonal_alpha_over_a_million_tokens():
    """1,024 sequences of 1,024 tokens: ||V^T xhat||^2 is d times a Beta(r/2, (d-r)/2) variable, drawn as such."""
    d, r, runs = 256, 64, 1024
    torch.manual_seed(3)
    inside, outside = (torch.distributions.Gamma(n / 2, 0.5).sample((runs, LENGTH)) for n in (r, d - r))
    largest = (inside / (inside + outside)).amax(-1)
    arguments = {"sigma": 1.0, "trace": float(r), "symmetric_frobenius": r**0.5, "num_tokens": LENGTH}
    diagonal = alpha.diagonal(d, delta=DELTA, **arguments)
    assert (largest > diagonal).sum() <= most_failures(DELTA / 2, runs)  # it spends half of delta
    assert (largest > 0.75 * diagonal).sum() > most_failures(DELTA, runs)
    assert (largest > diagonal - r / d).all()  # without the trace it would fail always
