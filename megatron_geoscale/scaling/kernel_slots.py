"""What fused FP8 kernels read and write for a rank's attention layers: their scales and the amax that they leave.

Kernels know no `LayerScaler`. They read a scale from device memory and leave an amax there. Here that memory is
whole rows of device tensors: the forward scales are the scale table itself, which a refresh swaps in place, so no copy
is needed, nothing is done before a forward pass, and a captured CUDA graph reads the new scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_geoscale.scaling.amax_history import AmaxHistory
from megatron_geoscale.scaling.formats import SLOT_FORMATS
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, FORWARD_SLOTS, SLOTS
from megatron_geoscale.scaling.table import ScaleTable

_FORWARD = len(FORWARD_SLOTS)
ZERO_AMAX_SCALE = 2.0**126
"""What `scale_from_amax` makes of zeros: such a gradient leaves no amax either."""


class KernelSlots:
    """Scales and amaxes of all attention layers, at addresses that never change; rows are layers, columns `SLOTS`.

    amax: float32 [num_layers, len(SLOTS)], the largest since the last `collect`, or that of the last kernel, whichever
    the kernel keeps. The backward scales, [num_layers, len(BACKWARD_SLOTS)], start at 1.
    """

    def __init__(
        self, table: ScaleTable, gauges: Sequence[SlotGauge], *, history: AmaxHistory | None = None
    ) -> None:
        """`gauges` are told of every cast; `history`: what scales the backward slots, if not a hook on dO."""
        self._table, self._gauges, self._history = table, list(gauges), history
        self.hooked_backward = False
        """Whether `set_backward_scales` is called before each backward pass."""
        num_layers, device = len(table.scales), table.scales.device
        self.amax = torch.zeros(num_layers, len(SLOTS), dtype=torch.float32, device=device)
        own = torch.ones(num_layers, len(BACKWARD_SLOTS), dtype=torch.float32, device=device)
        self.backward_scales = own if history is None else history.scales[:, _FORWARD:]
        # Of the backward passes before the last: their scales are gone.
        self._backward_overrange = torch.zeros_like(own)
        self._fp8_max = torch.tensor([SLOT_FORMATS[slot].max for slot in SLOTS], device=device)
        self._unverified: set[int] = set()
        self._verified: set[int] = set()

    def expect(self, row: int) -> None:
        """Layer `row` (from 0) runs its attention: the next `collect` makes sure, once, that FP8 kernels did it."""
        if row not in self._verified:
            self._unverified.add(row)

    def scale(self, row: int, slot: str) -> torch.Tensor:
        """0-dim view of the scale that layer `row` (from 0) casts `slot` with."""
        if slot in BACKWARD_SLOTS:
            return self.backward_scales[row, BACKWARD_SLOTS.index(slot)]
        return self._table.scales[row, SLOTS.index(slot)]

    def amax_of(self, row: int, slot: str) -> torch.Tensor:
        """View, [1], of where the kernel leaves the amax of that cast."""
        column = SLOTS.index(slot)
        return self.amax[row, column : column + 1]

    def set_backward_scales(self, row: int, scales: torch.Tensor) -> None:
        """Scales, float32 [3] in the order of BACKWARD_SLOTS, of the backward pass of layer `row` that comes next."""
        amax, old, overrange = self.amax[row, _FORWARD:], self.backward_scales[row], self._backward_overrange[row]
        torch.maximum(overrange, amax * old, out=overrange)
        amax.zero_()
        old.copy_(scales)

    def collect(self) -> None:
        """Tell the gauges, and the history, what the kernels have left, and forget it. The host does not wait.

        Before the scales change, and before a gauge is read: an amax belongs to the scale that it was cast with.

        Raises RuntimeError as `_verify` does, after a layer's first forward pass.
        """
        if self._unverified:
            self._verify()
        used = torch.cat([self._table.scales[:, :_FORWARD], self.backward_scales], dim=1)
        overrange = self.amax * used
        torch.maximum(overrange[:, _FORWARD:], self._backward_overrange, out=overrange[:, _FORWARD:])
        overrange /= self._fp8_max
        for gauge in self._gauges:
            gauge.observe_maxima(self.amax, overrange)
        if self._history is not None:
            running = self._history.amax_history[0, :, _FORWARD:]
            torch.maximum(running, self.amax[:, _FORWARD:], out=running)
        self.amax.zero_()
        self._backward_overrange.zero_()

    def _verify(self) -> None:
        """The kernels' traces of layers that have run for the first time. Waits for the device.

        Raises RuntimeError, naming the layer, where a kernel has left no amax: TE then used another one, in BF16, which
        it says in a debug log only.
        """
        amax, do_scale = self.amax.tolist(), self.backward_scales[:, 0].tolist()
        for row in sorted(self._unverified):
            seen = dict(zip(SLOTS, amax[row], strict=True))
            which = ""
            if any(seen[slot] == 0.0 for slot in ("qkv", "s", "o")):
                which = "attention"
            elif self.hooked_backward and seen["do"] == 0.0 and do_scale[row] not in (1.0, ZERO_AMAX_SCALE):
                which = "the backward pass of attention"
            if which:
                raise RuntimeError(
                    f"{which} of layer {row + 1} did not run in Transformer Engine's fused FP8 kernel; "
                    "NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 makes Transformer Engine log why"
                )
        self._verified |= self._unverified
        self._unverified = set()
