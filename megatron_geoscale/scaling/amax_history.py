"""Scales from the amax of earlier steps, by Transformer Engine's rules: delayed scaling (THEORY 7)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_geoscale.scaling.formats import SLOT_FORMATS
from megatron_geoscale.scaling.slots import SLOTS

AMAX_ALGORITHMS = ("max", "most_recent")


class AmaxHistory:
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
        self.scales = torch.ones(num_layers, len(SLOTS), dtype=torch.float32, device=device)
        self.amax_history = torch.zeros(history_length, num_layers, len(SLOTS), dtype=torch.float32, device=device)
        self._algo, self._margin, self._amax_group = algo, margin, amax_group
        self._fp8_max = torch.tensor([SLOT_FORMATS[slot].max for slot in SLOTS], dtype=torch.float32, device=device)

    def observe(self, row: int, slot: str, amax: torch.Tensor) -> None:
        """Add a cast of layer `row` (from 0) to the running step; amax 0-dim."""
        running = self.amax_history[0, row, SLOTS.index(slot)]
        running.copy_(torch.maximum(running, amax))

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


class HistoryScaler:
    """One layer's `LayerScaler` on an `AmaxHistory`."""

    def __init__(self, history: AmaxHistory, row: int) -> None:
        """`row`, from 0, of the history."""
        self._history, self._row = history, row

    def before_backward(self, do: torch.Tensor, *, num_keys: int, amax_qkv: torch.Tensor) -> None:
        """Nothing: what this step holds is for the next one."""

    def scale(self, slot: str, *tensors: torch.Tensor) -> torch.Tensor:
        """As `LayerScaler.scale`."""
        return self._history.scales[self._row, SLOTS.index(slot)]

    def observe(self, slot: str, amax: torch.Tensor, saturated: torch.Tensor, flushed: torch.Tensor) -> None:
        """As `LayerScaler.observe`."""
        self._history.observe(self._row, slot, amax)
