"""Runs of pretrain.py in forked ranks: `main.main(flags)` as torchrun would have it called, but imported once."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tests.harness import free_port

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 16 --make-vocab-size-divisible-by 8"
)
LLAMA = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --ffn-hidden-size 64"
)
GPT2 = "--normalization LayerNorm --add-qkv-bias --position-embedding-type learned_absolute"
BATCH = "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --eval-iters 0 --num-workers 0 --log-interval 1"
NO_DROPOUT = "--attention-dropout 0 --hidden-dropout 0"
VOCABULARY = 70
"""Tokens of `corpus`; NullTokenizer adds one, for the end of a document. Padded to 72 on one rank, to 80 on two."""
_corpus = tempfile.TemporaryDirectory(prefix="corpus")


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """PREFIX.bin and PREFIX.idx with these documents; returns `prefix`."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.int32), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@functools.cache
def corpus() -> Path:
    """Prefix of 400 documents of 10 to 50 tokens, which count up in steps that differ from document to document."""
    preload()
    random = np.random.default_rng(0)
    documents = [(a + b * np.arange(n)) % VOCABULARY for a, b, n in random.integers([0, 1, 10], [60, 9, 50], (400, 3))]
    return write_corpus(Path(_corpus.name) / "counting", documents)


def base(*more: object, model: str = "llama") -> list[str]:
    """Flags of a tiny run on `corpus`, without dropout."""
    style = {"llama": LLAMA, "gpt2": GPT2}[model]
    data = ["--data-path", corpus(), "--split", "90,10,0", "--tokenizer-type", "NullTokenizer",
            "--vocab-size", VOCABULARY]
    return flags_of(MODEL, style, BATCH, NO_DROPOUT, data, *more)


@dataclass
class RankRun:
    """How one rank ended. `value`: what `watch` returned; `left_behind`: processes of its that outlived it."""

    code: int | None
    out: str
    err: str
    value: Any
    left_behind: int


def flags_of(*parts: object) -> list[str]:
    """One flat list of flags from lists, and from strings that are split at blanks."""
    flags: list[str] = []
    for part in parts:
        flags += part.split() if isinstance(part, str) else map(str, part if isinstance(part, list) else [part])
    return flags


@functools.cache
def preload() -> None:
    """Import once what the ranks will use."""
    from megatron_geoscale import cpu

    cpu.install()
    for name in ("megatron.core.datasets.helpers_cpp", "megatron.core.tokenizers.text", "torch.utils.tensorboard"):
        importlib.import_module(name)
    for name in ("checkpointing", "data", "loop", "main", "model"):
        importlib.import_module(f"megatron_geoscale.training.{name}")
    gc.freeze()  # a rank's garbage collection would touch, and so copy, every page of what was imported


def launch(
    flags: Sequence[object],
    ranks: int = 1,
    *,
    watch: Callable[[Any, Callable[[], str]], Any] | None = None,
    prepare: Callable[[], None] | None = None,
    timeout: float = 120,
    patience: float = 20,
) -> list[RankRun]:
    """pretrain.py with `flags` on `ranks` forked processes that meet over TCP as torchrun's do.

    `prepare()` is called in each before anything else. `watch(trainer, go)` is called in place of the training loop,
    which it runs with `go()`. Ranks that are still there `patience` seconds after one has failed, or after `timeout`
    seconds, are killed: their code is None.
    """
    preload()
    context = multiprocessing.get_context("fork")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pretrain") as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(list(map(str, flags)), rank, ranks, port, folder, watch, prepare))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        codes = _wait(processes, timeout, patience)
        return [_outcome(folder, rank, code, processes[rank].pid) for rank, code in enumerate(codes)]


def _wait(processes: list[Any], timeout: float, patience: float) -> list[int | None]:
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + patience)
            patience = float("inf")  # counted from the first failure
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _outcome(folder: Path, rank: int, code: int | None, group: int) -> RankRun:
    # multiprocessing's helpers see that their parent is gone, and need a moment to go; not so after a SIGKILL.
    patience = time.monotonic() + (3 if code is not None and code >= 0 else 0)
    while (left := _group(group)) and time.monotonic() < patience:
        time.sleep(0.05)
    for process in left:
        process.kill()
    value = folder / f"{rank}.pickle"
    return RankRun(
        code,
        (folder / f"{rank}.out").read_text(),
        (folder / f"{rank}.err").read_text(),
        pickle.loads(value.read_bytes()) if value.exists() else None,
        len(left),
    )


def _group(number: int) -> list[psutil.Process]:
    """The living processes of a group."""
    members = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == number and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return members


def _rank(flags: list[str], rank: int, ranks: int, port: int, folder: Path, watch: Any, prepare: Any) -> None:
    os.setpgid(0, 0)  # so that what it leaves behind can be found
    sys.stdout, sys.stderr = (open(folder / f"{rank}.{stream}", "w", buffering=1) for stream in ("out", "err"))  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megatron_geoscale.training import loop, main

    if watch is not None:
        plain = loop.Trainer.train

        def train(trainer: Any, exit_request: Any) -> str:
            reasons: list[str] = []

            def go() -> str:
                reasons.append(plain(trainer, exit_request))
                return reasons[-1]

            value = watch(trainer, go)
            (folder / f"{rank}.pickle").write_bytes(pickle.dumps(value))
            return reasons[-1] if reasons else "watched"

        loop.Trainer.train = train
    if prepare is not None:
        prepare()
    sys.exit(main.main(flags))


def succeed(flags: Sequence[object], ranks: int = 1, **options: Any) -> list[RankRun]:
    """`launch`, which must end well on every rank and leave no process behind."""
    __tracebackhide__ = True
    runs = launch(flags, ranks, **options)
    for rank, run in enumerate(runs):
        assert run.code == 0, f"rank {rank} ended with {run.code}:\n{run.out[-2000:]}\n{run.err[-6000:]}"
        assert run.left_behind == 0, f"rank {rank} left processes behind"
    return runs


def train(flags: Sequence[object], ranks: int = 1, **options: Any) -> list[dict[str, Any]]:
    """A run that must end well: its JSONL records, one an iteration."""
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory(prefix="jsonl") as folder:
        path = Path(folder) / "log.jsonl"
        succeed([*flags, "--geoscale-log-jsonl", path], ranks, **options)
        return read_records(path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(records: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """One value of every record, `geoscale.digest` for what is nested."""
    values = []
    for record in records:
        value: Any = record
        for key in name.split("."):
            value = value[key]
        values.append(value)
    return values


def layer_column(record: dict[str, Any], name: str) -> list[Any]:
    """One value of every layer of a record."""
    return [layer[name] for layer in record["geoscale"]["layers"]]


def close(mine: Sequence[float], theirs: Sequence[float], relative: float) -> bool:
    """Are both as long, and every value within `relative` of the other's?"""
    return len(mine) == len(theirs) and all(abs(a - b) <= relative * abs(b) for a, b in zip(mine, theirs, strict=True))
