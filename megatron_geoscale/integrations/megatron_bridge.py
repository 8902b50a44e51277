"""FP8 attention with scales from the weights in Megatron-Bridge's training loop.

    config = llama3_8b_pretrain_config()                     # a recipe of Megatron-Bridge
    use_geoscale(config.model, GeoScaleConfig())
    pretrain(config, forward_step, callbacks=[GeoScaleCallback(GeoScaleConfig())])

`use_geoscale` puts the attention into the provider's layer spec and is part of the run's saved configuration; the
callback makes the scales. Parameters and checkpoints are Bridge's own: scales are in none, they follow from weights.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_geoscale.attention.spec import attach_scaling, use_fp8_attention
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.engine import GeoScaleEngine

try:
    from megatron.bridge.training.callbacks import Callback, CallbackContext
except ImportError as error:
    raise ImportError(
        f"megatron_geoscale.integrations.megatron_bridge needs Megatron-Bridge, which cannot be imported: {error}"
    ) from error

Provider = TypeVar("Provider")


def use_geoscale(provider: Provider, config: GeoScaleConfig) -> Provider:
    """Make a GPTModelProvider, or one derived from it, build its layers with FP8 attention; returns `provider`.

    Raises ValueError, naming the flag, for what Bridge's loop does not carry.
    """
    _refuse(config)
    if getattr(provider, "attention_backend", None) == AttnBackend.local:
        raise ValueError("attention_backend local puts megatron-core's own attention over any other: use auto")
    # A partial of module-level functions and plain values, which Bridge can write into run_config.yaml and read.
    provider.transformer_layer_spec = functools.partial(
        layer_spec, inner=provider.transformer_layer_spec, geoscale=dataclasses.asdict(config)
    )
    return provider


def layer_spec(
    provider: Any, vp_stage: int | None = None, *, inner: ModuleSpec | Callable[..., Any], geoscale: Mapping[str, Any]
) -> Any:
    """What `inner` makes of `provider`, a layer's spec or a block's, with FP8 attention put in."""
    spec: Any = inner
    if not isinstance(inner, ModuleSpec):
        options = {"vp_stage": vp_stage} if "vp_stage" in inspect.signature(inner).parameters else {}
        spec = inner(provider, **options)
    block = spec if hasattr(spec, "layer_specs") else SimpleNamespace(layer_specs=[spec])
    use_fp8_attention(block, GeoScaleConfig(**geoscale))
    return spec


class GeoScaleCallback(Callback):
    """Makes the table when training or evaluation starts, and anew after each applied optimizer step."""

    def __init__(self, config: GeoScaleConfig) -> None:
        """`config`: that of `use_geoscale`. Raises ValueError as it does."""
        _refuse(config)
        self.config = config
        self.engine: GeoScaleEngine | None = None
        """Of this rank's model chunks, once training has started."""
        self._applied = config.refresh_interval  # optimizer steps since the last refresh: the first is due at once

    def on_train_start(self, context: CallbackContext) -> None:
        self._refresh(context)

    def on_train_step_start(self, context: CallbackContext) -> None:
        self._refresh(context)

    def on_train_step_end(self, context: CallbackContext) -> None:
        self._applied += not context.skipped_iter
        self.engine.collect()

    def on_eval_start(self, context: CallbackContext) -> None:
        self._refresh(context)

    def on_test_start(self, context: CallbackContext) -> None:
        self._refresh(context)

    def _refresh(self, context: CallbackContext) -> None:
        """If the weights have changed since the last. Collective over the whole job, which shares what decides it."""
        if self.engine is None:
            self.engine = attach_scaling(context.model, self.config)
        if self._applied < self.config.refresh_interval:
            return
        for chunk in context.model:  # under overlap_param_gather the weights are final only once they are gathered
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                chunk.start_param_sync(force_sync=True)
        self.engine.refresh()
        self._applied = 0


def _refuse(config: GeoScaleConfig) -> None:
    for what, present in {
        f"--geoscale-recipe {config.recipe}": not config.is_geometric or bool(config.calibrated_slots),
        f"--geoscale-estimator {config.estimator}": config.estimator != "gram",
        f"--geoscale-backward {config.backward}": config.backward == "delayed",
    }.items():
        if present:
            raise ValueError(f"{what} has a state that Megatron-Bridge's checkpoints would not hold, or takes no scale "
                             "from the weights: use certified or rank_aware")
