"""Scales for models of transformers under DeepSpeed, ZeRO stages 0 to 3.

    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    scales = attach(engine, GeoScaleConfig())

Under ZeRO-3 norms and bounds come from the flat shards (`sharded_weights` says what is sent); no weight is gathered.
Below, every rank has the weights and bounds its share of the layers. The table follows each step that DeepSpeed has
applied, and `engine.load_checkpoint`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.integrations.hugging_face import HuggingFaceScales

try:
    import deepspeed.ops
    from deepspeed import DeepSpeedEngine
except ImportError as error:
    raise ImportError(
        "megatron_geoscale.integrations.deepspeed needs DeepSpeed: pip install 'megatron-geoscale[deepspeed]'"
    ) from error


def compile_nothing() -> None:
    """Before `deepspeed.init_distributed` on a CPU: leave communication to gloo. DeepSpeed would compile an operation
    of its own, which takes a minute or two and a C++ compiler. Nothing on a GPU."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def attach(engine: DeepSpeedEngine, config: GeoScaleConfig, *, dtype: torch.dtype | None = None) -> HuggingFaceScales:
    """Give the model of `engine` FP8 attention whose scales follow its weights. Collective.

    dtype: what `torch_autocast` of DeepSpeed's configuration casts to, where it is on. Raises ValueError as
    `HuggingFaceScales`.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise ValueError(f"{type(engine).__name__} is not the engine that deepspeed.initialize returns")
    scales = HuggingFaceScales(engine.module, config, dtype=dtype)
    step, load = engine.step, engine.load_checkpoint

    @functools.wraps(step)
    def step_and_refresh(*args: Any, **options: Any) -> Any:
        before = engine.global_steps
        result = step(*args, **options)
        if engine.global_steps > before:  # not while gradients accumulate
            scales.after_step(applied=engine.was_step_applied())
        return result

    @functools.wraps(load)
    def load_and_refresh(*args: Any, **options: Any) -> Any:
        result = load(*args, **options)
        scales.refresh()
        return result

    engine.step, engine.load_checkpoint = step_and_refresh, load_and_refresh
    return scales
