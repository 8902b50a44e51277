"""Where a checkpoint is found: by its tracker, and in the one that a killed save was about to replace."""

import pytest

from megatron_geoscale.checkpoints.iterations import TRACKER, find_iteration, latest_iteration
from megatron_geoscale.checkpoints.torch_dist import latest_directory


def test_the_trackers_iteration_or_the_directory_itself(tmp_path):
    assert latest_iteration(tmp_path) is None and latest_directory(tmp_path) == tmp_path
    (tmp_path / TRACKER).write_text("12\n")
    with pytest.raises(ValueError, match=f"{TRACKER} names iteration 12, but .*iter_0000012 is not there"):
        latest_directory(tmp_path)
    (tmp_path / "iter_0000012").mkdir()
    assert latest_directory(tmp_path) == tmp_path / "iter_0000012"


def test_what_was_being_replaced_stands_in_until_its_successor_is_there(tmp_path):
    (tmp_path / TRACKER).write_text("12")
    stale = tmp_path / "iter_0000012.stale"
    stale.mkdir()
    assert latest_directory(tmp_path) == find_iteration(tmp_path, 12) == stale
    (tmp_path / "iter_0000012").mkdir()
    assert latest_directory(tmp_path) == tmp_path / "iter_0000012"


@pytest.mark.parametrize("text", ["ten", "-1", "", "\u0661"])
def test_a_tracker_that_is_no_number_is_named(tmp_path, text):
    (tmp_path / TRACKER).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{TRACKER} must hold an iteration number"):
        latest_iteration(tmp_path)
