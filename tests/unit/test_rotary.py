"""bounds/rotary.py against dense rotated interaction matrices at many distances, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_geoscale.bounds import rotary_norm_bound
from megatron_geoscale.bounds.rotary import balance, rotary_pairs
from megatron_geoscale.spectral import gram, gram_norm, spectral_norm

D_IS_ONE = 1 + 1e-8  # the bounds add what float64 rounding can hide


def rotation(head_dim, rotary_dim, interleaved, angles):
    """Dense R, written out entry by entry."""
    matrix = torch.eye(head_dim, dtype=torch.float64)
    for pair, angle in enumerate(angles):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def largest_rotated_norm(w_q, w_k, rotary_dim, interleaved, distances=range(0, 64, 3)):
    """max over distances of ||A^T R B|| per head, RoPE base 10000 and random angles as well (other bases, scaling)."""
    w_k = w_k.repeat_interleave(w_q.shape[0] // w_k.shape[0], 0)
    pairs = rotary_dim // 2
    frequencies = [10000.0 ** (-pair / max(pairs, 1)) for pair in range(pairs)]
    generator = torch.Generator().manual_seed(0)
    angle_sets = [[distance * f for f in frequencies] for distance in distances]
    angle_sets += (2 * math.pi * torch.rand(10, pairs, generator=generator)).tolist()
    worst = torch.zeros(w_q.shape[0], dtype=torch.float64)
    for angles in angle_sets:
        r = rotation(w_q.shape[1], rotary_dim, interleaved, angles)
        worst = torch.maximum(worst, torch.linalg.matrix_norm(w_q.double().mT @ r @ w_k.double(), 2))
    return worst


def plain(w_q, w_k):
    return spectral_norm(w_q) * spectral_norm(w_k).repeat_interleave(w_q.shape[0] // w_k.shape[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 2, 8, 16])
@pytest.mark.parametrize("n_q, n_kv", [(2, 2), (4, 1)])
def test_covers_every_distance_and_is_never_looser_than_plain(interleaved, rotary_dim, n_q, n_kv):
    torch.manual_seed(rotary_dim)
    w_q = torch.randn(n_q, 16, 32) * torch.randn(n_q, 16, 1).exp()
    w_k = torch.randn(n_kv, 16, 32) * torch.randn(n_kv, 16, 1).exp()
    bound = rotary_norm_bound(w_q, w_k, rotary_dim=rotary_dim, interleaved=interleaved)
    assert (bound >= largest_rotated_norm(w_q, w_k, rotary_dim, interleaved)).all()
    assert (bound <= plain(w_q, w_k) * D_IS_ONE).all()
    grams = gram(w_q), gram(w_k)
    assert torch.equal(bound, rotary_norm_bound(w_q, w_k, rotary_dim=rotary_dim, interleaved=interleaved, grams=grams))


def test_without_rotation_it_is_the_exact_norm():
    torch.manual_seed(0)
    w_q, w_k = torch.randn(4, 8, 32), torch.randn(2, 8, 32)
    torch.testing.assert_close(rotary_norm_bound(w_q, w_k, rotary_dim=0), gram_norm(w_q, w_k), rtol=1e-7, atol=0.0)


def test_rotation_raises_the_norm_above_the_unrotated_one():
    """THEORY 3: ||A^T B|| is not a bound under RoPE. Here it is exactly zero, and 1 at a quarter turn."""
    w_q, w_k = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    w_q[0, 0, 0] = w_k[0, 1, 1] = 1.0
    assert gram_norm(w_q, w_k).item() == 0.0
    assert largest_rotated_norm(w_q, w_k, 2, False).item() > 0.99
    assert rotary_norm_bound(w_q, w_k, rotary_dim=2).item() == pytest.approx(1.0)
    torch.manual_seed(1)
    w_q, w_k = torch.randn(8, 16, 256), torch.randn(8, 16, 256)  # and with nothing special about the weights
    assert (largest_rotated_norm(w_q, w_k, 16, False) > gram_norm(w_q, w_k)).any()


def test_balancing_gains_where_frequency_content_differs():
    """THEORY 3's measured example: queries live in some pairs, keys in others; D = I is off by two orders."""
    torch.manual_seed(2)
    d_h, d = 64, 512
    content = torch.cat([torch.linspace(0, -5, d_h // 2)] * 2).exp()[:, None]
    w_q = torch.randn(1, d_h, d) * content
    w_k = torch.randn(1, d_h, d) * content.flip(0)
    bound = rotary_norm_bound(w_q, w_k, rotary_dim=d_h)
    assert (bound < plain(w_q, w_k) / 20).all()
    assert (bound >= largest_rotated_norm(w_q, w_k, d_h, False, range(8))).all()
    wrong_pairs = rotary_norm_bound(w_q, w_k, rotary_dim=d_h, interleaved=True)
    assert (wrong_pairs >= largest_rotated_norm(w_q, w_k, d_h, True, range(8))).all()


def optimum(w_q, w_k, rotary_dim):
    """Slow search for the best D with Adam on the spectral norms themselves, half-split pairs, full rotary."""
    a, b = gram(w_q), gram(w_k)
    log_scale = torch.zeros(w_q.shape[0], rotary_dim // 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], lr=0.05)
    best = torch.full((w_q.shape[0],), torch.inf, dtype=torch.float64)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.993**step
        s = torch.cat([log_scale, log_scale], dim=-1).exp()
        eigenvalues = [torch.linalg.eigvalsh(g * by[:, :, None] * by[:, None, :]) for g, by in ((a, s), (b, 1.0 / s))]
        best = torch.minimum(best, (eigenvalues[0][:, -1] * eigenvalues[1][:, -1]).sqrt().detach())
        p = 8.0 * 2 ** (step / 60)
        loss = sum(torch.logsumexp(p * e.clamp_min(1e-300).log(), -1) / p for e in eigenvalues).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


def test_the_search_comes_near_the_best_diagonal():
    torch.manual_seed(3)
    n, d_h, d = 2, 16, 64
    content = torch.cat([torch.linspace(0, -3, d_h // 2)] * 2).exp()[:, None]
    noise = [torch.randn(n, d_h, d) for _ in range(2)]
    spikes = [torch.randn(n, d_h, 1) @ torch.randn(n, 1, d) for _ in range(2)]
    cases = [
        (noise[0], noise[1]),
        (noise[0] * content, noise[1] * content.flip(0)),
        (spikes[0] + 0.1 * noise[0], spikes[1] + 0.1 * noise[1]),
        (noise[0] + 3 * spikes[0] * content, noise[0] + 3 * spikes[1] * content.flip(0)),
    ]
    for w_q, w_k in cases:
        assert (rotary_norm_bound(w_q, w_k, rotary_dim=d_h) <= 1.1 * optimum(w_q, w_k, d_h)).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_zero_rows_and_extreme_weights_keep_the_diagonal_finite(magnitude):
    torch.manual_seed(4)
    w_q, w_k = torch.randn(3, 8, 16) * magnitude, torch.randn(3, 8, 16)
    w_q[0, [1, 5]] = 0.0  # a whole pair of the queries
    w_k[0, [2, 6]] = 0.0  # another of the keys
    w_q[1], w_k[2] = 0.0, 0.0
    bound = rotary_norm_bound(w_q, w_k, rotary_dim=8)
    assert torch.isfinite(balance(gram(w_q), gram(w_k), rotary_dim=8, interleaved=False).scale).all()
    assert bound[1] == 0.0 and bound[2] == 0.0
    assert bound[0] >= largest_rotated_norm(w_q, w_k, 8, False)[0] > 0.0
    assert bound[0] <= plain(w_q, w_k)[0] * D_IS_ONE


def test_a_non_finite_head_stays_non_finite():
    w_q, w_k = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    w_q[0, 0, 0] = float("nan")
    assert torch.isfinite(rotary_norm_bound(w_q, w_k, rotary_dim=8)).tolist() == [False, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 24), st.booleans(), st.floats(0, 6), st.integers(0, 9999))
def test_any_shape_and_imbalance(half, half_rotated, d, interleaved, spread, seed):
    head_dim, rotary_dim = 2 * half, 2 * min(half, half_rotated)
    g = torch.Generator().manual_seed(seed)
    w_q = torch.randn(2, head_dim, d, generator=g) * (spread * torch.randn(2, head_dim, 1, generator=g)).exp()
    w_k = torch.randn(1, head_dim, d, generator=g) * (spread * torch.randn(1, head_dim, 1, generator=g)).exp()
    bound = rotary_norm_bound(w_q, w_k, rotary_dim=rotary_dim, interleaved=interleaved)
    assert (bound >= largest_rotated_norm(w_q, w_k, rotary_dim, interleaved, range(0, 20, 5)) * (1 - 1e-14)).all()
    assert (bound <= plain(w_q, w_k) * D_IS_ONE).all()


def test_pairs_follow_the_models_layout():
    half = rotary_pairs(8, 4, interleaved=False)
    assert [rows.tolist() for rows in half] == [[0, 1], [2, 3]]
    assert [rows.tolist() for rows in rotary_pairs(8, 4, interleaved=True)] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("rotary_dim", [-2, 3, 10])
def test_bad_rotary_dim_is_one_sentence(rotary_dim):
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        rotary_norm_bound(torch.zeros(1, 8, 4), torch.zeros(1, 8, 4), rotary_dim=rotary_dim)
