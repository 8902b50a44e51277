"""SlotGauge: maxima, counts, non-finite values, and that nothing leaves the device."""

import math

import torch

from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.slots import SLOTS


def observe(gauge, row, slot, amax, saturated, flushed, scale, device="cpu"):
    counts = torch.tensor([saturated, flushed], device=device)
    gauge.observe(row, slot, torch.tensor(amax, device=device), *counts, torch.tensor(scale, device=device))


def test_maxima_and_sums_land_in_their_cell():
    gauge = SlotGauge(3)
    observe(gauge, 1, "do", 7.0, 4, 1, 16384.0)
    observe(gauge, 1, "do", 3.0, 2, 5, 1e6)
    observe(gauge, 2, "qkv", 2.0, 0, 1, 448.0)
    expected = {(1, SLOTS.index("do")): (7.0, 3e6 / 57344, 6, 6), (2, 0): (2.0, 2.0, 0, 1)}
    for row in range(3):
        for column in range(len(SLOTS)):
            amax, share, saturated, flushed = expected.get((row, column), (0.0, 0.0, 0, 0))
            assert gauge.amax[row, column].item() == amax
            torch.testing.assert_close(gauge.overrange[row, column].item(), share, rtol=1e-6, atol=0.0)
            assert (gauge.saturated[row, column].item(), gauge.flushed[row, column].item()) == (saturated, flushed)


def test_non_finite_amax_stays_until_reset():
    gauge = SlotGauge(1)
    observe(gauge, 0, "o", math.nan, 0, 0, 1.0)
    observe(gauge, 0, "o", 1.0, 0, 0, 1.0)
    observe(gauge, 0, "s", math.inf, 1, 0, 1.0)
    observe(gauge, 0, "s", 1.0, 0, 0, 1.0)
    o, s = SLOTS.index("o"), SLOTS.index("s")
    assert math.isnan(gauge.amax[0, o]) and math.isnan(gauge.overrange[0, o])
    assert gauge.amax[0, s].item() == gauge.overrange[0, s].item() == math.inf
    addresses = [t.data_ptr() for t in (gauge.amax, gauge.overrange, gauge.saturated, gauge.flushed)]
    gauge.reset()
    tensors = (gauge.amax, gauge.overrange, gauge.saturated, gauge.flushed)
    assert addresses == [t.data_ptr() for t in tensors]
    assert all(not t.any() for t in tensors)


def test_observe_never_reads_a_value():
    """Meta tensors have no values: reading one on the host would raise."""
    gauge = SlotGauge(1, device="meta")
    empty = torch.empty((), device="meta")
    count = torch.empty((), dtype=torch.int64, device="meta")
    gauge.observe(0, "dp", empty, count, count, empty)
    gauge.reset()
