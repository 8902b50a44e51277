"""Which code computes FP8 attention on this machine."""

from __future__ import annotations

import torch

from megatron_geoscale.attention.obstacles import installed_te
from megatron_geoscale.config import GeoScaleConfig


def resolve_attention(config: GeoScaleConfig) -> str:
    """`emulated` or `te`: what `config.attention` means here. `auto` is te where Transformer Engine and a CUDA device
    are there."""
    if config.attention != "auto":
        return config.attention
    return "te" if torch.cuda.is_available() and installed_te()[0] is not None else "emulated"
