"""From bounds to scales, slot by slot (THEORY 5, 5.1), and the scaler that reads them back at the cast.

The bounds hold in exact arithmetic. What the layer's own rounding and the casts before a slot can add is put on top
here, so that with margin 1 the scaled value still does not exceed the FP8 maximum: a cast to E4M3 moves a value by at
most 1/16 of itself, or by half the smallest subnormal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_geoscale.bounds.tensors import FLOAT32_ROUNDOFF, rounding_allowance
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.formats import E4M3, SLOT_FORMATS, max_abs, scale_from_amax
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, SLOTS
from megatron_geoscale.scaling.table import BOUNDS, ScaleTable

E4M3_ROUNDING = 2.0**-4
"""Largest relative error of a cast to a normal E4M3 number: half a unit in the last of 3 mantissa bits."""
E5M2_ROUNDING = 2.0**-3
E4M3_SUBNORMAL = 2.0**-10
"""Largest error of a cast to a subnormal E4M3 number, in scaled units: half of the smallest, 2**-9."""
FP32_SLACK = 2.0**-10
"""Relative room for the float32 sums of attention itself, at most a few thousand terms of roundoff 2**-24 each."""


def scales_from_bounds(
    bounds: torch.Tensor, geometry: AttentionGeometry, config: GeoScaleConfig, alpha: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales float32 [num_layers, len(SLOTS)] from bounds float64 [num_layers, len(BOUNDS)].

    `geometry`: of any layer, for what all layers share. The backward slots stay 0: `TableScaler` scales them from dO.
    alpha: calibrated factors of the slots' bounds, float64 [num_layers, len(SLOTS)] (THEORY 6); None where there are
    none, which is not the same as 1 under `paper`: there it leaves the published, rank-aware bound.
    """
    factor = None if alpha is None else dict(zip(SLOTS, alpha.unbind(1), strict=True))
    bound = dict(zip(BOUNDS, bounds.unbind(1), strict=True))
    scale = dict.fromkeys(SLOTS, torch.zeros_like(bound["sigma"], dtype=torch.float32))
    allowance = _entry_allowance(geometry)
    keep = 1.0 - geometry.dropout

    offset_error = _offset_error(bound["offset_size"], geometry)
    amax_qkv = torch.maximum(torch.maximum(bound["amax_q"], bound["amax_k"]), bound["amax_v"]) * allowance
    amax_qkv = amax_qkv + offset_error
    if factor is not None:
        amax_qkv = amax_qkv * factor["qkv"]
    scale["qkv"] = scale_from_amax(amax_qkv, E4M3, margin=config.margin)
    subnormal = E4M3_SUBNORMAL / scale["qkv"].double()

    amax_logits = bound["logit_bound" if factor is None else "logit_worst"]
    if config.recipe != "paper":  # its logit scale is the published one, of the bound alone
        amax_logits = amax_logits + bound["softmax_scale"] * _product_error(bound, subnormal, geometry)
    if factor is not None:
        amax_logits = amax_logits * factor["logits"]
    scale["logits"] = scale_from_amax(amax_logits, E4M3, margin=config.margin)

    scale["s"] = scale_from_amax(torch.full_like(bound["sigma"], 1.0 / keep), E4M3)
    # A row of probabilities sums to 1, after dropout to 1/keep at most; its casts can add 1/16, or a subnormal each.
    row_sum = ((1.0 + E4M3_ROUNDING) + geometry.max_sequence_length * E4M3_SUBNORMAL / E4M3.max) / keep
    amax_v8 = (bound["amax_v"] * allowance + offset_error) * (1.0 + E4M3_ROUNDING) + subnormal
    amax_o = amax_v8 * row_sum * (1.0 + FP32_SLACK)
    if factor is not None:
        amax_o = amax_o * factor["o"]
    scale["o"] = scale_from_amax(amax_o, E4M3, margin=config.margin)
    return torch.stack([scale[slot] for slot in SLOTS], dim=1)


def _product_error(
    bound: dict[str, torch.Tensor], subnormal: torch.Tensor, geometry: AttentionGeometry
) -> torch.Tensor:
    """How far the computed product of computed and cast vectors, q8.k8, may be from q.k: [num_layers].

    |q8.k8 - q.k| <= sum of |q||e_k| + |e_q||k| + |e_q||e_k|, where e is what the layer's rounding and the cast did to a
    vector: at most so much of its norm, and half a subnormal an entry. It is not relative to q.k, which may cancel.
    """
    q_norm, k_norm = bound["query_norm"], bound["key_norm"]
    grown = (1.0 + E4M3_ROUNDING) * _norm_allowance(geometry)
    absolute = _absolute_error(_offset_error(bound["offset_size"], geometry), subnormal, geometry)
    error = (grown**2 - 1.0) * q_norm * k_norm + grown * absolute * (q_norm + k_norm) + absolute**2
    return error + FP32_SLACK * (grown * q_norm + absolute) * (grown * k_norm + absolute)


def _absolute_error(
    offset_error: torch.Tensor, subnormal: torch.Tensor, geometry: AttentionGeometry
) -> torch.Tensor:
    """What a computed and cast vector's 2-norm may be off by apart from its relative error: so much in each entry."""
    return geometry.widest_vector**0.5 * ((1.0 + E4M3_ROUNDING) * offset_error + subnormal)


def _offset_error(offset_size: torch.Tensor, geometry: AttentionGeometry) -> torch.Tensor:
    """What rounding may add to an entry of Q, K or V beyond the part relative to its bound, where the norm's shift and
    the biases cancel; RoPE may turn two such errors into one."""
    return 2.0**0.5 * (_entry_allowance(geometry) - 1.0) * offset_size


def _entry_allowance(geometry: AttentionGeometry) -> float:
    """How far a computed entry of Q, K or V may exceed its bound: `rounding_allowance`, and where the projection runs
    in FP8 the casts of its inputs and of its weights, relative to the same products of norms."""
    casts = (1.0 + E4M3_ROUNDING) ** 2 if geometry.fp8_projection else 1.0
    return casts * rounding_allowance(geometry.hidden_size, unit_roundoff=geometry.unit_roundoff)


def _norm_allowance(geometry: AttentionGeometry) -> float:
    """How far the 2-norm of a computed query, key or value vector may exceed its bound: roundings as for entries, and
    those relative to |W| |x|, the float32 sums over d and the casts of W, whose errors add up over the d_h rows to
    ||A||_F <= sqrt(d_h) ||A||_2."""
    by_weight = 2.0 * geometry.hidden_size * FLOAT32_ROUNDOFF + (E4M3_ROUNDING if geometry.fp8_projection else 0.0)
    return _entry_allowance(geometry) + geometry.widest_vector**0.5 * by_weight


class TableScaler:
    """One layer's `LayerScaler` (scaling.slots): forward scales from the table, backward ones from this step's dO.

    dO is the only observation (THEORY 5.1): its amax scales its own cast, its largest row norm times the bound on
    a value vector's norm scales dP, and dQ, dK, dV take their own amax, since dK and dV grow with the sequence. These
    scales are powers of two, so gradients round alike however the heads are spread over tensor-parallel ranks, each of
    which sees the amax of its own heads only.
    """

    def __init__(
        self, table: ScaleTable, gauges: SlotGauge | Sequence[SlotGauge], row: int, geometry: AttentionGeometry
    ) -> None:
        """`row` of the table, from 0, is the layer's; `gauges` are told of every cast."""
        self._table, self._row, self._geometry = table, row, geometry
        self._gauges = [gauges] if isinstance(gauges, SlotGauge) else list(gauges)
        self._gradient_scale = geometry.softmax_scale * geometry.logit_multiplier
        self._norm_allowance = _norm_allowance(geometry)
        self._used: dict[str, torch.Tensor] = {}

    def scale(self, slot: str, *tensors: torch.Tensor) -> torch.Tensor:
        """As `LayerScaler.scale`. `do`, dO as [s, b, heads, d_h], must be asked for before `dp`."""
        if slot == "do":
            self._do_norm = torch.linalg.vector_norm(tensors[0], dim=-1).amax()
        if slot == "dp":
            scale = scale_from_amax(self._dp_bound(), SLOT_FORMATS[slot], power_of_two=True)
        elif slot in BACKWARD_SLOTS:
            scale = scale_from_amax(max_abs(*tensors), SLOT_FORMATS[slot], power_of_two=True)
        else:
            scale = self._table.scales[self._row, SLOTS.index(slot)]
        self._used[slot] = scale
        return scale

    def _dp_bound(self) -> torch.Tensor:
        """Of dS * softmax_scale: half of max|dP| (|P(1-P)| <= 1/4 of a range of twice that), casts included."""
        value_norm = self._table.bounds[self._row, BOUNDS.index("value_norm")] * self._norm_allowance
        offset_error = _offset_error(self._table.bounds[self._row, BOUNDS.index("offset_size")], self._geometry)
        subnormal = E4M3_SUBNORMAL / self._table.scales[self._row, SLOTS.index("qkv")].double()
        value_norm = value_norm * (1.0 + E4M3_ROUNDING) + _absolute_error(offset_error, subnormal, self._geometry)
        amax_dp = self._do_norm.double() * (1.0 + E5M2_ROUNDING) * value_norm * (1.0 + FP32_SLACK)
        return self._gradient_scale * 0.5 * amax_dp / (1.0 - self._geometry.dropout)

    def observe(self, slot: str, amax: torch.Tensor, saturated: torch.Tensor, flushed: torch.Tensor) -> None:
        """As `LayerScaler.observe`."""
        for gauge in self._gauges:
            gauge.observe(self._row, slot, amax, saturated, flushed, self._used[slot])
