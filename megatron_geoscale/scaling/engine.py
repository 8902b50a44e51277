"""The engine: reads the attention weights, bounds what attention will cast, and swaps the scale table.

    weights -> norms (spectral) -> bounds -> scales -> ScaleTable -> attention

`GeoScaleEngine.attach(model_chunks, config)` finds the layers and gives each one's core attention its scaler;
`engine.refresh()` makes the table agree with the weights. Call it on every rank before the forward pass that follows
a change of the weights (an applied optimizer step, a load). It holds one MAX all-reduce over the whole job, of
[layers, bounds] numbers: over tensor-parallel ranks it joins the heads of a layer, over pipeline stages it completes
the table, over data-parallel replicas it gathers their shares of the layers (or changes nothing, where each computes
all), and it carries the news of a non-finite weight to everyone. With fewer key/value groups than tensor-parallel ranks
each layer adds an all-gather of its linear_qkv over those.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling import guard
from megatron_geoscale.scaling.amax_history import AmaxHistory, HistoryScaler
from megatron_geoscale.scaling.calibrator import Calibrator
from megatron_geoscale.scaling.estimator import SigmaEstimator
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.kernel_slots import KernelSlots
from megatron_geoscale.scaling.latent_layers import LatentLayer, latent_norm
from megatron_geoscale.scaling.layer_bounds import bound_heads, layers_at_once
from megatron_geoscale.scaling.layers import AttentionLayer, find_attention_layers, refuse_unbounded
from megatron_geoscale.scaling.slot_scales import TableScaler, scales_from_bounds
from megatron_geoscale.scaling.table import BOUNDS, ScaleTable, digest
from megatron_geoscale.spectral.moments import Moments


class GeoScaleEngine:
    """Scales for the FP8 attention of one Megatron model, predicted from its weights. Make it with `attach`."""

    def __init__(
        self,
        layers: Sequence[AttentionLayer | LatentLayer],
        config: GeoScaleConfig,
        *,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        share: tuple[int, int] | None = None,
    ) -> None:
        """`group`: as in `attach_layers`. share: (index, of how many) of the shares of `layers` that ranks of the group
        have bounded each, where data-parallel ranks are not Megatron's."""
        self.config = config
        self._group = group
        self.layers = list(layers)
        num_layers = self.layers[0].config.num_layers
        self.table = ScaleTable(num_layers, device)
        self.gauge = SlotGauge(num_layers, device)
        if share is None and config.split_over_data_parallel:
            share = (
                parallel_state.get_data_parallel_rank(with_context_parallel=True),
                parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            )
        index, of = share or (0, 1)
        self._mine = self.layers[index::of]
        self.estimator = SigmaEstimator(self._mine, config, share=index)
        self.calibrator = Calibrator(num_layers, config, device) if config.calibrated_slots else None
        """Sets alpha from what a burn-in saw (THEORY 6), under recipes that do so."""
        self._gauges = [self.gauge] if self.calibrator is None else [self.gauge, self.calibrator.gauge]
        self.history: AmaxHistory | None = None
        """Scales of the backward slots under `--geoscale-backward delayed`."""
        if config.backward == "delayed":
            amax_group = group or parallel_state.get_amax_reduction_group(with_context_parallel=True)
            self.history = AmaxHistory(num_layers, amax_group=amax_group, device=device)
        self.kernels: KernelSlots | None = None
        """What fused kernels read and write, where they compute the attention: see `kernel_slots`."""
        self.refresh_ms = 0.0
        """Wall time of the last refresh, milliseconds; on a GPU without the check, that of launching it."""
        self._batches = _batches(self._mine)
        self._codes = torch.zeros(num_layers, dtype=torch.float64, device=device)

    @classmethod
    def attach(cls, model_chunks: Sequence[torch.nn.Module], config: GeoScaleConfig) -> GeoScaleEngine:
        """Find every self-attention layer of this rank's model chunks and give its core attention a scaler.

        The table is empty until the first `refresh`. Raises ValueError for a recipe that is no function of the
        weights and for models that the bounds do not cover (`refuse_unbounded`).
        """
        if not config.is_geometric:
            raise ValueError(f"--geoscale-recipe {config.recipe} takes no scale from the weights: nothing to attach")
        return cls.attach_layers(find_attention_layers(model_chunks), config)

    @classmethod
    def attach_layers(
        cls,
        layers: Sequence[AttentionLayer | LatentLayer],
        config: GeoScaleConfig,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> GeoScaleEngine:
        """`attach` for these layers alone. With a `group`, `refresh` is collective over it instead of the whole job:
        over the tensor-parallel group of a layer it makes that layer's row of the table, and no other."""
        for layer in layers:
            refuse_unbounded(layer, config)
        engine = cls(layers, config, device=layers[0].device, group=group)
        for layer in engine.layers:
            row, gauges = layer.number - 1, engine._gauges
            backward = None if engine.history is None else HistoryScaler(engine.history, row)
            layer.core_attention.scaler = TableScaler(engine.table, gauges, row, layer.geometry, backward=backward)
        return engine

    def kernel_slots(self) -> KernelSlots:
        """Memory for fused kernels on this engine's scales, one for all its layers; from then on `collect` reads it."""
        if self.kernels is None:
            self.kernels = KernelSlots(self.table, self._gauges, history=self.history)
        return self.kernels

    def collect(self) -> None:
        """Bring `gauge` up to date. The host does not wait, but after a layer's first step with fused kernels, when it
        makes sure that they ran and raises RuntimeError if not (`KernelSlots.collect`)."""
        if self.kernels is not None:
            self.kernels.collect()

    @property
    def scales(self) -> torch.Tensor:
        """float32 [num_layers, len(SLOTS)], every layer of the model."""
        return self.table.scales

    def digest(self) -> str:
        """Hash of the whole table, equal on every rank."""
        return digest(self.table.scales)

    @torch.no_grad()
    def refresh(self, *, check: bool = True) -> None:
        """Make the table agree with the weights. Collective over the whole job, or the group of `attach_layers`.

        Raises NonFiniteWeightsError, the same on every rank, before anything is swapped. `check=False` leaves that to
        `check_finite`, so that the host need not wait for the device (under the power estimator it waits once a batch
        of layers, to see whether to converge); until then a table that could not be made is the one before.
        """
        start = time.perf_counter()
        device = self.table.bounds.device
        rows = torch.zeros(len(self.table.bounds), len(BOUNDS) + 1, dtype=torch.float64, device=device)
        self.estimator.begin()
        for batch in self._batches:
            rows.index_copy_(0, batch.rows, self._bound(batch))
        if dist.is_initialized():
            dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=self._group)
        self._codes = rows[:, -1]
        self._swap(rows[:, :-1], unless=(self._codes > 0).any())
        if check:
            self.check_finite()
        self.refresh_ms = (time.perf_counter() - start) * 1e3

    def check_finite(self) -> None:
        """Raise NonFiniteWeightsError if the last refresh met a weight that is not finite. Waits for the device."""
        guard.raise_if_nonfinite(self._codes)

    def check_later(self) -> guard.DeferredCheck:
        """`check_finite` without the wait, to be asked once the host has gone on."""
        return guard.DeferredCheck(self._codes)

    def _bound(self, batch: _Batch) -> torch.Tensor:
        """Bounds and code of each layer of the batch, [layers, len(BOUNDS) + 1]."""
        read, norms, num_layers = [], [], len(batch.layers)
        for layer in batch.layers:
            read.append(layer.moments(with_cross=self.config.recipe == "rank_aware", look=self.estimator.look))
            norms.append(layer.head_norms())
        moments, head_norms = Moments.cat(read), _stack_norms(norms)
        codes = guard.find_nonfinite(
            moments,
            head_norms,
            num_layers=num_layers,
            first_head=batch.layers[0].first_head,
            heads_per_group=batch.geometry.heads_per_group,
        )
        if batch.geometry.latent:
            sigma = latent_norm(moments, batch.geometry.rotary_dim)
        else:
            sigma = self.estimator.sigma(batch.layers, moments)
        bounds = bound_heads(
            batch.geometry, moments, sigma, head_norms, self.config, num_layers=len(self.table.bounds)
        )
        rows = torch.stack([bounds[name].view(num_layers, -1).amax(dim=1) for name in BOUNDS], dim=1)
        # A NaN is not the largest to an all-reduce: a layer that has one brings its code alone.
        return torch.cat([rows.where(codes[:, None] == 0, torch.zeros_like(rows)), codes[:, None]], dim=1)

    def _swap(self, bounds: torch.Tensor, *, unless: torch.Tensor) -> None:
        alpha = None if self.calibrator is None else self.calibrator.alpha
        scales = scales_from_bounds(bounds, self.layers[0].geometry, self.config, alpha)
        self.collect()
        self.table.swap(self.table.scales.where(unless, scales), self.table.bounds.where(unless, bounds))

    def begin_step(self) -> None:
        """Forget what validation has cast: calibration is a matter of training steps."""
        self.collect()
        if self.calibrator is not None:
            self.calibrator.gauge.reset()

    @torch.no_grad()
    def end_step(self) -> None:
        """Calibrate from the training step that has run; a changed alpha is in the table at once, for the next step.
        Likewise the history of backward scales, where there is one.

        Nothing, under recipes that have neither; else collective over the whole job, once a step on every rank,
        whether or not its optimizer step was applied. The host does not wait for the device.
        """
        self.collect()
        if self.history is not None:
            self.history.end_step()
        if self.calibrator is None:
            return
        bounds = self.table.bounds.clone()
        ones, geometry = torch.ones_like(self.calibrator.factors), self.layers[0].geometry
        self.calibrator.end_step(lambda: scales_from_bounds(bounds, geometry, self.config, ones))
        if not self.calibrator.burning_in:
            self._swap(bounds, unless=torch.zeros_like(self._codes[0], dtype=torch.bool))

    def news(self) -> list[str]:
        """Sentences to print: how alpha has changed since the last call, alike on every rank. Waits for the device."""
        return [] if self.calibrator is None else self.calibrator.news()

    def sharded_state_dict(self) -> dict[str, Any]:
        """State for the distributed checkpoint: estimator's and calibrator's. Scales are never saved, they follow."""
        calibration = {} if self.calibrator is None else self.calibrator.sharded_state_dict()
        return self.estimator.sharded_state_dict() | calibration

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `sharded_state_dict` saved."""
        self.estimator.load_state_dict(state)
        if self.calibrator is not None:
            self.calibrator.load_state_dict(state)


class _Batch:
    """Layers of equal geometry, which are bounded together."""

    def __init__(self, layers: Sequence[AttentionLayer | LatentLayer]) -> None:
        self.layers, self.geometry = list(layers), layers[0].geometry
        self.rows = torch.tensor([layer.number - 1 for layer in layers], device=layers[0].device)
        """Of the table."""


def _batches(layers: Sequence[AttentionLayer | LatentLayer]) -> list[_Batch]:
    """`layers` by geometry, at most `layers_at_once` in each batch."""
    by_geometry: dict[AttentionGeometry, list[AttentionLayer | LatentLayer]] = {}
    for layer in layers:
        by_geometry.setdefault(layer.geometry, []).append(layer)
    batches = []
    for geometry, alike in by_geometry.items():
        most = layers_at_once(alike[0].num_local_heads, geometry.head_dim)
        batches += [_Batch(alike[first : first + most]) for first in range(0, len(alike), most)]
    return batches


def _stack_norms(norms: Sequence[tuple[HeadNorm, HeadNorm] | None]) -> tuple[HeadNorm, HeadNorm] | None:
    """The layers' norms of queries and of keys, gains and shifts [layers, head_dim]; None where there are none."""
    if norms[0] is None:
        return None
    stacked = []
    for side in zip(*(pair for pair in norms if pair is not None), strict=True):
        shifts = [norm.shift for norm in side if norm.shift is not None]
        stacked.append(HeadNorm(torch.stack([norm.gain for norm in side]), torch.stack(shifts) if shifts else None))
    return stacked[0], stacked[1]
