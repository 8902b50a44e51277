"""A run's JSONL as arrays: a few numbers an iteration, and of every layer its utilisation and saturation.

The file is read line by line, and of each line only what the page shows is kept: 100,000 iterations of 80 layers are
about 100 MB.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RunRecords:
    """Arrays over the iterations that the log has, in order; NaN where the log says nothing."""

    iteration: np.ndarray
    """int64 [steps]"""
    loss: np.ndarray
    """float64 [steps]"""
    grad_norm: np.ndarray
    step_ms: np.ndarray
    tokens_per_second: np.ndarray
    refresh_ms: np.ndarray
    saturated: np.ndarray
    """float64 [steps], values of all layers and slots."""
    utilization: np.ndarray
    """float32 [steps, layers]: the largest |x| * scale / FP8_max of a layer's bounded slots."""
    layer_saturated: np.ndarray
    """float32 [steps, layers]"""
    saturated_by_slot: dict[str, int]
    digest: str | None
    """Of the last iteration's scale table."""
    num_repeated: int
    """Iterations that were logged again, after a resume."""
    truncated: bool
    """Whether the last line was half written."""


def read_run(path: Path) -> RunRecords:
    """Read `path`. ValueError naming file and line for what is no log of a run; OSError as open gives it."""
    rows: dict[int, tuple[Any, ...]] = {}
    by_slot: dict[int, dict[str, int]] = {}
    num_repeated, digest, truncated = 0, None, False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                truncated = True
                break
            try:
                record = json.loads(line)
                row = _row(record)
                slots = dict((record["geoscale"] or {}).get("saturated_by_slot", {}))
                digest = (record["geoscale"] or {}).get("digest")
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{path}:{number}: not a line of --geoscale-log-jsonl") from None
            iteration = record["iteration"]
            if iteration in rows:
                num_repeated += 1
            rows[iteration], by_slot[iteration] = row, slots
    if not rows:
        raise ValueError(f"{path}: no iteration is in it")
    if len({len(row[-1]) for row in rows.values()}) > 1:
        raise ValueError(f"{path}: its iterations differ in their number of layers, so they are of more than one model")
    order = sorted(rows)
    columns = list(zip(*(rows[iteration] for iteration in order)))
    total: dict[str, int] = {}
    for slots in by_slot.values():
        for slot, count in slots.items():
            total[slot] = total.get(slot, 0) + count
    loss, grad_norm, step_ms, speed, refresh, saturated = (np.asarray(c, dtype=np.float64) for c in columns[:6])
    return RunRecords(
        iteration=np.asarray(order, dtype=np.int64),
        loss=loss,
        grad_norm=grad_norm,
        step_ms=step_ms,
        tokens_per_second=speed,
        refresh_ms=refresh,
        saturated=saturated,
        utilization=np.stack(columns[6]),
        layer_saturated=np.stack(columns[7]),
        saturated_by_slot=total,
        digest=digest,
        num_repeated=num_repeated,
        truncated=truncated,
    )


def _row(record: dict[str, Any]) -> tuple[Any, ...]:
    geoscale = record["geoscale"] or {}
    layers = geoscale.get("layers", [])
    if type(record["iteration"]) is not int:
        raise TypeError
    utilization = [max(map(float, layer.get("utilization", {}).values()), default=math.nan) for layer in layers]
    return (
        _number(record["lm_loss"]),
        _number(record["grad_norm"]),
        _number(record.get("step_ms")),
        _number(record["tokens_per_second"]),
        _number(geoscale.get("refresh_ms")),
        _number(geoscale.get("saturated")),
        np.asarray(utilization, dtype=np.float32),
        np.asarray([layer["saturated"] for layer in layers], dtype=np.float32),
    )


def _number(value: float | str | None) -> float:
    """The log writes NaN and infinities as strings, and null for what a rank did not know."""
    return math.nan if value is None else float(value)
