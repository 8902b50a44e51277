"""--geoscale-split-over-data-parallel: each replica bounds its share of the layers, and nothing else changes."""

import pytest
import torch
import torch.distributed as dist

from tests.functional.common import base, column, flags_of, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

TP2 = "--tensor-model-parallel-size 2"
SPLIT = "--geoscale-split-over-data-parallel"


def flags_for(*more, steps=3):
    return base("--lr 1e-3 --lr-decay-iters 6 --train-iters", steps, *more)


@pytest.mark.parametrize("recipe", ["certified", "paper"])
@pytest.mark.parametrize(("ranks", "extra"), [(2, ""), (4, TP2)], ids=["dp2", "dp2-tp2"])
def test_table_and_digest_are_those_of_the_run_without_it(ranks, extra, recipe):
    flags = flags_for(extra, "--geoscale-recipe", recipe, "--num-layers 3")
    plain, split = train(flags, ranks), train([*flags, SPLIT], ranks)
    assert column(split, "geoscale.layers") == column(plain, "geoscale.layers")
    assert column(split, "geoscale.digest") == column(plain, "geoscale.digest")
    assert column(split, "lm_loss") == column(plain, "lm_loss")


def count_folded(trainer, go):
    """Numbers of the layers that a refresh folds on this rank, and the table it ends with."""
    from megatron_geoscale.scaling.layers import AttentionLayer

    folded, plain = [], AttentionLayer.projections

    def projections(layer):
        folded.append(layer.number)
        return plain(layer)

    AttentionLayer.projections = projections
    engine = trainer.run.scaling
    engine.refresh()
    return folded, engine.digest(), sorted(engine.estimator.vectors)


@pytest.mark.parametrize(
    ("ranks", "layers", "extra", "shares"),
    [
        (2, 3, "", [[1, 3], [2]]),
        (3, 2, "--global-batch-size 6", [[1], [2], []]),  # one rank with nothing to do
        (4, 3, TP2, [[1, 3], [1, 3], [2], [2]]),
    ],
    ids=["dp2", "dp3-two-layers", "dp2-tp2"],
)
@pytest.mark.parametrize("recipe", ["certified", "paper"])
def test_a_rank_reads_its_share_only(ranks, layers, extra, shares, recipe):
    flags = flags_for(extra, SPLIT, "--geoscale-recipe", recipe, "--num-layers", layers)
    runs = succeed(flags, ranks, watch=count_folded)
    assert [run.value[0] for run in runs] == shares
    assert len({run.value[1] for run in runs}) == 1
    assert [run.value[2] for run in runs] == (shares if recipe == "paper" else [[]] * ranks)


def test_layer_granularity_with_a_rank_that_has_no_layer():
    flags = flags_for("--global-batch-size 6 --geoscale-recipe paper --geoscale-granularity layer")
    plain, split = train(flags, 3), train([*flags, SPLIT], 3)
    assert column(split, "geoscale.digest") == column(plain, "geoscale.digest")


@pytest.mark.parametrize(
    ("before", "after"), [(SPLIT, SPLIT), (SPLIT, ""), ("", SPLIT)], ids=["split-split", "split-plain", "plain-split"]
)
def test_power_vectors_resume_bit_for_bit_with_it_and_without(tmp_path, before, after):
    flags = flags_for("--geoscale-recipe paper", steps=4)
    whole = train([*flags, SPLIT], 2)
    train([*flags, *flags_of(before, "--exit-interval 2 --save", tmp_path)], 2)
    rest = train([*flags, *flags_of(after, "--load", tmp_path)], 2)
    assert column(rest, "iteration") == [3, 4]
    for name in ("lm_loss", "geoscale.digest", "geoscale.layers"):
        assert column(rest, name) == column(whole, name)[2:], name


def break_one_replica(trainer, go):
    """What each rank raises when only one replica's copy of layer 2 has a NaN: the owner's, then the other's."""
    engine, said = trainer.run.scaling, []
    weight = engine.layers[1].attention.linear_qkv.weight
    for rank in (1, 0):
        kept = weight.detach().clone()
        with torch.no_grad():
            if dist.get_rank() == rank:
                weight[-1, -1] = float("nan")  # of the last group's value
            try:
                engine.refresh()
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
            weight.copy_(kept)
    return said


def test_a_nan_on_the_replica_that_reads_the_layer_is_named_on_all_ranks():
    runs = succeed(flags_for(SPLIT), 2, watch=break_one_replica)
    assert runs[0].value == runs[1].value
    owners, others = runs[0].value
    assert owners.startswith("non-finite attention weights in layer 2, head 2, W_V")
    assert others == ""  # the price of the flag: nobody reads the other replica's copy
