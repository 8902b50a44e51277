"""Power iteration over tensor-parallel ranks: equal to the unsharded run, and no more collectives for more layers."""

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from megatron_geoscale.spectral import converge, power_iteration, start_vectors

LAYERS, N_Q, N_KV, D_H, D = 3, 8, 4, 8, 48


def weights(layers=LAYERS):
    generator = torch.Generator().manual_seed(11)
    w_q = torch.randn(layers, N_Q, D_H, D, generator=generator)
    return w_q, torch.randn(layers, N_KV, D_H, D, generator=generator)


def start(granularity, heads):
    heads = heads if granularity == "head" else None
    return torch.stack([start_vectors(D, layer=layer, heads=heads) for layer in range(LAYERS)])


def shard(rank, world, granularity):
    w_q, w_k = weights()
    heads = range(rank * N_Q // world, (rank + 1) * N_Q // world)
    w_q = w_q[:, heads.start : heads.stop]
    return w_q, w_k[:, rank * N_KV // world : (rank + 1) * N_KV // world], start(granularity, heads)


def sharded(rank, world, granularity):
    arguments = shard(rank, world, granularity)
    group = dist.group.WORLD
    return (
        power_iteration(*arguments, 3, granularity=granularity, group=group),
        converge(*arguments, granularity=granularity, group=group),
    )


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_equals_unsharded(granularity, world):
    w_q, w_k = weights()
    state = start(granularity, range(N_Q))
    three = power_iteration(w_q, w_k, state, 3, granularity=granularity)
    settled = converge(w_q, w_k, state, granularity=granularity)
    ranks = run_ranks(sharded, world, granularity)
    for expected, which in ((three, 0), (settled, 1)):
        for part in (0, 1):
            parts = [results[which][part] for results in ranks]
            if granularity == "layer":
                assert all(torch.equal(parts[0], other) for other in parts)  # bit-identical on all ranks
            got = torch.cat(parts, dim=1) if granularity == "head" else parts[0]
            torch.testing.assert_close(got, expected[part], rtol=1e-6, atol=1e-9)
    if granularity == "layer":
        assert {results[1][2] for results in ranks} == {settled[2]}
    else:
        sigma = torch.cat([results[1][0] for results in ranks], dim=1)
        assert torch.equal(sigma.float(), settled[0].float())  # same heads, same bits, whatever the tensor parallelism


def replicated_keys(rank, world):
    """num_query_groups < TP: ranks share a key group, each with its own query heads."""
    w_q, w_k = weights()
    heads = slice(rank * N_Q // world, (rank + 1) * N_Q // world)
    return power_iteration(
        w_q[:, heads], w_k[:, :1], start("layer", None), 2, granularity="layer", group=dist.group.WORLD
    )


def test_key_groups_replicated_over_ranks():
    w_q, w_k = weights()
    sigma, _ = power_iteration(w_q, w_k[:, :1], start("layer", None), 2, granularity="layer")
    for result, _ in run_ranks(replicated_keys, 4):
        torch.testing.assert_close(result, sigma, rtol=1e-6, atol=0.0)


def count(rank, world, granularity, layers, steps):
    calls = []
    original = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return original(tensor, *args, **kwargs)

    w_q, w_k, state = (part[:layers] for part in shard(rank, world, granularity))
    dist.all_reduce = counting
    power_iteration(w_q, w_k, state, steps, granularity=granularity, group=dist.group.WORLD)
    return calls


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_collectives_do_not_grow_with_the_number_of_layers(layers):
    for calls in run_ranks(count, 2, "layer", layers, 2):
        assert calls == [(layers, D)] * 4  # two half-iterations a step, one vector per layer in each
    for calls in run_ranks(count, 2, "head", layers, 2):
        assert calls == []


def broken_rank(rank, world, granularity):
    w_q, w_k, state = shard(rank, world, granularity)
    if rank == 1:
        w_q[1, 0, 0, 0] = float("nan")
    sigma, _, steps = converge(w_q, w_k, state, granularity=granularity, group=dist.group.WORLD)
    return torch.isfinite(sigma), steps


def test_a_nan_on_one_rank_ends_alike_on_all():
    results = run_ranks(broken_rank, 2, "layer")
    for finite, steps in results:
        assert finite.tolist() == [True, False, True]
        assert steps == results[0][1]
    local = run_ranks(broken_rank, 2, "head")
    assert local[0][0].all() and local[1][0].sum() == LAYERS * N_Q // 2 - 1
