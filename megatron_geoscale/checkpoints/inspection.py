"""What an engine would compute for a checkpoint's weights, and what a reader wants to know besides, without a model.

One layer is in memory at a time. The functions are the engine's own, so sigma, bounds and scales are equal to those of
`GeoScaleEngine.refresh` for the same weights, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.bounds.rotary import certified_gram_norm
from megatron_geoscale.checkpoints.attention_weights import AttentionSource, AttentionWeights
from megatron_geoscale.config import BASELINE_RECIPES, GeoScaleConfig
from megatron_geoscale.scaling import guard
from megatron_geoscale.scaling.folding import fold_attention
from megatron_geoscale.scaling.formats import E4M3, overrange
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.layer_bounds import bound_heads
from megatron_geoscale.scaling.slot_scales import scales_from_bounds
from megatron_geoscale.scaling.slots import FORWARD_SLOTS, SLOTS
from megatron_geoscale.scaling.table import BOUNDS
from megatron_geoscale.spectral.gram import norm_of_grams, per_query_head, trace
from megatron_geoscale.spectral.moments import Moments
from megatron_geoscale.spectral.projections import Projections

GAIN_OUTLIER = 20.0
"""A norm gain is an outlier where max |gain| exceeds this many times the median |gain|."""
_BOUNDED = {"amax_q": "Q", "amax_k": "K", "amax_v": "V"}


@dataclass(frozen=True)
class LayerReport:
    """One layer. Everything is a function of its weights, of the recipe and of the sequence length."""

    number: int
    """From 1."""
    bounds: dict[str, float]
    """The layer's row of `ScaleTable.bounds`, and `amax_o`, of an entry of the attention output, which is V's bound
    over 1 - attention dropout."""
    scales: dict[str, float | None]
    """Of the forward slots; None where a scale is made from the tensor itself (recipe `current`)."""
    sigma: list[float]
    """||A^T B|| of each query head, by the chosen estimator; under layer granularity, whose one value is in `bounds`
    and bounds no head, each head's from its Gram matrices."""
    stable_rank: list[float | None]
    """||A^T B||_F^2 / ||A^T B||_2^2 of each query head from its Gram matrices, None for a head of zeros."""
    rotary_tightness: float | None
    """sigma_bound / (||A|| ||B||) of the head whose sigma_bound is the largest: what balancing gains over D = I (THEORY
    3). None without RoPE, and where queries and keys are normalised."""
    utilization: dict[str, float | None]
    """`q`, `k`, `v`: share of E4M3's range that a typical entry takes, its root mean square over all heads and rows
    for isotropic tokens, times the scale, over 448. RoPE does not change it. None without a scale."""
    warnings: list[str]
    """Sentences that name the layer."""


def inspect_layers(
    source: AttentionSource, config: GeoScaleConfig, *, max_sequence_length: int | None = None
) -> Iterator[LayerReport]:
    """Every layer of `source`, in order. The sequence length is the model's own longest unless given.

    Under the recipes `delayed` and `current` the bounds are those of `certified`, and the scale is what such a run
    starts with: 1, or none. Alphas are those of a burn-in. Raises ValueError naming layer, head and matrix of the first
    weight that is not finite.
    """
    for number in range(1, source.num_layers + 1):
        weights = source.layer(number)
        if max_sequence_length is not None:
            geometry = replace(weights.geometry, max_sequence_length=max_sequence_length)
            weights = replace(weights, geometry=geometry)
        yield _inspect(weights, config, source.num_layers)
        del weights  # before the next layer is read


def _inspect(weights: AttentionWeights, config: GeoScaleConfig, num_layers: int) -> LayerReport:
    geometry, layer = weights.geometry, _Layer(weights)
    moments = Moments.of(layer.projections(), with_cross=config.recipe == "rank_aware")
    head_norms = None
    if weights.head_norms is not None:
        head_norms = _as_stack(weights.head_norms[0]), _as_stack(weights.head_norms[1])
    codes = guard.find_nonfinite(
        moments, head_norms, num_layers=1, first_head=0, heads_per_group=geometry.heads_per_group
    )
    _refuse_nonfinite(codes, weights.number)
    exact = norm_of_grams(moments.q, moments.k)
    sigma = exact if (config.estimator, config.granularity) == ("gram", "head") else _estimate(layer, moments, config)
    bounds = bound_heads(geometry, moments, sigma, head_norms, config, num_layers=num_layers)
    row = torch.stack([bounds[name].amax() for name in BOUNDS])
    scales = _scales(row, geometry, config)
    plain = certified_gram_norm(moments.q) * per_query_head(certified_gram_norm(moments.k), moments.q)
    largest = int(bounds["sigma_bound"].argmax()) if head_norms is None else 0
    balanced = geometry.rotary_dim > 0 and head_norms is None
    named = dict(zip(BOUNDS, row.tolist(), strict=True))
    return LayerReport(
        number=weights.number,
        bounds=named | {"amax_o": named["amax_v"] / (1.0 - geometry.dropout)},
        scales=scales,
        sigma=(sigma if config.granularity == "head" else exact).tolist(),
        stable_rank=_shares(_squared_frobenius(moments), exact.square()),
        rotary_tightness=_shares(bounds["sigma_bound"], plain)[largest] if balanced else None,
        utilization=_utilization(moments, weights, scales["qkv"]),
        warnings=_outliers(weights) + _misfits(weights, bounds, scales, config),
    )


class _Layer:
    """A layer for `SigmaEstimator`: all heads on one rank."""

    first_head, ranks_per_group, tp_group = 0, 1, None

    def __init__(self, weights: AttentionWeights) -> None:
        geometry = weights.geometry
        self.number, self.hidden_size, self.num_local_heads = weights.number, geometry.hidden_size, geometry.num_heads
        self.device = weights.gain.device
        self._projections = fold_attention(
            weights.query,
            weights.key,
            weights.value,
            gain=weights.gain,
            shift=weights.shift,
            rotary_dim=geometry.rotary_dim,
            rotary_scale=geometry.rotary_scale,
        )

    def projections(self) -> Projections:
        return self._projections


def _estimate(layer: _Layer, moments: Moments, config: GeoScaleConfig) -> torch.Tensor:
    """sigma as an engine's first refresh estimates it, converged from its start vectors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.core")  # each module's word on what is not installed
        from megatron_geoscale.scaling.estimator import SigmaEstimator  # imports megatron-core, for seconds
    estimator = SigmaEstimator([layer], config)
    estimator.begin()
    estimator.look(layer, layer.projections())
    return estimator.sigma([layer], moments)


def _as_stack(norm: HeadNorm) -> HeadNorm:
    """Of one layer: gain and shift [1, head_dim]."""
    return HeadNorm(norm.gain[None], None if norm.shift is None else norm.shift[None])


def _refuse_nonfinite(codes: torch.Tensor, number: int) -> None:
    try:
        guard.raise_if_nonfinite(torch.cat([codes.new_zeros(number - 1), codes]))
    except guard.NonFiniteWeightsError as error:
        raise ValueError(str(error).partition(": ")[0]) from None


def _scales(row: torch.Tensor, geometry: AttentionGeometry, config: GeoScaleConfig) -> dict[str, float | None]:
    if config.recipe in BASELINE_RECIPES:
        return dict.fromkeys(FORWARD_SLOTS, 1.0 if config.recipe == "delayed" else None)
    scales = scales_from_bounds(row[None], geometry, config)[0]
    return {slot: float(scales[SLOTS.index(slot)]) for slot in FORWARD_SLOTS}


def _squared_frobenius(moments: Moments) -> torch.Tensor:
    """||A^T B||_F^2 = tr(G_A G_B) of each query head."""
    return (moments.q * per_query_head(moments.k, moments.q)).sum(dim=(-2, -1))


def _shares(numerators: torch.Tensor, denominators: torch.Tensor) -> list[float | None]:
    """Quotients, None for 0 / 0."""
    return [float(share) if share.isfinite() else None for share in numerators / denominators]


def _utilization(moments: Moments, weights: AttentionWeights, scale: float | None) -> dict[str, float | None]:
    if scale is None:
        return dict.fromkeys("qkv")
    squares = {}
    for letter in "qkv":
        gram, bias = getattr(moments, letter), getattr(moments, letter + "_bias")
        mean = trace(gram).mean() / gram.shape[-1]  # E[xhat xhat^T] = I: a row's mean square is its squared norm
        squares[letter] = mean if bias is None else mean + bias.square().mean()
    if weights.head_norms is not None:  # n of length sqrt(head_dim) has entries of mean square 1
        for letter, norm in zip("qk", weights.head_norms):
            mean = norm.gain.square().mean()
            squares[letter] = mean if norm.shift is None else mean + norm.shift.square().mean()
    used = torch.tensor(scale, dtype=torch.float64)
    return {letter: float(overrange(square.sqrt(), used, E4M3)) for letter, square in squares.items()}


def _outliers(weights: AttentionWeights) -> list[str]:
    gains = {"input norm": weights.gain}
    if weights.head_norms is not None:
        gains |= {"query norm": weights.head_norms[0].gain, "key norm": weights.head_norms[1].gain}
    found = []
    for what, gain in gains.items():
        size = gain.abs()
        largest, median = float(size.amax()), float(size.median())
        if largest > GAIN_OUTLIER * median:
            found.append(f"layer {weights.number}: the {what}'s largest gain, {largest:.3g} at channel "
                         f"{int(size.argmax())}, exceeds {GAIN_OUTLIER:g} times its median, {median:.3g}")
    return found


def _misfits(
    weights: AttentionWeights,
    bounds: dict[str, torch.Tensor],
    scales: dict[str, float | None],
    config: GeoScaleConfig,
) -> list[str]:
    """A sentence for every head whose bound the layer's scale does not map into the range of E4M3.

    A recipe's scale does so by construction, unless it is no float32 number; a scale of 1, a delayed run's first, only
    happens to.
    """
    wanted = dict.fromkeys(_BOUNDED, "qkv")
    if config.recipe not in BASELINE_RECIPES:
        wanted["logit_bound"] = "logits"
    found = []
    for name, slot in wanted.items():
        scale, values = scales[slot], bounds[name]
        if scale is None:
            continue
        for index in (values * scale > E4M3.max).nonzero()[:, 0].tolist():
            per_group = len(values) == weights.geometry.num_groups < weights.geometry.num_heads
            who = "key/value head" if per_group else "head"
            where = f"layer {weights.number}, {who} {index}" if len(values) > 1 else f"layer {weights.number}"
            found.append(f"{where}: {_BOUNDED.get(name, 'a logit')} may reach {float(values[index]):.3g}, and with the "
                         f"scale {scale:.3g} E4M3 ends at {E4M3.max / scale:.3g}")
    return found
