"""The scale table: one device tensor [layer, slot] for the whole model, swapped whole, with a digest.

Every rank holds all layers' rows, its own and the other pipeline stages': the refresh's one all-reduce fills them, so
the digest and the log need no collective of their own.
"""

from __future__ import annotations

import hashlib

import torch

from megatron_geoscale.scaling.slots import SLOTS

BOUNDS = (
    "sigma",
    "sigma_bound",
    "logit_bound",
    "logit_worst",
    "amax_q",
    "amax_k",
    "amax_v",
    "query_norm",
    "key_norm",
    "value_norm",
    "offset_size",
    "softmax_scale",
)
"""Columns of `ScaleTable.bounds`, each the largest over the layer's heads. sigma: ||A^T B||_2 by the chosen estimator,
unrotated. sigma_bound: what logit_bound uses. logit_bound: of |logit|. logit_worst: the same with alpha = 1, what a
calibrated alpha is a share of. amax_*: of an entry of Q, K (after RoPE), V. *_norm: of the 2-norm of one head's query,
key or value vector. offset_size: what the rounding of biases is relative to (`spectral.projections.offset_size`).
softmax_scale: the layer's, no bound at all, here because layers may differ in it. All are functions of the weights: a
calibrated alpha (THEORY 6) is in the scales only."""


class ScaleTable:
    """Scales and the bounds that they were made from. THEORY 5.

    scales: float32 [num_layers, len(SLOTS)], TE's convention FP8_max / amax; 0 in a slot whose scale comes from the
    tensor itself at the cast (do, dp, dqkv).
    bounds: float64 [num_layers, len(BOUNDS)], in exact arithmetic: what rounding adds is allowed for in the scale.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.scales = torch.zeros(num_layers, len(SLOTS), dtype=torch.float32, device=device)
        self.bounds = torch.zeros(num_layers, len(BOUNDS), dtype=torch.float64, device=device)

    def swap(self, scales: torch.Tensor, bounds: torch.Tensor) -> None:
        """Replace the whole table in place: views of rows, and captured CUDA graphs, stay valid."""
        self.scales.copy_(scales)
        self.bounds.copy_(bounds)

    def bound(self, layer: int, name: str) -> float:
        """One bound of global layer `layer` (from 1)."""
        return float(self.bounds[layer - 1, BOUNDS.index(name)])

    def scale(self, layer: int, slot: str) -> float:
        """One scale of global layer `layer` (from 1)."""
        return float(self.scales[layer - 1, SLOTS.index(slot)])


def digest(scales: torch.Tensor) -> str:
    """16 hexadecimal digits of SHA-256 over the bytes of `scales`: equal for equal scales, bit by bit."""
    return hashlib.sha256(scales.cpu().numpy().tobytes()).hexdigest()[:16]
