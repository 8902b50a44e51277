"""Puts FP8 attention into a Megatron layer spec, and scales into the model that was built from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_geoscale.attention.baselines import CurrentScaling, DelayedScaling
from megatron_geoscale.attention.emulated import EmulatedAttention
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.layers import find_attention_layers


class AttentionScaling(Protocol):
    """What holds the scales of a model's attention: the engine, or a baseline."""

    gauge: SlotGauge
    scales: torch.Tensor | None
    """float32 [num_layers, len(SLOTS)]; None where a scale exists only while its tensor does."""


def use_emulated_attention(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Make every layer of a decoder block spec compute its core attention in emulated FP8; returns `block`.

    `block` is what `get_gpt_decoder_block_spec` returns, local or Transformer Engine's.
    """
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = EmulatedAttention
    return block


def attach_scaling(
    model_chunks: Sequence[torch.nn.Module], config: GeoScaleConfig
) -> GeoScaleEngine | DelayedScaling | CurrentScaling:
    """Give every attention layer of `model_chunks` the scaler of `config.recipe`, baselines included.

    Raises ValueError as `GeoScaleEngine.attach` does.
    """
    if config.is_geometric:
        scaling: GeoScaleEngine | DelayedScaling | CurrentScaling = GeoScaleEngine.attach(model_chunks, config)
        layers = scaling.layers
    else:
        layers = find_attention_layers(model_chunks)
        num_layers = layers[0].config.num_layers
        device = layers[0].device
        if config.recipe == "delayed":
            # Megatron reduces TE's amax over tensor, data and context parallel ranks (--tp-only-amax-red is off).
            group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
            scaling = DelayedScaling(num_layers, amax_group=group, device=device)
        else:
            scaling = CurrentScaling(num_layers, device=device)
        for layer in layers:
            layer.core_attention.scaler = scaling.layer(layer.number - 1)
    for layer in layers:
        layer.core_attention.fp8_logits = config.logits_dtype == "fp8"
        layer.core_attention.overflow = config.overflow
    return scaling
