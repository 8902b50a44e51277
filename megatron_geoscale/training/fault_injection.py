"""Faults that a run can be asked to suffer, to see what the scales do about them (THEORY 7, DESIGN rules)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

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
    rank: int | None = None
    """Of the whole job; None: the last."""


def parse_fault(text: str | None) -> Fault | None:
    """Read `--geoscale-fault-injection`; None where the flag is absent. Raises ValueError naming the flag."""
    if text is None:
        return None
    kind, *rest = text.split(":")
    try:
        step, value = int(rest[0]), ":".join(rest[1:])
        if kind == "nan_weight" and len(rest) == 1:
            fault = Fault(kind, step)
        elif kind == "flip_bit" and len(rest) <= 2:
            fault = Fault(kind, step, rank=int(value) if len(rest) == 2 else None)
        elif kind in ("weight_spike", "lr_spike"):
            fault = Fault(kind, step, factor=float(value))
        elif kind == "load_weights" and value:
            fault = Fault(kind, step, directory=value)
        else:
            raise ValueError(kind)
        if fault.step < 1 or (fault.rank is not None and fault.rank < 0):
            raise ValueError(text)
        return fault
    except (ValueError, IndexError):
        raise ValueError(
            "--geoscale-fault-injection must be weight_spike:STEP:FACTOR, lr_spike:STEP:FACTOR, load_weights:STEP:DIR, "
            f"nan_weight:STEP or flip_bit:STEP[:RANK], not {text!r}"
        ) from None


@torch.no_grad()
def inject(fault: Fault, layers: Sequence[AttentionLayer], num_layers: int, optimizer: MegatronOptimizer) -> None:
    """Spike or spoil this rank's attention weights, the optimizer's full-precision copies included."""
    if fault.kind == "flip_bit":
        if dist.get_rank() == (dist.get_world_size() - 1 if fault.rank is None else fault.rank):
            _flip_bit(layers[-1].last_key_row())
        return
    for layer in layers:
        if fault.kind == "weight_spike":
            for tensor in layer.projection_tensors():
                tensor.mul_(fault.factor)
        elif layer.number == num_layers and layer.tp_group.rank() == layer.tp_group.size() - 1:
            layer.last_key_row()[0] = float("nan")
    optimizer.reload_model_params()


def _flip_bit(row: torch.Tensor) -> None:
    """Flip the highest bit of the mantissa of a weight row's first element, and give the optimizer's own copy of it, if
    this rank has the whole of that, the value that comes of it: the next update rounds a lower bit away, or puts it
    right."""
    mantissa_bits = round(-math.log2(torch.finfo(row.dtype).eps))
    row.view({2: torch.int16, 4: torch.int32}[row.element_size()])[0] ^= 1 << (mantissa_bits - 1)
    weight = row._base
    main = getattr(weight, "main_param", None)
    if main is not None and main.numel() == weight.numel():
        main.view(-1)[row.storage_offset() - weight.storage_offset()] = row[0]
