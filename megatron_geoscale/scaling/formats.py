"""FP8 formats: scales, casts and what a cast loses. The only place that divides by an FP8 maximum.

A scale follows Transformer Engine's convention, scale = FP8_max / amax (THEORY 5): a tensor is stored as
fp8(x * scale) and read back as fp8 * (1 / scale).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, SLOTS


@dataclass(frozen=True)
class FP8Format:
    """An FP8 number format: torch's dtype for it and its largest finite value."""

    name: str
    dtype: torch.dtype
    max: float
    overflow: float
    """The largest magnitude that does not round beyond `max`."""
    beyond: float
    """What it rounds to beyond: E4M3 has no infinity."""


# Half a step above the largest lies a tie, which goes to the even mantissa: E4M3's largest, 1.75 * 2^8, is even and
# keeps its tie; E5M2's, 1.75 * 2^15, is odd, so its tie, 61440, is already infinity, and 2^-8 is
# float32's step below it.
E4M3 = FP8Format("E4M3", torch.float8_e4m3fn, 448.0, overflow=464.0, beyond=math.nan)
E5M2 = FP8Format("E5M2", torch.float8_e5m2, 57344.0, overflow=61440.0 - 2.0**-8, beyond=math.inf)

SLOT_FORMATS = {slot: E5M2 if slot in BACKWARD_SLOTS else E4M3 for slot in SLOTS}
"""Format of each slot, TE's HYBRID: E4M3 forward, E5M2 for gradients (FACTS 1)."""

# A scale and its reciprocal must both be normal float32 numbers: beyond 2^126 the reciprocal is subnormal, and some
# devices flush it to zero.
_MIN_SCALE, _MAX_SCALE = 2.0**-126, 2.0**126


class Cast(NamedTuple):
    """Result of `cast`."""

    values: torch.Tensor
    """float32, shape of the input: what a kernel that reads the FP8 tensor computes with."""
    amax: torch.Tensor
    """0-dim float32: max |x| before scaling; NaN where x has one."""
    saturated: torch.Tensor
    """0-dim int64: how many |x| * scale exceed the FP8 maximum."""
    flushed: torch.Tensor
    """0-dim int64: how many non-zero x were stored as zero."""


class Powers(NamedTuple):
    """Signal and noise power of an approximation; powers of parts (ranks, layers, microbatches) add up."""

    signal: torch.Tensor
    """0-dim float64: sum of reference^2."""
    noise: torch.Tensor
    """0-dim float64: sum of (reference - approximation)^2."""


def scale_from_amax(
    amax: torch.Tensor, fmt: FP8Format, *, margin: float = 1.0, power_of_two: bool = False
) -> torch.Tensor:
    """Scale that maps `amax` to `margin` times the FP8 maximum (THEORY 5); float32, shape of `amax`.

    Always finite and positive. amax * scale, in float32, never exceeds fmt.max, so a value equal to its bound does
    not count as saturated. An amax below fmt.max * 2^-126, zero included, gets the largest scale, 2^126. A NaN or
    infinite amax gives 1, as TE's current scaling does: the tensor's own NaN stays visible. `power_of_two` takes the
    largest power of two below: rescaling is then exact, and normal FP8 numbers round alike whatever the power is.
    """
    amax = amax.to(torch.float32)
    # A tensor on both sides: torch computes number / tensor as number * (1 / tensor), with a second rounding. One step
    # down is then enough to undo that the quotient was rounded up.
    scale = (torch.full_like(amax, margin * fmt.max) / amax).clamp(_MIN_SCALE, _MAX_SCALE)
    scale = torch.where(scale * amax > fmt.max, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where(torch.isfinite(amax), scale, torch.ones_like(scale))


def max_abs(*tensors: torch.Tensor) -> torch.Tensor:
    """max |x| over all `tensors` as 0-dim float32; NaN if any element is."""
    extremes = [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]
    return torch.stack(extremes).abs().amax().to(torch.float32)


def overrange(amax: torch.Tensor, scale: torch.Tensor, fmt: FP8Format) -> torch.Tensor:
    """amax * scale / FP8_max: the share of the range in use; above 1, by how much values exceeded it."""
    return amax * scale / fmt.max


def cast(x: torch.Tensor, scale: torch.Tensor, fmt: FP8Format, *, overflow: str = "saturate") -> Cast:
    """Cast `x` to FP8 and back under `scale` (0-dim float32), counting what is lost.

    `overflow` is one of `config.OVERFLOWS`. Values beyond the largest are counted as saturated under both, infinities
    too; a NaN stays NaN and is not counted. Rounding is to nearest, ties to even, so under `nan` a value that exceeds
    the largest by less than half a step is still stored as the largest.
    """
    x = x.to(torch.float32)
    scaled = x * scale
    saturated = torch.count_nonzero(scaled.abs() > fmt.max)
    beyond = scaled.abs() > fmt.overflow if overflow == "nan" else None
    stored = _decoded(scaled.clamp_(-fmt.max, fmt.max).to(fmt.dtype))
    if beyond is not None:
        stored = torch.where(beyond, torch.copysign(torch.full_like(stored, fmt.beyond), stored), stored)
    # Rounding makes zeros of non-zeros and never the reverse, so the difference is the exact count.
    flushed = torch.count_nonzero(x) - torch.count_nonzero(stored)
    return Cast(stored.mul_(scale.reciprocal()), max_abs(x), saturated, flushed)


_E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def _decoded(codes: torch.Tensor) -> torch.Tensor:
    """FP8 numbers as float32. On a CPU torch decodes E4M3 more slowly than the numbers are found in a table."""
    if codes.dtype != torch.float8_e4m3fn or codes.device.type != "cpu":
        return codes.to(torch.float32)
    return _E4M3_VALUES.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def signal_and_noise(reference: torch.Tensor, approximation: torch.Tensor) -> Powers:
    """Powers of `reference` and of `approximation`'s error, summed in float64."""
    exact = reference.detach().to(torch.float64)
    return Powers(exact.square().sum(), (exact - approximation.detach().to(torch.float64)).square().sum())


def powers_to_db(powers: Powers) -> float:
    """Signal-to-quantisation-noise ratio in dB; infinite without noise, NaN without signal and noise. Synchronises."""
    return float(10.0 * torch.log10(powers.signal / powers.noise))


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-quantisation-noise ratio of `approximation` in dB, as `powers_to_db` defines it."""
    return powers_to_db(signal_and_noise(reference, approximation))
