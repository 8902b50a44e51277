"""Scales for models of transformers under PyTorch's FSDP2 (`fully_shard`); also for plain models and DDP.

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scales = attach(model, GeoScaleConfig(), optimizer=optimizer)

Norms and bounds come from the local shards (`sharded_weights` says what is sent); no weight is gathered. The table
follows every `optimizer.step()`; after anything else that changes weights, a load above all, call `scales.refresh()`.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.integrations.hugging_face import HuggingFaceScales


def attach(
    model: torch.nn.Module,
    config: GeoScaleConfig,
    *,
    optimizer: torch.optim.Optimizer | None,
    dtype: torch.dtype | None = None,
) -> HuggingFaceScales:
    """Give `model`, after `fully_shard`, FP8 attention whose scales follow its weights. Collective.

    optimizer: whose steps change them; None where nothing trains. A step that a GradScaler skips does not refresh.
    dtype: `param_dtype` of the MixedPrecisionPolicy, or autocast's. Raises ValueError as `HuggingFaceScales`.
    """
    scales = HuggingFaceScales(model, config, dtype=dtype)

    def stepped(*_: Any) -> None:
        scales.after_step(applied=True)

    if optimizer is not None:
        optimizer.register_step_post_hook(stepped)
    return scales
