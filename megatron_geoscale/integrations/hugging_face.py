"""FP8 attention with scales from the weights inside models of transformers, however their parameters are sharded.

The attention goes in through transformers' registry (https://huggingface.co/docs/transformers/attention_interface),
scales come from `integrations.sharded_weights` through the same engine as Megatron's. Families: those of
`checkpoints.families`. `integrations.fsdp` and `integrations.deepspeed` attach it to a training loop.

Gradient checkpointing as transformers does it by default (`use_reentrant=False`) runs a layer's forward twice with
gradients on, and its casts are counted twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_geoscale.attention.backend import resolve_attention
from megatron_geoscale.attention.fp8_function import fp8_attention
from megatron_geoscale.attention.spec import set_casts, use_kernels
from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.checkpoints.attention_weights import head_norms, huggingface_geometry
from megatron_geoscale.checkpoints.families import Family, family_from
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.integrations.sharded_weights import ShardedAttention
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.slot_scales import TableScaler
from megatron_geoscale.scaling.slots import LayerScaler
from megatron_geoscale.scaling.table import ScaleTable
from megatron_geoscale.spectral.moments import Moments

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError("models of transformers need it: pip install 'megatron-geoscale[hf]'") from error

ATTENTION, FUSED_ATTENTION = "geoscale_fp8", "geoscale_fp8_te"
"""Names of the attention in transformers' registries, emulated and in Transformer Engine's kernels."""


class HuggingFaceScales:
    """The scales of one model's FP8 attention; made and put into the model by `__init__`, which is collective.

    `table` and `gauge` are as the engine's; the gauge counts this rank's casts.
    """

    def __init__(self, model: PreTrainedModel, config: GeoScaleConfig, *, dtype: torch.dtype | None = None) -> None:
        """Attach to `model`, sharded already, and make the first table. dtype: what the forward pass computes attention
        in, where it casts parameters to another than their own (mixed precision policies, autocast).

        Raises ValueError for a model whose family or layout of parameters is not supported, and for a `config` whose
        recipe or options are not for sharded weights.
        """
        _refuse(config)
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"{type(model).__name__} is not a model of transformers, and only those are supported")
        self.config = config
        family = family_from(model.config.to_dict(), Path(type(model.config).__name__))
        parameters = dict(model.named_parameters())
        prefix = family.prefix(parameters)
        weights = ShardedAttention(
            family, parameters, prefix=prefix, dtype=dtype, with_cross=config.recipe == "rank_aware"
        )
        self._weights, self.layers = weights, [_Layer(weights, number + 1) for number in range(family.num_layers)]
        self.engine = GeoScaleEngine(
            self.layers, config, device=weights.device, group=weights.group, share=weights.share
        )
        self._put_into(model, family, prefix)
        use_kernels(self.engine)
        self.refresh_ms = 0.0
        """Wall time of the last refresh, milliseconds."""
        self._steps = 0
        self.refresh()

    @property
    def table(self) -> ScaleTable:
        """Scales and bounds of every layer, equal on every rank."""
        return self.engine.table

    @property
    def gauge(self) -> SlotGauge:
        """What this rank's casts lost since the last `gauge.reset()`; asking brings it up to date."""
        self.engine.collect()
        return self.engine.gauge

    def digest(self) -> str:
        """Hash of the scales, equal on every rank."""
        return self.engine.digest()

    def saturated(self) -> int:
        """How many values all ranks have saturated since their last `gauge.reset()`. Collective over the whole job."""
        count = self.gauge.saturated.sum()
        if dist.is_initialized():
            dist.all_reduce(count)
        return int(count)

    def refresh(self) -> None:
        """Make the table agree with the weights: after a load, or any change that is no optimizer step. Collective.

        Raises NonFiniteWeightsError, the same on every rank, before anything is swapped.
        """
        start = time.perf_counter()
        vectors = self._weights.vectors()
        for layer, own in zip(self.layers, vectors, strict=True):
            layer.vectors = own
        for index, moments in self._weights.read(vectors) if self._weights.is_cut else ():
            self.layers[index].received = moments
        try:
            self.engine.refresh()
        finally:
            for layer in self.layers:
                layer.received = None
        self.refresh_ms = (time.perf_counter() - start) * 1e3

    def after_step(self, *, applied: bool) -> None:
        """A training step has run: calibrate, under recipes that do, and refresh if the optimizer changed the weights.
        The adapters call it. Collective."""
        self.engine.end_step()
        if applied:
            self._steps += 1
            if self._steps % self.config.refresh_interval == 0:
                self.refresh()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What calibration has learned, for the checkpoint; empty under recipes without it."""
        return {} if self.engine.calibrator is None else self.engine.calibrator.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `state_dict` gave, then make the table anew. Collective, after the weights are loaded."""
        if self.engine.calibrator is not None:
            device = self.table.scales.device
            self.engine.calibrator.load_state_dict({name: tensor.to(device) for name, tensor in state.items()})
        self.refresh()

    def _put_into(self, model: PreTrainedModel, family: Family, prefix: str) -> None:
        for name, mask in ((ATTENTION, _mask), (FUSED_ATTENTION, sdpa_mask)):
            AttentionInterface.register(name, _attention)
            AttentionMaskInterface.register(name, mask)
        engine, fused = self.engine, resolve_attention(self.config) == "te"
        for layer in self.layers:
            stem = family.layer_stem(layer.number, prefix)
            module = model.get_submodule(stem + ("attn" if family.is_fused else "self_attn"))
            module.geoscale = port = layer.core_attention
            row = layer.number - 1
            port.eval_scaler = port.scaler = TableScaler(engine.table, engine.gauge, row, layer.geometry)
            if engine.calibrator is not None:
                gauges = [engine.gauge, engine.calibrator.gauge]
                port.scaler = TableScaler(engine.table, gauges, row, layer.geometry)
            if fused:
                from megatron_geoscale.integrations.hugging_face_te import fused_attention

                port.kernel = layer.core_attention = fused_attention(family, layer.number, layer.dtype)
                layer.config, port.kernel.scaler = port.kernel.config, port.scaler
        set_casts(self.layers, self.config)
        model.set_attn_implementation(FUSED_ATTENTION if fused else ATTENTION)


def _refuse(config: GeoScaleConfig) -> None:
    """ValueError, in one sentence that names the flag, for what is not for models of transformers."""
    if not config.is_geometric:
        raise ValueError(f"--geoscale-recipe {config.recipe} takes no scale from the weights: nothing to attach")
    for flag, value, other in (
        ("--geoscale-estimator", config.estimator, "gram"),
        ("--geoscale-granularity", config.granularity, "head"),
    ):
        if value != other:
            raise ValueError(f"{flag} {value} is not for models of transformers, whose weights are read in parts: use "
                             f"{flag} {other}, which is exact")
    for what, present in {
        "--geoscale-logits-dtype fp8": config.logits_dtype == "fp8",
        "--geoscale-overflow nan": config.overflow == "nan",
        "--geoscale-recipe calibrated": bool(config.calibrated_slots),  # it would see the casts of evaluation too
    }.items():
        if present and resolve_attention(config) == "te":
            raise ValueError(f"{what} is not for models of transformers under --geoscale-attention te: use "
                             "--geoscale-attention emulated")
    if config.backward == "delayed":
        raise ValueError("--geoscale-backward delayed is not for models of transformers: use bound or bf16")


class _Port:
    """What an attention module of transformers carries as `geoscale`: the core attention that the engine knows."""

    scaler: LayerScaler
    eval_scaler: LayerScaler
    """Of evaluation, which calibration must not see."""
    fp8_logits: bool
    overflow: str
    fp8_backward: bool
    kernel: Any = None
    """`TransformerEngineAttention`, where that computes."""

    def __init__(self, number: int, dtype: torch.dtype, max_length: int) -> None:
        self.number, self.dtype, self.max_length = number, dtype, max_length

    def check(self, value: torch.Tensor) -> None:
        """ValueError where the bounds are not about this forward pass. value: [b, groups, sk, d], which shows the dtype
        of the projections even where RoPE has turned queries and keys in another."""
        if value.dtype != self.dtype:
            raise ValueError(f"attention layer {self.number} computes in {value.dtype} and its weights were bounded in "
                             f"{self.dtype}: attach with dtype={value.dtype}")
        if value.size(2) > self.max_length:
            raise ValueError(f"attention layer {self.number} has {value.size(2)} keys, and its scales are made for "
                             f"{self.max_length}, the model's longest sequence")


class _Layer:
    """A layer as the engine reads it: all heads, whose moments have come from the ranks that hold them."""

    first_head, ranks_per_group = 0, 1

    def __init__(self, weights: ShardedAttention, number: int) -> None:
        self._weights, self.number, self.device, self.dtype = weights, number, weights.device, weights.dtype
        self.config: Any = weights.family
        self.geometry = huggingface_geometry(weights.family, number, torch.finfo(weights.dtype).eps / 2)
        self.num_local_heads = self.geometry.num_heads
        self.core_attention: Any = _Port(number, weights.dtype, self.geometry.max_sequence_length)
        self.vectors: Mapping[str, torch.Tensor] = {}
        """As `ShardedAttention.vectors`, of this refresh."""
        self.received: Moments | None = None

    def moments(self, **_: Any) -> Moments:
        """Of this refresh; the Gram estimator looks at nothing else."""
        return self._weights.whole(self.number - 1, self.vectors) if self.received is None else self.received

    def head_norms(self) -> tuple[HeadNorm, HeadNorm] | None:
        """As `scaling.layers.AttentionLayer.head_norms`."""
        return head_norms(self.vectors, self.geometry, zero_centered=False)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [b, heads, sq, d], key and value [b, groups, sk, d]; its output is
    [b, sq, heads, d]."""
    port: _Port | None = getattr(module, "geoscale", None)
    if port is None:
        raise RuntimeError(f"{ATTENTION} attention ran before scales were attached to the model")
    port.check(value)
    if port.kernel is not None:
        from megatron_geoscale.integrations.hugging_face_te import attend

        return attend(port.kernel, query, key, value, attention_mask, training=module.training), None
    if attention_mask is None or attention_mask.dtype != torch.bool:
        raise ValueError(f"{ATTENTION} attention takes a mask of bools, True where a key is seen, or one of the two "
                         "dimensions of a batch, from which transformers makes that")
    shape = (*query.shape[:3], key.size(2))
    ones = torch.ones(shape, device=query.device) if dropout else None
    with torch.autocast(query.device.type, enabled=False):  # which would round its sums
        out = fp8_attention(
            *(x.permute(2, 0, 1, 3) for x in (query, key, value)),
            scaler=port.scaler if module.training else port.eval_scaler,
            softmax_scale=scaling,
            masked=~attention_mask,
            dropout=None if ones is None else torch.nn.functional.dropout(ones, dropout),
            fp8_logits=port.fp8_logits,
            observe=torch.is_grad_enabled() or not module.training,
            overflow=port.overflow,
            fp8_backward=port.fp8_backward,
        )
    return out.transpose(0, 1).to(value.dtype), None


def _mask(*args: Any, **options: Any) -> torch.Tensor:
    """bool [b, 1, sq, sk], True where a key is seen: causality, padding, windows and packed sequences alike."""
    return sdpa_mask(*args, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
