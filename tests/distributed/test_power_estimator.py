"""The power estimator inside a real engine: restarts where the certificate disproves an estimate, and nowhere else."""

import pytest
import torch
import torch.distributed as dist

from megatron_geoscale.spectral import power_iteration
from tests.distributed.test_engine import randomise
from tests.functional.common import base, succeed

pytestmark = pytest.mark.usefixtures("megatron")

TP2 = "--tensor-model-parallel-size 2"
HEADS, GROUPS, HEAD_DIM, HIDDEN = 4, 2, 8, 32


def dense(p):
    return torch.linalg.svdvals(p.q.mT @ p.k.repeat_interleave(len(p.q) // len(p.k), 0))[:, 0]


def count_converges(calls):
    """Every call of the estimator to `converge` from now on appends to `calls` the shape of its state."""
    from megatron_geoscale.scaling import estimator

    plain = estimator.converge

    def converge(w_q, w_k, state, **options):
        calls.append(tuple(state.shape))
        return plain(w_q, w_k, state, **options)

    estimator.converge = converge


def against(vectors, d):
    """A unit vector of R^d orthogonal to `vectors` [n, d]."""
    basis = torch.linalg.qr(torch.cat([vectors.T, torch.randn(d, d, dtype=torch.float64)], dim=1))[0]
    return basis[:, len(vectors)]


@torch.no_grad()
def spike_orthogonally(layer, vectors, size):
    """Add size^2 to the first group's first head, unseen from the tracked vectors of the group's heads: W_Q += s w e^T
    and W_K += s w f^T with e, f orthogonal to left and right vectors, w to their images in the head."""
    p, per_group = layer.projections(), HEADS // GROUPS
    right = vectors[:per_group]
    inner = right @ p.k[0].T
    left = torch.einsum("hc,hcd->hd", inner, p.q[:per_group])
    left = left / left.norm(dim=-1, keepdim=True)
    w = against(torch.cat([inner, torch.einsum("hd,hcd->hc", left, p.q[:per_group])]), HEAD_DIM)
    e, f = against(torch.cat([left, right]), HIDDEN), against(torch.cat([right, left]), HIDDEN)
    rows = layer.attention.linear_qkv.weight.view(GROUPS, per_group + 2, HEAD_DIM, HIDDEN)
    gain = layer.norm.weight.double()
    rows[0, 0] += size * torch.outer(w, e / gain)
    rows[0, -2] += size * torch.outer(w, f / gain)


def orthogonal_spike(trainer, go):
    randomise(trainer)
    engine, calls = trainer.run.scaling, []
    estimator, (layer, other) = engine.estimator, engine.layers
    engine.refresh()
    before = {number: vector.clone() for number, vector in estimator.vectors.items()}
    spike_orthogonally(layer, before[1], 20 * float(dense(layer.projections()).max()) ** 0.5)
    p = layer.projections()
    plain = {n: power_iteration(q.q, q.k, before[n], 1, granularity="head")
             for n, q in ((1, p), (2, other.projections()))}
    count_converges(calls)
    engine.refresh()
    after, sigma, again = dict(estimator.vectors), estimator.previous[1].clone(), len(calls)
    engine.refresh()
    return {
        "true": dense(p), "plain": plain, "vectors": after, "sigma": sigma,
        "table": engine.table.bound(1, "sigma"), "converges": again, "afterwards": len(calls) - again,
    }


def test_an_orthogonal_spike_deceives_one_warm_step_and_not_the_engine():
    (run,) = succeed(base("--train-iters 1 --geoscale-recipe paper"), watch=orthogonal_spike)
    v = run.value
    concerned = slice(0, HEADS // GROUPS)  # the spiked head, and the one that reads the same key
    assert v["plain"][1][0][0] < 0.02 * v["true"][0]
    assert (v["plain"][1][0][concerned] < 0.9 * v["true"][concerned]).all()
    torch.testing.assert_close(v["sigma"][concerned], v["true"][concerned], rtol=1e-3, atol=0.0)
    assert v["table"] == pytest.approx(float(v["true"].max()), rel=1e-3)
    # Exactly these heads start again. The others, and the other layer, take their warm step, to the last bit.
    assert v["converges"] == 1 and v["afterwards"] == 0
    rest = slice(HEADS // GROUPS, None)
    assert torch.equal(v["vectors"][1][rest], v["plain"][1][1][rest])
    assert torch.equal(v["sigma"][rest], v["plain"][1][0][rest])
    assert not torch.equal(v["vectors"][1][concerned], v["plain"][1][1][concerned])
    assert torch.equal(v["vectors"][2], v["plain"][2][1])


def converges_per_step(trainer, go):
    calls, counts = [], []
    count_converges(calls)
    refresh = trainer.run.scaling.refresh

    def counted(**options):
        calls.clear()
        refresh(**options)
        counts.append(len(calls))

    trainer.run.scaling.refresh = counted
    go()
    return counts


def test_ordinary_steps_restart_nothing_and_a_jump_restarts_its_layers():
    flags = base("--train-iters 6 --lr 1e-3 --geoscale-recipe paper --geoscale-fault-injection weight_spike:5:4")
    (run,) = succeed(flags, watch=converges_per_step)
    assert run.value == [2, 0, 0, 0, 2, 0]


def jump_of_one_head(trainer, go):
    """Four query heads share one key over two ranks: reading the weights is a collective, and rank 0 alone sees the
    jump."""
    engine, calls = trainer.run.scaling, []
    engine.refresh()
    if dist.get_rank() == 0:
        with torch.no_grad():
            engine.layers[0].attention.linear_qkv.weight[:HEAD_DIM] *= 5.0  # the first head's query rows
    count_converges(calls)
    engine.refresh()
    return len(calls), engine.estimator.previous[1].clone(), dense(engine.layers[0].projections()), engine.digest()


def test_a_jump_on_one_rank_of_a_shared_key_group_hangs_no_one():
    flags = base("--train-iters 1 --num-query-groups 1 --geoscale-recipe paper", TP2)
    runs = succeed(flags, 2, watch=jump_of_one_head, timeout=60)
    for run in runs:
        calls, sigma, true, digest = run.value
        assert calls == 1 and digest == runs[0].value[3]
        torch.testing.assert_close(sigma, true, rtol=1e-3, atol=0.0)
