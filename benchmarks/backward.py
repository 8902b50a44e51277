#!/usr/bin/env python3
"""The three ways to cast in the backward pass beside each other: `python benchmarks/backward.py [--json PATH]`.

    gradients   --geoscale-backward bound, delayed and bf16 under the recipe certified: SQNR of dQ, dK, dV against
                uncast attention in float64, on a layer with synthetic weights and on a trained model, and after dO
                has become 32 times as large from one step to the next
    length      how loose the bound on dQ, dK, dV is at 1k to 8k tokens, hidden 4096, weights N(0, 0.02): `own amax` is
                what no fused kernel can know, `weights alone` the bound without the amax of Q, K, V

The trained model is that of benchmarks/ablations.py. Prints Markdown tables, progress on stderr.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import torch
from _captured import GRADIENTS, HISTORY, Model, Tensors, in_model, measure, recipe_config, summary
from _measure import machine_line, progress, set_up, table, write_json

from _cli import ArgumentParser, run
from _corpus import stdlib_directory
from _replay_training import training_flags
from _runs import import_once
from replay_transients import BASE_STEPS, trained_model

Rows = list[dict[str, Any]]
MODES, JUMP, TOKENS, LENGTHS = ("bound", "delayed", "bf16"), 32.0, 512, (1024, 2048, 4096, 8192)
BACKWARD = ("do", "dp", "dqkv")


def _row(case: str, what: str, found: dict[str, Any]) -> dict[str, Any]:
    """A line of a table from what `summary` found; room: how many times the largest of dQ, dK, dV could double."""
    used = found["utilization"]["dqkv"]
    return {
        "case": case, "backward": what, **{name: found["sqnr_db"][name] for name in GRADIENTS},
        "saturated": sum(found["saturated_by_slot"][slot] for slot in BACKWARD),
        **{f"flushed {slot}": found["flushed_by_slot"][slot] for slot in BACKWARD},
        "room of dqkv (bits)": -math.log2(used) if used else "no cast",
    }  # fmt: skip


def _jumped(tensors: Tensors) -> Tensors:
    out, *gradients = tensors.exact
    return replace(tensors, gradient=JUMP * tensors.gradient, exact=(out, *(JUMP * x for x in gradients)))


def _layer(hidden_size: int, heads: int, groups: int, tokens: int, *, trained: bool) -> tuple[Any, Any, Any]:
    """Shape, weights and geometry of a Llama-like layer with heads of 128."""
    from _shape_layers import Shape, synthesise, untrained
    from megatron_geoscale.scaling.geometry import AttentionGeometry

    shape = Shape(1, hidden_size, heads, groups, 128, tokens, rotary=True, layer_norm=False)
    weights = synthesise(shape, 1, torch.device("cpu"))
    geometry = AttentionGeometry(
        hidden_size=hidden_size, num_heads=heads, num_groups=groups, head_dim=128, softmax_scale=128**-0.5,
        max_sequence_length=tokens, rotary_dim=128,
    )  # fmt: skip
    return shape, weights if trained else untrained(weights, 1), geometry


def _tensors(shape: Any, weights: Any, step: int, *, tail: float = 0.0) -> Tensors:
    """Gaussian tokens, and a Gaussian dO whose tokens have sizes exp(tail N(0, 1)) and whose entries likewise."""
    from _shape_layers import generator, qkv

    g = generator("backward", step)
    q, k, v = qkv(shape, weights, torch.randn(shape.seq_length, shape.hidden_size, generator=g))
    gradient = torch.randn(q.shape, generator=g)
    for size in (q.shape, (len(q), 1, 1, 1)):
        gradient = gradient * (tail * torch.randn(size, generator=g)).exp()
    return Tensors.of(q, k, v, gradient, 128**-0.5)


def synthetic() -> Iterator[dict[str, Any]]:
    """A layer of hidden size 1024, 8 heads, 2 groups. HISTORY steps for `delayed`, then the one that is measured."""
    import_once()
    from _replay_shapes import Predicted
    from megatron_geoscale.spectral import Moments

    for case, trained, tail, jump in (
        ("flat attention", False, 0.0, False), ("flat, dO heavy-tailed", False, 1.5, False),
        ("flat, dO 32 times as large", False, 0.0, True), ("sharp attention", True, 0.0, False),
    ):  # fmt: skip
        progress(case)
        shape, weights, geometry = _layer(1024, 8, 2, TOKENS, trained=trained)
        steps = [_tensors(shape, weights, step, tail=tail) for step in range(HISTORY + 1)]
        if jump:
            steps[-1] = _jumped(steps[-1])
        for mode in MODES:
            layer = Predicted(geometry, recipe_config("certified", backward=mode), 1, torch.device("cpu"))
            layer.refresh(Moments.of(weights.projections(), with_cross=False))
            for tensors in steps:
                layer.gauge.reset()
                powers = tensors.cast(layer.scaler, fp8_backward=mode != "bf16")
                layer.end_step()
            yield _row(case, mode, summary([powers], layer.gauge))


def on_trained(model: Model) -> Rows:
    """The trained model's own tensors, all layers together."""
    captured, rows = model.capture(), []
    after = [*captured[:-1], [_jumped(tensors) for tensors in captured[-1]]]
    for case, batches in {"trained model": captured, "trained model, dO 32 times as large": after}.items():
        for mode in MODES:
            rows.append(_row(case, mode, measure(model, batches, recipe_config("certified", backward=mode))))
    return rows


def length(lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The later half of the tokens, whose gradients are the smallest."""
    import_once()
    from _replay_shapes import Predicted
    from megatron_geoscale.attention.baselines import CurrentScaling
    from megatron_geoscale.scaling.slot_scales import TableScaler
    from megatron_geoscale.spectral import Moments

    class WeightsAlone(TableScaler):
        def before_backward(self, do: torch.Tensor, *, num_keys: int, amax_qkv: torch.Tensor) -> None:
            super().before_backward(do, num_keys=num_keys, amax_qkv=torch.full_like(amax_qkv, torch.inf))

    for tokens in lengths:
        progress(f"{tokens} tokens")
        shape, weights, geometry = _layer(4096, 1, 1, tokens, trained=False)
        layer = Predicted(geometry, recipe_config("certified"), 1, torch.device("cpu"))
        layer.refresh(Moments.of(weights.projections(), with_cross=False))
        tensors = _tensors(shape, weights, 0)
        own = TableScaler(layer.table, layer.gauge, 0, geometry, backward=CurrentScaling(1).layer(0))
        ways = {"own amax": own, "bound": layer.scaler,
                "bound, weights alone": WeightsAlone(layer.table, layer.gauge, 0, geometry)}
        for what, scaler in ways.items():
            layer.gauge.reset()
            powers = tensors.cast(scaler, part=slice(tokens // 2, None))
            yield _row(f"{tokens:,} tokens", what, summary([powers], layer.gauge))


def markdown(name: str, rows: Rows) -> str:
    """A table."""
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{round(value, 1) + 0.0:.1f}"
        return value if isinstance(value, str) else f"{value:,}"

    columns = [c if c in ("case", "backward") else f" {c} (dB)" if c in GRADIENTS else f" {c}" for c in rows[0]]
    return table(name, columns, [[cell(value) for value in row.values()] for row in rows]) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write machine and rows to PATH")
    parser.add_argument("--load", type=Path, metavar="DIR", help="checkpoint directory instead of training one")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, metavar="N",
                        help=f"steps of the training before (default: {BASE_STEPS})")
    parser.add_argument("--input", nargs="+", default=[stdlib_directory()], metavar="PATH",
                        help="text to train on (default: the standard library of this Python)")
    parser.add_argument("--output", type=Path, default=Path("runs/replay"), metavar="DIR", help="default: runs/replay")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="L", help="of the table `length`")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    about = set_up(1)
    data, base, _ = trained_model(args)
    gradients = [*synthetic(), *in_model([*training_flags(1), *data], base, on_trained)]
    found = {"gradients": gradients, "length": list(length(args.lengths))}
    print(machine_line(about), "\n")
    for name, rows in found.items():
        print(markdown(f"backward {name}", rows))
    write_json(args.json, about, {"backward": found})


if __name__ == "__main__":
    sys.exit(run(main))
