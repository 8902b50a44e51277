"""What a replay is summed up to: the JSON of DESIGN, a Markdown table, and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Record = Mapping[str, Any]
COLUMNS = {
    "recipe": "recipe",
    "saturated_values": "saturated values",
    "saturated_steps": "in steps",
    "first_saturated_step": "first",
    "worst_overrange": "worst over-range",
    "flushed_values": "flushed values",
    "transient_sqnr_db": "SQNR at the transient (dB)",
    "nonfinite": "non-finite steps",
    "utilization_median": "utilisation, median",
    "utilization_max": "max",
    "final_loss": "final loss",
    "reference_loss": "uncast",
}


def summarize(
    scenario: str, recipe: str, records: Sequence[Record], reference: Sequence[Record], *, transient: int
) -> dict[str, Any]:
    """One replay's numbers. `reference`: the records of the run without casts; `transient`: a step, from 1.

    saturated_values and flushed_values are sums over all steps, layers, slots and heads; worst_overrange is the largest
    |x| * scale / FP8_max of any of them, 1 where a slot is scaled by its own amax. transient_sqnr_db: of the attention
    output at the transient step against uncast attention on the same Q, K and V, all layers together. nonfinite: steps
    whose loss, or a value that was cast, was not finite. utilization_median: of the joint slot of Q, K and V, over
    steps and layers; utilization_max: of any slot that a recipe bounds. Losses are those of the last step's batch.
    """
    scales = [record["geoscale"] for record in records]
    saturated = [scale["saturated"] for scale in scales]
    shares = [float(layer["utilization"]["qkv"]) for scale in scales for layer in scale["layers"]]
    worst = [float(scale["overrange_max"]) for scale in scales]
    bad = sum(
        not (math.isfinite(float(record["lm_loss"])) and math.isfinite(over)) for record, over in zip(records, worst)
    )
    return {
        "scenario": scenario,
        "recipe": recipe,
        "saturated_values": sum(saturated),
        "saturated_steps": sum(map(bool, saturated)),
        "first_saturated_step": next((step for step, count in enumerate(saturated, start=1) if count), None),
        "worst_overrange": _json(max(worst)),
        "flushed_values": sum(scale["flushed"] for scale in scales),
        "transient_sqnr_db": _json(float(scales[transient - 1]["attention_sqnr_db"])),
        "nonfinite": bad,
        "utilization_median": _json(median(shares)),
        "utilization_max": _json(max(float(scale["utilization_max"]) for scale in scales)),
        "final_loss": _json(float(records[-1]["lm_loss"])),
        "reference_loss": _json(float(reference[-1]["lm_loss"])),
    }


def _json(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)


def markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A table per scenario."""
    parts = []
    for scenario in dict.fromkeys(summary["scenario"] for summary in summaries):
        own = [summary for summary in summaries if summary["scenario"] == scenario]
        rows = [list(COLUMNS.values()), *([_cell(summary[key]) for key in COLUMNS] for summary in own)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths))} |" for row in rows]
        lines.insert(1, f"|{'|'.join('-' * (width + 1) + ':' for width in widths)}|")
        parts.append(f"### {scenario}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.4g}"


def plot(
    scenario: str, runs: Mapping[str, Sequence[Record]], path: Path, *, transient: int, logits: bool, reference: str
) -> None:
    """One PNG of a scenario: largest magnitudes against each recipe's range, range in use, loss. `runs`: by recipe,
    the reference included. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    slots = ["qkv", "logits"] if logits else ["qkv"]
    size = (9, 3 * len(slots) + 6)
    figure, axes = pyplot.subplots(len(slots) + 2, 1, sharex=True, figsize=size, layout="constrained")
    steps = range(1, 1 + max(map(len, runs.values())))
    names = {"qkv": "Q, K, V", "logits": "logits"}
    for panel, slot in zip(axes, slots):
        for recipe, records in runs.items():
            if recipe == reference:
                continue
            layers = [record["geoscale"]["layers"] for record in records]
            amax = [max(float(layer["amax"][slot]) for layer in step) for step in layers]
            # What the scale maps to the FP8 maximum, in the layer that is fullest.
            reach = [_reach(step, slot) for step in layers]
            (line,) = panel.plot(steps, reach, label=f"{recipe}: range")
            panel.plot(steps, amax, color=line.get_color(), linestyle=":", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_ylabel(f"{names[slot]}: largest |x| (dotted),\nlargest representable (line)")
    for recipe, records in runs.items():
        if recipe != reference:
            used = [float(record["geoscale"]["utilization_max"]) for record in records]
            axes[-2].plot(steps, used, label=recipe, marker=".")
        axes[-1].plot(steps, [float(record["lm_loss"]) for record in records], label=recipe)
    axes[-2].axhline(1, color="black", linewidth=0.8)
    axes[-2].set_yscale("log")
    axes[-2].set_ylabel("range in use; above 1 values saturate")
    axes[-1].set_ylabel("loss")
    axes[-1].set_xlabel("step of the replay")
    axes[0].set_title(scenario)
    for panel in axes:
        panel.axvline(transient, color="grey", linestyle="--", linewidth=0.8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _reach(layers: Sequence[Mapping[str, Any]], slot: str) -> float:
    fullest = max(layers, key=lambda layer: float(layer["utilization"][slot]))
    used = float(fullest["utilization"][slot])
    return float(fullest["amax"][slot]) / used if used else math.nan
