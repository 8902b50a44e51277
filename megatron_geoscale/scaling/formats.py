"""FP8 formats: scales, casts and what a cast loses. The only place that divides by an FP8 maximum.

A scale follows Transformer Engine's convention, scale = FP8_max / amax (THEORY 5): a tensor is stored as
fp8(x * scale) and read back as fp8 * (1 / scale).
"""

from __future__ import annotations

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


E4M3 = FP8Format("E4M3", torch.float8_e4m3fn, 448.0)
E5M2 = FP8Format("E5M2", torch.float8_e5m2, 57344.0)

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


def cast(x: torch.Tensor, scale: torch.Tensor, fmt: FP8Format) -> Cast:
    """Cast `x` to FP8 and back under `scale` (0-dim float32), counting what is lost.

    Saturating, as TE's kernels are (FACTS 1), in both formats: torch's own cast to E5M2 would give infinity. Infinities
    saturate too and are counted; a NaN stays NaN and is not counted. Rounding is to nearest, ties to even.
    """
    x = x.to(torch.float32)
    scaled = x * scale
    saturated = torch.count_nonzero(scaled.abs() > fmt.max)
    stored = scaled.clamp_(-fmt.max, fmt.max).to(fmt.dtype).to(torch.float32)
    # Rounding makes zeros of non-zeros and never the reverse, so the difference is the exact count.
    flushed = torch.count_nonzero(x) - torch.count_nonzero(stored)
    return Cast(stored.mul_(scale.reciprocal()), max_abs(x), saturated, flushed)


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
