"""bounds/logits.py: the formula of THEORY 3 written densely; attacks by tokens are in test_norm_attack.py."""

import math

import pytest
import torch

from megatron_geoscale.bounds import certified_logit_bound, isotropic_logit_bound, rotary_norm_bound
from megatron_geoscale.spectral import Moments, Projections, gram_norm


def projections(seed=0, n_q=4, n_kv=2, d_h=8, d=24, biases="qk", bias_scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = draw(n_q, d_h, d), draw(n_kv, d_h, d), draw(n_kv, d_h, d)
    q_bias, k_bias = bias_scale * draw(n_q, d_h), bias_scale * draw(n_kv, d_h)
    return Projections(q, q_bias if "q" in biases else None, k, k_bias if "k" in biases else None, v, None)


@pytest.mark.parametrize("biases", ["", "q", "k", "qk"])
def test_without_rope_every_term_is_exact(biases):
    p, c, m = projections(biases=biases), 0.3, 5.0
    sigma, bound = certified_logit_bound(Moments.of(p), softmax_scale=c, rotary_dim=0, input_norm=m)
    for head in range(4):
        a_matrix, b_matrix = p.q[head], p.k[head // 2]
        a = torch.zeros(8, dtype=torch.float64) if p.q_bias is None else p.q_bias[head]
        b = torch.zeros(8, dtype=torch.float64) if p.k_bias is None else p.k_bias[head // 2]
        expected = m * m * torch.linalg.matrix_norm(a_matrix.T @ b_matrix, 2)
        expected = expected + m * ((a_matrix.T @ b).norm() + (b_matrix.T @ a).norm()) + (a @ b).abs()
        assert bound[head].item() == pytest.approx(c * expected.item(), rel=1e-6)
        assert bound[head] >= c * expected
    torch.testing.assert_close(sigma, gram_norm(p.q, p.k), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_with_rope_sigma_is_the_rotary_bound(rotary_dim, interleaved):
    p = projections(1)
    layout = {"rotary_dim": rotary_dim, "interleaved": interleaved}
    sigma, bound = certified_logit_bound(Moments.of(p), softmax_scale=0.2, input_norm=4.0, **layout)
    assert torch.equal(sigma, rotary_norm_bound(p.q, p.k, **layout))
    assert (bound > 0.2 * 16.0 * sigma).all()  # the biases


def test_a_bias_in_few_pairs_does_not_meet_the_whole_matrix():
    """Trained key biases sit in a few low-frequency pairs; there ||A|| ||b|| would be many times too large."""
    p = projections(2, n_q=1, n_kv=1, d_h=16, d=64, biases="k")
    quiet = p.q.clone()
    quiet[:, [3, 11]] *= 1e-3  # the query hardly listens to the pair that carries the bias
    bias = torch.zeros_like(p.k_bias)
    bias[:, 3] = 1000.0
    p = Projections(quiet, None, p.k, bias, p.v, None)
    sigma, bound = certified_logit_bound(Moments.of(p), softmax_scale=1.0, rotary_dim=16, input_norm=8.0)
    cross = (bound - 64.0 * sigma) / 8.0
    exact = 1000.0 * torch.linalg.matrix_norm(p.q[0, [3, 11]], 2)  # the worst rotation of that pair
    assert cross.item() == pytest.approx(exact.item(), rel=1e-5)
    assert cross.item() < 0.01 * (torch.linalg.matrix_norm(p.q[0], 2) * 1000.0).item()


def test_isotropic_bound_scales_only_the_quadratic_term():
    p, m, c = projections(3), math.sqrt(24), 0.35
    sigma = gram_norm(p.q, p.k)
    kinds = {"softmax_scale": c, "rotary_dim": 8, "input_norm": m}
    full = isotropic_logit_bound(sigma, Moments.of(p), alpha=1.0, **kinds)
    part = isotropic_logit_bound(sigma, Moments.of(p), alpha=0.25, **kinds)
    torch.testing.assert_close(full - part, 0.75 * c * 24 * sigma, rtol=1e-12, atol=0.0)
    certified_sigma, certified = certified_logit_bound(Moments.of(p), **kinds)
    torch.testing.assert_close(certified - full, c * 24 * (certified_sigma - sigma), rtol=1e-9, atol=0.0)
    bare = projections(3, biases="")
    torch.testing.assert_close(
        isotropic_logit_bound(sigma, Moments.of(bare), alpha=0.25, **kinds), 0.25 * c * 24 * sigma, rtol=1e-12, atol=0.0
    )
    layer_sigma = isotropic_logit_bound(sigma.max(), Moments.of(bare), alpha=0.5, **kinds)
    assert layer_sigma.shape == (4,)


def test_bad_shapes_are_one_sentence():
    p = projections(4)
    bad = Projections(p.q[:3], p.q_bias[:3], p.k, p.k_bias, p.v, None)
    with pytest.raises(ValueError, match="multiple of n_kv"):
        Moments.of(bad)
    with pytest.raises(ValueError, match="rotary_dim"):
        certified_logit_bound(Moments.of(p), softmax_scale=1.0, rotary_dim=9, input_norm=1.0)


def test_offsets_alone_are_bounded_to_the_last_digit():
    """Without weights a logit is a.b, which may cancel: the exact value, in fractions, is never above the bound."""
    from fractions import Fraction

    zero, g = torch.zeros(1, 8, 16, dtype=torch.float64), torch.Generator().manual_seed(0)
    for rotary_dim in (0, 4):
        for _ in range(300):
            a, b = torch.randn(2, 1, 8, dtype=torch.float64, generator=g)
            moments = Moments.of(Projections(zero, a, zero, b, zero, b))
            _, bound = certified_logit_bound(moments, softmax_scale=1.0, rotary_dim=rotary_dim, input_norm=4.0)
            exact = sum(Fraction(x) * Fraction(y) for x, y in zip(a[0].tolist(), b[0].tolist()))
            assert abs(exact) <= Fraction(bound.item())
