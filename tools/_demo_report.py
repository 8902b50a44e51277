"""What the demo says about its runs: a summary of each, a table and a plot of all, made from their JSONL alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_geoscale.config import GEOMETRIC_RECIPES

Record = dict[str, Any]
"""One line of the JSONL: one iteration."""
COLUMNS = {
    "recipe": ("recipe", ""),
    "steps": ("steps", "d"),
    "final_loss": ("loss", ".3f"),
    "saturated_values": ("saturated values", ",d"),
    "worst_overrange": ("worst over-range", ".3f"),
    "first_saturated_step": ("first saturated step", "d"),
    "spike_sqnr_db": ("SQNR at the spike (dB)", ".1f"),
    "refresh_share": ("refresh / step time", ".1%"),
}
"""The keys of a summary; the head and the format that the table gives them."""


class LogReader:
    """The records of a JSONL that another process is writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes_read = 0
        self.records: list[Record] = []

    def update(self) -> bool:
        """Read on; returns whether there was anything new."""
        if not self._path.exists():
            return False
        with self._path.open("rb") as file:
            file.seek(self._bytes_read)
            lines = [line for line in file if line.endswith(b"\n")]  # the last one may be half written
        self._bytes_read += sum(map(len, lines))
        self.records += map(json.loads, lines)
        return bool(lines)


def summarize(recipe: str, records: Sequence[Record], *, spike: int, tokens_per_step: int) -> dict[str, Any]:
    """The keys of `COLUMNS` for a whole run. A number that JSON has no word for stays the string that the log has."""
    scaling = [record["geoscale"] for record in records]
    saturated_steps = [record["iteration"] for record in records if record["geoscale"]["saturated"]]
    total_ms = sum(1e3 * tokens_per_step / record["tokens_per_second"] for record in records)
    return {
        "recipe": recipe,
        "steps": len(records),
        "final_loss": records[-1]["lm_loss"],
        "saturated_values": sum(scales["saturated"] for scales in scaling),
        "worst_overrange": max((scales["overrange_max"] for scales in scaling), key=_nan_above_all),
        "first_saturated_step": saturated_steps[0] if saturated_steps else None,
        "spike_sqnr_db": records[spike - 1]["geoscale"]["attention_sqnr_db"],
        "refresh_share": sum(scales["refresh_ms"] for scales in scaling) / total_ms,
    }


def _nan_above_all(value: float | str) -> float:
    number = float(value)
    return math.inf if math.isnan(number) else number


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The summaries as a Markdown table that is readable as it stands."""
    rows = [[head for head, _ in COLUMNS.values()]]
    for summary in summaries:
        rows.append([_cell(summary[key], form) for key, (_, form) in COLUMNS.items()])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 1) + ':' for width in widths)}|")
    return "\n".join(lines) + "\n"


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else format(value, form)


def plot(logs: Mapping[str, Sequence[Record]], path: Path, *, spike: int, resumed: int, factor: int) -> None:
    """One PNG: over-range, saturated values and loss against the step. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 9), layout="constrained")
    for recipe, records in logs.items():
        steps = [record["iteration"] for record in records]
        (line,) = top.plot(steps, [_number(record, "overrange_max") for record in records], label=recipe)
        if recipe in GEOMETRIC_RECIPES:
            utilization = [_number(record, "utilization_max") for record in records]
            label = f"{recipe}: tensors that it bounds (Q, K, V, O)"
            top.plot(steps, utilization, color=line.get_color(), linestyle=":", label=label)
        middle.plot(steps, [_number(record, "saturated") for record in records], label=recipe, marker=".")
        bottom.plot(steps, [float(record["lm_loss"]) for record in records], label=recipe)
    top.axhline(1, color="black", linewidth=0.8)
    top.set_yscale("log")
    top.set_ylabel("max |x| · scale / FP8 maximum")
    top.set_title("FP8 attention under a weight spike: above the line, values saturate")
    middle.set_yscale("symlog")
    middle.set_ylim(bottom=-0.5)
    middle.set_ylabel("saturated values in the step")
    bottom.set_ylabel("loss")
    bottom.set_xlabel("step")
    for axes in (top, middle, bottom):
        axes.axvline(spike, color="grey", linestyle="--", linewidth=0.8)
        axes.axvline(resumed, color="grey", linestyle=":", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is top else "upper right", fontsize="small")
    for step, word in ((spike, f" weights × {factor}"), (resumed, " stopped, resumed")):
        bottom.annotate(word, (step, 0.97), xycoords=("data", "axes fraction"), va="top", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _number(record: Record, name: str) -> float:
    return float(record["geoscale"][name])
