"""TensorBoard and wandb: the run's scalars, and of the layers scalars and histograms.

A quantity of a layer is `geoscale-layers/sigma/layer-01`; its histogram over layers is `geoscale/sigma/layers`. What is
NaN or infinite is written as it is as a scalar, and left out of histograms, which have no place for it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Writers:
    """What `--tensorboard-dir` and `--wandb-project` ask for; nothing, where neither is given."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Opens them. Raises ValueError if wandb is asked for and is not installed."""
        self._tensorboard = self._wandb = None
        if args.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(args.tensorboard_dir)
        if args.wandb_project:
            try:
                import wandb
            except ImportError:
                raise ValueError("--wandb-project needs wandb: pip install megatron-geoscale[wandb]") from None
            self._wandb = wandb.init(
                project=args.wandb_project, name=args.wandb_exp_name or None, dir=args.wandb_save_dir or None
            )

    def write(self, iteration: int, scalars: Mapping[str, Any], layers: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write the numbers among `scalars`, and those of `layers`, which are the JSONL's."""
        if self._tensorboard is None and self._wandb is None:
            return
        numbers = {name: value for name, value in scalars.items() if _is_number(value)}
        columns = dict(_columns(layers))
        width = len(str(len(layers)))
        of_layers = {
            f"geoscale-layers/{name}/layer-{row + 1:0{width}d}": value
            for name, column in columns.items()
            for row, value in enumerate(column)
        }
        histograms = {f"geoscale/{name}": np.asarray([v for v in c if math.isfinite(v)]) for name, c in columns.items()}
        if self._tensorboard is not None:
            for name, value in (numbers | of_layers).items():
                self._tensorboard.add_scalar(name, value, iteration)
            for name, values in histograms.items():
                if len(values):
                    self._tensorboard.add_histogram(f"{name}/layers", values, iteration)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers | of_layers, step=iteration)

    def close(self) -> None:
        """Close the logs."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _columns(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    """Each quantity of the layers, `utilization/qkv` for a nested one, with its value in every layer."""
    flat = []
    for layer in layers:
        row: dict[str, Any] = {}
        for name, value in layer.items():
            row |= {f"{name}/{slot}": v for slot, v in value.items()} if isinstance(value, dict) else {name: value}
        flat.append(row)
    for name in flat[0] if flat else ():
        values = [row[name] for row in flat]
        if name != "layer" and all(map(_is_number, values)):
            yield name, values
