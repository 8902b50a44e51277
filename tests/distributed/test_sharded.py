"""Norms from weights that no rank holds whole equal the unsharded ones, with traffic far below the weights' size."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from megatron_geoscale.spectral import (
    FlatShard,
    all_reduced_gram,
    certified_norm,
    converge,
    gram,
    gram_norm,
    power_iteration,
    row_sharded_grams,
    row_sharded_norm_bound,
    sharded_converge,
    sharded_power_iteration,
    start_vectors,
)

LAYERS, N_Q, N_KV, D_H, D = 5, 8, 4, 6, 50
SIZES = {"num_heads": N_Q, "num_groups": N_KV, "head_dim": D_H}

# Where each rank's part of a weight begins and ends, as functions of its (elements, elements of a row).
ZERO3 = (0, lambda n, d: -(-n // 3), lambda n, d: 2 * -(-n // 3), lambda n, d: n)
UNEVEN = (0, lambda n, d: n // 7, lambda n, d: n // 7 + 3, lambda n, d: n)
EMPTY = (0, lambda n, d: n // 3 + 1, lambda n, d: n, lambda n, d: n)
ROWS = (0, lambda n, d: (n // d // 2 + 1) * d, lambda n, d: n)
HEADS = (0, lambda n, d: n // 2, lambda n, d: n)
LAYOUTS = {"zero3": ZERO3, "uneven": UNEVEN, "empty": EMPTY, "whole rows": ROWS, "whole heads": HEADS}


def weights(layers=LAYERS):
    generator = torch.Generator().manual_seed(17)
    return tuple(torch.randn(layers, n, D_H, D, generator=generator) for n in (N_Q, N_KV))


def start(granularity, layers=LAYERS):
    heads = range(N_Q) if granularity == "head" else None
    return torch.stack([start_vectors(D, layer=layer, heads=heads) for layer in range(layers)])


def local_shards(rank, layout, layers=LAYERS):
    """This rank's shards of the query and key weights: two lists, one entry per layer."""

    def local(w):
        rows, boundaries = w.shape[1] * D_H, LAYOUTS[layout]
        first, last = (b if b == 0 else b(rows * D, D) for b in boundaries[rank : rank + 2])
        return [FlatShard(layer.reshape(-1)[first:last].clone(), first, rows, D) for layer in w]

    return tuple(local(w) for w in weights(layers))


def sharded(rank, world, layout):
    shards = local_shards(rank, layout)
    group = dist.group.WORLD
    iterations = {
        granularity: sharded_power_iteration(
            *shards, start(granularity), 3, **SIZES, granularity=granularity, group=group
        )
        for granularity in ("head", "layer")
    }
    grams = tuple(row_sharded_grams(part, head_dim=D_H, group=group) for part in shards)
    return iterations, grams, row_sharded_norm_bound(*shards, head_dim=D_H, group=group)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_shards_equal_the_unsharded_weights(layout):
    w_q, w_k = weights()
    ranks = run_ranks(sharded, len(LAYOUTS[layout]) - 1, layout)
    for granularity in ("head", "layer"):
        expected = power_iteration(w_q, w_k, start(granularity), 3, granularity=granularity)
        for part in (0, 1):
            results = [iterations[granularity][part] for iterations, _, _ in ranks]
            assert all(torch.equal(results[0], other) for other in results)  # bit-identical on all ranks
            torch.testing.assert_close(results[0], expected[part], rtol=1e-6, atol=1e-9)
    certified = torch.stack([certified_norm(q, k) for q, k in zip(w_q, w_k, strict=True)])
    for _, grams, bound in ranks:
        assert torch.equal(bound, ranks[0][2])
        (g_q, parts_q), (g_k, parts_k) = grams
        whole = (parts_q == 1) & (parts_k == 1).repeat_interleave(N_Q // N_KV, dim=1)
        torch.testing.assert_close(bound[whole], certified[whole], rtol=1e-6, atol=0.0)
        assert (bound[~whole] >= certified[~whole]).all()
        spread = (parts_q * parts_k.repeat_interleave(N_Q // N_KV, dim=1)).sqrt()
        assert (bound <= 1.2 * spread * certified).all()
        for g, w in ((g_q, w_q), (g_k, w_k)):
            torch.testing.assert_close(
                g.diagonal(0, -2, -1), w.double().square().sum(-1), rtol=1e-12, atol=0.0
            )  # norms of rows are exact, however cut
        if layout == "whole heads":
            assert whole.all()
            torch.testing.assert_close(g_q, torch.stack([gram(w) for w in w_q]), rtol=1e-12, atol=1e-12)
        else:
            assert parts_q.max() > 1 and whole.any()


GAIN = torch.linspace(0.0, -3.0, D).exp()  # the norms' top vectors stand out, so few steps settle them


def converged(rank, world, layout):
    shards = [[dataclasses.replace(s, gain=GAIN) for s in part] for part in local_shards(rank, layout, 2)]
    options = {**SIZES, "group": dist.group.WORLD, "tolerance": 1e-8}
    return {
        granularity: sharded_converge(*shards, start(granularity, 2), granularity=granularity, **options)
        for granularity in ("head", "layer")
    }


def test_a_cold_start_from_flat_shards_reaches_the_dense_norm():
    w_q, w_k = (w.double() * GAIN.double() for w in weights(2))
    interactions = w_q.mT @ w_k.repeat_interleave(N_Q // N_KV, 1)
    dense = {"head": interactions, "layer": interactions.sum(1)}
    ranks = run_ranks(converged, 3, "uneven")
    for granularity, matrices in dense.items():
        sigma, state, steps = ranks[0][granularity]
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrices, 2), rtol=1e-6, atol=0.0)
        for other in ranks:  # all stop at the same step, with the same bits
            assert other[granularity][2] == steps
            assert torch.equal(other[granularity][0], sigma) and torch.equal(other[granularity][1], state)
        whole = converge(w_q, w_k, start(granularity, 2), granularity=granularity, tolerance=1e-8)
        assert steps == whole[2] > 3
        torch.testing.assert_close(sigma, whole[0], rtol=1e-9, atol=0.0)


def tied_across_the_cut(rank, world):
    """A head of two equal rows, one and a half of them on rank 0: local Gram matrices miss a quarter of its norm."""
    first, last = ((0, 3 * D // 2), (3 * D // 2, 2 * D))[rank]
    shard, group = [FlatShard(torch.ones(last - first), first, 2, D)], dist.group.WORLD
    grams, parts = row_sharded_grams(shard, head_dim=2, group=group)
    bound = row_sharded_norm_bound(shard, shard, head_dim=2, group=group)
    return grams[0], parts[0], bound[0]


def test_local_grams_alone_would_be_no_bound_and_the_frobenius_norm_helps():
    w = torch.ones(1, 2, D)
    norm = gram_norm(w, w)
    for grams, parts, bound in run_ranks(tied_across_the_cut, 2):
        torch.testing.assert_close(gram_norm(w, w, grams=(grams, grams)), 0.75 * norm, rtol=1e-6, atol=0.0)
        assert parts.tolist() == [2.0]  # which would make it 1.5 times the norm
        assert norm <= bound <= 1.000001 * norm


def columns(rank, world):
    ends = (0, 30, D)
    return [all_reduced_gram(w[..., ends[rank] : ends[rank + 1]], dist.group.WORLD) for w in weights()]


def test_grams_of_columns_add_up():
    w_q, w_k = weights()
    for grams_q, grams_k in run_ranks(columns, 2):
        for q, k, *grams in zip(w_q, w_k, grams_q, grams_k, strict=True):
            torch.testing.assert_close(gram_norm(q, k, grams=tuple(grams)), gram_norm(q, k), rtol=1e-6, atol=0.0)


def traffic(rank, world, layers, steps):
    """What each function all-reduces: its name -> sizes of the tensors, in elements."""
    original, sizes = dist.all_reduce, []

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    def counted(function, *args, **kwargs):
        sizes.clear()
        function(*args, **kwargs, group=dist.group.WORLD)
        return list(sizes)

    dist.all_reduce = counting
    shards = local_shards(rank, "zero3", layers)
    found = {
        granularity: counted(
            sharded_power_iteration, *shards, start(granularity, layers), steps, **SIZES, granularity=granularity
        )
        for granularity in ("head", "layer")
    }
    found["bound"] = counted(row_sharded_norm_bound, *shards, head_dim=D_H)
    found["columns"] = counted(all_reduced_gram, weights(layers)[0][..., rank::world])
    return found


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_collectives_do_not_grow_with_layers_nor_traffic_with_the_weights(layers):
    steps = 2
    for found in run_ranks(traffic, 3, layers, steps):
        head = [N_Q * D_H, N_Q * D] * 2  # B v, A^T z, A v, B^T z: never a product of d_h and d
        layer = [N_KV * D_H, D, N_Q * D_H, D]
        assert found["head"] == [layers * size for size in head] * steps
        assert found["layer"] == [layers * size for size in layer] * steps
        assert found["bound"] == [layers * n * (D_H * D_H + 1) for n in (N_Q, N_KV)]
        assert found["columns"] == [layers * N_Q * D_H * D_H]
