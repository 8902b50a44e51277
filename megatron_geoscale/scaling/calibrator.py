"""Calibration of alpha: a burn-in under the uncalibrated bounds, then tighter ones (THEORY 6).

The state is the same on every rank: each step's maxima go through one MAX all-reduce over the whole job, of
[num_layers, slots] numbers for all layers together, so tensor-, data-, context-parallel ranks and pipeline stages
decide alike. A jump of the weights does not start a new burn-in: rho is relative to bounds that follow the weights, and
during warm-up, when sigma moves at every step, a burn-in would never end. What a jump can break is caught by the count
of saturated values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_geoscale.bounds.calibration import ShareStatistics, calibrated_alpha, raised_alpha
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.formats import SLOT_FORMATS
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.slots import SLOTS


class Calibrator:
    """alpha of every layer's calibrated slots (`GeoScaleConfig.calibrated_slots`), in memory that no step adds to."""

    def __init__(self, num_layers: int, config: GeoScaleConfig, device: torch.device) -> None:
        self.config = config
        self.gauge = SlotGauge(num_layers, device)
        """What the step has cast so far; the run's own gauge is emptied by the log."""
        self.statistics = ShareStatistics((num_layers, len(SLOTS)), device)
        self.factors = torch.zeros(num_layers, len(SLOTS), dtype=torch.float64, device=device)
        """alpha of every slot, 1 where it is not calibrated; 0 as long as the burn-in lasts."""
        self._told: torch.Tensor | None = None
        """`factors` when `news` was last asked for, None before the end of the burn-in was told."""
        self._calibrated = torch.tensor([slot in config.calibrated_slots for slot in SLOTS], device=device)
        self._fp8_max = torch.tensor([SLOT_FORMATS[slot].max for slot in SLOTS], dtype=torch.float64, device=device)

    @property
    def burning_in(self) -> bool:
        """Whether alpha is still to be found."""
        return self.statistics.steps < self.config.burn_in_steps

    @property
    def alpha(self) -> torch.Tensor | None:
        """float64 [num_layers, len(SLOTS)], None during the burn-in."""
        return None if self.burning_in else self.factors

    def alpha_of(self, row: int) -> dict[str, float] | None:
        """alpha of each calibrated slot of layer `row` (from 0), None during the burn-in."""
        if self.burning_in:
            return None
        return {slot: float(self.factors[row, SLOTS.index(slot)]) for slot in self.config.calibrated_slots}

    def end_step(self, uncalibrated: Callable[[], torch.Tensor]) -> None:
        """Take up the step that has run, and forget it; the host does not wait for the device.

        uncalibrated: makes the scales of this step's bounds with alpha = 1, of which rho is measured. One all-reduce
        over the whole job; after the burn-in it carries only whether values saturated.
        """
        burning_in = self.burning_in
        seen = self.gauge.amax.double() if burning_in else (self.gauge.saturated > 0).double()
        seen = seen.where(seen.isfinite(), torch.full_like(seen, torch.inf))  # NaN is not the largest to all_reduce
        seen = seen.where(self._calibrated, torch.zeros_like(seen))
        self.gauge.reset()
        if dist.is_initialized():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        if not burning_in:
            self.factors = raised_alpha(self.factors, seen > 0)
            return
        self.statistics.add(seen * uncalibrated().double() / (self.config.margin * self._fp8_max))
        if not self.burning_in:
            self._set_alpha()

    def _set_alpha(self) -> None:
        config = self.config
        found = calibrated_alpha(self.statistics.maxima, factor=config.calibration_factor, floor=config.alpha_floor)
        self.factors = found.where(self._calibrated, torch.ones_like(found))
        self._told = None

    def news(self) -> list[str]:
        """Sentences to print: the end of the burn-in, and alphas raised since the last call. Waits for the device."""
        if self.burning_in:
            return []
        before, self._told = self._told, self.factors
        if before is None:
            return [self._summary()]
        return [
            f"WARNING: values of {SLOTS[column]} saturated in layer {row + 1}: alpha is raised from "
            f"{float(before[row, column]):.4g} to {float(self.factors[row, column]):.4g}"
            for row, column in (self.factors != before).nonzero().tolist()
        ]

    def _summary(self) -> str:
        maxima, median = self.statistics.maxima, self.statistics.quantile(0.5)
        parts = []
        for slot in self.config.calibrated_slots:
            column = SLOTS.index(slot)
            low, high = self.factors[:, column].aminmax()
            parts.append(
                f"{slot} {float(low):.4g} to {float(high):.4g} (share of the bound in use: at most "
                f"{float(maxima[:, column].max()):.4g}, median over steps at most {float(median[:, column].max()):.4g})"
            )
        return f"calibration ended after {self.statistics.steps} steps, alpha by layer: " + ", ".join(parts)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state, the same on every rank; for `load_state_dict`."""
        tensors = {
            "alpha": self.factors,
            "maxima": self.statistics.maxima,
            "counts": self.statistics.counts,
            "steps": torch.tensor([self.statistics.steps], device=self.factors.device),
        }
        return {self._key(name): tensor for name, tensor in tensors.items()}

    def sharded_state_dict(self) -> dict[str, Any]:
        """The state for dist_checkpointing: replicated tensors of global shape, so any layout can take them up."""
        replica = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        return {
            key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
            for key, tensor in self.state_dict().items()
        }

    def _key(self, name: str) -> str:
        return f"geoscale.calibration.{self.config.recipe}.{name}"  # a rho belongs to the bounds of its recipe

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `state_dict` or `sharded_state_dict` saved.

        A longer --geoscale-burn-in-steps than was saved goes on with the burn-in, a shorter one ends it.
        """
        self.factors = state[self._key("alpha")]
        self.statistics.maxima = state[self._key("maxima")]
        self.statistics.counts = state[self._key("counts")]
        self.statistics.steps = int(state[self._key("steps")])
        if not self.burning_in and not self.factors.any():
            self._set_alpha()  # a shorter burn-in than the checkpoint's has just ended
        elif not self.burning_in:
            self._told = self.factors
