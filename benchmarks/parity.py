#!/usr/bin/env python3
"""Does a recipe cost loss? The demo's model from the same seeds under every recipe: `python benchmarks/parity.py`.

Every recipe trains on the same batches from the same weights, once a seed. A gap is a recipe's loss less that of
`none`, the run without casts, at the same seed. `none, perturbed` is the noise that any gap must be read against: the
uncast run with the norms' epsilon off by one part in a thousand, so that only rounding differs at first. The SQNR
columns compare FP8 attention with exact attention on the same captured tensors (benchmarks/_captured.py), those of the
first seed's `none`.

The model computes in bfloat16, `none` its attention too; --fp32 is for processors where that is slow. Runs that are
complete in the output directory, with the same flags, are not repeated. Prints a Markdown table, progress on stderr.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from _captured import GRADIENTS, in_model, measure_recipes
from _measure import machine_line, progress, set_up, table, write_json

from _cli import ArgumentParser, run
from _corpus import stdlib_directory
from _replay_training import RECIPES, REFERENCE, data_flags, training_flags
from _runs import read_jsonl, run_all

FIRST_SEED = 1234
LAST_STEPS = 20
"""At the end of a run, over which its loss is averaged."""
PERTURBED = f"{REFERENCE}, perturbed"
EPSILON = {REFERENCE: "1e-5", PERTURBED: "1.001e-5"}
EVALUATION_BATCHES = 8
_VALIDATION = re.compile(r"validation loss at iteration (\d+) \| lm loss value: (\S+)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each recipe (default: 3)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of each run (default: 200)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, metavar="R",
                        help=f"besides {REFERENCE} (default: all)")
    parser.add_argument("--fp32", action="store_true", help="weights and arithmetic of the model in float32")
    parser.add_argument("--input", nargs="+", default=[stdlib_directory()], metavar="PATH",
                        help="text to train on (default: the standard library of this Python)")
    parser.add_argument("--output", type=Path, default=Path("runs/parity"), metavar="DIR", help="default: runs/parity")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write machine, settings and rows to PATH")
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps, args.workers) < 1:
        parser.error("--seeds, --steps and --workers must be 1 or more")
    return args


def run_flags(recipe: str, seed: int, args: argparse.Namespace) -> list[object]:
    """pretrain.py's flags of one run, without the data's."""
    name = REFERENCE if recipe == PERTURBED else recipe
    flags: list[object] = [
        *training_flags(args.steps, seed), "--geoscale-recipe", name, "--lr-warmup-iters", min(20, args.steps // 2),
        "--split", "95,5,0", "--eval-iters", EVALUATION_BATCHES, "--eval-interval", args.steps,
        "--geoscale-burn-in-steps", max(1, args.steps // 4), "--norm-epsilon", EPSILON.get(recipe, EPSILON[REFERENCE]),
    ]  # fmt: skip
    if recipe == REFERENCE and seed == FIRST_SEED:
        flags += ["--save", args.output / "trained", "--no-save-optim"]
    return flags if args.fp32 else [*flags, "--bf16"]


def train_all(args: argparse.Namespace, data: list[object]) -> dict[tuple[str, int], dict[str, Any]]:
    """Every run, trained now unless it is there: loss, validation loss and saturated values by recipe and seed."""
    folder = args.output / "runs"
    cases = {
        f"{recipe.replace(', ', '-')}-{seed}": (recipe, seed)
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)
        for recipe in (REFERENCE, PERTURBED, *args.recipes)
    }
    jobs = {name: [*run_flags(recipe, seed, args), *data] for name, (recipe, seed) in cases.items()}
    waiting = {name: flags for name, flags in jobs.items() if not _complete(folder, name, flags, args.steps)}
    if len(waiting) < len(jobs):
        progress(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are in {folder} already")
    run_all(waiting, folder, workers=args.workers, title="training")
    return {case: _outcome(folder, name) for name, case in cases.items()}


def _complete(folder: Path, name: str, flags: Sequence[object], steps: int) -> bool:
    """Whether the run has been made with these flags, to its end."""
    log, jsonl = folder / f"{name}.log", folder / f"{name}.jsonl"
    if not (log.is_file() and jsonl.is_file()):
        return False
    text = log.read_text(errors="replace")
    command = shlex.join([*map(str, flags), "--geoscale-log-jsonl", str(jsonl)])
    return text.startswith(f"$ python pretrain.py {command}\n") and _validation(text) == steps


def _validation(log: str) -> int | None:
    found = _VALIDATION.search(log)
    return int(found.group(1)) if found else None


def _outcome(folder: Path, name: str) -> dict[str, Any]:
    records = read_jsonl(folder / f"{name}.jsonl")
    found = _VALIDATION.search((folder / f"{name}.log").read_text())
    assert found is not None, f"{name} has ended without a validation loss"
    scales = [record["geoscale"] for record in records if record["geoscale"] is not None]
    return {
        "loss": statistics.fmean(float(record["lm_loss"]) for record in records[-LAST_STEPS:]),
        "validation": float(found.group(2)),
        "saturated": sum(scale["saturated"] for scale in scales),
        "worst_overrange": max((float(scale["overrange_max"]) for scale in scales), default=None),
    }


def summarize(
    outcomes: dict[tuple[str, int], dict[str, Any]], recipes: Sequence[str], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each recipe: every seed's numbers, and mean, least and largest gap to the uncast run at its seed."""
    rows = []
    for recipe in recipes:
        own = [outcomes[recipe, seed] for seed in seeds]
        row: dict[str, Any] = {"recipe": recipe, "seeds": own, "saturated": sum(run["saturated"] for run in own)}
        for name in ("loss", "validation"):
            values = [run[name] for run in own]
            gaps = [value - outcomes[REFERENCE, seed][name] for value, seed in zip(values, seeds, strict=True)]
            row[name], row[f"{name}_gap"] = _spread(values), _spread(gaps)
        rows.append(row)
    return rows


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "least": min(values), "largest": max(values)}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    columns = ("recipe", " loss", " gap to none, mean (least to largest)", " validation loss",
               " gap to none, mean (least to largest)", " saturated values", " SQNR of O (dB)",
               *(f" {name}" for name in GRADIENTS))  # fmt: skip
    cells = []
    for row in rows:
        noise = row.get("captured")
        uncast = row["recipe"] in EPSILON
        gaps = ("" if row["recipe"] == REFERENCE else _gap(row[f"{name}_gap"]) for name in ("loss", "validation"))
        gap, validation_gap = gaps
        cells.append((
            row["recipe"], f"{row['loss']['mean']:.4f}", gap, f"{row['validation']['mean']:.4f}", validation_gap,
            "" if uncast else f"{row['saturated']:,}",
            *("" if noise is None else f"{noise['sqnr_db'][name]:.1f}" for name in ("O", *GRADIENTS)),
        ))  # fmt: skip
    return table("parity", columns, cells)


def _gap(gap: dict[str, float]) -> str:
    return f"{gap['mean']:+.4f} ({gap['least']:+.4f} to {gap['largest']:+.4f})"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    about = set_up(1)
    data = data_flags(args.output / "data", args.input)
    outcomes = train_all(args, data)
    seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
    rows = summarize(outcomes, (REFERENCE, PERTURBED, *args.recipes), seeds)
    progress("casting captured tensors")
    flags = [*run_flags(REFERENCE, FIRST_SEED, args), *data]
    captured = in_model(flags, args.output / "trained", measure_recipes, args.recipes)
    for row in rows:
        if row["recipe"] in captured:
            row["captured"] = captured[row["recipe"]]
    loss, validation = rows[0]["loss"], rows[0]["validation"]
    print(machine_line(about), "\n")
    print(markdown(rows), "\n")
    print(f"{args.seeds} seeds, {args.steps} steps, {'float32' if args.fp32 else 'bfloat16'}; over the seeds, the loss "
          f"of {REFERENCE} spreads from {loss['least']:.4f} to {loss['largest']:.4f}, its validation loss from "
          f"{validation['least']:.4f} to {validation['largest']:.4f}.")
    settings = {"seeds": args.seeds, "steps": args.steps, "bf16": not args.fp32}
    write_json(args.json, about, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    sys.exit(run(main))
