"""What the ranks of a test leave behind: nothing."""

import multiprocessing
import time

import psutil
import pytest

from tests.harness import run_ranks


def with_a_child(rank, world, fails):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    if fails:
        raise ValueError(str(child.pid))
    return child.pid


def is_gone(pid):
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_processes_that_ranks_start_end_with_them():
    assert all(is_gone(pid) for pid in run_ranks(with_a_child, 2, False))
    with pytest.raises(ValueError) as failure:
        run_ranks(with_a_child, 1, True)
    assert is_gone(int(str(failure.value)))
