"""A projection that runs in FP8 itself makes Q, K and V larger than W and x allow: the scales must cover its casts."""

import math

import pytest
import torch

from megatron_geoscale.bounds import certified_logit_bound, entry_bound, vector_norm_bound
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.formats import E4M3, cast
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.slot_scales import scales_from_bounds
from megatron_geoscale.scaling.slots import SLOTS
from megatron_geoscale.scaling.table import BOUNDS
from megatron_geoscale.spectral import Moments, Projections

D, HEAD_DIM, SCALE = 256, 4, 0.5
GROWTH = 18 / 17
"""The most that a cast to E4M3 raises a normal number: from just above a tie at 17/16 to 18/16."""


def per_tensor(x):
    """x as an FP8 matrix product takes it under current scaling: cast under the scale of its own amax."""
    return cast(x, E4M3.max / x.abs().max(), E4M3).values.double()


def ties(size, *, first):
    """Equal entries that are just above a tie once the largest entry, `first`, is at E4M3's maximum."""
    values = torch.full((size,), 17.01 / 16 * 2**8 / E4M3.max * first, dtype=torch.float64)
    values[0] = first
    return values


def worst():
    """(W, x): every row lies along the token, which is on the norm's sphere, and all entries of both round up."""
    row = ties(D, first=1.0)
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    return sign[:, None] * row, math.sqrt(D) * row / row.norm()


def projected(w, x, dtype):
    """What the layer computes: FP8 operands, sums in float32, stored in `dtype`."""
    return (per_tensor(w).float() @ per_tensor(x).float()).to(dtype)


def bounds_of(w):
    heads = w[None]
    moments = Moments.of(Projections(heads, None, heads, None, heads, None))
    options = dict(rotary_dim=0, input_norm=math.sqrt(D))
    sigma, logits = certified_logit_bound(moments, softmax_scale=SCALE, **options)
    entry = entry_bound(moments.q, None, **options)
    norm = vector_norm_bound(moments.q, None, input_norm=math.sqrt(D))
    values = dict(sigma=sigma, sigma_bound=sigma, logit_bound=logits, logit_worst=logits, softmax_scale=SCALE)
    values |= dict.fromkeys(("amax_q", "amax_k", "amax_v"), entry)
    values |= dict.fromkeys(("query_norm", "key_norm", "value_norm"), norm)
    return torch.tensor([[float(values.get(name, 0.0)) for name in BOUNDS]], dtype=torch.float64), float(entry)


def scales_of(bounds, dtype, margin, *, fp8_projection):
    geometry = AttentionGeometry(
        hidden_size=D, num_heads=1, num_groups=1, head_dim=HEAD_DIM, softmax_scale=SCALE, max_sequence_length=8,
        unit_roundoff=torch.finfo(dtype).eps / 2, fp8_projection=fp8_projection,
    )
    return dict(zip(SLOTS, scales_from_bounds(bounds, geometry, GeoScaleConfig(margin=margin))[0], strict=True))


def use(w, x, dtype, *, fp8_projection, margins=(1.0,)):
    """Shares of the allowed range that an entry and a logit take; the margin decides how Q itself is rounded."""
    bounds, _ = bounds_of(w)
    vector = projected(w, x, dtype).float()
    shares = []
    for margin in margins:
        scales = scales_of(bounds, dtype, margin, fp8_projection=fp8_projection)
        stored = cast(vector, scales["qkv"], E4M3).values
        used = vector.abs().max() * scales["qkv"], SCALE * (stored @ stored) * scales["logits"]
        shares.append([float(value) / (margin * E4M3.max) for value in used])
    return [max(share) for share in zip(*shares)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_worst_casts_of_weights_and_inputs_are_covered_and_nothing_less_would_do(dtype):
    w, x = worst()
    _, entry = bounds_of(w)
    assert entry == pytest.approx(float((w @ x).abs().max()), rel=1e-6)  # the exact product attains its bound
    growth = float(projected(w, x, dtype).abs().max()) / entry
    assert 1.1 < growth < GROWTH**2 * 1.005 < (17 / 16) ** 2
    margins = torch.linspace(0.5, 1, 33).tolist()
    entry_share, logit_share = use(w, x, dtype, fp8_projection=True, margins=margins)
    assert 0.9 < entry_share <= 1 and 0.7 < logit_share <= 1
    entry_share, logit_share = use(w, x, dtype, fp8_projection=False, margins=margins)
    assert entry_share > 1.05 and logit_share > 1.01


@pytest.mark.parametrize("seed", range(4))
def test_no_weights_and_inputs_found_by_search_break_the_scales(seed):
    """Inputs along a row, spread over so many magnitudes that some are cast to subnormals, climbing by random steps."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def share(w, x):
        return max(use(w, x, torch.bfloat16, fp8_projection=True))

    spread = (0.0, 1.0, 4.0, 8.0)[seed]
    w = draw(HEAD_DIM, D) * torch.exp(spread * draw(D))
    w[1:] = w[0] * draw(HEAD_DIM - 1, 1)
    x = math.sqrt(D) * w[0] / w[0].norm()
    best = share(w, x)
    for _ in range(60):
        noise = torch.exp(0.05 * draw(D))
        trial = x * noise / (x * noise).norm() * math.sqrt(D), w * noise
        if (found := share(trial[1], trial[0])) > best:
            best, (x, w) = found, trial
    assert 0.6 < best <= 1
