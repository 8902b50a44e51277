#!/usr/bin/env python3
"""What each choice behind the scales is worth: `python benchmarks/ablations.py [--only NAME ...] [--json PATH]`.

    margin            room below the FP8 maximum, on captured tensors
    powers_of_two     forward scales rounded down to powers of two, on captured tensors
    sigma             norm of a head or of the layer, exact or by power iteration, logits cast to FP8
    slack             SQNR when a scale is too small (a loose bound) or too large (values saturate)
    causality         whether a later token changes the output of earlier ones, through the scale
    tokens            tokens that are heavy-tailed or far from isotropic, on a layer with synthetic weights
    refresh_interval  scales of older weights, in short trainings

Captured tensors (benchmarks/_captured.py) are those of the model that tools/replay_transients.py trains: it is made
in the output directory unless it is there, or taken from --load. Prints a Markdown section for each, progress on
stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import torch
from _captured import GRADIENTS, Model, Tensors, attach_after, in_model, measure, recipe_config, sqnr
from _measure import machine_line, number, progress, set_up, table, write_json
from torch import Tensor

from _cli import ArgumentParser, run
from _corpus import stdlib_directory
from _replay_training import RECIPES, data_flags, training_flags
from _runs import import_once, run_all
from replay_transients import BASE_STEPS, trained_model

Rows = list[dict[str, Any]]
MARGINS = (1.0, 0.9, 0.5, 0.25, 2.0**-4, 2.0**-8)
SLACK_BITS = (-2, -1, 0, 1, 2, 3, 4, 6, 8, 10, 12, 14)
"""Powers of two by which a scale is smaller than the tensor's own amax asks for."""
RUN_STEPS, SPIKE_STEP, SPIKES, INTERVALS = 32, 17, (30.0, 100.0), (1, 2, 4, 16)
"""Of `refresh_interval`; the learning rate of update 17 is multiplied: an interval of 16 refreshes just before it."""
TOKENS, TYPICAL_STEPS, ODD_STEPS = 256, 2, 5
"""Of `tokens`: length of a sequence, steps with isotropic tokens, then steps with the odd ones."""
KINDS = ("isotropic", "Student t, 3 degrees", "log-normal", "nearly equal", "4 massive channels", "adversarial")


def margin(model: Model, captured: Sequence[Sequence[Tensors]]) -> Rows:
    """A margin of 2^-k scales as a bound that is 2^k times as large."""
    rows = []
    for recipe in ("certified", "calibrated"):
        for eta in MARGINS:
            found = measure(model, captured, recipe_config(recipe, margin=eta))
            rows.append({"recipe": recipe, "margin": eta, **_columns(found)})
    return rows


def powers_of_two(model: Model, captured: Sequence[Sequence[Tensors]]) -> Rows:
    """The largest power of two below, at up to twice the slack: rescaling is exact then. For P that is 256, not 448."""
    from megatron_geoscale.scaling.slots import SLOTS

    def round_down(*, p: bool, others: bool) -> Callable[[Tensor], Tensor]:
        chosen = torch.tensor([p if slot == "s" else others for slot in SLOTS])
        return lambda scales: torch.where(chosen, torch.exp2(torch.log2(scales).floor()), scales)

    ways = {
        "none": round_down(p=False, others=False),
        "all": round_down(p=True, others=True),
        "all but P": round_down(p=False, others=True),
        "P alone": round_down(p=True, others=False),
    }
    return [
        {"recipe": recipe, "powers of two": name, **_columns(measure(model, captured, recipe_config(recipe), adjust))}
        for recipe in ("certified", "rank_aware", "calibrated")
        for name, adjust in ways.items()
    ]


def sigma(model: Model, captured: Sequence[Sequence[Tensors]]) -> Rows:
    """How the norm behind the logits' scale is taken; logits cast. `opposed`: every second query head of a group is the
    negative of the one before, so the sum over heads that `layer` takes is zero. No recipe is calibrated here."""
    cases = [("certified", "gram", "head"), ("rank_aware", "gram", "head")]  # their bounds read no other norm
    cases += [("paper", estimator, scope) for estimator in ("gram", "power") for scope in ("head", "layer")]
    rows = []
    for weights in ("trained", "opposed"):
        if weights == "opposed":
            _oppose_heads(model)
            captured = model.capture()
        for recipe, estimator, granularity in cases:
            config = recipe_config(
                recipe, estimator=estimator, granularity=granularity, logits_dtype="fp8", burn_in_steps=10**6
            )
            found = measure(model, captured, config)
            rows.append({
                "weights": weights, "recipe": recipe, "estimator": estimator, "granularity": granularity,
                "utilisation of the logits": found["utilization"]["logits"],
                "saturated logits": found["saturated_by_slot"]["logits"], "SQNR of O (dB)": found["sqnr_db"]["O"],
            })  # fmt: skip
    return rows


@torch.no_grad()
def _oppose_heads(model: Model) -> None:
    from megatron_geoscale.scaling.layers import find_attention_layers

    for layer in find_attention_layers(model.chunks):
        rows = layer.attention.linear_qkv.weight.unflatten(0, (layer.config.num_query_groups, -1, layer.head_dim))
        for head in range(1, layer.heads_per_group, 2):
            rows[:, head].copy_(-rows[:, head - 1])


def causality(model: Model, captured: Sequence[Sequence[Tensors]]) -> Rows:
    """Values of O before the last token that differ once the last token's K and V, which no earlier query may see, are
    8 times as large."""
    rows = []
    for recipe in RECIPES:
        _, scalers = attach_after(model, captured[:-1], recipe_config(recipe))
        changed = total = 0
        for t, scaler in zip(captured[-1], scalers, strict=True):
            k, v = t.k.clone(), t.v.clone()
            k[-1] *= 8
            v[-1] *= 8
            before, after = t.attend(t.q, t.k, t.v, scaler)[:-1], t.attend(t.q, k, v, scaler)[:-1]
            changed, total = changed + int((before != after).sum()), total + before.numel()
        rows.append({"recipe": recipe, "changed values of earlier tokens": changed, "of": total})
    return rows


def slack(model: Model, captured: Sequence[Sequence[Tensors]]) -> Rows:
    """Q, K, V and O under their own amax, times the slack. Q, K, V of 8 heads of 64, 256 tokens, root mean square 1,
    independent entries; and the captured ones."""
    sources = {name: [_drawn(name)] for name in ("Gaussian", "Student t, 3 degrees", "log-normal")}
    sources["captured"] = list(captured[-1])
    rows = []
    for bits in SLACK_BITS:
        row: dict[str, Any] = {"slack": f"2^{bits}"}
        for name, tensors in sources.items():
            found = sqnr([t.cast(_Slackened(2.0**bits)) for t in tensors])
            row |= {f"{name}: Q, K, V (dB)": found["QKV"], f"{name}: O (dB)": found["O"]}
        rows.append(row)
    return rows


def _drawn(name: str) -> Tensors:
    g, shape = torch.Generator().manual_seed(7), (TOKENS, 1, 8, 64)

    def draw() -> Tensor:
        x = torch.randn(shape, generator=g)
        if name == "Student t, 3 degrees":
            x = x / torch.randn((3, *shape), generator=g).square().mean(dim=0).sqrt()
        elif name == "log-normal":
            x = x.exp() * torch.randn(shape, generator=g).sign()
        return x / x.square().mean().sqrt()

    return Tensors.of(draw(), draw(), draw(), torch.randn(shape, generator=g), 64**-0.5)


class _Slackened:
    """Current scaling, with the scales of Q, K, V and of O divided by a slack."""

    def __init__(self, factor: float) -> None:
        from megatron_geoscale.attention.baselines import CurrentScaling

        self._current, self._factor = CurrentScaling(1).layer(0), factor
        self.before_backward = self._current.before_backward

    def scale(self, slot: str, *tensors: Tensor) -> Tensor:
        scale = self._current.scale(slot, *tensors)
        return scale / self._factor if slot in ("qkv", "o") else scale

    def observe(self, slot: str, amax: Tensor, saturated: Tensor, flushed: Tensor) -> None:
        """Nothing is read from it."""


def tokens() -> Rows:
    """A GPT-2-like layer (hidden size 512, 8 heads of 64, LayerNorm, biases; weights of tools/_shape_layers.py), logits
    cast. Two steps with isotropic tokens, the burn-in and the history, then five with the odd ones."""
    import_once()
    from _replay_shapes import Predicted
    from _shape_layers import Shape, generator, qkv, synthesise
    from megatron_geoscale.attention.baselines import DelayedScaling
    from megatron_geoscale.scaling.geometry import AttentionGeometry
    from megatron_geoscale.scaling.slots import SLOTS
    from megatron_geoscale.spectral import Moments

    device = torch.device("cpu")
    shape = Shape(4, 512, 8, 8, 64, 1024, rotary=False, layer_norm=True)
    weights = synthesise(shape, 1, device)
    p = weights.projections()
    moments = Moments.of(p, with_cross=True)
    geometry = AttentionGeometry(
        hidden_size=shape.hidden_size, num_heads=shape.heads, num_groups=shape.groups, head_dim=shape.head_dim,
        softmax_scale=shape.head_dim**-0.5, max_sequence_length=shape.seq_length, rotary_dim=0,
    )  # fmt: skip
    rows = []
    for kind in KINDS:
        made = []
        for step in range(TYPICAL_STEPS + ODD_STEPS):
            hidden = _hidden("isotropic" if step < TYPICAL_STEPS else kind, p, step)
            gradient = torch.randn(TOKENS, 1, shape.heads, shape.head_dim, generator=generator("gradient", step))
            made.append(Tensors.of(*qkv(shape, weights, hidden), gradient, geometry.softmax_scale))
        for recipe in ("certified", "rank_aware", "paper", "calibrated", "delayed"):
            config = recipe_config(recipe, logits_dtype="fp8", burn_in_steps=TYPICAL_STEPS)
            if recipe == "delayed":
                scaling: Any = DelayedScaling(1)
                scaler = scaling.layer(0)
            else:
                scaling = Predicted(geometry, config, shape.layers, device)
                scaling.refresh(moments)
                scaler = scaling.scaler
            seen = []
            for tensors in made:
                scaling.gauge.reset()
                tensors.cast(scaler, fp8_logits=True)
                seen.append((scaling.gauge.saturated[0].tolist(), scaling.gauge.overrange[0].tolist()))
                scaling.end_step()
            first, last = seen[TYPICAL_STEPS], seen[-1]
            logits, others = SLOTS.index("logits"), [SLOTS.index("qkv"), SLOTS.index("o")]
            rows.append({
                "tokens": kind, "recipe": recipe,
                "saturated Q, K, V, O: first step": sum(first[0][i] for i in others),
                "saturated Q, K, V, O: fifth": sum(last[0][i] for i in others),
                "utilisation of Q, K, V: first step": first[1][others[0]],
                "saturated logits: first step": first[0][logits], "saturated logits: fifth": last[0][logits],
                "utilisation of the logits: first step": first[1][logits],
            })  # fmt: skip
    return rows


def _hidden(kind: str, p: Any, step: int) -> Tensor:
    """Hidden states [tokens, d] before the norm."""
    g, d = torch.Generator().manual_seed(100 + step), p.q.shape[-1]
    x = torch.randn(TOKENS, d, generator=g)
    if kind == "Student t, 3 degrees":
        x = x / torch.randn(3, TOKENS, d, generator=g).square().mean(dim=0).sqrt()
    elif kind == "log-normal":
        x = (1.5 * x).exp() * torch.randn(TOKENS, d, generator=g).sign()
    elif kind == "nearly equal":
        x = torch.randn(d, generator=torch.Generator().manual_seed(99)) + 0.01 * x
    elif kind == "4 massive channels":
        x[:, torch.randperm(d, generator=torch.Generator().manual_seed(99))[:4]] *= 100
    elif kind == "adversarial":
        # What the loudest head answers most to, as query and as key, and its largest rows.
        norms = torch.linalg.matrix_norm(p.q.mT @ p.k, ord=2)
        head = int(norms.argmax())
        left, _, right = torch.linalg.svd(p.q[head].T @ p.k[head])
        rows = torch.cat([p.q, p.k, p.v]).flatten(0, 1)
        worst = torch.stack([left[:, 0], right[0], rows[rows.norm(dim=1).argmax()]]).float()
        x = worst[torch.arange(TOKENS) % 3] + 1e-4 * x
    return x


def refresh_interval(args: argparse.Namespace) -> Rows:
    """Trainings of 32 steps from random weights at learning rate 1e-3, without warm-up, in bfloat16."""
    data = data_flags(args.output / "data", args.input)
    events: dict[str, list[object]] = {"training": []}
    for factor in SPIKES:
        fault = f"lr_spike:{SPIKE_STEP}:{factor}"
        events[f"learning rate times {factor:g} in update {SPIKE_STEP}"] = ["--geoscale-fault-injection", fault]
    jobs: dict[str, list[object]] = {}
    for number_of_event, flags in enumerate(events.values()):
        for interval in INTERVALS:
            jobs[f"interval-{interval}-{number_of_event}"] = [
                *training_flags(RUN_STEPS), *data, "--bf16", "--geoscale-refresh-interval", interval, *flags,
                "--no-check-for-nan-in-loss-and-grad",
            ]  # fmt: skip
    records = run_all(jobs, args.output / "runs", workers=args.workers, title="refresh intervals")
    rows = []
    for number_of_event, event in enumerate(events):
        for interval in INTERVALS:
            scales = [record["geoscale"] for record in records[f"interval-{interval}-{number_of_event}"]]
            rows.append({
                "event": event, "refresh interval": interval,
                "saturated values": sum(scale["saturated"] for scale in scales),
                "in steps": sum(scale["saturated"] > 0 for scale in scales),
                "worst over-range": max(float(scale["overrange_max"]) for scale in scales),
                "utilisation of Q, K, V, median": median(
                    float(layer["utilization"]["qkv"]) for scale in scales for layer in scale["layers"]
                ),
                "largest": max(float(layer["utilization"]["qkv"]) for scale in scales for layer in scale["layers"]),
            })  # fmt: skip
    return rows


ON_CAPTURED = {"margin": margin, "powers_of_two": powers_of_two, "slack": slack, "causality": causality, "sigma": sigma}
"""`sigma` last: it changes the weights."""
NAMES = (*ON_CAPTURED, "tokens", "refresh_interval")


def _on_captured(model: Model, names: Sequence[str]) -> dict[str, Rows]:
    captured = model.capture()
    found = {}
    for name in names:
        progress(name)
        found[name] = ON_CAPTURED[name](model, captured)
    return found


def _columns(found: dict[str, Any]) -> dict[str, Any]:
    """Of `measure`."""
    return {
        "utilisation of Q, K, V, median": found["utilization_qkv_median"],
        "SQNR of Q, K, V (dB)": found["sqnr_db"]["QKV"],
        "O": found["sqnr_db"]["O"],
        **{name: found["sqnr_db"][name] for name in GRADIENTS},
        "saturated": found["saturated"],
        "flushed Q, K, V": found["flushed_by_slot"]["qkv"],
    }


def markdown(name: str, rows: Rows) -> str:
    """A section."""
    texts = [column for column in rows[0] if isinstance(rows[0][column], str | bool)]
    columns = [column if column in texts else f" {column}" for column in rows[0]]
    cells = ([_cell(column, value) for column, value in row.items()] for row in rows)
    return f"## {name}\n\n{table(name, columns, cells)}\n"


def _cell(column: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    decibels = "dB" in column or column in ("O", *GRADIENTS)
    return f"{value:.1f}" if decibels else number(value)


def plot(rows: Rows, path: Path) -> None:
    """SQNR of Q, K, V against the slack. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for column in (column for column in rows[0] if "Q, K, V" in column):
        axes.plot([int(row["slack"][2:]) for row in rows], [row[column] for row in rows], marker=".",
                  label=column.split(":")[0])  # fmt: skip
    axes.axvline(0, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xlabel("slack in bits: log2(bound / amax); left of 0 values saturate")
    axes.set_ylabel("SQNR of Q, K, V in E4M3 (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help="default: all")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write machine and rows to PATH")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write a plot of `slack` to PNG")
    parser.add_argument("--load", type=Path, metavar="DIR", help="checkpoint directory instead of training one")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, metavar="N",
                        help=f"steps of the training before (default: {BASE_STEPS})")
    parser.add_argument("--input", nargs="+", default=[stdlib_directory()], metavar="PATH",
                        help="text to train on (default: the standard library of this Python)")
    parser.add_argument("--output", type=Path, default=Path("runs/replay"), metavar="DIR", help="default: runs/replay")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    args = parser.parse_args(argv)
    if args.base_steps < 1 or args.workers < 1:
        parser.error("--base-steps and --workers must be 1 or more")
    if args.plot and "slack" not in args.only:
        parser.error("--plot belongs to the ablation slack")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    about = set_up(1)
    found: dict[str, Rows] = {}
    on_captured = [name for name in ON_CAPTURED if name in args.only]
    if on_captured:
        data, base, _ = trained_model(args)
        found |= in_model([*training_flags(1), *data], base, _on_captured, on_captured)
    others = {"tokens": tokens, "refresh_interval": partial(refresh_interval, args)}
    for name, work in others.items():
        if name in args.only:
            progress(name)
            found[name] = work()
    print(machine_line(about), "\n")
    for name, rows in found.items():
        print(markdown(name, rows))
    if args.plot:
        plot(found["slack"], args.plot)
    write_json(args.json, about, {"ablations": found})


if __name__ == "__main__":
    sys.exit(run(main))
