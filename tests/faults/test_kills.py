"""kill -9 and a rank that hangs: the others stop in time, and the last complete checkpoint goes on bit for bit."""

import os
import signal
import time

import psutil
import pytest

from tests.faults.moments import at, die, stop
from tests.functional.common import base, column, launch, train

pytestmark = pytest.mark.usefixtures("megatron")

STEPS = 8
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
DP2 = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
GONE = "stops because another rank has gone"


def flags_for(*more):
    return base("--train-iters", STEPS, *more)


@pytest.fixture(scope="module")
def whole(megatron):
    """Records without interruption, by flags of the layout."""
    return {extra: train(flags_for(extra), 2 if extra else 1) for extra in ("", TP2)}


KILLS = {  # name: (ranks, flags, who dies, where in iteration 4, what the kill leaves)
    "step-tp2": (2, TP2, 1, "step", None),
    "step-pp2": (2, PP2, 0, "step", None),
    "step-dp2-overlap": (2, DP2, 1, "step", None),
    "refresh-tp2-pp2": (4, f"{TP2} {PP2}", 3, "refresh", None),
    "save": (1, "", 0, "save", None),
    "files": (1, "", 0, "files", "iter_0000004.partial"),
    "name": (1, "", 0, "name", "iter_0000004.partial"),
    "tracker": (1, "", 0, "tracker", "iter_0000004"),
    "files-tp2": (2, TP2, 1, "files", "iter_0000004.partial"),
    "name-tp2": (2, TP2, 1, "name", "iter_0000004.partial"),
    "files-beside-training-tp2": (2, f"{TP2} --async-save", 1, "files", "iter_0000004.partial"),
    "name-beside-training": (1, "--async-save", 0, "name", "iter_0000004.partial"),
}


def killing(place, rank):
    if place != "tracker":
        return at(place, 4, die, rank)

    def no_tracker():
        os.replace = die

    return at("name", 4, no_tracker, rank)


@pytest.mark.parametrize("case", KILLS)
def test_kill_9_costs_what_came_after_the_last_checkpoint(tmp_path, whole, case):
    ranks, extra, victim, place, left = KILLS[case]
    flags = flags_for(extra, "--save-interval 2 --save", tmp_path)
    runs = launch(flags, ranks, prepare=killing(place, victim))
    assert runs[victim].code == -signal.SIGKILL
    others = [(rank, run) for rank, run in enumerate(runs) if rank != victim]
    assert [(run.code, run.left_behind) for _, run in others] == [(1, 0)] * (ranks - 1)
    for rank, run in others:
        assert run.err.splitlines()[-1] == f"pretrain.py: rank {rank} {GONE}" and "Traceback" not in run.err
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert left is None or left in os.listdir(tmp_path)
    layout = extra.replace("--async-save", "").strip()
    if layout in whole:
        rest = train([*flags, "--load", tmp_path], ranks)
        assert column(rest, "iteration") == list(range(3, STEPS + 1))
        for name in ("lm_loss", "grad_norm", "geoscale.digest"):
            assert column(rest, name) == column(whole[layout], name)[2:]
        names = {path.name for path in tmp_path.iterdir() if path.name != "exit_reason.txt"}
        assert names == {*(f"iter_{i:07d}" for i in (2, 4, 6, 8)), "latest_checkpointed_iteration.txt"}


@pytest.mark.parametrize(
    ("ranks", "extra", "rank", "place"), [(2, TP2, 1, "step"), (2, PP2, 0, "refresh"), (2, DP2, 1, "save")]
)
def test_hung_rank_stops_the_others_within_the_timeout(tmp_path, ranks, extra, rank, place):
    """The group of a rank has the flag's timeout, not megatron-core's own half hour."""
    started = time.monotonic()
    flags = flags_for(extra, "--distributed-timeout-minutes 0.05 --save-interval 2 --save", tmp_path)
    runs = launch(flags, ranks, prepare=at(place, 4, stop, rank), patience=0.1)
    assert time.monotonic() - started < 20
    assert runs[rank].code is None  # still stopped, until the harness killed it, as a launcher would
    (other,) = runs[:rank] + runs[rank + 1 :]
    assert other.code == 1 and other.err.splitlines()[-1] == (
        f"pretrain.py: rank {1 - rank} stops because another rank has not answered for "
        "--distributed-timeout-minutes 0.05"
    )
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_data_worker_that_is_killed_is_one_sentence():
    def kill_workers():
        for child in psutil.Process().children():
            child.kill()

    (run,) = launch(flags_for("--num-workers 1"), prepare=at("step", 3, kill_workers))
    assert run.code == 1
    assert run.err == "pretrain.py: rank 0 stops because a data worker of its own has been killed\n"


def test_rank_that_never_comes_stops_the_others_within_the_timeout():
    runs = launch(flags_for(TP2, "--distributed-timeout-minutes 0.05"), 2, prepare=at("start-up", 0, die, 1))
    assert runs[0].code == 1 and runs[0].err.startswith("pretrain.py: rank 0 stops because another rank")
