"""Many short runs of pretrain.py, a few at a time: each forked from one process that has imported megatron-core once.

A run is `python pretrain.py FLAGS` on one process, as its log's first line says: what a fork saves is the ten seconds
of imports. Runs are deterministic, so how many go on at once changes no number.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from _children import environment

TAIL_LINES = 20
"""Of a failed run's log, which are shown."""


def run_all(
    jobs: Mapping[str, Sequence[object]], folder: Path, *, workers: int, title: str
) -> dict[str, list[dict[str, Any]]]:
    """Run pretrain.py with each job's flags; the JSONL records of each, by the job's name.

    Writes FOLDER/NAME.log and FOLDER/NAME.jsonl. SystemExit, naming the log, for the first run that fails; the others
    are stopped.
    """
    import_once()
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    waiting, running = list(jobs.items()), {}
    bar = tqdm(total=len(jobs), desc=title, unit="run", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name, flags = waiting.pop(0)
                jsonl = folder / f"{name}.jsonl"
                jsonl.unlink(missing_ok=True)
                command = [*map(str, flags), "--geoscale-log-jsonl", str(jsonl)]
                process = context.Process(target=_pretrain, args=(command, folder / f"{name}.log"))
                process.start()
                running[name] = process
            for name in [name for name, process in running.items() if process.exitcode is not None]:
                process = running.pop(name)
                if process.exitcode != 0:
                    _fail(name, process.exitcode, folder / f"{name}.log")
                bar.update()
                if bar.disable:
                    done = len(jobs) - len(waiting) - len(running)
                    print(f"{title}: {name} ({done} of {len(jobs)})", file=sys.stderr, flush=True)
            time.sleep(0.05)
    finally:
        bar.close()
        for process in running.values():
            process.kill()
            process.join()
    return {name: read_jsonl(folder / f"{name}.jsonl") for name in jobs}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def import_once() -> None:
    """Import what runs need, quietly; further calls cost nothing."""
    from megatron_geoscale import cpu

    cpu.quieten()
    cpu.install()
    from megatron_geoscale.training import checkpointing, data, loop, main, model  # noqa: F401

    gc.freeze()  # a child's garbage collection would touch, and so copy, every page of what was imported


def _pretrain(flags: list[str], log: Path) -> None:
    """In a fork: pretrain.py's own main, with output to `log`."""
    with log.open("w", buffering=1) as output:
        print("$ python pretrain.py", shlex.join(flags), file=output, flush=True)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    import torch

    from megatron_geoscale.training import main

    os.environ.update(environment())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    status = main.main(flags)
    for child in multiprocessing.active_children():  # data workers
        child.kill()
    sys.stdout.flush()
    os._exit(status)


def _fail(name: str, status: int, log: Path) -> None:
    print(*log.read_text(errors="replace").splitlines()[-TAIL_LINES:], sep="\n", file=sys.stderr)
    program = Path(sys.argv[0]).name
    raise SystemExit(f"{program}: the run {name} failed with exit code {status}, as above; all of it: {log}")
