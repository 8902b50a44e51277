"""When a run is to stop before its last iteration: SIGTERM, or --exit-duration-in-mins."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
import torch.distributed as dist


class ExitRequest:
    """On whichever rank it is noticed, all ranks exit after the same step. Made first of all, so that SIGTERM during
    start-up is not lost; the children of a rank get the signal from a launcher too, and must live through it."""

    def __init__(self) -> None:
        self._start, self._seconds = time.monotonic(), float("inf")
        self._signalled = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: Any) -> None:  # may come twice, from Slurm and from torchrun
        self._signalled = True

    def limit(self, minutes: float | None) -> None:
        """Set --exit-duration-in-mins, counted from the start of the process; None sets none."""
        self._seconds = float("inf") if minutes is None else 60 * minutes

    def reason(self, *, before_any_step: bool = False) -> str | None:
        """Why to exit now, None to go on. Collective over the whole job.

        before_any_step: only SIGTERM is a reason, for a run whose time is too short must not begin again for ever.
        """
        late = not before_any_step and time.monotonic() - self._start > self._seconds
        flags = torch.tensor([self._signalled, late], dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        signalled, late = flags.tolist()
        return "SIGTERM" if signalled else "--exit-duration-in-mins" if late else None


def ignore_sigterm(*_: Any) -> None:
    """In a data worker, which a launcher signals together with its rank: torch would let it die, and the rank with it.
    It goes when its rank does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
