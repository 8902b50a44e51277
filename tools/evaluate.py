#!/usr/bin/env python3
"""Accuracy of a model on multiple-choice tasks in MMLU's layout, few-shot, by the log-likelihood of the answers.

    python tools/evaluate.py --tasks DIR --load CHECKPOINT                  a checkpoint of pretrain.py
    python tools/evaluate.py --tasks DIR --hf MODEL                         a Hugging Face directory (safetensors)

DIR holds dev/<subject>_dev.csv and test/<subject>_test.csv with rows question, A, B, C, D, letter of the answer. One
process. With --geoscale-recipe, attention is cast to FP8 as in training, and the number of
saturated values is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from _cli import ArgumentParser, run
from _models import HuggingFaceModel, MegatronModel, log_likelihoods, open_megatron
from _multiple_choice import SCORINGS, Result, Score, evaluate, read_tasks
from megatron_geoscale.config import RECIPES

WIDTH = 100
"""Of the table where there is no terminal."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--tasks", type=Path, required=True, metavar="DIR", help="dev/ and test/ with a CSV file for each subject")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--load", type=Path, metavar="DIR", help="--save directory of pretrain.py")
    model.add_argument("--hf", type=Path, metavar="DIR", help="a Hugging Face directory")
    add("--ckpt-step", type=int, metavar="N", help="with --load: this iteration instead of the latest")
    add("--tokenizer-type", metavar="TYPE", help="with --load: instead of the checkpoint's")
    add("--tokenizer-model", metavar="PATH", help="with --load: instead of the checkpoint's")
    add("--geoscale-recipe", choices=RECIPES, default="none",
        help="with --load: cast attention to FP8 under this recipe (default: %(default)s)")
    add("--scoring", choices=SCORINGS, default=SCORINGS[0],
        help="letter: compare A to D, as MMLU does; text: compare the answers' texts, log-likelihood by character "
        "(default: %(default)s)")
    add("--num-shots", type=int, default=5, metavar="N", help="worked examples in a prompt (default: %(default)s)")
    add("--micro-batch-size", type=int, default=4, metavar="N", help="prompts in a forward (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if args.num_shots < 0:
        parser.error(f"--num-shots must not be negative, not {args.num_shots}")
    if args.micro_batch_size < 1:
        parser.error(f"--micro-batch-size must be positive, not {args.micro_batch_size}")
    if args.hf is not None:
        for name in ("ckpt_step", "tokenizer_type", "tokenizer_model"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for --load, not for --hf")
        if args.geoscale_recipe != "none":
            parser.error("--geoscale-recipe is for --load, not for --hf")
    return args


def as_json(args: argparse.Namespace, model: Any, result: Result) -> dict[str, Any]:
    def fields(score: Score) -> dict[str, Any]:
        return {
            "questions": score.questions,
            "correct": score.correct,
            "accuracy": score.accuracy,
            "standard_error": score.standard_error,
        }

    return {
        "model": model.name,
        "tasks": str(args.tasks),
        "scoring": args.scoring,
        "num_shots": args.num_shots,
        "sequence_length": model.sequence_length,
        "recipe": args.geoscale_recipe,
        "saturated": model.saturated if isinstance(model, MegatronModel) else None,
        "shortened_prompts": result.shortened,
        "cut_prompts": result.cut,
        "subjects": {name: fields(score) for name, score in result.scores.items()},
        "micro_average": fields(result.total),
        "macro_average": {"accuracy": result.macro_average, "standard_error": result.macro_standard_error},
    }


def print_table(summary: dict[str, Any]) -> None:
    """The same for people."""
    table = Table()
    table.add_column("subject")
    for column in ("questions", "correct", "accuracy, %", "standard error"):
        table.add_column(column, justify="right")
    averages = {"micro average": summary["micro_average"], "macro average": summary["macro_average"]}
    for name, score in (*summary["subjects"].items(), *averages.items()):
        if name == "micro average":
            table.add_section()
        error = score["standard_error"]
        table.add_row(
            name, str(score.get("questions", "")), str(score.get("correct", "")), f"{100 * score['accuracy']:.2f}",
            "" if error is None else f"{100 * error:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
    console.print(f"{summary['model']}: {summary['num_shots']}-shot, scoring by {summary['scoring']}", style="bold")
    console.print(table)
    total, length = summary["micro_average"]["questions"], summary["sequence_length"]
    console.print(f"{summary['shortened_prompts']} of {total} prompts lost worked examples to fit {length} tokens, "
                  f"{summary['cut_prompts']} the question's start too")
    if summary["saturated"] is not None:
        console.print(f"FP8 attention under recipe {summary['recipe']}: {summary['saturated']} saturated values")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    subjects = read_tasks(args.tasks, args.num_shots)
    opened: Any
    if args.hf is not None:
        opened = nullcontext(HuggingFaceModel(args.hf))
    else:
        opened = open_megatron(
            args.load,
            step=args.ckpt_step,
            recipe=args.geoscale_recipe,
            tokenizer_type=args.tokenizer_type,
            tokenizer_model=args.tokenizer_model,
        )
    with opened as model:
        score = partial(log_likelihoods, model, batch_size=args.micro_batch_size)
        result = evaluate(
            subjects, model.encode, score, scoring=args.scoring, sequence_length=model.sequence_length
        )
        summary = as_json(args, model, result)
    if args.json:
        print(json.dumps(summary, allow_nan=False, indent=1))
    else:
        print_table(summary)


if __name__ == "__main__":
    sys.exit(run(main))
