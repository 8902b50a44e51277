"""The calibrated recipe in real runs: one alpha whatever the layout, across a resume, and raised when it must be."""

import pytest
import torch

from megatron_geoscale.scaling.slots import SLOTS
from tests.functional.common import base, column, flags_of, layer_column, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
CALIBRATED = "--geoscale-recipe calibrated --geoscale-logits-dtype fp8 --geoscale-burn-in-steps 3"


def alphas(records):
    return [layer_column(record, "alpha") for record in records]


def without_learning(*more):
    """Weights that stay as they are, so layouts differ in nothing but the rounding of activations."""
    return base("--lr 1e-30 --train-iters 5", CALIBRATED, *more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Checkpoint of the start, and the records of one rank from there."""
    start = tmp_path_factory.mktemp("start")
    succeed([*without_learning("--train-iters 0 --save"), str(start)])
    return start, train([*without_learning("--load"), str(start)])


@pytest.mark.parametrize("extra", [TP2, f"{TP2} --sequence-parallel", "", PP2])
def test_alpha_and_digest_do_not_depend_on_the_layout(alone, extra):
    start, expected = alone
    records = train([*without_learning("--load"), str(start), *flags_of(extra)], 2)
    assert alphas(records) == alphas(expected)
    assert column(records, "geoscale.digest") == column(expected, "geoscale.digest")
    digests = column(expected, "geoscale.digest")
    assert digests[0] == digests[1] == digests[2] != digests[3] == digests[4]
    assert alphas(expected)[2] == [None, None]
    for layer in alphas(expected)[3]:
        assert set(layer) == {"qkv", "logits", "o"} and all(0.01 <= a <= 1 for a in layer.values())
        assert layer["qkv"] < 1 and layer["logits"] < 1
    # Scales only: bounds are those of the weights, and a slot that is not calibrated has the scale that it had.
    assert layer_column(expected[0], "logit_bound") == layer_column(expected[4], "logit_bound")
    before, after = (layer_column(expected[step], "scale_qkv") for step in (2, 3))
    for old, new, alpha in zip(before, after, alphas(expected)[3], strict=True):
        assert new / old == pytest.approx(1 / alpha["qkv"], rel=1e-6)
    assert sum(column(expected, "geoscale.saturated")) == 0


def test_burn_in_goes_on_in_another_layout(alone, tmp_path):
    start, expected = alone
    succeed([*without_learning("--exit-interval 2 --save", tmp_path, "--load"), str(start), *flags_of(TP2)], 2)
    records = train([*without_learning("--load"), str(tmp_path), *flags_of(PP2)], 2)
    assert column(records, "iteration") == [3, 4, 5]
    assert alphas(records) == alphas(expected)[2:]
    assert column(records, "geoscale.digest") == column(expected, "geoscale.digest")[2:]


CASES = {
    "calibrated": (1, CALIBRATED, 2),
    "calibrated, alpha set": (1, CALIBRATED, 4),
    "calibrated, power iteration, fp32 logits": (
        1, "--geoscale-recipe calibrated --geoscale-estimator power --geoscale-burn-in-steps 4", 2),
    "paper": (1, "--geoscale-recipe paper --geoscale-logits-dtype fp8 --geoscale-burn-in-steps 4", 3),
    "calibrated, tp2 with dropout": (2, f"{CALIBRATED} {TP2} --attention-dropout 0.1 --hidden-dropout 0.1", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_calibration_is_the_uninterrupted_one_bit_for_bit(case, tmp_path):
    ranks, extra, stop = CASES[case]
    flags = base("--train-iters 6 --lr-decay-iters 6", extra)
    whole = train(flags, ranks)
    parts = train([*flags, *flags_of("--exit-interval", stop, "--save", tmp_path)], ranks)
    parts += train([*flags, *flags_of("--exit-interval 6 --load", tmp_path)], ranks)
    for name in ("iteration", "lm_loss", "geoscale.digest", "geoscale.saturated"):
        assert column(parts, name) == column(whole, name), name
    assert alphas(parts) == alphas(whole)
    assert alphas(whole)[0] == [None, None] and None not in alphas(whole)[-1]


def test_finetuning_starts_a_new_burn_in_and_a_recipe_brings_its_own(tmp_path):
    flags = base("--lr-decay-iters 8", CALIBRATED)
    first = train([*flags, *flags_of("--train-iters 8 --exit-interval 4 --save", tmp_path)])
    assert None not in alphas(first)[-1]
    tuned = train([*flags, *flags_of("--train-iters 4 --finetune --load", tmp_path)])
    assert [None in alpha for alpha in alphas(tuned)] == [True, True, True, False]
    paper = train([*flags, *flags_of("--geoscale-recipe paper --train-iters 8 --load", tmp_path)])
    assert [None in alpha for alpha in alphas(paper)] == [True, True, True, False]


def test_validation_leaves_no_trace_in_a_calibration():
    flags = base("--train-iters 6 --eval-interval 2", CALIBRATED)
    without, plain = train(flags), train([*flags, "--eval-iters", "2"])
    assert column(plain, "geoscale.digest") == column(without, "geoscale.digest")
    assert alphas(plain) == alphas(without)


def watch_raises(trainer, go):
    """Each step's saturated slots as its rank saw them, and alpha before and after the calibrator took them up."""
    scaling, seen = trainer.run.scaling, []
    end_step, news, running = scaling.end_step, scaling.news, []

    def watched_end_step():
        running.extend((scaling.calibrator.gauge.saturated > 0, scaling.calibrator.factors.clone()))
        end_step()

    def watched_news():  # at every step, since that is the log interval
        told = news()
        seen.append((*running, scaling.calibrator.factors.clone(), scaling.digest(), told))
        running.clear()
        return told

    scaling.end_step, scaling.news = watched_end_step, watched_news
    go()
    return seen


@pytest.mark.parametrize(("ranks", "extra"), [(1, ""), (2, TP2), (2, "")])
def test_saturation_raises_alpha_of_its_slot_at_once_on_all_ranks(ranks, extra):
    """Next to no room above what one step saw, and a weight spike: values outgrow their share of the bound."""
    flags = base(CALIBRATED, "--geoscale-burn-in-steps 1 --geoscale-calibration-factor 1.001 --train-iters 8",
                 "--geoscale-fault-injection weight_spike:5:20", extra, model="gpt2")
    runs = succeed(flags, ranks, watch=watch_raises)
    calibrated = torch.tensor([slot in ("qkv", "logits", "o") for slot in SLOTS])
    raises = 0
    for number, steps in enumerate(zip(*(run.value for run in runs)), start=1):
        saturated = torch.stack([step[0] for step in steps]).any(0) & calibrated
        _, before, after, digest, told = steps[0]
        for step in steps:
            assert torch.equal(step[2], after) and step[3] == digest and step[4] == told
        if number == 1:
            continue
        expected = torch.where(saturated, (2 * before).clamp(max=1.0), before)
        assert torch.equal(after, expected)
        changed = (after != before).nonzero().tolist()
        raises += len(changed)
        assert len(told) == len(changed)
        for sentence, (row, slot) in zip(told, changed):
            assert f"values of {SLOTS[slot]} saturated in layer {row + 1}: alpha is raised" in sentence
            assert sentence in runs[-1].out + runs[0].out
    assert raises > 0
