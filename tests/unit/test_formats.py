"""FP8 casts against the list of numbers that each format can hold, and counts against counting one by one."""

import math

import pytest
import torch

from megatron_geoscale.scaling.formats import (
    E4M3,
    E5M2,
    SLOT_FORMATS,
    cast,
    max_abs,
    overrange,
    powers_to_db,
    scale_from_amax,
    signal_and_noise,
    sqnr_db,
)
from megatron_geoscale.scaling.slots import SLOTS

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


def nearest(x: torch.Tensor, fmt) -> torch.Tensor:
    """Saturating round to nearest, ties to even, in float64: a search in the sorted list of all non-negative codes."""
    grid = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).double()
    grid = grid[torch.isfinite(grid)]  # ascending; position parity is the parity of the last mantissa bit
    magnitude = x.double().abs().clamp(max=fmt.max)
    high = torch.searchsorted(grid, magnitude).clamp(max=len(grid) - 1)
    low = (high - 1).clamp(min=0)
    up, down = grid[high] - magnitude, magnitude - grid[low]
    take_high = (up < down) | ((up == down) & (high % 2 == 0))
    return torch.where(take_high, grid[high], grid[low]) * x.double().sign()


def wide(count: int, seed: int = 0, exponents: tuple[int, int] = (-24, 20)) -> torch.Tensor:
    """Random float32 of both signs whose exponents are uniform over `exponents`."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(*exponents, (count,), generator=generator)
    return torch.randn(count, generator=generator) * 2.0**exponent


def test_slots_have_the_hybrid_formats():
    assert {slot: fmt.name for slot, fmt in SLOT_FORMATS.items()} == {
        "qkv": "E4M3", "logits": "E4M3", "s": "E4M3", "o": "E4M3", "do": "E5M2", "dp": "E5M2", "dqkv": "E5M2",
    }  # fmt: skip
    assert tuple(SLOT_FORMATS) == SLOTS
    for fmt in (E4M3, E5M2):
        assert fmt.max == torch.finfo(fmt.dtype).max


@FORMATS
@pytest.mark.parametrize("exponent", [-3, 0, 5])
def test_cast_rounds_to_the_nearest_code_and_saturates(fmt, exponent):
    grid = torch.arange(127, dtype=torch.uint8).view(fmt.dtype).float()
    grid = grid[torch.isfinite(grid)]
    halfway = (grid[1:] + grid[:-1]) / 2
    # A power of two scales without rounding, so equality is exact.
    x = torch.cat([wide(20_000), halfway, -halfway, grid, -grid]) / 2.0**exponent
    scale = torch.tensor(2.0**exponent)
    assert torch.equal(cast(x, scale, fmt).values.double(), nearest(x.double() * 2.0**exponent, fmt) / 2.0**exponent)


@FORMATS
def test_counts_equal_counting_one_by_one(fmt):
    x = torch.cat([wide(3000, seed=1), torch.zeros(50), torch.tensor([math.inf, -math.inf, math.nan, fmt.max])])
    scale = torch.tensor(1.7)
    result = cast(x, scale, fmt)
    saturated = flushed = 0
    for value, stored in zip(x.tolist(), result.values.tolist()):
        product = float(torch.tensor(value) * scale)
        saturated += abs(product) > fmt.max
        flushed += value != 0 and stored == 0
    assert saturated > 100 and flushed > 100
    assert (result.saturated.item(), result.flushed.item()) == (saturated, flushed)
    assert result.saturated.dtype == result.flushed.dtype == torch.int64


@FORMATS
def test_non_finite_values(fmt):
    x = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    result = cast(x, torch.tensor(2.0), fmt)
    assert result.values[:3].tolist() == [1.0, fmt.max / 2, -fmt.max / 2]
    assert math.isnan(result.values[3]) and math.isnan(result.amax)
    assert (result.saturated.item(), result.flushed.item()) == (2, 0)
    assert cast(x[:3], torch.tensor(2.0), fmt).amax.item() == math.inf


def test_overflow_to_nan_is_ieee_rounding():
    """Ties around the largest value go to the even mantissa: 464 is still 448 in E4M3, 61440 is infinity in E5M2."""
    one = torch.tensor(1.0)

    def step(x, towards):
        return torch.nextafter(torch.tensor(x), torch.tensor(towards)).item()

    x = torch.tensor([448.0, 464.0, step(464.0, 1e9), -470.0, math.inf, -math.inf, math.nan, 3.0])
    result = cast(x, one, E4M3, overflow="nan")
    assert result.values[[0, 1, 7]].tolist() == [448.0, 448.0, 3.0] and result.values[2:7].isnan().all()
    assert result.saturated.item() == 5  # 464 is counted too: its magnitude exceeds the largest
    x = torch.tensor([57344.0, step(61440.0, 0.0), 61440.0, -1e9, math.inf, -math.inf, math.nan])
    result = cast(x, one, E5M2, overflow="nan")
    assert result.values[:6].tolist() == [57344.0, 57344.0, math.inf, -math.inf, math.inf, -math.inf]
    assert math.isnan(result.values[6]) and result.saturated.item() == 5

    x = wide(50_000)  # torch's own cast to E5M2 does the same; both modes agree wherever nothing overflows
    result = cast(x, one, E5M2, overflow="nan")
    assert torch.equal(result.values, x.to(torch.float8_e5m2).float()) and result.values.isinf().sum() > 100
    for fmt in (E4M3, E5M2):
        saturating, ieee = cast(x, one, fmt), cast(x, one, fmt, overflow="nan")
        assert torch.equal(saturating.values[ieee.values.isfinite()], ieee.values[ieee.values.isfinite()])
        assert (saturating.saturated, saturating.flushed) == (ieee.saturated, ieee.flushed)


@FORMATS
def test_a_value_at_its_bound_never_saturates(fmt):
    amax = wide(200_000, seed=2, exponents=(-100, 120)).abs()
    amax = amax[amax > 2.0**-105]
    scale = scale_from_amax(amax, fmt)
    assert scale.dtype == torch.float32
    assert not (amax * scale > fmt.max).any()
    assert (amax * scale).min() >= fmt.max * (1 - 2.0**-22)
    # Without the step down it would happen, so the assertion above is not idle.
    assert (amax * (fmt.max / amax) > fmt.max).any()
    torch.testing.assert_close(scale_from_amax(amax, fmt, margin=0.5), scale / 2, rtol=2.0**-22, atol=0.0)


@FORMATS
def test_scales_are_finite_positive_and_invertible(fmt):
    amax = torch.tensor([0.0, 1e-45, 1e-38, 1e-30, 3.4e38, math.inf, math.nan])
    scale = scale_from_amax(amax, fmt, margin=1e-3)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.isfinite(1 / scale).all() and (1 / scale >= torch.finfo(torch.float32).tiny).all()
    assert scale[:2].tolist() == [2.0**126] * 2
    assert scale[-2:].tolist() == [1.0, 1.0]


def test_bfloat16_is_cast_through_float32():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    for got, want in zip(cast(x, torch.tensor(3.0), E4M3), cast(x.float(), torch.tensor(3.0), E4M3)):
        assert torch.equal(got, want) and got.dtype == want.dtype


def test_max_abs_and_overrange():
    assert max_abs(torch.tensor([1.0, -3.0]), torch.tensor([[2.5]])).item() == 3.0
    assert math.isnan(max_abs(torch.ones(2), torch.tensor([math.nan])))
    assert overrange(torch.tensor(1000.0), torch.tensor(2.0), E4M3).item() == pytest.approx(2000 / 448)


def test_sqnr_of_a_bound_too_large_and_too_small():
    """FACTS 1: about 31.5 dB on Gaussian data, flat under loose bounds, lost under tight ones."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(4))
    levels = [sqnr_db(x, cast(x, scale_from_amax(max_abs(x) * slack, E4M3), E4M3).values) for slack in (1, 30, 1024)]
    assert all(30.5 < level < 32.5 for level in levels)
    assert sqnr_db(x, cast(x, scale_from_amax(max_abs(x) / 4, E4M3), E4M3).values) < 15


def test_sqnr_arithmetic():
    reference, approximation = torch.tensor([10.0, 0.0]), torch.tensor([9.0, 0.0])
    assert sqnr_db(reference, approximation) == pytest.approx(20.0)
    assert sqnr_db(reference, reference) == math.inf
    parts = [signal_and_noise(r, a) for r, a in zip(reference, approximation)]
    total = type(parts[0])(parts[0].signal + parts[1].signal, parts[0].noise + parts[1].noise)
    assert powers_to_db(total) == pytest.approx(20.0) and total.signal.dtype == torch.float64
