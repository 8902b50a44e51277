"""SIGTERM at every moment of a run: a complete checkpoint, exit status 0, and a resume that goes on bit for bit."""

import pytest

from tests.faults.moments import at, terminate
from tests.functional.common import base, column, launch, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

STEPS = 8
TP2, DP2 = "--tensor-model-parallel-size 2", "--use-distributed-optimizer"


def flags_for(*more):
    return base("--train-iters", STEPS, *more)


@pytest.fixture(scope="module")
def whole(megatron):
    """Losses without interruption."""
    return column(train(flags_for()), "lm_loss")


CASES = {  # name: (ranks, flags, where, iteration, last checkpoint)
    "start-up": (1, "", "start-up", 0, 0),
    "step-with-a-data-worker": (1, "--num-workers 1", "step", 3, 3),
    "step-of-one-replica": (2, DP2, "step", 3, 3),
    "refresh": (1, "", "refresh", 3, 3),
    "save": (1, "--save-interval 2", "save", 4, 4),
    "files": (1, "--save-interval 2 --num-workers 1", "files", 4, 4),
    "name": (1, "--save-interval 2", "name", 4, 4),
    "files-beside-training": (1, "--save-interval 2 --async-save", "files", 4, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_sigterm_leaves_a_complete_checkpoint_and_exits_with_0(tmp_path, whole, case):
    ranks, extra, place, iteration, last = CASES[case]
    runs = succeed(flags_for(extra, "--save", tmp_path), ranks, prepare=at(place, iteration, terminate))
    assert runs[0].out.splitlines()[-1].endswith(f"exiting at iteration {last}: SIGTERM")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(last)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in ("", ".txt")]
    if ranks == 1:
        assert column(train(flags_for("--load", tmp_path)), "lm_loss") == whole[last:]


def test_sigterm_in_the_start_up_of_a_resumed_run_saves_nothing_again(tmp_path):
    succeed(flags_for("--save", tmp_path, "--exit-interval 3"))
    before = (tmp_path / "iter_0000003" / "common.pt").stat().st_mtime_ns
    (run,) = launch(flags_for("--save", tmp_path, "--load", tmp_path), prepare=at("start-up", 0, terminate))
    assert run.code == 0 and "exiting at iteration 3: SIGTERM" in run.out
    assert (tmp_path / "iter_0000003" / "common.pt").stat().st_mtime_ns == before
