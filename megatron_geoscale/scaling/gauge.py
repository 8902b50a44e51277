"""What the casts of a run lost: one device tensor per quantity, a row per layer and a column per slot."""

from __future__ import annotations

import torch

from megatron_geoscale.scaling.formats import SLOT_FORMATS, overrange
from megatron_geoscale.scaling.slots import SLOTS


class SlotGauge:
    """Maxima and counts of every cast since the last `reset`, [num_layers, len(SLOTS)] each.

    `amax` float32: max |x|. `overrange` float32: max |x| * scale / FP8_max, above 1 where values saturated.
    `saturated`, `flushed` int64: as `formats.Cast` counts them; of fused kernels see `observe_maxima`. All are updated
    in place (their addresses stay) and nothing is copied to the host. A NaN or infinite amax stays until `reset`: it
    shows in `amax` and `overrange`.
    """

    def __init__(self, num_layers: int, device: torch.device | str = "cpu") -> None:
        shape = (num_layers, len(SLOTS))
        self.amax = torch.zeros(shape, dtype=torch.float32, device=device)
        self.overrange = torch.zeros(shape, dtype=torch.float32, device=device)
        self.saturated = torch.zeros(shape, dtype=torch.int64, device=device)
        self.flushed = torch.zeros(shape, dtype=torch.int64, device=device)

    def observe(
        self,
        row: int,
        slot: str,
        amax: torch.Tensor,
        saturated: torch.Tensor,
        flushed: torch.Tensor,
        scale: torch.Tensor,
    ) -> None:
        """Add a cast made by layer `row` (from 0) under `slot` with `scale`. All tensors are 0-dim."""
        column = SLOTS.index(slot)
        # torch.maximum propagates NaN from either side.
        for total, new in ((self.amax, amax), (self.overrange, overrange(amax, scale, SLOT_FORMATS[slot]))):
            total[row, column].copy_(torch.maximum(total[row, column], new))
        self.saturated[row, column].add_(saturated)
        self.flushed[row, column].add_(flushed)

    def observe_maxima(self, amax: torch.Tensor, overrange: torch.Tensor) -> None:
        """Add what kernels tell of all layers' casts, float32 [num_layers, len(SLOTS)] each.

        They keep maxima and count nothing: a slot whose maximum was beyond the range adds 1 to `saturated`, for at
        least one value was, and `flushed` stays as it is.
        """
        for total, new in ((self.amax, amax), (self.overrange, overrange)):
            torch.maximum(total, new, out=total)
        self.saturated.add_(overrange > 1.0)

    def reset(self) -> None:
        """Forget everything, in place."""
        for total in (self.amax, self.overrange, self.saturated, self.flushed):
            total.zero_()
