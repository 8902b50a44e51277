"""Whatever the layout, pretrain.py trains the same model from one checkpoint, and makes the same scales from it."""

import pytest
import torch

from tests.functional.common import (
    base,
    close,
    column,
    flags_of,
    layer_column,
    succeed,
    train,
)

pytestmark = pytest.mark.usefixtures("megatron")

STEPS = 20
SHAPE = "--num-layers 4 --lr 1e-3 --lr-decay-iters 20"
BOUNDS = ("sigma", "sigma_bound", "logit_bound", "amax_q", "amax_k", "amax_v", "scale_qkv")
TP2, PP2, SP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--sequence-parallel"
INTERLEAVED = "--num-layers-per-virtual-pipeline-stage 1"
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LAYOUTS = {  # name: (ranks, flags)
    "tp2": (2, TP2),
    "tp2-sp": (2, f"{TP2} {SP}"),
    "pp2": (2, PP2),
    "pp2-interleaved": (2, f"{PP2} {INTERLEAVED} --micro-batch-size 1"),
    "dp2": (2, ""),
    "dp2-distopt-overlap": (2, DISTRIBUTED_OPTIMIZER),
    "tp2-pp2-sp": (4, f"{TP2} {PP2} {SP}"),
    "tp2-dp2-sp-distopt-overlap": (4, f"{TP2} {SP} {DISTRIBUTED_OPTIMIZER}"),
}


def off_their_start(trainer, go):
    """Norm gains and biases that training has moved, as far as the bounds can tell; then the run, which saves."""
    with torch.no_grad():
        for name, parameter in trainer.run.chunks[0].named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    trainer.run.optimizer.reload_model_params()
    go()


@pytest.fixture(scope="module", params=["llama"])
def start(request, megatron, tmp_path_factory):
    """(flags that load the checkpoint which one rank saved at iteration 0, the records of one rank under them)."""
    folder = tmp_path_factory.mktemp(request.param)
    succeed(base(SHAPE, "--train-iters 0 --save", folder, model=request.param), watch=off_their_start)
    flags = base(SHAPE, "--train-iters", STEPS, "--load", folder, model=request.param)
    return flags, train(flags)


@pytest.mark.parametrize(
    ("start", "layout"),
    [("llama", name) for name in LAYOUTS] + [("gpt2", name) for name in ("tp2-sp", "pp2-interleaved", "tp2-pp2-sp")],
    indirect=["start"],
)
def test_every_layout_trains_as_one_rank_does(start, layout):
    """To 1e-4, not to rounding: a value that one layout rounds up and another down, in a cast to 3 bits of mantissa,
    is 6 % apart. The next test has no casts."""
    flags, alone = start
    ranks, extra = LAYOUTS[layout]
    records = train([*flags, *flags_of(extra)], ranks)
    assert column(records, "iteration") == list(range(1, STEPS + 1))
    assert close(column(records, "lm_loss"), column(alone, "lm_loss"), 1e-4)
    assert close(column(records, "grad_norm"), column(alone, "grad_norm"), 1e-2)
    assert column(records, "learning_rate") == column(alone, "learning_rate")
    assert column(records, "geoscale.saturated") == [0] * STEPS
    for name in BOUNDS:
        assert close(layer_column(records[0], name), layer_column(alone[0], name), 1e-6), name
        assert close(layer_column(records[-1], name), layer_column(alone[-1], name), 1e-2), name
    assert records[0]["geoscale"]["digest"] == alone[0]["geoscale"]["digest"]
    assert records[-1]["geoscale"]["digest"] != alone[0]["geoscale"]["digest"]


@pytest.mark.parametrize("layout", ["tp2-pp2-sp", "dp2-distopt-overlap"])
def test_without_casts_layouts_agree_to_rounding(start, layout):
    flags, _ = start
    ranks, extra = LAYOUTS[layout]
    flags = [*flags, *flags_of("--geoscale-recipe none --train-iters 10")]
    alone, records = train(flags), train([*flags, *flags_of(extra)], ranks)
    for name in ("lm_loss", "grad_norm"):
        assert close(column(records, name), column(alone, name), 1e-6), name
    assert column(records, "geoscale") == [None] * 10


def test_the_curve_is_one_that_learns(start):
    """Else equal curves would say little."""
    _, alone = start
    losses = column(alone, "lm_loss")
    assert abs(losses[-1] - losses[0]) > 100 * 1e-4 * losses[0]
    assert len(set(layer_column(alone[0], "sigma"))) == 4
    assert layer_column(alone[0], "layer") == [1, 2, 3, 4]


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2-distopt-overlap"])
def test_bf16_weights_make_the_same_scales_in_every_layout(start, layout):
    flags, _ = start
    ranks, extra = LAYOUTS[layout]
    two_steps = [*flags, "--bf16", "--train-iters", 2, "--lr-decay-iters", 2]
    alone, records = train(two_steps), train([*two_steps, *flags_of(extra)], ranks)
    assert records[0]["geoscale"]["digest"] == alone[0]["geoscale"]["digest"]
    assert close(column(records, "lm_loss"), column(alone, "lm_loss"), 1e-2)


@pytest.mark.parametrize(("estimator", "layout"), [("gram", "tp2"), ("power", "tp2-pp2-sp")])
def test_layer_granularity_sums_over_tensor_parallel_ranks(start, estimator, layout):
    flags, head = start
    ranks, extra = LAYOUTS[layout]
    flags = [*flags, "--train-iters", 2, *flags_of("--geoscale-granularity layer --geoscale-estimator", estimator)]
    alone, records = train(flags), train([*flags, *flags_of(extra)], ranks)
    assert close(layer_column(records[0], "sigma"), layer_column(alone[0], "sigma"), 1e-6)
    assert close(layer_column(records[-1], "sigma"), layer_column(alone[-1], "sigma"), 1e-3)
    assert not close(layer_column(alone[0], "sigma"), layer_column(head[0], "sigma"), 1e-2)


def replicas(trainer, go):
    """Digest and attention weights of this rank before each step's forward, as the refresh has read them."""
    from megatron_geoscale.scaling.layers import find_attention_layers

    seen, scaling = [], trainer.run.scaling
    layers, plain = find_attention_layers(trainer.run.chunks), scaling.refresh

    def refresh(**options):
        plain(**options)
        seen.append((scaling.digest(), [layer.attention.linear_qkv.weight.detach().clone() for layer in layers]))

    scaling.refresh = refresh
    go()
    return seen


def test_overlapped_gather_is_over_when_the_weights_are_read(start):
    """In bf16 replicas hold different weights between the optimizer's step and the gather that a forward waits for."""
    flags, _ = start
    flags = [*flags, "--bf16", "--train-iters", 4, *flags_of(DISTRIBUTED_OPTIMIZER)]
    one, other = (run.value for run in succeed(flags, 2, watch=replicas))
    assert len(one) == len(other) == 4
    for (digest, weights), (other_digest, other_weights) in zip(one, other, strict=True):
        assert digest == other_digest
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    assert len({digest for digest, _ in one}) == 4
