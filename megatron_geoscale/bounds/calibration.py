"""alpha from observation: what share of its bound a slot has used in a burn-in (THEORY 6).

`rho` is max |x| / bound of one step, a number a layer and slot. `ShareStatistics` keeps the largest rho of all steps
and a histogram over powers of two, so its memory grows with neither steps nor tokens. `calibrated_alpha` turns the
largest into a factor for the bound, `raised_alpha` corrects one that has proved too small. Elementwise and
deterministic: equal rho give equal bits on every rank. Nothing here is certified: an alpha below 1 is a forecast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS_PER_OCTAVE = 8
_OCTAVES = 16
BINS = BINS_PER_OCTAVE * _OCTAVES
"""The histogram resolves rho in [2^-16, 1); its first and last bin take what lies beyond."""
_STEPS_PER_OCTAVE = 16
RAISE = 2.0


class ShareStatistics:
    """Running maximum and quantiles of rho, O(1) memory in the number of observations.

    maxima: float64 [*shape]; counts: int64 [*shape, BINS]; steps: how many rho were seen.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.maxima = torch.zeros(shape, dtype=torch.float64, device=device)
        self.counts = torch.zeros((*shape, BINS), dtype=torch.int64, device=device)
        self.steps = 0

    def add(self, rho: Tensor) -> None:
        """Take up the rho of one step, [*shape]. A NaN or infinity counts as 1: of such a tensor nothing is known."""
        rho = rho.to(torch.float64)
        rho = rho.where(rho.isfinite(), torch.ones_like(rho))
        self.maxima = torch.maximum(self.maxima, rho)
        bins = ((rho.clamp_min(2.0 ** -(_OCTAVES + 1)).log2() + _OCTAVES) * BINS_PER_OCTAVE).floor().long()
        self.counts.scatter_add_(-1, bins.clamp(0, BINS - 1)[..., None], torch.ones_like(bins)[..., None])
        self.steps += 1

    def quantile(self, share: float) -> Tensor:
        """The rho that `share` of the steps did not exceed: [*shape], within 2^(1/16) (4.5%) in the histogram's range.

        Zero where nothing was seen. ValueError unless 0 < share <= 1.
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must lie in (0, 1], got {share}.")
        rank = max(1, math.ceil(share * self.steps))
        bins = (self.counts.cumsum(-1) < rank).sum(-1).clamp_max(BINS - 1)
        middle = ((bins.to(torch.float64) + 0.5) / BINS_PER_OCTAVE - _OCTAVES).exp2()
        return torch.minimum(middle, self.maxima)  # never above the largest, and zero if that is


def calibrated_alpha(maxima: Tensor, *, factor: float, floor: float) -> Tensor:
    """clip(factor * max rho, floor, 1), the product rounded up to a sixteenth of its power of two: float64.

    The rounding (6.25% at most) makes equal alphas of maxima that differ in their last bits only, as those of different
    parallel layouts do. 1 where nothing but zeros was seen: no observation is no knowledge.
    """
    mantissa, exponent = torch.frexp(factor * maxima.to(torch.float64))
    rounded_up = torch.ldexp((mantissa * 2 * _STEPS_PER_OCTAVE).ceil() / (2 * _STEPS_PER_OCTAVE), exponent)
    return rounded_up.clamp(floor, 1.0).where(maxima > 0, torch.ones_like(rounded_up))


def raised_alpha(alpha: Tensor, saturated: Tensor) -> Tensor:
    """alpha doubled, to 1 at most, where `saturated` (bool) is True."""
    return (RAISE * alpha).clamp_max(1.0).where(saturated, alpha)
