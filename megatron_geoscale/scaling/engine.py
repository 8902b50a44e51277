"""The engine: reads the attention weights, bounds what attention will cast, and swaps the scale table.

    weights -> norms (spectral) -> bounds -> scales -> ScaleTable -> attention

`GeoScaleEngine.attach(model_chunks, config)` finds the layers and gives each one's core attention its scaler;
`engine.refresh()` makes the table agree with the weights. Call it on every rank before the forward pass that follows
a change of the weights (an applied optimizer step, a load). It holds one MAX all-reduce over the whole job, of
[layers, bounds] numbers: over tensor-parallel ranks it joins the heads of a layer, over pipeline stages it completes
the table, over data-parallel replicas it changes nothing, and it carries the news of a non-finite weight to everyone.
With fewer key/value groups than tensor-parallel ranks each layer adds an all-gather of its linear_qkv over those.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling import guard
from megatron_geoscale.scaling.calibrator import Calibrator
from megatron_geoscale.scaling.estimator import SigmaEstimator
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.layer_bounds import Grams, bound_layer
from megatron_geoscale.scaling.layers import AttentionLayer, find_attention_layers, refuse_unbounded
from megatron_geoscale.scaling.slot_scales import TableScaler, scales_from_bounds
from megatron_geoscale.scaling.table import BOUNDS, ScaleTable, digest


class GeoScaleEngine:
    """Scales for the FP8 attention of one Megatron model, predicted from its weights. Make it with `attach`."""

    def __init__(self, layers: Sequence[AttentionLayer], config: GeoScaleConfig, *, device: torch.device) -> None:
        self.config = config
        self.layers = list(layers)
        num_layers = self.layers[0].config.num_layers
        self.table = ScaleTable(num_layers, device)
        self.gauge = SlotGauge(num_layers, device)
        self.estimator = SigmaEstimator(self.layers, config)
        self.calibrator = Calibrator(num_layers, config, device) if config.calibrated_slots else None
        """Sets alpha from what a burn-in saw (THEORY 6), under recipes that do so."""
        self.refresh_ms = 0.0
        """Wall time of the last refresh, milliseconds."""

    @classmethod
    def attach(cls, model_chunks: Sequence[torch.nn.Module], config: GeoScaleConfig) -> GeoScaleEngine:
        """Find every self-attention layer of this rank's model chunks and give its core attention a scaler.

        The table is empty until the first `refresh`. Raises ValueError for a recipe that is no function of the
        weights and for models that the bounds do not cover (`refuse_unbounded`).
        """
        if not config.is_geometric:
            raise ValueError(f"--geoscale-recipe {config.recipe} takes no scale from the weights: nothing to attach")
        layers = find_attention_layers(model_chunks)
        for layer in layers:
            refuse_unbounded(layer)
        engine = cls(layers, config, device=layers[0].device)
        gauges = [engine.gauge] if engine.calibrator is None else [engine.gauge, engine.calibrator.gauge]
        for layer in engine.layers:
            layer.core_attention.scaler = TableScaler(engine.table, gauges, layer)
        return engine

    @property
    def scales(self) -> torch.Tensor:
        """float32 [num_layers, len(SLOTS)], every layer of the model."""
        return self.table.scales

    def digest(self) -> str:
        """Hash of the whole table, equal on every rank."""
        return digest(self.table.scales)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the table agree with the weights. Collective over the whole job.

        Raises NonFiniteWeightsError, the same on every rank, before anything is swapped.
        """
        start = time.perf_counter()
        rows = torch.zeros(len(self.table.bounds), len(BOUNDS) + 1, dtype=torch.float64)
        layer_sigma = self.estimator.begin()
        for layer in self.layers:
            projections = layer.projections()
            code = guard.find_nonfinite(
                projections,
                layer.head_norms(),
                first_head=layer.first_head,
                heads_per_group=layer.heads_per_group,
            )
            if code:
                rows[layer.number - 1, -1] = code
                continue
            grams = Grams.of(projections)
            sigma = layer_sigma.get(layer.number)
            if sigma is None:
                sigma = self.estimator.head_sigma(layer, projections, (grams.q, grams.k))
            bounds = bound_layer(layer, projections, grams, sigma, self.config, num_layers=len(rows))
            rows[layer.number - 1, :-1] = torch.stack([bounds[name].max() for name in BOUNDS])
        rows = rows.to(self.table.bounds.device)
        if dist.is_initialized():
            dist.all_reduce(rows, op=dist.ReduceOp.MAX)
        guard.raise_if_nonfinite(rows[:, -1])
        bounds = rows[:, :-1]
        self._swap(bounds)
        self.refresh_ms = (time.perf_counter() - start) * 1e3

    def _swap(self, bounds: torch.Tensor) -> None:
        alpha = None if self.calibrator is None else self.calibrator.alpha
        self.table.swap(scales_from_bounds(bounds, self.layers[0], self.config, alpha), bounds)

    def begin_step(self) -> None:
        """Forget what validation has cast: calibration is a matter of training steps."""
        if self.calibrator is not None:
            self.calibrator.gauge.reset()

    @torch.no_grad()
    def end_step(self) -> list[str]:
        """Calibrate from the training step that has run; a changed alpha is in the table at once, for the next step.

        Nothing, under recipes that do not calibrate; else collective over the whole job, once a step on every rank,
        whether or not its optimizer step was applied. Returns sentences to print, the same on every rank.
        """
        if self.calibrator is None:
            return []
        bounds = self.table.bounds
        told = self.calibrator.end_step(
            lambda: scales_from_bounds(bounds, self.layers[0], self.config, torch.ones_like(self.calibrator.factors))
        )
        if told:
            self._swap(bounds.clone())
        return told

    def sharded_state_dict(self) -> dict[str, Any]:
        """State for the distributed checkpoint: estimator's and calibrator's. Scales are never saved, they follow."""
        calibration = {} if self.calibrator is None else self.calibrator.sharded_state_dict()
        return self.estimator.sharded_state_dict() | calibration

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `sharded_state_dict` saved."""
        self.estimator.load_state_dict(state)
        if self.calibrator is not None:
            self.calibrator.load_state_dict(state)
