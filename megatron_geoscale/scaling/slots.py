"""The tensors that FP8 attention casts, their order in every table, and how a cast asks for its scale.

A *slot* is one scale: Q, K and V share one, as TE's fused kernels do. The order of `SLOTS` is the column order of
`ScaleTable`, of the gauges and of the digest.
"""

from __future__ import annotations

from typing import Protocol

import torch

SLOTS = ("qkv", "logits", "s", "o", "do", "dp", "dqkv")
"""qkv: Q, K after RoPE, and V. logits: S * softmax_scale, cast only under `logits_dtype=fp8`. s: softmax output after
dropout. o: attention output. do: its gradient. dp: dS * softmax_scale, which is what TE's slot of that name holds.
dqkv: dQ, dK, dV."""
FORWARD_SLOTS = SLOTS[:4]
BACKWARD_SLOTS = SLOTS[4:]


class LayerScaler(Protocol):
    """What one attention layer asks while it runs; one per layer, made by the engine or by a baseline."""

    def scale(self, slot: str, *tensors: torch.Tensor) -> torch.Tensor:
        """Scale for casting `tensors` (float32, unscaled) under `slot`: 0-dim float32, TE's convention FP8_max/amax."""
        ...

    def before_backward(self, do: torch.Tensor, *, num_keys: int, amax_qkv: torch.Tensor) -> None:
        """Told before a backward pass asks for its scales: dO [s, b, heads, d_v] as it will be cast, and the 0-dim amax
        of the Q, K and V that the forward pass has cast."""
        ...

    def observe(self, slot: str, amax: torch.Tensor, saturated: torch.Tensor, flushed: torch.Tensor) -> None:
        """Report a cast: max |x| before scaling (0-dim float), and how many values exceeded the range or became zero
        though they were not (0-dim int64)."""
        ...
