"""Faults that a run can be asked to suffer, to see what the scales do about them (THEORY 7, DESIGN rules)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_geoscale.scaling.layers import AttentionLayer


@dataclass(frozen=True)
class Fault:
    """`kind` at the start of iteration `step` (from 1)."""

    kind: str
    step: int
    factor: float = 1.0


def parse_fault(text: str | None) -> Fault | None:
    """Read `--geoscale-fault-injection`; None where the flag is absent. Raises ValueError naming the flag."""
    if text is None:
        return None
    kind, *numbers = text.split(":")
    expected = {"weight_spike": (int, float), "nan_weight": (int,)}.get(kind)
    try:
        if expected is None:
            raise ValueError(kind)
        fault = Fault(kind, *(make(number) for make, number in zip(expected, numbers, strict=True)))
        if fault.step < 1:
            raise ValueError(fault.step)
        return fault
    except ValueError:
        raise ValueError(
            f"--geoscale-fault-injection must be weight_spike:STEP:FACTOR or nan_weight:STEP, not {text!r}"
        ) from None


@torch.no_grad()
def inject(fault: Fault, layers: Sequence[AttentionLayer], num_layers: int, optimizer: MegatronOptimizer) -> None:
    """Do it to this rank's weights, the optimizer's full-precision copies included."""
    for layer in layers:
        linear = layer.attention.linear_qkv
        if fault.kind == "weight_spike":
            linear.weight.mul_(fault.factor)
            if getattr(linear, "bias", None) is not None:
                linear.bias.mul_(fault.factor)
        elif layer.number == num_layers and layer.tp_group.rank() == layer.tp_group.size() - 1:
            # The last group's key lies before its value; where ranks share the group it may begin on an earlier one.
            linear.weight[max(0, linear.weight.shape[0] - 2 * layer.head_dim), 0] = float("nan")
    optimizer.reload_model_params()
