"""Delayed and current scaling, the baselines that every recipe is compared with (THEORY 7).

Both own the scales of all attention layers of a rank and hand each layer its `LayerScaler`, as the engine does for the
geometric recipes: `gauge`, `scales`, `layer(row)`, `end_step()`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_geoscale.scaling.formats import SLOT_FORMATS, max_abs, scale_from_amax
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.slots import SLOTS, LayerScaler

AMAX_ALGORITHMS = ("max", "most_recent")


class DelayedScaling:
    """Transformer Engine's delayed scaling: the scales of this step come from the amax of earlier ones.

    The update is that of TE 2.16.1, `transformer_engine/pytorch/quantization.py` (`_amax_and_scale_update`):
    row 0 of the history collects the running step; `end_step` reduces it over `amax_group`, takes the maximum of the
    whole history (`max`) or row 0 (`most_recent`), rotates the history so that the oldest row is dropped and row 0 is
    zero, and sets scale = FP8_max / amax / 2^margin. Where that amax is 0 or not finite the scale stays; where the
    quotient overflows it is the largest float32. So a history of `history_length` rows covers that many steps, this one
    included, and an infinite amax freezes a `max` scale until it has left the history. Scales start at 1.

    Differences: TE updates after every microbatch, ours after every step (call `end_step` per microbatch for TE's
    rhythm). TE's fused kernel skips a NaN in a `max` history; TE's Python, followed here, keeps the scale until the
    NaN has left. The quotient is rounded once, as in the kernel; TE's Python rounds twice, one unit apart at most.

    No state of this class is in a checkpoint, because none of TE's attention state is in Megatron's (FACTS 1): a
    resumed run starts with an empty history at scale 1.
    """

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
        """`margin` is TE's: a power of two below the FP8 maximum. `amax_group`: the ranks that share scales, in
        Megatron TP x DP x CP; None keeps each rank's own. Raises ValueError for a history length below 1 or an
        unknown algo."""
        if history_length < 1:
            raise ValueError(f"history_length of delayed scaling must be 1 or more, not {history_length}")
        if algo not in AMAX_ALGORITHMS:
            raise ValueError(f"algo of delayed scaling must be one of {', '.join(AMAX_ALGORITHMS)}, not {algo!r}")
        self.gauge = SlotGauge(num_layers, device)
        self.scales = torch.ones(num_layers, len(SLOTS), dtype=torch.float32, device=device)
        self.amax_history = torch.zeros(history_length, num_layers, len(SLOTS), dtype=torch.float32, device=device)
        self._algo, self._margin, self._amax_group = algo, margin, amax_group
        self._fp8_max = torch.tensor([SLOT_FORMATS[slot].max for slot in SLOTS], dtype=torch.float32, device=device)

    def layer(self, row: int) -> LayerScaler:
        """Scaler of the rank's `row`-th attention layer, from 0."""
        return _DelayedLayer(self, row)

    def end_step(self) -> None:
        """Turn what the step observed into the next step's scales. A collective over `amax_group`: every rank of it
        must call this, whether or not its optimizer step was applied."""
        history = self.amax_history
        if self._amax_group is not None:
            dist.all_reduce(history[0], op=dist.ReduceOp.MAX, group=self._amax_group)
        amax = history.amax(dim=0) if self._algo == "max" else history[0].clone()
        history.copy_(history.roll(-1, dims=0))
        history[0].zero_()

        scale = self._fp8_max / amax / 2**self._margin
        scale = torch.where((amax > 0) & torch.isfinite(amax), scale, self.scales)
        self.scales.copy_(scale.clamp(max=torch.finfo(torch.float32).max))


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


class _DelayedLayer:
    def __init__(self, owner: DelayedScaling, row: int) -> None:
        self._owner, self._row = owner, row

    def scale(self, slot: str, *tensors: torch.Tensor) -> torch.Tensor:
        return self._owner.scales[self._row, SLOTS.index(slot)]

    def observe(self, slot: str, amax: torch.Tensor, saturated: torch.Tensor, flushed: torch.Tensor) -> None:
        running = self._owner.amax_history[0, self._row, SLOTS.index(slot)]
        running.copy_(torch.maximum(running, amax))
        self._owner.gauge.observe(self._row, slot, amax, saturated, flushed, self.scale(slot))


class _CurrentLayer:
    def __init__(self, gauge: SlotGauge, row: int) -> None:
        self._gauge, self._row = gauge, row
        self._last: dict[str, torch.Tensor] = {}

    def scale(self, slot: str, *tensors: torch.Tensor) -> torch.Tensor:
        self._last[slot] = scale_from_amax(max_abs(*tensors), SLOT_FORMATS[slot])
        return self._last[slot]

    def observe(self, slot: str, amax: torch.Tensor, saturated: torch.Tensor, flushed: torch.Tensor) -> None:
        self._gauge.observe(self._row, slot, amax, saturated, flushed, self._last[slot])
