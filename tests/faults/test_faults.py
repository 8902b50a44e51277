"""What happens to a run that is hit: a NaN in a weight, a loss or a gradient that is none, a spike, the clock."""

import os
import re

import pytest

from tests.functional.common import base, close, column, launch, read_records, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

TP2, PP2, SP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--sequence-parallel"
STEPS = 8


def flags_for(*more):
    return base("--train-iters", STEPS, *more)


def announce_forward():
    """Every forward and backward pass of the rank says so on stdout."""
    from megatron_geoscale.training import loop

    plain = loop._run_schedule

    def run_schedule(*args, **options):
        print("forward")
        return plain(*args, **options)

    loop._run_schedule = run_schedule


NAN_CASES = {  # name: (ranks, flags, layer, head and matrix that hold the NaN)
    "one": (1, "", 2, 2),
    "tp2": (2, TP2, 2, 2),
    "tp2-pp2-sp": (4, f"{TP2} {PP2} {SP} --num-layers 4", 4, 2),
    "dp2-overlap-bf16": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16", 2, 2),
    "tp2-paper-layer": (2, f"{TP2} --geoscale-recipe paper --geoscale-granularity layer", 2, 2),
}


@pytest.mark.parametrize("case", NAN_CASES)
def test_nan_stops_every_rank_with_one_sentence_before_the_forward(tmp_path, case):
    ranks, extra, layer, head = NAN_CASES[case]
    log = tmp_path / "log.jsonl"
    flags = flags_for(extra, "--geoscale-fault-injection nan_weight:3", "--save", tmp_path, "--save-interval 2")
    runs = launch([*flags, "--geoscale-log-jsonl", log], ranks, prepare=announce_forward)
    assert {run.err for run in runs} == {
        f"pretrain.py: error: non-finite attention weights in layer {layer}, head {head}, W_K (with its norm gain and "
        "bias folded in): no FP8 scale can be made from them, training stops before the forward pass\n"
    }
    assert [run.code for run in runs] == [2] * ranks
    assert [run.out.count("forward\n") for run in runs] == [2] * ranks
    assert [run.left_behind for run in runs] == [0] * ranks
    assert column(read_records(log), "iteration") == [1, 2]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.fixture(scope="module")
def whole(megatron):
    """Losses without interruption."""
    return train(flags_for())


@pytest.mark.parametrize(
    ("flag", "stops_at"), [("--exit-duration-in-mins 1e-7", 1), ("--exit-interval 5", 5), ("--exit-interval 3", 3)]
)
def test_exit_flags_save_and_say_why(tmp_path, whole, flag, stops_at):
    (run,) = succeed(flags_for(flag, "--save", tmp_path))
    name = flag.split()[0]
    assert run.out.splitlines()[-1].endswith(f"exiting at iteration {stops_at}: {name}")
    assert re.findall(r"iteration +(\d+)/ ", run.out) == [str(i) for i in range(1, stops_at + 1)]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(stops_at)
    rest = train(flags_for("--load", tmp_path))
    assert column(rest, "lm_loss") == column(whole, "lm_loss")[stops_at:]


def test_time_that_is_not_up_stops_nothing(tmp_path):
    (run,) = succeed(flags_for("--exit-duration-in-mins 60"))
    assert run.out.splitlines()[-1].endswith("training is complete")


def test_spike_saturates_delayed_scales_and_no_certified_one():
    """The project's claim in small: weights multiplied by 4 at iteration 5."""
    calm = flags_for("--init-method-std 0.2 --lr 1e-3")
    flags = [*calm, "--geoscale-fault-injection", "weight_spike:5:4"]
    certified, delayed, none = (train([*flags, "--geoscale-recipe", r]) for r in ("certified", "delayed", "none"))
    assert column(certified, "geoscale.saturated") == [0] * STEPS
    assert column(delayed, "geoscale.saturated")[4] > 0
    assert column(delayed, "geoscale.overrange_max")[4] > 3
    assert max(column(certified, "geoscale.overrange_max")) <= 1
    sqnr = [record["geoscale"].get("attention_sqnr_db") for record in certified]
    assert [value is not None for value in sqnr] == [i == 5 for i in range(1, STEPS + 1)]
    assert sqnr[4] > delayed[4]["geoscale"]["attention_sqnr_db"] + 6
    assert close(column(certified, "lm_loss"), column(none, "lm_loss"), 0.1)
    unhurt = column(train([*calm, "--geoscale-recipe", "none"]), "lm_loss")
    assert [a == b for a, b in zip(unhurt, column(none, "lm_loss"), strict=True)] == [True] * 4 + [False] * 4


def spoil(what, iteration):
    """A `prepare` under which the last rank's loss, or the gradients that come of it, are not finite at `iteration`."""

    def prepare():
        from megatron_geoscale.training import loop

        plain, calls = loop._run_schedule, []

        def run_schedule(run, *args, **options):
            calls.append(None)
            mine = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and len(calls) == iteration
            if mine and what == "loss":
                loop._loss, loss = lambda *args: poisoned(loss(*args)), loop._loss
            value = plain(run, *args, **options)
            if mine and what == "gradient":
                for chunk in run.chunks:
                    next(chunk.parameters()).main_grad.view(-1)[0] = float("inf")
            if mine and what == "loss":
                loop._loss = loss
            return value

        def poisoned(answer):
            return answer[0] * float("nan"), *answer[1:]

        loop._run_schedule = run_schedule

    return prepare


@pytest.mark.parametrize(
    ("ranks", "extra"), [(1, ""), (2, TP2), (2, PP2), (2, "--use-distributed-optimizer"), (2, f"{PP2} --bf16")]
)
def test_nan_loss_of_one_rank_stops_all_and_costs_no_checkpoint(tmp_path, ranks, extra):
    flags = flags_for(extra, "--save-interval 2 --save", tmp_path)
    runs = launch(flags, ranks, prepare=spoil("loss", 4))
    assert [run.code for run in runs] == [1] * ranks
    lines = [line for run in runs for line in run.err.splitlines() if "pretrain.py" in line]
    said = {re.sub(r"rank \d", "rank N", line) for line in lines}
    diverged = {line for line in said if "the gradients are not finite, training has diverged" in line}
    assert diverged and said - diverged <= {"pretrain.py: rank N stops because another rank has gone"}
    assert "Traceback" not in "".join(run.err for run in runs)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.mark.parametrize(("ranks", "extra"), [(1, ""), (2, "--use-distributed-optimizer")])
def test_infinite_gradient_under_fp16_skips_the_step_and_changes_no_scale(ranks, extra):
    """The dynamic loss scale has come down from 2**32 by then, and halves again."""
    flags = base("--train-iters 30 --fp16", extra)
    calm = train(flags, ranks)
    applied = [i for i in range(1, 30) if calm[i]["geoscale"]["refresh_ms"] > 0]  # refreshed: the step before applied
    at = applied[1]  # steps are counted from 1, so it is the step after the second that was applied
    hit = train(flags, ranks, prepare=spoil("gradient", at + 1))
    digests = column(hit, "geoscale.digest")
    assert digests[: at + 1] == column(calm, "geoscale.digest")[: at + 1]
    assert digests[at + 1] == digests[at] and column(hit, "geoscale.refresh_ms")[at + 1] == 0
    assert column(calm, "geoscale.digest")[at + 1] != digests[at]
    assert column(hit, "learning_rate")[at] == column(hit, "learning_rate")[at - 1]
    assert digests[at + 2] != digests[at]
