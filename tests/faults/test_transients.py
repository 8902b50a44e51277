"""The sudden changes that pretrain.py can be asked to suffer, and what it says when training has diverged."""

import re

import pytest

from tests.functional.common import base, close, column, launch, layer_column, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

CALM = "--train-iters 6 --lr 1e-3 --init-method-std 0.2 --geoscale-log-sqnr"


def fault(text, recipe, *more):
    return train(base(CALM, "--geoscale-recipe", recipe, "--geoscale-fault-injection", text, *more))


def test_a_learning_rate_spike_lasts_one_update_and_shows_in_the_next_forward():
    calm = train(base(CALM, "--geoscale-recipe none"))
    none = fault("lr_spike:3:1000", "none")
    assert column(none, "lm_loss")[:3] == column(calm, "lm_loss")[:3]
    assert column(none, "lm_loss")[3] != column(calm, "lm_loss")[3]
    assert column(none, "learning_rate") == column(calm, "learning_rate")  # the schedule is not touched
    certified, delayed = (fault("lr_spike:3:1000", recipe) for recipe in ("certified", "delayed"))
    assert column(certified, "geoscale.saturated") == [0] * 6
    assert max(layer_column(certified[3], "sigma")) > 1.5 * max(layer_column(certified[2], "sigma"))
    jump, before = delayed[3]["geoscale"], delayed[2]["geoscale"]
    assert jump["overrange_max"] > 1.5 and jump["saturated"] > before["saturated"]
    sqnr = column(certified, "geoscale.attention_sqnr_db")  # of every step
    assert all(value > 15 for value in sqnr)
    assert jump["attention_sqnr_db"] < sqnr[3] - 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_loaded_into_a_running_history(tmp_path, ranks):
    """The loaded weights are eight times as large as the run's own; optimizer, data and history stay the run's."""
    extra = "--tensor-model-parallel-size 2" if ranks == 2 else ""
    trained = train(base("--train-iters 1 --lr 1e-9 --init-method-std 1.6", extra, "--save", tmp_path), ranks)
    flags = base(CALM, extra, "--geoscale-fault-injection", f"load_weights:4:{tmp_path}")
    certified, delayed = (train([*flags, "--geoscale-recipe", recipe], ranks) for recipe in ("certified", "delayed"))
    assert close(layer_column(certified[3], "sigma"), layer_column(trained[0], "sigma"), 1e-4)
    assert not close(layer_column(certified[2], "sigma"), layer_column(trained[0], "sigma"), 0.5)
    assert column(certified, "geoscale.saturated") == [0] * 6
    assert delayed[3]["geoscale"]["overrange_max"] > 4
    assert column(certified, "iteration") == [1, 2, 3, 4, 5, 6]


def test_weights_that_cannot_be_loaded_are_one_sentence(tmp_path):
    succeed(base("--train-iters 1 --save", tmp_path, "--num-layers 3"))
    for directory, words in ((tmp_path, "--num-layers was 3"), (tmp_path / "none", "holds no checkpoint")):
        (run,) = launch(base(CALM, "--geoscale-fault-injection", f"load_weights:2:{directory}"))
        assert run.code == 2 and words in run.err and "Traceback" not in run.err


def test_overflow_to_nan_ends_the_run_in_one_sentence_unless_it_is_to_go_on():
    spike = ["--geoscale-overflow", "nan", "--geoscale-fault-injection", "weight_spike:3:8"]
    (run,) = launch(base(CALM, "--geoscale-recipe delayed", spike))
    assert run.code == 1 and "Traceback" not in run.err
    (sentence,) = run.err.splitlines()
    assert re.match(r"pretrain.py: rank 0: the gradients are not finite, training has diverged", sentence)
    records = train(base(CALM, "--geoscale-recipe delayed --no-check-for-nan-in-loss-and-grad", spike))
    diverged = [value == "nan" for value in column(records, "lm_loss")]
    assert diverged == sorted(diverged) and diverged[0] is False and diverged[2] is True  # a NaN never goes away
    certified = train(base(CALM, "--geoscale-recipe certified", spike))
    assert column(certified, "geoscale.saturated") == [0] * 6
    saturating = train(base(CALM, "--geoscale-recipe certified --geoscale-fault-injection weight_spike:3:8"))
    assert column(certified, "lm_loss") == column(saturating, "lm_loss")


def test_another_learning_rate_schedule_is_named(tmp_path):
    succeed(base("--train-iters 2 --lr-warmup-iters 1 --save", tmp_path))
    (run,) = launch(base("--train-iters 4 --load", tmp_path))
    assert run.code == 2 and "Traceback" not in run.err
    assert "another learning-rate schedule" in run.err and "--override-opt_param-scheduler" in run.err
    succeed(base("--train-iters 4 --override-opt_param-scheduler --load", tmp_path))
