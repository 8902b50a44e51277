#!/usr/bin/env python3
"""Bounds and FP8 scales of a checkpoint's attention, from its weights alone: no model is built, no GPU is needed.

PATH is a Hugging Face directory with safetensors (GPT-2, Llama, Mistral, Qwen2, Qwen3, Mixtral) or a Megatron
checkpoint of pretrain.py. Layers are read one after another. The numbers are those that training would begin with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import _scale_report
from _cli import ArgumentParser, run, write_atomically
from megatron_geoscale.checkpoints.attention_weights import AttentionSource, open_checkpoint
from megatron_geoscale.checkpoints.inspection import LayerReport, inspect_layers
from megatron_geoscale.config import BASELINE_RECIPES, ESTIMATORS, GEOMETRIC_RECIPES, GRANULARITIES, GeoScaleConfig

LAYER_BOUNDS = ("sigma", "sigma_bound", "logit_bound", "amax_q", "amax_k", "amax_v")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="inspect_scales.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    default = GeoScaleConfig()
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="a Hugging Face directory (safetensors) or a Megatron checkpoint")
    add("--recipe", choices=(*GEOMETRIC_RECIPES, *BASELINE_RECIPES), default=default.recipe,
        help="where scales come from; delayed and current get certified's bounds and the scale that a run starts "
        "with, if any (default: %(default)s)")
    add("--estimator", choices=ESTIMATORS, help="how sigma is computed (default: power for paper, else gram)")
    add("--granularity", choices=GRANULARITIES, default=default.granularity,
        help="largest head's norm, or the norm of the sum over heads (default: %(default)s)")
    add("--seq-length", type=int, metavar="L", help="default: the longest that the model takes")
    add("--margin", type=float, default=default.margin, metavar="ETA",
        help="share of the FP8 range that a bound may fill (default: %(default)s)")
    add("--failure-probability", type=float, default=default.failure_probability, metavar="DELTA",
        help="of the isotropic bounds of rank_aware and paper (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--plot", type=Path, metavar="PNG", help="also draw sigma of every head and layer")
    return parser.parse_args(argv)


def config_from(args: argparse.Namespace) -> GeoScaleConfig:
    try:
        return GeoScaleConfig(
            recipe=args.recipe,
            estimator=args.estimator,
            granularity=args.granularity,
            margin=args.margin,
            failure_probability=args.failure_probability,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("--geoscale-", "--")) from None


def as_json(source: AttentionSource, config: GeoScaleConfig, reports: Sequence[LayerReport]) -> dict[str, Any]:
    """`layers` has the keys of --geoscale-log-jsonl's; what goes beyond them is in `details`."""
    return {
        "model": source.name,
        "recipe": config.recipe,
        "estimator": config.estimator,
        "granularity": config.granularity,
        "layers": [
            {
                "layer": report.number,
                **{name: report.bounds[name] for name in LAYER_BOUNDS},
                "scale_qkv": report.scales["qkv"],
                "saturated": 0,
            }
            for report in reports
        ],
        "heads": [report.sigma for report in reports],
        "details": [
            {
                "layer": report.number,
                "stable_rank": report.stable_rank,
                "amax_o": report.bounds["amax_o"],
                "scales": report.scales,
                "rotary_tightness": report.rotary_tightness,
                "utilization": report.utilization,
            }
            for report in reports
        ],
        "warnings": [warning for report in reports for warning in report.warnings],
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    config = config_from(args)
    if args.seq_length is not None and args.seq_length < 1:
        raise ValueError(f"--seq-length must be positive, not {args.seq_length}")
    if args.plot is not None:
        _scale_report.check_plot(args.plot)
    source = open_checkpoint(args.path)
    layers = inspect_layers(source, config, max_sequence_length=args.seq_length)
    try:
        reports = list(tqdm(layers, total=source.num_layers, unit="layer", disable=None, leave=False))
    except ValueError as error:
        raise ValueError(f"{args.path}: {error}") from error
    if args.plot is not None:
        write_atomically(args.plot, _scale_report.plot(reports, source.name))
    if args.json:
        print(json.dumps(as_json(source, config, reports), allow_nan=False, indent=1))
    else:
        _scale_report.print_tables(source, config, reports)


if __name__ == "__main__":
    sys.exit(run(main))
