"""Delayed scaling on sequences computed by hand from TE's rules (THEORY 7), and current scaling."""

import math

import pytest
import torch

from megatron_geoscale.attention.baselines import CurrentScaling, DelayedScaling
from megatron_geoscale.scaling.formats import E4M3, E5M2, SLOT_FORMATS, cast
from megatron_geoscale.scaling.slots import SLOTS

FLOAT32_MAX = torch.finfo(torch.float32).max


def report(scaler, slot, amax):
    zero = torch.zeros((), dtype=torch.int64)
    scaler.observe(slot, torch.tensor(amax, dtype=torch.float32), zero, zero)


def run(owner, amaxes, slot="qkv"):
    """Scale of `slot` in layer 0 before the first step and after each step that observed the given amax."""
    layer = owner.layer(0)
    scales = [layer.scale(slot).item()]
    for amax in amaxes:
        report(layer, slot, amax)
        owner.end_step()
        scales.append(layer.scale(slot).item())
    return scales


def test_first_steps():
    assert run(DelayedScaling(1), [4.0, 2.0, 7.0]) == [1.0, 112.0, 112.0, 64.0]
    assert run(DelayedScaling(1), [4.0, 8.0], slot="do") == [1.0, 57344 / 4, 57344 / 8]


def test_step_uses_the_past_only_and_every_microbatch_counts():
    owner = DelayedScaling(1)
    layer = owner.layer(0)
    for amax in (3.0, 7.0, 5.0):
        report(layer, "qkv", amax)
        assert layer.scale("qkv", torch.tensor([1e6])).item() == 1.0
    owner.end_step()
    assert layer.scale("qkv").item() == 64.0


def test_history_rolls_over():
    # Window of three steps: 8 rules for its own step and the two that follow.
    assert run(DelayedScaling(1, history_length=3), [8.0, 1.0, 2.0, 4.0, 1.0, 1.0, 1.0]) == [
        1.0, 56.0, 56.0, 56.0, 112.0, 112.0, 112.0, 448.0,
    ]  # fmt: skip
    assert run(DelayedScaling(1, history_length=1), [8.0, 1.0, 2.0]) == [1.0, 56.0, 448.0, 224.0]


def test_history_has_te_row_order():
    owner = DelayedScaling(1, history_length=4)
    run(owner, [1.0, 2.0, 3.0])
    assert owner.amax_history[:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    run(owner, [4.0])
    assert owner.amax_history[:, 0, 0].tolist() == [0.0, 2.0, 3.0, 4.0]


def test_most_recent():
    assert run(DelayedScaling(1, algo="most_recent"), [8.0, 1.0, 0.0, 2.0]) == [1.0, 56.0, 448.0, 448.0, 224.0]


def test_zero_amax_keeps_the_scale():
    assert run(DelayedScaling(1), [0.0, 0.0, 4.0, 0.0]) == [1.0, 1.0, 1.0, 112.0, 112.0]
    assert run(DelayedScaling(1, history_length=1), [4.0, 0.0, 2.0]) == [1.0, 112.0, 112.0, 224.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_amax_keeps_the_scale(bad):
    # Under `max` until it has left the history, under `most_recent` for its own step.
    assert run(DelayedScaling(1, history_length=2), [4.0, bad, 2.0, 2.0]) == [1.0, 112.0, 112.0, 112.0, 224.0]
    assert run(DelayedScaling(1, algo="most_recent"), [4.0, bad, 2.0]) == [1.0, 112.0, 112.0, 224.0]


def test_margin_is_a_power_of_two():
    assert run(DelayedScaling(1, margin=3), [4.0, 7.0]) == [1.0, 14.0, 8.0]


def test_tiny_amax_gives_the_largest_float32():
    assert run(DelayedScaling(1), [1e-40])[-1] == FLOAT32_MAX


def test_layers_and_slots_are_apart():
    owner = DelayedScaling(2)
    report(owner.layer(1), "o", 4.0)
    owner.end_step()
    expected = torch.ones(2, len(SLOTS))
    expected[1, SLOTS.index("o")] = 112.0
    assert torch.equal(owner.scales, expected)
    assert owner.gauge.amax[1, SLOTS.index("o")].item() == 4.0


def test_overrange_belongs_to_the_scale_of_the_cast():
    owner = DelayedScaling(1)
    run(owner, [1.0, 10.0])
    assert owner.gauge.overrange[0, 0].item() == 10.0  # cast under 448 / 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="history_length"):
        DelayedScaling(1, history_length=0)
    with pytest.raises(ValueError, match="algo"):
        DelayedScaling(1, algo="mean")


def test_reduction_over_the_group(tmp_path):
    """A group of one rank reduces to itself; that the group is used at all shows in the count of collectives."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    calls = []
    original = dist.all_reduce

    def counted(tensor, op, group):
        calls.append((tensor.numel(), op))
        return original(tensor, op=op, group=group)

    try:
        dist.all_reduce = counted
        assert run(DelayedScaling(3, amax_group=dist.group.WORLD), [4.0, 2.0]) == [1.0, 112.0, 112.0]
    finally:
        dist.all_reduce = original
        dist.destroy_process_group()
    assert calls == [(3 * len(SLOTS), dist.ReduceOp.MAX)] * 2


@pytest.mark.parametrize("slot", SLOTS)
def test_current_scaling_fills_the_range_of_each_tensor(slot):
    owner = CurrentScaling(2)
    layer, fmt = owner.layer(1), SLOT_FORMATS[slot]
    generator = torch.Generator().manual_seed(0)
    for magnitude in (1e-3, 1e4):
        tensors = [magnitude * torch.randn(500, generator=generator), magnitude * torch.randn(70, generator=generator)]
        scale = layer.scale(slot, *tensors)
        amax = torch.cat(tensors).abs().max()
        assert scale.item() == pytest.approx(fmt.max / amax.item(), rel=1e-6)
        results = [cast(tensor, scale, fmt) for tensor in tensors]
        assert sum(result.saturated.item() for result in results) == 0
        layer.observe(slot, amax, results[0].saturated, results[0].flushed)
    assert owner.gauge.overrange[1, SLOTS.index(slot)].item() == pytest.approx(1.0, rel=1e-6)
    assert owner.gauge.amax[1, SLOTS.index(slot)].item() == amax.item()
    owner.end_step()
    assert owner.scales is None


def test_formats_of_the_two_directions():
    assert run(DelayedScaling(1), [1.0], slot="s")[-1] == E4M3.max
    assert run(DelayedScaling(1), [1.0], slot="dp")[-1] == E5M2.max
