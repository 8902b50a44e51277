"""The same faults under torchrun, whose agent signals, kills and restarts: real processes, each to its end."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.functional.common import base, column, read_records, train
from tests.harness import ROOT, free_port

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron")]

STEPS = 8
TP2 = "--tensor-model-parallel-size 2"


def start(launcher, flags, log, **environment):
    """pretrain.py under `launcher` in a process of its own, its output in `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, *launcher, str(ROOT / "pretrain.py"), *map(str, flags)]
    with open(log, "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def torchrun(*more):
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
            f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1", *more]


def wait_for(condition, process, log, timeout=120):
    """What `condition()` answers, once it is true."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.002)
    return found


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def workers(process):
    return [p for p in family(process) if p.ppid() == process.pid and "pretrain.py" in " ".join(p.cmdline())]


def finish(process, log, known, timeout=90):
    """Its exit status; whatever it leaves behind is killed, and counted."""
    try:
        status = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(log.read_text()[-6000:]) from None
    finally:
        known += family(process) if process.poll() is None else []
        process.kill()
        process.wait()
        deadline = time.monotonic() + 3
        while (left := [p for p in known if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for p in left:
            p.kill()
    assert not left
    return status


def test_kill_9_of_a_worker_in_a_save_is_mended_by_max_restarts(tmp_path):
    """TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 lets the new workers meet in a store of their own (docs/FAULTS.md)."""
    save, log, jsonl = tmp_path / "save", tmp_path / "out", tmp_path / "log.jsonl"
    flags = base("--train-iters", STEPS, TP2)
    saving = ["--save", save, "--load", save, "--save-interval", 1, "--geoscale-log-jsonl", jsonl]
    agent = start(torchrun("--max-restarts", "1"), [*flags, *saving], log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    known = []
    try:
        wait_for(lambda: (save / "iter_0000003.partial").exists(), agent, log)
        known = family(agent)
        workers(agent)[1].kill()
    finally:
        status = finish(agent, log, known)
    assert status == 0, log.read_text()[-6000:]
    assert "pretrain.py: rank 0 stops because another rank has gone" in log.read_text()
    records = read_records(jsonl)
    numbers = column(records, "iteration")
    resumed = next(i for i in range(1, len(numbers)) if numbers[i] <= numbers[i - 1] or i >= 3)
    assert numbers == [*range(1, resumed + 1), *range(numbers[resumed], STEPS + 1)] and resumed in (3, 4)
    assert f"loaded checkpoint {save / f'iter_{numbers[resumed] - 1:07d}'}" in log.read_text()
    whole = dict(zip(range(1, STEPS + 1), column(train(flags, 2), "lm_loss"), strict=True))
    assert column(records, "lm_loss") == [whole[number] for number in numbers]
    assert not [path for path in save.iterdir() if path.suffix not in ("", ".txt")]


def test_sigterm_to_torchrun_saves_beside_training_and_leaves_nobody(tmp_path):
    """The signal goes to every process of each worker, data workers and writers too; torchrun then exits with 1."""
    save, log = tmp_path / "save", tmp_path / "out"
    flags = base("--train-iters 1000000 --lr-decay-style constant --num-workers 1 --keep-last 2 --async-save",
                 "--save-interval 3 --log-interval 10", TP2, "--save", save)
    agent = start(torchrun(), flags, log)
    known = []
    try:
        wait_for(lambda: (save / "iter_0000006").exists(), agent, log)
        known = family(agent)
        agent.terminate()
        agent.terminate()
    finally:
        status = finish(agent, log, known)
    text = log.read_text()
    assert status == 1 and "Traceback" not in text.split("exiting at iteration")[0], text[-6000:]
    last = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert f"exiting at iteration {last}: SIGTERM" in text
    found = sorted(path.name for path in save.glob("iter_*"))
    assert len(found) == 2 and found[1] == f"iter_{last:07d}"
    assert (save / "exit_reason.txt").read_text() == f"exiting at iteration {last}: SIGTERM\n"
