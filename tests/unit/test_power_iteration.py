"""spectral/power_iteration.py on one process: oracle, warm starts, THEORY 2's counterexamples."""

import pytest
import torch

from megatron_geoscale.spectral import converge, gram_norm, power_iteration, start_vectors, trace_power_bound


def interaction(w_q, w_k):
    return w_q.double().mT @ w_k.double().repeat_interleave(w_q.shape[0] // w_k.shape[0], 0)


def start(w_q, granularity, layer=1):
    heads = range(w_q.shape[0]) if granularity == "head" else None
    return start_vectors(w_q.shape[-1], layer=layer, heads=heads)


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("n_q, n_kv, d_h, d", [(4, 4, 8, 32), (6, 2, 4, 24), (4, 1, 1, 16), (1, 1, 16, 8)])
def test_one_step_is_one_application_of_the_dense_matrix(granularity, n_q, n_kv, d_h, d):
    torch.manual_seed(0)
    w_q, w_k = torch.randn(n_q, d_h, d), torch.randn(n_kv, d_h, d)
    state = start(w_q, granularity)
    m = interaction(w_q, w_k) if granularity == "head" else interaction(w_q, w_k).sum(0)
    left = (m @ state[..., None])[..., 0]
    left = left / left.norm(dim=-1, keepdim=True)
    right = (m.mT @ left[..., None])[..., 0]
    sigma, new = power_iteration(w_q, w_k, state, 1, granularity=granularity)
    torch.testing.assert_close(sigma, right.norm(dim=-1), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(new, right / right.norm(dim=-1, keepdim=True), rtol=1e-10, atol=1e-12)
    assert sigma.dtype == new.dtype == torch.float64
    thrice = power_iteration(w_q, w_k, state, 3, granularity=granularity)
    for _ in range(2):
        sigma, new = power_iteration(w_q, w_k, new, 1, granularity=granularity)
    assert torch.equal(thrice[0], sigma) and torch.equal(thrice[1], new)


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_converges_to_the_dense_norm_from_below(granularity, magnitude):
    torch.manual_seed(1)
    w_q, w_k = torch.randn(8, 16, 64) * magnitude, torch.randn(2, 16, 64)
    m = interaction(w_q, w_k)
    expected = torch.linalg.matrix_norm(m if granularity == "head" else m.sum(0), 2)
    sigma, state, steps = converge(w_q, w_k, start(w_q, granularity), granularity=granularity)
    torch.testing.assert_close(sigma, expected, rtol=5e-6, atol=0.0)
    assert (sigma <= expected * (1 + 1e-12)).all()
    warm, _ = power_iteration(w_q, w_k, state, 1, granularity=granularity)
    torch.testing.assert_close(warm, expected, rtol=5e-6, atol=0.0)
    assert converge(w_q, w_k, state, granularity=granularity)[2] < steps


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_stacked_layers_equal_single_layers(granularity):
    torch.manual_seed(2)
    w_q, w_k = torch.randn(3, 4, 8, 32), torch.randn(3, 2, 8, 32)
    states = torch.stack([start(w_q[0], granularity, layer) for layer in range(3)])
    sigma, state = power_iteration(w_q, w_k, states, 2, granularity=granularity)
    settled, _, steps = converge(w_q, w_k, states, granularity=granularity)
    each = [converge(*parts, granularity=granularity) for parts in zip(w_q, w_k, states, strict=True)]
    assert torch.equal(settled, torch.stack([single[0] for single in each]))
    assert steps == max(single[2] for single in each)
    for layer in range(3):
        one_sigma, one_state = power_iteration(w_q[layer], w_k[layer], states[layer], 2, granularity=granularity)
        assert torch.equal(sigma[layer], one_sigma) and torch.equal(state[layer], one_state)


def test_a_heads_result_does_not_depend_on_the_other_heads():
    torch.manual_seed(3)
    w_q, w_k = torch.randn(8, 8, 64), torch.randn(4, 8, 64)
    whole = converge(w_q, w_k, start(w_q, "head"), granularity="head")
    half = converge(w_q[4:], w_k[2:], start_vectors(64, layer=1, heads=range(4, 8)), granularity="head")
    torch.testing.assert_close(whole[0][4:], half[0], rtol=1e-14, atol=0.0)
    assert torch.equal(whole[0][4:].float(), half[0].float())
    torch.testing.assert_close(whole[1][4:], half[1], rtol=1e-12, atol=1e-14)


def test_start_vectors_depend_on_global_numbers_only():
    whole = start_vectors(16, layer=3, heads=range(8))
    assert torch.equal(whole[4:6], start_vectors(16, layer=3, heads=range(4, 6)))
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(8, dtype=torch.float64))
    everything = torch.cat([whole, start_vectors(16, layer=4, heads=range(8)), start_vectors(16, layer=3)[None]])
    assert len({tuple(vector.tolist()) for vector in everything}) == 17


def test_layer_norm_of_cancelling_heads_is_zero():
    """THEORY 2: heads (A, B) and (-A, B) cancel, so the layer's norm is no bound for its heads."""
    torch.manual_seed(4)
    a, b = torch.randn(1, 8, 32), torch.randn(1, 8, 32)
    w_q = torch.cat([a, -a])
    sigma, _, _ = converge(w_q, b, start(w_q, "layer"), granularity="layer")
    heads = gram_norm(w_q, b)
    assert sigma.item() <= 1e-12 * heads[0].item()
    assert heads.min() > 1.0


def test_one_warm_step_lags_behind_an_orthogonal_spike_and_the_trace_bound_does_not():
    """THEORY 2.3: after a rank-1 spike orthogonal to the tracked vector one warm step sees nothing of it."""
    torch.manual_seed(5)
    d = 64
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0].T
    scales = torch.tensor([1.0, 0.5, 0.25, 0.1], dtype=torch.float64)[:, None]
    w_q, w_k = (scales * basis[:4])[None], (scales * basis[:4])[None]
    sigma, state, _ = converge(w_q, w_k, start(w_q, "head"), granularity="head", tolerance=1e-14)
    torch.testing.assert_close(sigma, torch.ones_like(sigma))
    spiked_q, spiked_k = w_q.clone(), w_k.clone()
    spiked_q[0, 3], spiked_k[0, 3] = 10 * basis[10], 10 * basis[11]  # a rank-1 part of norm 100
    true = gram_norm(spiked_q, spiked_k).item()
    assert true == pytest.approx(100.0)
    assert power_iteration(spiked_q, spiked_k, state, 1, granularity="head")[0].item() < 0.02 * true
    assert true <= trace_power_bound(spiked_q, spiked_k).item() <= true * 4 ** (1 / 64) * (1 + 1e-9)


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_zero_and_non_finite_weights_end_and_keep_the_state(granularity, value):
    w_q, w_k = torch.full((2, 4, 16), value), torch.randn(1, 4, 16)
    state = start(w_q, granularity)
    sigma, kept, steps = converge(w_q, w_k, state, granularity=granularity)
    assert (sigma == 0).all() if value == 0.0 else (~torch.isfinite(sigma)).all()
    assert torch.equal(kept, state) and steps == 1
    # And the vectors are good again once the weights are.
    good = torch.randn(2, 4, 16)
    assert torch.isfinite(power_iteration(good, w_k, kept, 1, granularity=granularity)[0]).all()


def test_max_steps_ends_an_iteration_that_does_not_settle():
    torch.manual_seed(6)
    w = torch.randn(2, 8, 32)
    assert converge(w, w.flip(0), start(w, "head"), granularity="head", tolerance=0.0, max_steps=5)[2] == 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"granularity": "tensor"}, "Granularity"),
        ({"steps": 0}, "at least one step"),
        ({"state": torch.zeros(3, 16)}, "state must have shape"),
        ({"w_k": torch.zeros(3, 4, 16)}, "multiple of n_kv"),
        ({"w_k": torch.zeros(2, 2, 4, 16)}, "differ in layers"),
    ],
)
def test_bad_arguments_are_one_sentence(change, message):
    arguments = {"w_q": torch.zeros(4, 4, 16), "w_k": torch.zeros(2, 4, 16), "state": torch.zeros(4, 16), "steps": 1}
    arguments = {**arguments, "granularity": "head", **change}
    with pytest.raises(ValueError, match=message):
        power_iteration(**arguments)
