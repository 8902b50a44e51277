#!/usr/bin/env python3
"""Pretrain a small Llama-style GPT with FP8 attention while its attention weights jump: once per recipe, then compare.

    python tools/demo.py            (or: make demo)

On the standard library of the running Python: trains a tokenizer, tokenizes, and for each recipe pretrains on two
processes (tensor parallel, gloo, on the CPU even where there is a GPU). In the middle W_Q, W_K and W_V of every layer
are multiplied by 4; the run is then stopped, and resumed from its checkpoint. Prints a table of what was measured; the
output directory gets it as table.md and summary.json, a plot as demo.png, and each run's command, log and checkpoint.

A second demo in the same directory reuses tokenizer and data, if their settings and text are the same, and trains anew.
Exit code 0; 1 if a run failed or `certified` saturated a value; 2 after a mistake of the user.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from _children import TOOLS, child
from _cli import ArgumentParser, run, write_atomically
from _corpus import stdlib_directory
from _demo_data import prepare_data
from _demo_report import LogReader, plot, summarize, table
from megatron_geoscale.config import BASELINE_RECIPES, GEOMETRIC_RECIPES

PRETRAIN = TOOLS.parent / "pretrain.py"
SEQUENCE, BATCH = 256, 8
SPIKE_FACTOR = 4
FEWEST_STEPS = 4
MODEL = f"""
    --tensor-model-parallel-size 2 --sequence-parallel
    --num-layers 4 --hidden-size 256 --num-attention-heads 8 --group-query-attention --num-query-groups 4
    --seq-length {SEQUENCE} --position-embedding-type rope --normalization RMSNorm --swiglu
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size {BATCH} --global-batch-size {BATCH}
    --lr 2e-3 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1 --adam-beta2 0.95
    --split 100,0,0 --eval-iters 0 --num-workers 0 --log-interval 10
""".split()
MARKER = ".geoscale-demo"
"""Says that a directory is the demo's, so that it may delete there; locked while it runs."""
TAIL_LINES = 20
"""Of a failed launch's output, which are shown."""
VERDICT = "failed (exitcode:"
"""In torchrun's line about the rank that failed first, after which only its own traceback follows."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    recipes = (*GEOMETRIC_RECIPES, *BASELINE_RECIPES)
    parser = ArgumentParser(description="Pretrain a small GPT under a weight spike, once per recipe, and compare.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="what is written and, by the next demo, replaced (default: runs/demo)")
    parser.add_argument("--recipes", nargs="+", default=["certified", "delayed"], choices=recipes, metavar="RECIPE",
                        help=f"of {', '.join(recipes)} (default: certified delayed)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="iterations a recipe (default: 100)")
    parser.add_argument("--input", nargs="+", default=[stdlib_directory()], metavar="PATH",
                        help="text to train on (default: the standard library of this Python)")
    args = parser.parse_args(argv)
    if args.steps < FEWEST_STEPS:
        parser.error(f"--steps must be {FEWEST_STEPS} or more, not {args.steps}")
    args.recipes = list(dict.fromkeys(args.recipes))
    args.spike = args.steps // 2
    args.stop = args.spike + max(1, args.steps // 6)
    return args


@contextmanager
def claim(output: Path) -> Iterator[None]:
    """Make `output` the demo's, alone. Raises ValueError where it holds something else or another demo runs."""
    marker = output / MARKER
    if output.exists() and not marker.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} holds something else than a demo, which would be replaced: name another")
    output.mkdir(parents=True, exist_ok=True)
    with marker.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output {output} is in use by another demo") from None
        os.set_inheritable(file.fileno(), True)  # children of a demo that was killed hold the lock until they end
        yield


class Progress:
    """A bar over the iterations of a recipe; where stderr is no terminal, a line for every tenth of them."""

    def __init__(self, recipe: str, steps: int, reader: LogReader) -> None:
        self._recipe, self._steps, self._reader = recipe, steps, reader
        self._bar = tqdm(total=steps, desc=recipe, unit="step", disable=None)
        self._next = 1

    def phase(self, name: str) -> None:
        """Say what the run is at."""
        self._bar.set_description(f"{self._recipe}, {name}")
        if self._bar.disable:
            print(f"{self._recipe}: {name}", file=sys.stderr, flush=True)

    def update(self) -> None:
        """Show what the log tells by now."""
        if not self._reader.update():
            return
        records = self._reader.records
        saturated = sum(record["geoscale"]["saturated"] for record in records)
        state = f"loss {float(records[-1]['lm_loss']):.3f}, saturated {saturated}"
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(len(records) - self._bar.n)
        if self._bar.disable and len(records) >= self._next:
            print(f"{self._recipe}: step {len(records)} of {self._steps}, {state}", file=sys.stderr, flush=True)
            self._next = len(records) + max(1, self._steps // 10)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def launch(flags: Sequence[object], log: Path, progress: Progress) -> None:
    """One torchrun of pretrain.py to its end; its output goes to `log`."""
    # Without an address torchrun takes the host's name, and waits minutes where that does not resolve.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", "2", str(PRETRAIN), *map(str, flags)]
    with log.open("w") as output:
        print("$", shlex.join(command), file=output, flush=True)
        with child(command, output) as process:
            while process.poll() is None:
                progress.update()
                time.sleep(0.2)
    progress.update()
    if process.returncode != 0:
        progress.close()
        lines = log.read_text(errors="replace").splitlines()
        verdict = next((number for number, line in enumerate(lines) if VERDICT in line), len(lines))
        print(*lines[: verdict + 1][-TAIL_LINES:], sep="\n", file=sys.stderr)
        raise SystemExit(f"demo.py: the launch failed with exit code {process.returncode}, as above; all of it: {log}")


def pretrain(recipe: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train under `recipe` through the spike, stop, resume, finish; the records of all iterations."""
    folder, data = args.output / recipe, args.output / "data"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    checkpoints, jsonl = folder / "checkpoints", folder / "log.jsonl"
    flags = [
        *MODEL, "--train-iters", args.steps, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model",
        data / "tokenizer.model", "--data-path", data / "corpus_text_document", "--data-cache-path", data / "cache",
        "--geoscale-recipe", recipe, "--geoscale-log-jsonl", jsonl,
        "--geoscale-fault-injection", f"weight_spike:{args.spike}:{SPIKE_FACTOR}",
    ]
    reader = LogReader(jsonl)
    progress = Progress(recipe, args.steps, reader)
    progress.phase("first launch")
    launch([*flags, "--save", checkpoints, "--exit-interval", args.stop], folder / "first.log", progress)
    progress.phase("resumed")
    launch([*flags, "--load", checkpoints, "--exit-on-missing-checkpoint"], folder / "resumed.log", progress)
    progress.close()
    iterations = [record["iteration"] for record in reader.records]
    if iterations != list(range(1, args.steps + 1)):
        raise SystemExit(f"demo.py: {jsonl} does not hold the iterations 1 to {args.steps} once each but {iterations}")
    return reader.records


def report(logs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and write what the runs measured; returns their summaries."""
    summaries = [
        summarize(recipe, records, spike=args.spike, tokens_per_step=SEQUENCE * BATCH)
        for recipe, records in logs.items()
    ]
    text = table(summaries)
    write_atomically(args.output / "summary.json", (json.dumps(summaries, indent=2) + "\n").encode())
    write_atomically(args.output / "table.md", text.encode())
    print(f"\nW_Q, W_K and W_V x {SPIKE_FACTOR} before step {args.spike}, stopped and resumed after step {args.stop}\n")
    print(text)
    try:
        plot(logs, args.output / "demo.png", spike=args.spike, resumed=args.stop, factor=SPIKE_FACTOR)
        print(f"plot: {args.output / 'demo.png'}")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'megatron-geoscale[plot]')")
    return summaries


def main() -> None:
    args = parse()
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # a closed terminal ends the children too
    with claim(args.output):
        for name in ("summary.json", "table.md", "demo.png"):
            (args.output / name).unlink(missing_ok=True)
        prepare_data(args.output / "data", args.input)
        summaries = report({recipe: pretrain(recipe, args) for recipe in args.recipes}, args)
    for summary in summaries:
        if summary["recipe"] == "certified" and summary["saturated_values"]:
            raise SystemExit(f"demo.py: certified saturated {summary['saturated_values']} values, first in step "
                             f"{summary['first_saturated_step']}, and must never saturate any")


if __name__ == "__main__":
    sys.exit(run(main))
