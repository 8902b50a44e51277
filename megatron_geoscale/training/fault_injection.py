"""Faults that a run can be asked to suffer, to see what the scales do about them (THEORY 7, DESIGN rules)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # tools parse pretrain.py's flags without megatron-core
    from megatron.core.optimizer import MegatronOptimizer

    from megatron_geoscale.scaling.layers import AttentionLayer


@dataclass(frozen=True)
class Fault:
    """`kind` at iteration `step` (from 1)."""

    kind: str
    step: int
    factor: float = 1.0
    directory: str = ""


def parse_fault(text: str | None) -> Fault | None:
    """Read `--geoscale-fault-injection`; None where the flag is absent. Raises ValueError naming the flag."""
    if text is None:
        return None
    kind, *rest = text.split(":")
    try:
        step, value = int(rest[0]), ":".join(rest[1:])
        if kind == "nan_weight" and len(rest) == 1:
            fault = Fault(kind, step)
        elif kind in ("weight_spike", "lr_spike"):
            fault = Fault(kind, step, factor=float(value))
        elif kind == "load_weights" and value:
            fault = Fault(kind, step, directory=value)
        else:
            raise ValueError(kind)
        if fault.step < 1:
            raise ValueError(fault.step)
        return fault
    except (ValueError, IndexError):
        raise ValueError(
            "--geoscale-fault-injection must be weight_spike:STEP:FACTOR, lr_spike:STEP:FACTOR, load_weights:STEP:DIR "
            f"or nan_weight:STEP, not {text!r}"
        ) from None


@torch.no_grad()
def inject(fault: Fault, layers: Sequence[AttentionLayer], num_layers: int, optimizer: MegatronOptimizer) -> None:
    """Spike or spoil this rank's attention weights, the optimizer's full-precision copies included."""
    for layer in layers:
        if fault.kind == "weight_spike":
            for tensor in layer.projection_tensors():
                tensor.mul_(fault.factor)
        elif layer.number == num_layers and layer.tp_group.rank() == layer.tp_group.size() - 1:
            layer.last_key_row()[0] = float("nan")
    optimizer.reload_model_params()
