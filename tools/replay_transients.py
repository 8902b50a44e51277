#!/usr/bin/env python3
"""Replay the sudden changes under which delayed scaling fails, once per recipe, on a model that was really trained.

    python tools/replay_transients.py                                             all scenarios, all recipes
    python tools/replay_transients.py --scenario weight_spike --recipe certified --json
    python tools/replay_transients.py --shape llama2-70b                          attention of full-size layers

The first run trains a small Llama-style GPT on the standard library's text (some minutes on two cores) and keeps it in
the output directory; `--load DIR --data-path PREFIX` takes another checkpoint, its model and its tokenizer. What
happens at which step is in tools/_replay_training.py, what the numbers mean in `summarize` of tools/_replay_report.py.
The same seed gives the same JSON. With --shape nothing is trained: see tools/_replay_shapes.py.

Writes replay.json, replay.md (with --shape: replay-SHAPE.json and .md) and a plot per scenario to the output directory,
with each run's command and log. Exit code 0, also where recipes saturate, for that is the result; 2 after a mistake of
the user, 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from _cli import ArgumentParser, run, write_atomically
from _corpus import stdlib_directory
from _replay_report import markdown, plot, summarize
from _replay_training import (
    FACTORS,
    RECIPES,
    REFERENCE,
    SCENARIOS,
    data_flags,
    replay_flags,
    training_flags,
    transient_of,
)
from _runs import import_once, run_all
from megatron_geoscale.config import OVERFLOWS

BASE_STEPS = 300
"""Of the training before the replays: the loss has left the plateau of the token frequencies by then."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, help="default: all")
    parser.add_argument("--recipe", choices=RECIPES, help="default: all")
    parser.add_argument("--json", action="store_true", help="print the JSON, of one replay as one object")
    parser.add_argument("--factor", type=float, metavar="F",
                        help="of weight_spike (default: 4) or of lr_spike (default: 30), given with --scenario")
    parser.add_argument("--logits-dtype", choices=("fp32", "fp8"), default="fp32",
                        help="fp8: logits are cast too, as in arXiv:2602.18851 (default: fp32, as real kernels)")
    parser.add_argument("--overflow", choices=OVERFLOWS, default="saturate",
                        help="what a cast does beyond the largest value (default: saturate, as real kernels)")
    parser.add_argument("--shape", choices=("gpt2-xl", "mistral-7b", "llama2-13b", "llama2-70b"),
                        help="replay attention layers of this model's dimensions instead of a training")
    parser.add_argument("--weights", type=Path, metavar="DIR",
                        help="with --shape: Hugging Face directory of such a model (default: weights are made up)")
    parser.add_argument("--num-layers", type=int, default=4, metavar="N",
                        help="with --shape: layers to replay, evenly spaced, 0 for all (default: 4)")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="with --shape: sequence (default: 256)")
    parser.add_argument("--load", type=Path, metavar="DIR",
                        help="directory of a checkpoint that pretrain.py saved, to replay instead of training one")
    parser.add_argument("--data-path", metavar="PREFIX",
                        help="with --load: text made with the checkpoint's tokenizer (default: this tool's own)")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, metavar="N",
                        help=f"steps of the training before (default: {BASE_STEPS})")
    parser.add_argument("--input", nargs="+", default=[stdlib_directory()], metavar="PATH",
                        help="text to train on (default: the standard library of this Python)")
    parser.add_argument("--output", type=Path, default=Path("runs/replay"), metavar="DIR", help="default: runs/replay")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N",
                        help="runs at a time (default: 2)")
    args = parser.parse_args(argv)
    if args.factor is not None and args.scenario not in FACTORS:
        parser.error(f"--factor belongs to --scenario {' or '.join(FACTORS)}")
    if args.data_path and not args.load:
        parser.error("--data-path needs --load")
    if args.weights and not args.shape:
        parser.error("--weights needs --shape")
    if args.base_steps < 1 or args.workers < 1:
        parser.error("--base-steps and --workers must be 1 or more")
    return args


def trained_model(
    args: argparse.Namespace, data: list[object] | None = None
) -> tuple[list[object], Path, int]:
    """Flags of the data, directory of the trained checkpoint, and its iteration; made now unless they are there.

    `data`: flags of other data, with --load."""
    import_once()
    from megatron_geoscale.checkpoints.iterations import latest_iteration

    if args.load is not None:
        iteration = latest_iteration(str(args.load))
        if not iteration:
            raise ValueError(f"--load {args.load} holds no trained checkpoint")
        return data or data_flags(args.output / "data", args.input), args.load, iteration
    data, base = data_flags(args.output / "data", args.input), args.output / f"base-{args.base_steps}"
    if latest_iteration(str(base)) != args.base_steps:
        flags = [*training_flags(args.base_steps), *data, "--geoscale-recipe", REFERENCE, "--lr-warmup-fraction", 0.1,
                 "--save", base]  # fmt: skip
        run_all({"base": flags}, args.output / "runs", workers=1, title=f"training {args.base_steps} steps")
    return data, base, args.base_steps


def replay(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is asked for, write plots, and sum it up."""
    from megatron_geoscale.training.checkpoint_args import saved_flags

    data, base, iteration = trained_model(args, ["--data-path", args.data_path] if args.data_path else None)
    scenarios = [args.scenario] if args.scenario else list(SCENARIOS)
    recipes = [args.recipe] if args.recipe else list(RECIPES)
    model = saved_flags(str(args.load)) if args.load is not None else None
    jobs = {}
    for scenario in scenarios:
        for recipe in (REFERENCE, *recipes):
            factor = args.factor if args.factor is not None else FACTORS.get(scenario, 1.0)
            flags = replay_flags(scenario, recipe, base=base, base_steps=iteration, factor=factor,
                                 logits_dtype=args.logits_dtype, overflow=args.overflow, model=model)  # fmt: skip
            jobs[f"{scenario}-{recipe}"] = [*flags, *data]
    records = run_all(jobs, args.output / "runs", workers=args.workers, title="replaying")
    summaries = []
    for scenario in scenarios:
        reference, transient = records[f"{scenario}-{REFERENCE}"], transient_of(scenario)
        runs = {recipe: records[f"{scenario}-{recipe}"] for recipe in (*recipes, REFERENCE)}
        summaries += [summarize(scenario, r, runs[r], reference, transient=transient) for r in recipes]
        try:
            plot(scenario, runs, args.output / f"{scenario}.png", transient=transient,
                 logits=args.logits_dtype == "fp8", reference=REFERENCE)  # fmt: skip
        except ImportError:
            print("no plots: matplotlib is not installed", file=sys.stderr)
    return summaries


def replay_shape(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same for layers of a full-size model, one after another."""
    import_once()
    import torch

    import _replay_shapes
    import _shape_layers
    from megatron_geoscale.checkpoints.attention_weights import open_checkpoint

    torch.set_num_threads(1)  # another number would sum in another order, and the JSON would depend on the machine
    shape = _shape_layers.SHAPES[args.shape]
    source = open_checkpoint(args.weights) if args.weights else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = min(args.num_layers or shape.layers, shape.layers)
    numbers = [1 + index * (shape.layers - 1) // max(1, count - 1) for index in range(count)]
    recipes = [args.recipe] if args.recipe else list(RECIPES)
    scenarios = [args.scenario] if args.scenario else list(SCENARIOS)
    steps: dict[tuple[str, str], list[Any]] = {(scenario, recipe): [] for scenario in scenarios for recipe in recipes}
    for number in tqdm(numbers, desc=args.shape, unit="layer", disable=None):
        if source is None:
            trained = _shape_layers.synthesise(shape, number, device)
        else:
            trained = _shape_layers.stored_layer(source, shape, number, device)
        for scenario in scenarios:
            factor = args.factor if args.factor is not None else FACTORS.get(scenario, 1.0)
            found = _replay_shapes.replay_layer(
                shape, scenario, recipes, trained, layer=number, tokens=args.tokens, factor=factor,
                logits_dtype=args.logits_dtype, overflow=args.overflow,
            )
            for recipe in recipes:
                steps[scenario, recipe].append(found[recipe])
    return [
        {**_replay_shapes.summarize(scenario, recipe, layers), "shape": args.shape, "layers": numbers}
        for (scenario, recipe), layers in steps.items()
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    summaries = replay_shape(args) if args.shape else replay(args)
    name = f"replay-{args.shape}" if args.shape else "replay"
    write_atomically(args.output / f"{name}.json", (json.dumps(summaries, indent=2) + "\n").encode())
    write_atomically(args.output / f"{name}.md", markdown(summaries).encode())
    if args.json:
        single = args.scenario and args.recipe
        print(json.dumps(summaries[0] if single else summaries, indent=2))
    else:
        print(markdown(summaries))


if __name__ == "__main__":
    sys.exit(run(main))
