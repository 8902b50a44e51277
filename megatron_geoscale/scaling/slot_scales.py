"""From bounds to scales, slot by slot (THEORY 5, 5.1), and the scaler that reads them back at the cast.

The bounds hold in exact arithmetic. What the layer's own rounding and the casts before a slot can add is put on top
here, so that with margin 1 the scaled value still does not exceed the FP8 maximum: a cast to E4M3 moves a value by at
most 1/16 of itself, or by half the smallest subnormal.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.backward_scales import backward_scales, cast_sizes, gradient_sizes
from megatron_geoscale.scaling.formats import E4M3, scale_from_amax
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.rounding import (
    E4M3_ROUNDING,
    E4M3_SUBNORMAL,
    FP32_SLACK,
    absolute_error,
    cast_row_sum,
    entry_allowance,
    norm_allowance,
    offset_error,
)
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, SLOTS, LayerScaler
from megatron_geoscale.scaling.table import BOUNDS, ScaleTable


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
    allowance = entry_allowance(geometry)
    keep = 1.0 - geometry.dropout

    offset = offset_error(bound["offset_size"], geometry)
    amax_qkv = torch.maximum(torch.maximum(bound["amax_q"], bound["amax_k"]), bound["amax_v"]) * allowance
    amax_qkv = amax_qkv + offset
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
    # A row of probabilities sums to 1, after dropout to 1/keep at most.
    row_sum = cast_row_sum(geometry.max_sequence_length) / keep
    amax_v8 = (bound["amax_v"] * allowance + offset) * (1.0 + E4M3_ROUNDING) + subnormal
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
    grown = (1.0 + E4M3_ROUNDING) * norm_allowance(geometry)
    absolute = absolute_error(offset_error(bound["offset_size"], geometry), subnormal, geometry)
    error = (grown**2 - 1.0) * q_norm * k_norm + grown * absolute * (q_norm + k_norm) + absolute**2
    return error + FP32_SLACK * (grown * q_norm + absolute) * (grown * k_norm + absolute)


def _backward_scales(
    do: torch.Tensor,
    bounds: torch.Tensor,
    scales: torch.Tensor,
    amax_qkv: torch.Tensor | None,
    geometry: AttentionGeometry,
    num_keys: int,
) -> torch.Tensor:
    """As `TableScaler.backward_scales`, from one layer's rows of the table."""
    per_group = min(geometry.heads_per_group, do.size(2))  # a group may be spread over ranks
    return backward_scales(
        gradient_sizes(do, per_group),
        cast_sizes(bounds, scales, geometry, amax_qkv),
        geometry,
        num_queries=do.size(0),
        num_keys=num_keys,
        value_dim=do.size(3),
        heads_per_group=per_group,
    )


_on_gpu = torch.compile(_backward_scales)
"""More than a hundred kernels on single numbers become a few. It compiles when it is first called, once for all layers
of a geometry."""


def _compiled(*args: Any) -> torch.Tensor:
    """`_backward_scales`, compiled; as it is, with a warning, where torch finds no compiler for GPU code."""
    global _on_gpu
    try:
        return _on_gpu(*args)
    except RuntimeError as error:
        if _on_gpu is _backward_scales:
            raise
        reason = str(error).splitlines()[0]
        warnings.warn(f"the backward scales cannot be compiled, which makes each step slower: {reason}", stacklevel=2)
        _on_gpu = _backward_scales
        return _on_gpu(*args)


class TableScaler:
    """One layer's `LayerScaler` (scaling.slots): forward scales from the table, backward ones from this step's dO.

    dO is the only tensor that is observed (THEORY 5.1), and one amax, that of Q, K and V, which their cast reports
    anyway. The backward scales are powers of two, so gradients round alike however the heads are spread over
    tensor-parallel ranks, each of which sees its own heads only.
    """

    def __init__(
        self,
        table: ScaleTable,
        gauges: SlotGauge | Sequence[SlotGauge],
        row: int,
        geometry: AttentionGeometry,
        *,
        backward: LayerScaler | None = None,
    ) -> None:
        """`row` of the table, from 0, is the layer's; `gauges` are told of every cast. `backward`: what scales the
        backward slots instead of `backward_scales`, and is told of their casts."""
        self._table, self._row, self._geometry, self._backward = table, row, geometry, backward
        self._gauges = [gauges] if isinstance(gauges, SlotGauge) else list(gauges)
        self._used: dict[str, torch.Tensor] = {}

    def backward_scales(
        self, do: torch.Tensor, *, num_keys: int, amax_qkv: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scales of dO, dS * softmax_scale and dQ, dK, dV, in the order of BACKWARD_SLOTS: float32 [3] on dO's device.

        do: [s, b, heads, d_v], this rank's heads, any float dtype; whole sequences. amax_qkv: 0-dim, at least the
        largest |entry| of the Q, K and V (before their cast) that made the output whose gradient `do` is; None leaves
        the bounds of the weights. The host does not wait for the device. A NaN or an infinity in dO gives scales of 1.
        """
        bounds, scales = self._table.bounds[self._row], self._table.scales[self._row]
        return (_compiled if do.is_cuda else _backward_scales)(do, bounds, scales, amax_qkv, self._geometry, num_keys)

    def before_backward(self, do: torch.Tensor, *, num_keys: int, amax_qkv: torch.Tensor) -> None:
        """As `LayerScaler.before_backward`."""
        if self._backward is None:
            scales = self.backward_scales(do, num_keys=num_keys, amax_qkv=amax_qkv)
            self._used.update(zip(BACKWARD_SLOTS, scales.unbind(), strict=True))

    def scale(self, slot: str, *tensors: torch.Tensor) -> torch.Tensor:
        """As `LayerScaler.scale`; the backward slots after `before_backward`."""
        if slot not in BACKWARD_SLOTS:
            self._used[slot] = self._table.scales[self._row, SLOTS.index(slot)]
        elif self._backward is not None:
            self._used[slot] = self._backward.scale(slot, *tensors)
        return self._used[slot]

    def observe(self, slot: str, amax: torch.Tensor, saturated: torch.Tensor, flushed: torch.Tensor) -> None:
        """As `LayerScaler.observe`."""
        if self._backward is not None and slot in BACKWARD_SLOTS:
            self._backward.observe(slot, amax, saturated, flushed)
        for gauge in self._gauges:
            gauge.observe(self._row, slot, amax, saturated, flushed, self._used[slot])
