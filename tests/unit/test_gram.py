"""spectral/gram.py against a dense float64 SVD of A^T B."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_geoscale.spectral import certified_norm, gram, gram_norm, spectral_norm, trace_power_bound


def dense(w_q, w_k):
    """sigma_max of every A_h^T B_g(h), d x d, in float64."""
    w_k = w_k.repeat_interleave(w_q.shape[0] // w_k.shape[0], 0)
    return torch.linalg.svdvals(w_q.double().mT @ w_k.double())[:, 0]


def scale_of(w_q, w_k):
    """||A|| ||B||, to which errors are relative."""
    w_k = w_k.repeat_interleave(w_q.shape[0] // w_k.shape[0], 0)
    return torch.linalg.svdvals(w_q.double())[:, 0] * torch.linalg.svdvals(w_k.double())[:, 0]


def test_gram_is_w_w_transposed_and_its_bits_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    w = torch.randn(5, 16, 96)
    torch.testing.assert_close(gram(w), w.double() @ w.double().mT, rtol=1e-13, atol=0.0)
    for head in range(5):
        assert torch.equal(gram(w)[head], gram(w[head : head + 1])[0])
    assert gram(w.requires_grad_()).requires_grad is False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n_q, n_kv, d_h, d",
    [(1, 1, 1, 8), (4, 4, 8, 32), (6, 2, 16, 48), (4, 1, 64, 128), (2, 2, 256, 300), (2, 1, 64, 16), (2, 2, 1, 1)],
)
def test_norms_equal_dense_svd(dtype, n_q, n_kv, d_h, d):
    torch.manual_seed(d_h + n_q)
    w_q, w_k = torch.randn(n_q, d_h, d).to(dtype), torch.randn(n_kv, d_h, d).to(dtype)
    sigma = dense(w_q, w_k)
    torch.testing.assert_close(gram_norm(w_q, w_k), sigma, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(spectral_norm(w_q), torch.linalg.svdvals(w_q.double())[:, 0], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(certified_norm(w_q, w_k), sigma, rtol=1e-6, atol=0.0)
    assert (certified_norm(w_q, w_k) >= sigma).all()
    bound = trace_power_bound(w_q, w_k)
    assert (bound >= sigma).all()
    assert (bound <= sigma * min(d_h, d) ** (1 / 64) * (1 + 1e-6)).all()


@pytest.mark.parametrize("rank", [0, 1, 2, 5])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_rank_deficient_and_extreme_weights(rank, magnitude):
    torch.manual_seed(rank)
    w_q = (torch.randn(4, 16, rank) @ torch.randn(4, rank, 40) * magnitude).float()
    w_k = (torch.randn(2, 16, rank) @ torch.randn(2, rank, 40) * magnitude).float()
    sigma = dense(w_q, w_k)
    torch.testing.assert_close(gram_norm(w_q, w_k), sigma, rtol=1e-7, atol=0.0)
    assert (certified_norm(w_q, w_k) >= sigma).all()
    assert (trace_power_bound(w_q, w_k) >= sigma).all()
    assert (trace_power_bound(w_q, w_k) <= sigma * max(rank, 1) ** (1 / 64) * (1 + 1e-5)).all()


@pytest.mark.parametrize("overlap", [0.0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-2])
def test_nearly_orthogonal_heads_are_bounded_and_accurate_to_the_stated_error(overlap):
    """Queries and keys live in almost orthogonal subspaces of the head: the hard case for Gram matrices."""
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator))[0]
    inputs = [torch.randn(8, 64, dtype=torch.float64, generator=generator) for _ in range(2)]
    w_q = (basis[:, :8] @ inputs[0])[None]
    w_k = ((basis[:, 8:] + overlap * basis[:, :8]) @ inputs[1])[None]
    sigma, scale = dense(w_q, w_k), scale_of(w_q, w_k)
    assert ((gram_norm(w_q, w_k) - sigma).abs() <= 1e-7 * scale).all()
    if overlap >= 1e-4:
        assert ((gram_norm(w_q, w_k) - sigma).abs() <= 1e-9 * scale).all()
    assert (certified_norm(w_q, w_k) >= sigma).all()
    assert (certified_norm(w_q, w_k) <= sigma + 1e-4 * scale).all()
    for power in (1, 2, 8, 32, 128):
        assert (trace_power_bound(w_q, w_k, power) >= sigma * (1 - 1e-14)).all()
        assert (trace_power_bound(w_q, w_k, power) <= 16 * scale).all()


def test_trace_power_tightens_with_the_power():
    torch.manual_seed(4)
    w_q, w_k = torch.randn(3, 32, 64), torch.randn(3, 32, 64)
    sigma = dense(w_q, w_k)
    bounds = [trace_power_bound(w_q, w_k, power) for power in (1, 2, 4, 8, 16, 32, 64, 256)]
    for power, wide, narrow in zip((1, 2, 4, 8, 16, 32, 64), bounds, bounds[1:], strict=False):
        assert (wide >= narrow).all() and (narrow >= sigma).all()
        assert (wide <= sigma * 32 ** (1 / (2 * power)) * (1 + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 24),
    st.integers(1, 40),
    st.integers(-30, 30),
    st.integers(0, 9999),
)
def test_any_shape_and_magnitude(groups, per_group, d_h, d, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    w_q = torch.randn(groups * per_group, d_h, d, generator=generator) * 10.0**exponent
    w_k = torch.randn(groups, d_h, d, generator=generator) * torch.randn(groups, d_h, 1, generator=generator).exp()
    sigma = dense(w_q, w_k)
    assert ((gram_norm(w_q, w_k) - sigma).abs() <= 1e-9 * scale_of(w_q, w_k)).all()
    assert (certified_norm(w_q, w_k) >= sigma).all()
    assert (trace_power_bound(w_q, w_k) >= sigma * (1 - 1e-14)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["query", "key"])
def test_a_non_finite_head_is_non_finite_and_leaves_the_others_alone(bad, side):
    torch.manual_seed(5)
    w_q, w_k = torch.randn(4, 4, 12), torch.randn(2, 4, 12)
    clean = gram_norm(w_q, w_k)
    (w_q if side == "query" else w_k)[1, 2, 3] = bad
    broken = torch.tensor([False, True, False, False] if side == "query" else [False, False, True, True])
    for sigma in (gram_norm(w_q, w_k), certified_norm(w_q, w_k), trace_power_bound(w_q, w_k)):
        assert torch.equal(~torch.isfinite(sigma), broken)
    torch.testing.assert_close(gram_norm(w_q, w_k)[~broken], clean[~broken], rtol=1e-14, atol=0.0)


def test_bad_arguments_are_one_sentence():
    w = torch.zeros(4, 8, 16)
    for w_k in (
        torch.zeros(3, 8, 16),
        torch.zeros(4, 8, 15),
        torch.zeros(4, 7, 16),
        torch.zeros(8, 16),
        torch.zeros(0, 8, 16),
    ):
        for norm in (gram_norm, trace_power_bound):
            with pytest.raises(ValueError, match="multiple of n_kv"):
                norm(w, w_k)
    for power in (0, -2, 3, 31):
        with pytest.raises(ValueError, match="power of two"):
            trace_power_bound(w, w, power)
    with pytest.raises(ValueError, match="head_dim, hidden"):
        spectral_norm(torch.zeros(4, 4))
