"""spectral/sharded.py and sharded_gram.py on one process: the parts of a weight, added up here, are the weight."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_geoscale.spectral import (
    FlatShard,
    all_reduced_gram,
    certified_norm,
    gram,
    gram_norm,
    power_iteration,
    row_sharded_grams,
    row_sharded_norm_bound,
    sharded_converge,
    sharded_power_iteration,
    start_vectors,
)
from megatron_geoscale.spectral.sharded import _ranges


def cut(w, boundaries, gain=None):
    """Flat shards of w [rows, d] between the boundaries."""
    return [FlatShard(w.reshape(-1)[a:b], a, *w.shape, gain) for a, b in pairwise(boundaries)]


@st.composite
def sharded_weights(draw):
    """(whole weight in float64, its shards, heads, rows of a head): boundaries inside rows too, and often equal."""
    heads, head_dim, d = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    w = torch.randn(heads * head_dim, d, generator=generator, dtype=torch.float64).to(dtype)
    gain = torch.randn(d, generator=generator) if draw(st.booleans()) else None
    inner = draw(st.lists(st.integers(0, w.numel()), max_size=5))
    whole = w.double() if gain is None else w.double() * gain.double()
    return whole, cut(torch.nn.Parameter(w), [0, *sorted(inner), w.numel()], gain), heads, head_dim


@settings(deadline=None, max_examples=150)
@given(sharded_weights(), st.integers(1, 3))
def test_products_of_the_parts_add_up_to_the_dense_products(case, vectors):
    whole, shards, heads, head_dim = case
    d = whole.shape[1]
    for n in {heads, 1}:  # head granularity, layer granularity
        blocks = whole.view(n, -1, d)
        v = torch.randn(n, vectors, d, dtype=torch.float64)
        u = torch.randn(n, vectors, blocks.shape[1], dtype=torch.float64)
        forward, back = sum(s.apply(v) for s in shards), sum(s.apply_transposed(u) for s in shards)
        torch.testing.assert_close(forward, v @ blocks.mT, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(back, u @ blocks, rtol=1e-12, atol=1e-12)
        assert not forward.requires_grad and not back.requires_grad
    assert torch.equal(sum(s.dense(0, heads * head_dim) for s in shards), whole)
    for shard in shards:
        touched = {e // (head_dim * d) for e in range(shard.start, shard.stop)}
        assert set(shard.heads(head_dim)) == touched


@settings(deadline=None, max_examples=100)
@given(sharded_weights())
def test_sums_of_local_grams_bound_the_gram_of_the_whole(case):
    whole, shards, heads, head_dim = case
    each = [row_sharded_grams([shard], head_dim=head_dim, group=None) for shard in shards]
    grams, parts = (sum(values)[0] for values in zip(*each, strict=True))
    dense = gram(whole.view(heads, head_dim, -1))
    torch.testing.assert_close(grams[parts == 1], dense[parts == 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grams.diagonal(0, 1, 2), dense.diagonal(0, 1, 2), rtol=1e-12, atol=1e-12)
    above = torch.linalg.eigvalsh(parts[:, None, None] * grams - dense)
    assert (above >= -1e-12 * grams.diagonal(0, 1, 2).sum(-1, keepdim=True)).all()


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20))
def test_ranges_cover_without_overlap(start, length, size):
    parts = _ranges(start, start + length, size)
    assert [e for a, b in parts for e in range(a, b)] == list(range(start, start + length))
    for a, b in parts:  # inside one block, or whole blocks: the row arithmetic rests on it
        assert a // size == (b - 1) // size or (a % size == 0 and b % size == 0)


LAYERS, N_Q, N_KV, D_H, D = 2, 6, 2, 4, 24


def weights():
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(LAYERS, n, D_H, D, generator=generator) for n in (N_Q, N_KV))


def whole_shards(w):
    return [FlatShard(layer.reshape(-1), 0, w.shape[1] * D_H, D) for layer in w]


def run(shards_q, shards_k, state, steps=1, **changes):
    sizes = {"num_heads": N_Q, "num_groups": N_KV, "head_dim": D_H, "granularity": "head", "group": None}
    return sharded_power_iteration(shards_q, shards_k, state, steps, **{**sizes, **changes})


def start(granularity):
    heads = range(N_Q) if granularity == "head" else None
    return torch.stack([start_vectors(D, layer=layer, heads=heads) for layer in range(LAYERS)])


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_one_shard_with_everything_is_the_unsharded_iteration(granularity):
    w_q, w_k = weights()
    gain = torch.linspace(-1.0, 2.0, D)
    expected = power_iteration(w_q * gain, w_k * gain, start(granularity), 3, granularity=granularity)
    shards = ([dataclasses.replace(s, gain=gain) for s in whole_shards(w)] for w in (w_q, w_k))
    sigma, state = run(*shards, start(granularity), 3, granularity=granularity)
    torch.testing.assert_close(sigma, expected[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(state, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_converging_is_stepping_until_it_has_settled(granularity):
    shards = tuple(whole_shards(w) for w in weights())
    sizes = {"num_heads": N_Q, "num_groups": N_KV, "head_dim": D_H, "granularity": granularity, "group": None}
    sigma, state, steps = sharded_converge(*shards, start(granularity), **sizes, tolerance=0.0, max_steps=7)
    expected = sharded_power_iteration(*shards, start(granularity), 7, **sizes)
    assert steps == 7 and torch.equal(sigma, expected[0]) and torch.equal(state, expected[1])
    with pytest.raises(ValueError, match="state must have shape"):
        sharded_converge(*shards, start(granularity)[:1], **sizes)


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_zero_and_non_finite_weights_keep_the_state(granularity):
    w_q, w_k = weights()
    w_q[0] = 0.0
    w_k[1, 1, 2, 3] = float("nan")
    state = start(granularity)
    sigma, after = run(whole_shards(w_q), whole_shards(w_k), state, granularity=granularity)
    expected, expected_after = power_iteration(w_q, w_k, state, 1, granularity=granularity)
    torch.testing.assert_close(sigma, expected, rtol=1e-6, atol=0.0, equal_nan=True)
    torch.testing.assert_close(after, expected_after, rtol=1e-6, atol=1e-6)
    assert torch.equal(after[0], state[0])
    bound = row_sharded_norm_bound(whole_shards(w_q), whole_shards(w_k), head_dim=D_H, group=None)
    assert (bound[0] == 0).all() and bound[1].isnan().tolist() == [False] * 3 + [True] * 3


def test_bound_and_grams_are_exact_with_whole_heads():
    w_q, w_k = weights()
    bound = row_sharded_norm_bound(whole_shards(w_q), whole_shards(w_k), head_dim=D_H, group=None)
    expected = torch.stack([certified_norm(q, k) for q, k in zip(w_q, w_k, strict=True)])
    torch.testing.assert_close(bound, expected, rtol=1e-12, atol=0.0)
    columns = all_reduced_gram(w_q, None), all_reduced_gram(w_k, None)
    for layer, parts in enumerate(zip(*columns, strict=True)):
        expected = gram_norm(w_q[layer], w_k[layer])
        torch.testing.assert_close(gram_norm(w_q[layer], w_k[layer], grams=parts), expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(all_reduced_gram(w_q[0], None), columns[0][0], rtol=1e-12, atol=1e-12)
    assert torch.equal(all_reduced_gram(w_q[0, :, :, :0], None), torch.zeros(N_Q, D_H, D_H, dtype=torch.float64))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 3), 0, 2, 3), "must be a vector of floats"),
        ((torch.zeros(6, dtype=torch.int8), 0, 2, 3), "must be a vector of floats"),
        ((torch.zeros(6), 0, 0, 3), "rows and columns"),
        ((torch.zeros(4), 3, 2, 3), "was padding cut off"),
        ((torch.zeros(4), -1, 2, 3), "was padding cut off"),
        ((torch.zeros(6), 0, 2, 3, torch.ones(2)), "gain of a shard"),
    ],
)
def test_shards_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlatShard(*arguments)


def test_an_empty_shard_may_start_anywhere():
    shard = FlatShard(torch.zeros(0), 99, 2, 3)
    assert not shard.apply(torch.ones(2, 1, 3, dtype=torch.float64)).any()
    assert not shard.apply_transposed(torch.ones(2, 1, 1, dtype=torch.float64)).any()
    assert list(shard.heads(1)) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "at least one step"),
        ({"granularity": "group"}, "Granularity must be"),
        ({"num_heads": N_Q - 2}, "do not have the"),
        ({"head_dim": 5}, "not a whole number of heads"),
        ({"granularity": "layer"}, "state must have shape"),
    ],
)
def test_power_iteration_refuses_what_does_not_fit(changes, message):
    w_q, w_k = weights()
    with pytest.raises(ValueError, match=message):
        run(whole_shards(w_q), whole_shards(w_k), start("head"), **changes)


def test_stacks_that_do_not_fit_together_are_refused():
    w_q, w_k = (whole_shards(w) for w in weights())
    with pytest.raises(ValueError, match="do not fit together"):
        run(w_q[:1], w_k, start("head")[:1])
    with pytest.raises(ValueError, match="do not fit together"):
        row_sharded_norm_bound(w_k, w_q, head_dim=D_H, group=None)
    with pytest.raises(ValueError, match="one shape"):
        row_sharded_grams([w_q[0], w_k[0]], head_dim=D_H, group=None)
    with pytest.raises(ValueError, match="one shape"):
        row_sharded_grams([], head_dim=D_H, group=None)
    with pytest.raises(ValueError, match=r"\[\(layers,\) heads"):
        all_reduced_gram(torch.zeros(D_H, D), None)
