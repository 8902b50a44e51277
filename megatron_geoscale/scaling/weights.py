"""Reads weights and norms of megatron-core's modules as the next forward will use them."""

from __future__ import annotations

import torch
from megatron.core.fp8_utils import is_float8tensor

from megatron_geoscale.scaling.folding import effective_gain


def as_used(weight: torch.Tensor) -> torch.Tensor:
    """FP8 primary weights as the values that the matrix product takes them for; other weights as they are."""
    return weight.dequantize() if is_float8tensor(weight) else weight


def norm_constants(module: torch.nn.Module, *, zero_centered: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gain float64, shift or None), [inputs] each, of a norm, or of the norm that TE has fused into a linear layer.

    zero_centered: the stored gain is one less than the effective one.
    """
    fused = holds_norm(module)
    gain = getattr(module, "layer_norm_weight" if fused else "weight")
    shift = getattr(module, "layer_norm_bias" if fused else "bias", None)
    return effective_gain(gain, zero_centered=zero_centered), shift


def holds_norm(linear: torch.nn.Module) -> bool:
    """Does TE's linear layer normalise its input itself?"""
    return getattr(linear, "layer_norm_weight", None) is not None
