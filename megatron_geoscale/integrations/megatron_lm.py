"""FP8 attention with scales from the weights in Megatron-LM's own pretrain_gpt.py, without a fork.

    export GEOSCALE_ARGS="--geoscale-recipe certified"
    torchrun ... pretrain_gpt.py --spec megatron_geoscale.integrations.megatron_lm gpt_layer_spec ...

Megatron-LM imports the object that `--spec` names and calls nothing after the model is built. So `gpt_layer_spec` names
a layer class which, when it is built, takes the submodules of Megatron's own spec with our core attention in them, and
which makes its scales itself, in its own forward. Its parameters and its checkpoint are those of Megatron's layer.

When: the schedules set `current_microbatch` on every layer before each of its forwards. 0 marks the layer stale, in
training and in evaluation; a stale layer refreshes just before its core attention. By then the modules that hold its
weights have run, so under --overlap-param-gather the weights have been gathered; activation recompute sets nothing, so
it refreshes nothing; and after a skipped optimizer step the same weights make the same scales. The refresh is
collective over the layer's tensor-parallel group alone, which no pipeline stage skips.

Megatron-LM's parser knows no --geoscale-* flags and refuses what it does not know: they come in GEOSCALE_ARGS, which
must be the same on all ranks.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_geoscale.attention.backend import resolve_attention
from megatron_geoscale.attention.spec import set_casts, use_fp8_attention, use_kernels
from megatron_geoscale.config import GeoScaleConfig, add_geoscale_args, geoscale_config_from_args
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.scaling.guard import DeferredCheck
from megatron_geoscale.scaling.layers import describe_layer, refuse_unbounded

ARGS_VARIABLE = "GEOSCALE_ARGS"
_SPEC = "--spec megatron_geoscale.integrations.megatron_lm"
_agreed: set[GeoScaleConfig] = set()
"""Configs that all ranks of this pipeline stage are known to share."""


class GeoScaleLayer(TransformerLayer):
    """Megatron's transformer layer, with FP8 attention whose scales follow its own weights.

    Raises ValueError, naming the flag, for what it cannot do; see `_refuse`.
    """

    def __init__(self, config: TransformerConfig, *, layer_number: int = 1, **options: Any) -> None:
        geoscale, model = config_from_environment(), _model_settings()
        _refuse(config, geoscale)
        submodules = _submodules(config, geoscale, model, layer_number, options.get("vp_stage"))
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **options)
        _require_agreement(geoscale)
        self.geoscale = LayerScales(self, model, geoscale)
        self.self_attention.core_attention.register_forward_pre_hook(self._before_attention)
        self.register_load_state_dict_post_hook(lambda layer, _: layer.geoscale.mark_stale())

    @property
    def current_microbatch(self) -> int:
        """As megatron-core's schedules set it; the first of a step marks the scales stale."""
        return self.__dict__.get("_current_microbatch", 0)

    @current_microbatch.setter
    def current_microbatch(self, number: int) -> None:
        self.__dict__["_current_microbatch"] = number
        if number == 0:
            self.geoscale.mark_stale()

    def _before_attention(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.geoscale.before_attention(self.training, inputs[0])


gpt_layer_spec = ModuleSpec(module=GeoScaleLayer)
"""For `--spec megatron_geoscale.integrations.megatron_lm gpt_layer_spec`."""


class LayerScales:
    """The scales of one layer: a `GeoScaleEngine` that has no other, refreshed in the layer's forward."""

    def __init__(self, layer: TransformerLayer, model: Any, config: GeoScaleConfig) -> None:
        self.layer, self.config = describe_layer(layer, model), config
        refuse_unbounded(self.layer, config)
        self.engine: GeoScaleEngine | None = None
        """Made at the first refresh: when the layer is built, its weights may not be where they will train."""
        self._stale = True
        self._trained = False  # since the last refresh in evaluation mode
        self._check: DeferredCheck | None = None

    def mark_stale(self) -> None:
        """Refresh before the next attention."""
        self._stale = True

    def before_attention(self, training: bool, query: torch.Tensor) -> None:
        """Refresh if the weights may have changed. Raises NonFiniteWeightsError, on every tensor-parallel rank alike:
        at once on the CPU, on a GPU from the backward pass of the attention, where the host need not wait for it."""
        self._ask()
        # Outside the schedules, as when text is generated between two steps, nothing marks the layer.
        if self._stale or (self._trained and not training):
            self._refresh()
            self._stale, self._trained = False, False
            if self._check is not None and query.requires_grad:
                query.register_hook(lambda _: self._ask())
        self._trained |= training

    def _refresh(self) -> None:
        if self.engine is None:
            self.engine = GeoScaleEngine.attach_layers([self.layer], self.config, group=self.layer.tp_group)
            use_kernels(self.engine)
            set_casts(self.engine.layers, self.config)
        self.engine.collect()
        self.engine.refresh(check=not _host_runs_ahead())
        if _host_runs_ahead():
            self._check = self.engine.check_later()

    def _ask(self) -> None:
        check, self._check = self._check, None
        if check is not None:
            check.ask()


def config_from_environment() -> GeoScaleConfig:
    """What GEOSCALE_ARGS asks for, the defaults where it is not set. Raises ValueError for what it cannot mean."""
    parser = add_geoscale_args(_Parser(prog=ARGS_VARIABLE, add_help=False, allow_abbrev=False))
    return geoscale_config_from_args(parser.parse_args(shlex.split(os.environ.get(ARGS_VARIABLE, ""))))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{ARGS_VARIABLE}: {message}")


def report(model_chunks: Sequence[torch.nn.Module]) -> list[dict[str, float]]:
    """Of each GeoScale layer on this rank: its number, sigma, logit_bound, scale_qkv, and how many values saturated
    since the last report (under Transformer Engine's kernels, casts that saturated). Waits for the device."""
    rows = []
    for layer in (layer for chunk in model_chunks for layer in chunk.modules() if isinstance(layer, GeoScaleLayer)):
        engine, number = layer.geoscale.engine, layer.layer_number
        if engine is not None:
            engine.collect()
            bounds = {name: engine.table.bound(number, name) for name in ("sigma", "logit_bound")}
            saturated = int(engine.gauge.saturated[number - 1].sum())
            rows.append(
                {"layer": number, **bounds, "scale_qkv": engine.table.scale(number, "qkv"), "saturated": saturated}
            )
            engine.gauge.reset()
    return rows


def _submodules(
    config: TransformerConfig, geoscale: GeoScaleConfig, model: Any, layer_number: int, vp_stage: int | None
) -> TransformerLayerSubmodules:
    """Megatron's own for the layer, with our core attention. `layer_number`: from 1 in its pipeline stage's chunk."""
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=model.qk_l2_norm,
        vp_stage=vp_stage,
    )
    spec = use_fp8_attention(block, geoscale).layer_specs[layer_number - 1]
    if spec.module is not TransformerLayer:
        raise ValueError(f"{_SPEC} is for Megatron's TransformerLayer, and this model has {spec.module.__name__}")
    return spec.submodules


def _model_settings() -> SimpleNamespace:
    """What Megatron-LM hands to the GPTModel and not to its layers."""
    try:
        from megatron.training import get_args

        args = get_args()
    except (ImportError, AssertionError) as error:
        raise ValueError(
            f"{_SPEC} is for Megatron-LM's own pretrain_gpt.py: elsewhere use megatron_geoscale.attention.spec"
        ) from error
    return SimpleNamespace(
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        qk_l2_norm=args.qk_l2_norm,
    )


def _refuse(config: TransformerConfig, geoscale: GeoScaleConfig) -> None:
    """ValueError, in one sentence, for what would be left out in silence."""
    graphs = [getattr(config, name, False) for name in ("enable_cuda_graph", "external_cuda_graph")]
    refused = {
        # Their state would have to be saved, or needs to know the end of a step.
        f"--geoscale-recipe {geoscale.recipe}": not geoscale.is_geometric or bool(geoscale.calibrated_slots),
        f"--geoscale-backward {geoscale.backward}": geoscale.backward == "delayed",
        "--geoscale-refresh-interval above 1": geoscale.refresh_interval > 1,
        "--geoscale-split-over-data-parallel": geoscale.split_over_data_parallel,
        # A replayed graph runs no Python, so no refresh.
        "--cuda-graph-impl": getattr(config, "cuda_graph_impl", "none") != "none" or any(graphs),
        # Their layers come from other specs.
        "--mtp-num-layers": bool(config.mtp_num_layers),
        "--heterogeneous-layers-config-path": getattr(config, "heterogeneous_block_specs", False),
        "--experimental-attention-variant": getattr(config, "experimental_attention_variant", None) is not None,
        "--transformer-impl inference_optimized": config.transformer_impl == "inference_optimized",
    }
    for what, present in refused.items():
        if present:
            raise ValueError(f"{what} does not go with {_SPEC}")


def _require_agreement(config: GeoScaleConfig) -> None:
    """Raise ValueError on every rank of this pipeline stage unless all have the same config. Collective over them."""
    if config in _agreed:
        return
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, config, group=group)
    if len(set(found)) > 1:
        raise ValueError(f"{ARGS_VARIABLE} is not the same on all ranks: hand it to every node")
    _agreed.add(config)
    if dist.get_rank() == 0:
        print(f"{ARGS_VARIABLE}: recipe {config.recipe}, attention {resolve_attention(config)}", flush=True)


def _host_runs_ahead() -> bool:
    return torch.cuda.is_available()
