"""Run a function on several gloo ranks from a test, or a script under torchrun. Nothing that is started here can hang.

`run_ranks` forks: the ranks inherit what the test process has imported, so a case of two ranks takes about 0.3 s where
a fresh interpreter with megatron-core would take 10. The price is that the test process must not have used OpenMP
threads before (conftest.py sees to that) and must never touch CUDA.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


class RankFailure(AssertionError):
    """A rank died, timed out, or raised what cannot be pickled. Its message names the rank."""


class _RankTraceback(Exception):
    """The cause of a re-raised exception: the traceback as the rank printed it."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """`fn(rank, world_size, *args)` on `world_size` forked processes in one gloo group; the results, by rank.

    `fn` may be a closure; what it returns must be picklable. A tensor comes back as a copy. Collectives that wait for
    longer than `timeout` seconds fail in the rank.

    Raises: what the first rank to fail raised, with that rank's traceback as its cause; RankFailure when a rank died
    without a word, when its exception or result cannot be pickled, or after `timeout` seconds. The other ranks are
    killed in each case.
    """
    __tracebackhide__ = True
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            job = (fn, rank, world_size, args, f"{folder}/store", timeout, sender)
            process = context.Process(target=_rank_main, args=job)  # no daemon: a rank may start children
            process.start()
            sender.close()  # the rank holds the only writing end, so its death reads as end of file
            ranks.append((process, receiver))
        try:
            return _collect(ranks, time.monotonic() + timeout, timeout)
        finally:
            for process, receiver in ranks:
                process.kill()
                process.join()
                receiver.close()


def _collect(ranks: list[tuple[Any, Any]], deadline: float, timeout: float) -> list[Any]:
    """Wait for every rank's message; raise at the first failure."""
    __tracebackhide__ = True  # pytest then shows the test's line and the rank's traceback, not ours
    rank_of = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        pending = [receiver for receiver, rank in rank_of.items() if rank not in results]
        ready = wait(pending, max(0.0, deadline - time.monotonic()))
        if not ready:
            names = ", ".join(str(rank_of[receiver]) for receiver in pending)
            raise RankFailure(f"after {timeout:g} s nothing had come from rank {names} of {len(ranks)}: killed")
        failures = []
        for receiver in ready:
            rank = rank_of[receiver]
            try:
                failed_at, value, text = receiver.recv()
            except EOFError:
                ranks[rank][0].join()
                failures.append((time.monotonic(), rank, None, f"it exited with {ranks[rank][0].exitcode}"))
                continue
            if failed_at is None:
                results[rank] = pickle.loads(value)
            else:
                failures.append((failed_at, rank, value and pickle.loads(value), text))
        if failures:  # the others often fail in turn, with a closed connection: the earliest is the cause
            _, rank, error, text = min(failures, key=lambda failure: failure[0])
            if error is None:
                raise RankFailure(f"rank {rank} of {len(ranks)} failed: {text}")
            raise error from _RankTraceback(f"rank {rank} of {len(ranks)}:\n{text}")
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(
    fn: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], store: str, timeout: float, sender: Any
) -> None:
    """The life of one rank: sends (None, result, "") or (time of failure, exception or None, traceback)."""
    message: tuple[float | None, bytes | None, str]
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = pickle.dumps(fn(rank, world_size, *args))
        dist.destroy_process_group()
        message = (None, result, "")
    except BaseException as error:
        failed_at, text = time.monotonic(), traceback.format_exc()
        try:
            value = pickle.dumps(error)
            pickle.loads(value)  # an exception with its own __init__ may pickle and yet not come back
        except Exception:
            value = None
        message = (failed_at, value, text)
    try:
        # Such as megatron-core's save manager. Before the message: its receiver kills this process at once.
        for child in multiprocessing.active_children():
            child.kill()
        sender.send(message)
    finally:
        # No interpreter shutdown: it would run pytest's exit handlers and join gloo's threads.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def free_port() -> int:
    """A TCP port on the loopback interface that nothing was listening on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_torchrun(
    args: Sequence[str | Path],
    nproc: int,
    *,
    torchrun_args: Sequence[str] | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node nproc *args` from the repository's root, `args` starting with the script.

    `torchrun_args` replace the rendezvous options of a single agent (`--master-addr`, `--master-port` on a free port);
    `env` adds to this process's environment. Output is captured as text, whatever the exit status.

    Raises subprocess.TimeoutExpired after `timeout` seconds; the agent and its workers are stopped.
    """
    rendezvous = torchrun_args
    if rendezvous is None:
        rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc), *rendezvous]
    process = subprocess.Popen(
        [*command, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        process.terminate()  # the agent passes it on to the workers, which are in sessions of their own
        try:
            expired.stdout, expired.stderr = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
