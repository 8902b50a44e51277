"""Puts FP8 attention into a Megatron layer spec, and scales into the model that was built from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_geoscale.attention.backend import resolve_attention
from megatron_geoscale.attention.baselines import CurrentScaling, DelayedScaling
from megatron_geoscale.attention.emulated import EmulatedAttention
from megatron_geoscale.attention.obstacles import facts_here, fp8_attention_obstacles, installed_te
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.latent_layers import LatentLayer
from megatron_geoscale.scaling.layers import AttentionLayer, find_attention_layers


class AttentionScaling(Protocol):
    """What holds the scales of a model's attention: the engine, or a baseline."""

    gauge: SlotGauge
    scales: torch.Tensor | None
    """float32 [num_layers, len(SLOTS)]; None where a scale exists only while its tensor does."""


def use_emulated_attention(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Make every layer of a decoder block spec compute its core attention in emulated FP8; returns `block`.

    `block` is what `get_gpt_decoder_block_spec` returns, local or Transformer Engine's.
    """
    return _use(EmulatedAttention, block)


def use_te_attention(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Make every layer of a decoder block spec compute its core attention in Transformer Engine's fused FP8 kernels, on
    scales from the weights; returns `block`, local or Transformer Engine's.

    Raises ValueError where Transformer Engine cannot be imported.
    """
    version, problem = installed_te()
    if version is None:
        raise ValueError(f"--geoscale-attention te needs Transformer Engine, and {problem}: install "
                         "megatron-geoscale[gpu], or use --geoscale-attention emulated")
    try:
        from megatron_geoscale.attention.transformer_engine import TransformerEngineAttention
    except ImportError as error:  # of a name, which this version does not have
        raise ValueError(f"--geoscale-attention te does not go with this Transformer Engine: {error}") from error

    return _use(TransformerEngineAttention, block)


def _use(core_attention: type, block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = core_attention
    return block


def use_fp8_attention(block: TransformerBlockSubmodules, config: GeoScaleConfig) -> TransformerBlockSubmodules:
    """Put the core attention that `config` asks for into a decoder block spec; returns `block`.

    Under `te` the recipe `delayed` is Transformer Engine's own attention, which must be in `block`. Raises ValueError
    for what `te` does not do, and as `use_te_attention`.
    """
    if resolve_attention(config) == "emulated":
        return use_emulated_attention(block)
    for what, present in {
        "--geoscale-logits-dtype fp8": config.logits_dtype == "fp8",
        "--geoscale-overflow nan": config.overflow == "nan",
        # Transformer Engine's current scaling of attention needs sm100, and is Megatron's --fp8-recipe tensorwise.
        "--geoscale-recipe current": config.recipe == "current",
    }.items():
        if present:
            raise ValueError(f"{what} is not for --geoscale-attention te: use --geoscale-attention emulated")
    return block if config.recipe == "delayed" else use_te_attention(block)


def use_kernels(engine: GeoScaleEngine) -> None:
    """Let the Transformer Engine attention of `engine`'s layers run on its scales; nothing for emulated attention.

    After the model is on its device, and before its first forward pass. Raises ValueError, one sentence an obstacle,
    where Transformer Engine would not use its fused FP8 kernel.
    """
    layers = [layer for layer in engine.layers if hasattr(layer.core_attention, "take_over")]
    backward = engine.config.backward
    for layer in layers:
        core = layer.core_attention
        obstacles = fp8_attention_obstacles(
            facts_here(
                layer.config,
                layer_number=layer.number,
                fp8_backward=backward != "bf16",
                head_dim_qk=core.hidden_size_per_attention_head_k,
                head_dim_v=core.hidden_size_per_attention_head_v,
            )
        )
        if obstacles:
            raise ValueError(f"attention layer {layer.number} would not run in FP8: {'; '.join(obstacles)}")
    for layer in layers:
        layer.core_attention.take_over(engine.kernel_slots(), backward=backward)


def attach_scaling(
    model_chunks: Sequence[torch.nn.Module], config: GeoScaleConfig
) -> GeoScaleEngine | DelayedScaling | CurrentScaling | None:
    """Give every attention layer of `model_chunks` the scaler of `config.recipe`, baselines included.

    None where Transformer Engine's own attention keeps its own scales (recipe `delayed` under `te`). Raises ValueError
    as `GeoScaleEngine.attach` and `use_kernels` do.
    """
    if config.is_geometric:
        scaling: GeoScaleEngine | DelayedScaling | CurrentScaling = GeoScaleEngine.attach(model_chunks, config)
        layers = scaling.layers
        use_kernels(scaling)
    elif resolve_attention(config) == "te":
        return None
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
    set_casts(layers, config)
    return scaling


def set_casts(layers: Sequence[AttentionLayer | LatentLayer], config: GeoScaleConfig) -> None:
    """Tell the emulated attention of `layers` what to cast, and how."""
    for layer in layers:
        layer.core_attention.fp8_logits = config.logits_dtype == "fp8"
        layer.core_attention.overflow = config.overflow
        layer.core_attention.fp8_backward = config.backward != "bf16"
