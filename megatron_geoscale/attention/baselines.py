"""Delayed and current scaling, the baselines that every recipe is compared with (THEORY 7).

Both own the scales of all attention layers of a rank and hand each layer its `LayerScaler`, as the engine does for the
geometric recipes: `gauge`, `scales`, `layer(row)`, `end_step()`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_geoscale.scaling.amax_history import AmaxHistory, HistoryScaler
from megatron_geoscale.scaling.formats import SLOT_FORMATS, max_abs, scale_from_amax
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.slots import LayerScaler


class DelayedScaling(AmaxHistory):
    """Delayed scaling of every slot, forward and backward; arguments as `AmaxHistory`."""

    def __init__(
        self,
        num_layers: int,
        *,
        history_length: int = 1024,
        algo: str = "max",
        margin: int = 0,
        amax_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            num_layers, history_length=history_length, algo=algo, margin=margin, amax_group=amax_group, device=device
        )
        self.gauge = SlotGauge(num_layers, device)

    def layer(self, row: int) -> LayerScaler:
        """Scaler of the rank's `row`-th attention layer, from 0."""
        return _DelayedLayer(self, row)


class CurrentScaling:
    """Current scaling: each tensor is cast under the scale of its own amax, one more pass over it.

    Every slot is scaled so, softmax output and dS too, which TE leaves to delayed scaling (FACTS 1). Amax is the
    rank's own. It has no state and nothing to save.
    """

    scales: torch.Tensor | None = None
    """There is no table: a scale exists only while its tensor does."""

    def __init__(self, num_layers: int, device: torch.device | str = "cpu") -> None:
        self.gauge = SlotGauge(num_layers, device)

    def layer(self, row: int) -> LayerScaler:
        """Scaler of the rank's `row`-th attention layer, from 0."""
        return _CurrentLayer(self.gauge, row)

    def end_step(self) -> None:
        """Nothing: no step leaves anything to the next."""


class _DelayedLayer(HistoryScaler):
    def __init__(self, owner: DelayedScaling, row: int) -> None:
        super().__init__(owner, row)
        self._gauge = owner.gauge

    def observe(self, slot: str, amax: torch.Tensor, saturated: torch.Tensor, flushed: torch.Tensor) -> None:
        super().observe(slot, amax, saturated, flushed)
        self._gauge.observe(self._row, slot, amax, saturated, flushed, self.scale(slot))


class _CurrentLayer:
    def __init__(self, gauge: SlotGauge, row: int) -> None:
        self._gauge, self._row = gauge, row
        self._last: dict[str, torch.Tensor] = {}

    def before_backward(self, do: torch.Tensor, *, num_keys: int, amax_qkv: torch.Tensor) -> None:
        """Nothing: every tensor is scaled by what it is."""

    def scale(self, slot: str, *tensors: torch.Tensor) -> torch.Tensor:
        self._last[slot] = scale_from_amax(max_abs(*tensors), SLOT_FORMATS[slot])
        return self._last[slot]

    def observe(self, slot: str, amax: torch.Tensor, saturated: torch.Tensor, flushed: torch.Tensor) -> None:
        self._gauge.observe(self._row, slot, amax, saturated, flushed, self._last[slot])
