"""The four transients on attention layers of full-size models, one layer's weights in memory at a time.

Nothing is trained and no other part of a model is there: tokens are drawn at the input of each layer's norm
(tools/_shape_layers.py), so the layers are independent of each other and are streamed. Delayed scaling sees the same
tensors as every other recipe.

Steps: `HISTORY` steps with the old weights, then `AFTER` with the new ones. The old weights are those of the trained
model, except that pretrained_load begins with N(0, 0.02) weights; lr_spike adds FACTOR * `LEARNING_RATE` times the sign
of a rank-1 matrix to each projection, what an Adam update of that rate does with a gradient of rank 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from _shape_layers import Shape, Weights, draw_tokens, generator, qkv, spiked_update, untrained
from megatron_geoscale.attention.baselines import CurrentScaling, DelayedScaling
from megatron_geoscale.attention.emulated import fp8_attention
from megatron_geoscale.config import GEOMETRIC_RECIPES, GeoScaleConfig
from megatron_geoscale.scaling.amax_history import AmaxHistory, HistoryScaler
from megatron_geoscale.scaling.calibrator import Calibrator
from megatron_geoscale.scaling.formats import Powers, powers_to_db, signal_and_noise
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.layer_bounds import bound_heads
from megatron_geoscale.scaling.slot_scales import TableScaler, scales_from_bounds
from megatron_geoscale.scaling.slots import SLOTS
from megatron_geoscale.scaling.table import BOUNDS, ScaleTable
from megatron_geoscale.spectral.gram import norm_of_grams
from megatron_geoscale.spectral.moments import Moments

HISTORY, AFTER, BURN_IN = 4, 2, 2


class Predicted:
    """A geometric recipe's scales for one layer, without an engine around it."""

    def __init__(
        self, geometry: AttentionGeometry, config: GeoScaleConfig, num_layers: int, device: torch.device
    ) -> None:
        self.geometry, self.config, self.num_layers = geometry, config, num_layers
        self.table, self.gauge = ScaleTable(1, device), SlotGauge(1, device)
        self.calibrator = Calibrator(1, config, device) if config.calibrated_slots else None
        gauges = [self.gauge] if self.calibrator is None else [self.gauge, self.calibrator.gauge]
        self.history = AmaxHistory(1, device=device) if config.backward == "delayed" else None
        backward = None if self.history is None else HistoryScaler(self.history, 0)
        self.scaler = TableScaler(self.table, gauges, 0, geometry, backward=backward)

    def refresh(self, moments: Moments) -> None:
        """As `GeoScaleEngine.refresh`. Where weights jump, as here, its power iteration converges to the norm, so
        `paper` gets the norm too, without hundreds of steps."""
        sigma = norm_of_grams(moments.q, moments.k)
        bounds = bound_heads(self.geometry, moments, sigma, None, self.config, num_layers=self.num_layers)
        self._swap(torch.stack([bounds[name].max() for name in BOUNDS])[None])

    def end_step(self) -> None:
        """As `GeoScaleEngine.end_step`."""
        if self.history is not None:
            self.history.end_step()
        if self.calibrator is None:
            return
        bounds, ones = self.table.bounds.clone(), torch.ones_like(self.calibrator.factors)
        self.calibrator.end_step(lambda: scales_from_bounds(bounds, self.geometry, self.config, ones))
        self._swap(bounds)

    def _swap(self, bounds: Tensor) -> None:
        alpha = None if self.calibrator is None else self.calibrator.alpha
        self.table.swap(scales_from_bounds(bounds, self.geometry, self.config, alpha), bounds)


def weights_of_steps(
    scenario: str, trained: Weights, shape: Shape, layer: int, factor: float
) -> Iterator[Weights]:
    """The layer's weights at each step; a step that changes nothing yields the same object again."""
    if scenario == "resume":
        yield from [trained] * (HISTORY + AFTER)
        return
    before = untrained(trained, layer) if scenario == "pretrained_load" else trained
    yield from [before] * HISTORY
    after = {
        "pretrained_load": lambda: trained,
        "lr_spike": lambda: spiked_update(trained, shape, layer, factor),
        "weight_spike": lambda: trained.map(lambda x: factor * x),
    }[scenario]()
    yield from [after] * AFTER


def transient_of(scenario: str) -> int:
    """The first step, from 1, of the new weights, or of a history that is empty."""
    return 1 if scenario == "resume" else HISTORY + 1


@torch.no_grad()
def replay_layer(
    shape: Shape, scenario: str, recipes: Sequence[str], trained: Weights, *, layer: int, tokens: int, factor: float,
    logits_dtype: str, overflow: str,
) -> dict[str, list[dict[str, Any]]]:
    """One layer (`layer` from 1) through a scenario: by recipe, a dict of counts and powers for every step."""
    device = trained.gain.device
    geometry = AttentionGeometry(
        hidden_size=shape.hidden_size, num_heads=shape.heads, num_groups=shape.groups, head_dim=shape.head_dim,
        softmax_scale=shape.head_dim**-0.5, max_sequence_length=shape.seq_length,
        rotary_dim=shape.head_dim if shape.rotary else 0,
    )
    scalings: dict[str, Any] = {}
    for recipe in recipes:
        config = GeoScaleConfig(recipe=recipe, burn_in_steps=BURN_IN, logits_dtype=logits_dtype)
        scalings[recipe] = (
            Predicted(geometry, config, shape.layers, device) if recipe in GEOMETRIC_RECIPES
            else DelayedScaling(1, device=device) if recipe == "delayed" else CurrentScaling(1, device=device)
        )
    steps: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in recipes}
    current = None
    masked = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
    for step, weights in enumerate(weights_of_steps(scenario, trained, shape, layer, factor), start=1):
        changed = weights is not current
        if changed:
            current = weights
            moments = Moments.of(weights.projections(), with_cross="rank_aware" in recipes)
        q, k, v = qkv(shape, weights, draw_tokens(shape, layer, step, tokens, device))
        gradient = torch.randn(q.flatten(2).shape, generator=generator("gradient", layer, step)).to(q).view_as(q)
        exact = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True, scale=geometry.softmax_scale, enable_gqa=True
        ).permute(2, 0, 1, 3)
        for recipe, scaling in scalings.items():
            predicted = isinstance(scaling, Predicted)
            if predicted and changed:
                scaling.refresh(moments)
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                out = fp8_attention(
                    *inputs,
                    scaler=scaling.scaler if predicted else scaling.layer(0),
                    softmax_scale=geometry.softmax_scale,
                    masked=masked,
                    fp8_logits=logits_dtype == "fp8",
                    overflow=overflow,
                )
                out.backward(gradient)
            steps[recipe].append(_measured(scaling.gauge, signal_and_noise(exact, out), logits_dtype))
            scaling.gauge.reset()
            scaling.end_step()
    return steps


def _measured(gauge: SlotGauge, powers: Powers, logits_dtype: str) -> dict[str, Any]:
    """Plain numbers: a small tensor that is kept would hold the heap above it, gigabytes over many steps."""
    bounded = [SLOTS.index(slot) for slot in ("qkv", "o", *(["logits"] if logits_dtype == "fp8" else []))]
    return {
        "saturated": int(gauge.saturated.sum()),
        "flushed": int(gauge.flushed.sum()),
        "overrange": float(gauge.overrange.nan_to_num(nan=math.inf).max()),
        "utilization": float(gauge.overrange[0, SLOTS.index("qkv")]),
        "utilization_max": float(gauge.overrange[0, bounded].nan_to_num(nan=math.inf).max()),
        "powers": (float(powers.signal), float(powers.noise)),
        "nonfinite": not bool(torch.isfinite(powers.noise)),
    }


def summarize(scenario: str, recipe: str, layers: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The JSON of DESIGN over all layers' steps; no loss. nonfinite: steps with an output that is not finite."""
    steps = list(zip(*layers, strict=True))
    saturated = [sum(layer["saturated"] for layer in step) for step in steps]
    everything = [entry for step in steps for entry in step]
    at_transient = [layer["powers"] for layer in steps[transient_of(scenario) - 1]]
    powers = Powers(*(torch.tensor(math.fsum(part), dtype=torch.float64) for part in zip(*at_transient)))
    return {
        "scenario": scenario,
        "recipe": recipe,
        "saturated_values": sum(saturated),
        "saturated_steps": sum(map(bool, saturated)),
        "first_saturated_step": next((number for number, count in enumerate(saturated, start=1) if count), None),
        "worst_overrange": max(entry["overrange"] for entry in everything),
        "flushed_values": sum(entry["flushed"] for entry in everything),
        "transient_sqnr_db": powers_to_db(powers),
        "nonfinite": sum(any(layer["nonfinite"] for layer in step) for step in steps),
        "utilization_median": median(entry["utilization"] for entry in everything),
        "utilization_max": max(entry["utilization_max"] for entry in everything),
        "final_loss": None,
        "reference_loss": None,
    }
