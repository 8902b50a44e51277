"""The memory that fused kernels share with the engine, without kernels: the tests write what kernels would."""

import pytest
import torch

from megatron_geoscale.scaling.amax_history import AmaxHistory
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.kernel_slots import KernelSlots
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, SLOTS
from megatron_geoscale.scaling.table import BOUNDS, ScaleTable


def make(history=None):
    table, gauge = ScaleTable(2, torch.device("cpu")), SlotGauge(2)
    table.scales[:, :4] = torch.tensor([[2.0, 4.0, 448.0, 8.0], [1.0, 1.0, 448.0, 1.0]])
    return table, gauge, KernelSlots(table, [gauge], history=history)


def write(slots, row, **amax):
    for slot, value in amax.items():
        slots.amax_of(row, slot).fill_(value)


def test_scales_are_views_of_the_table_and_follow_a_swap():
    table, _, slots = make()
    scale = slots.scale(0, "o")
    table.swap(table.scales * 2, table.bounds)
    assert float(scale) == 16.0 and scale.data_ptr() == table.scales[0, SLOTS.index("o")].data_ptr()
    slots.set_backward_scales(1, torch.tensor([1.0, 2.0, 3.0]))
    assert [float(slots.scale(1, slot)) for slot in BACKWARD_SLOTS] == [1.0, 2.0, 3.0]


def test_an_amax_counts_under_the_scale_it_was_cast_with():
    table, gauge, slots = make()
    write(slots, 0, qkv=300.0, o=10.0)
    slots.collect()
    table.swap(table.scales / 4, table.bounds)
    write(slots, 0, qkv=100.0)
    slots.collect()
    assert gauge.overrange[0].tolist() == pytest.approx([600 / 448, 0, 0, 80 / 448, 0, 0, 0])
    assert gauge.amax[0].tolist() == [300.0, 0, 0, 10.0, 0, 0, 0]
    assert gauge.saturated.tolist() == [[1, 0, 0, 0, 0, 0, 0], [0] * 7] and not slots.amax.any()


def test_every_backward_pass_counts():
    _, gauge, slots = make()
    for scales, amax in (([8.0, 1.0, 1.0], 57344.0), ([1.0, 1.0, 1.0], 57344.0), ([2.0, 1.0, 1.0], 100.0)):
        slots.set_backward_scales(1, torch.tensor(scales))
        write(slots, 1, do=amax)
    slots.collect()
    assert gauge.overrange[1, SLOTS.index("do")] == 8.0 and int(gauge.saturated.sum()) == 1
    slots.collect()
    assert int(gauge.saturated.sum()) == 1


def test_a_nan_shows():
    _, gauge, slots = make()
    write(slots, 0, qkv=float("nan"), o=float("inf"))
    slots.collect()
    assert gauge.overrange[0, 0].isnan() and gauge.overrange[0, 3].isinf()
    assert gauge.saturated[0].tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_a_history_gets_the_largest_amax_of_the_step():
    history = AmaxHistory(2, history_length=1, algo="most_recent")
    _, _, slots = make(history)
    for amax in (2.0, 1.0):  # a log line in the middle of a step collects too
        write(slots, 0, do=amax, dqkv=amax / 2)
        slots.collect()
    history.end_step()
    assert [float(slots.scale(0, slot)) for slot in BACKWARD_SLOTS] == [57344.0 / 2.0, 1.0, 57344.0]


def test_the_trace_of_the_kernels_is_looked_for_once():
    _, _, slots = make()
    slots.expect(1)
    with pytest.raises(RuntimeError, match="attention of layer 2 did not run in Transformer Engine's fused FP8 kernel"):
        slots.collect()
    write(slots, 1, qkv=1.0, s=1.0, o=1.0)
    slots.collect()
    slots.expect(1)
    slots.collect()


def test_the_trace_of_the_backward_kernels(  # a gradient of zeros leaves none
):
    for amax, seen, raises in ((3.0, 0.0, True), (3.0, 3.0, False), (0.0, 0.0, False)):
        _, _, slots = make()
        slots.hooked_backward = True
        slots.expect(0)
        write(slots, 0, qkv=1.0, s=1.0, o=1.0)
        from megatron_geoscale.scaling.formats import E5M2, scale_from_amax

        slots.set_backward_scales(0, scale_from_amax(torch.full((3,), amax), E5M2, power_of_two=True))
        write(slots, 0, qkv=1.0, s=1.0, o=1.0, do=seen)
        if raises:
            with pytest.raises(RuntimeError, match="the backward pass of attention of layer 1 did not run"):
                slots.collect()
        else:
            slots.collect()


def test_backward_scales_are_one_graph_for_all_layers():
    """What runs compiled on a GPU; a break in the graph, or a compilation for each layer, would cost every step."""
    from megatron_geoscale.scaling import slot_scales

    geometry = AttentionGeometry(
        hidden_size=64, num_heads=4, num_groups=2, head_dim=16, softmax_scale=0.25, max_sequence_length=32,
        rotary_dim=16, rotary_interleaved=False, rotary_scale=1.0, logit_multiplier=1.0, dropout=0.0,
        unit_roundoff=2.0**-9, fp8_projection=False,
    )
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    table, do = ScaleTable(2, torch.device("cpu")), torch.randn(8, 1, 4, 16).bfloat16()
    table.scales.fill_(3.0)
    table.bounds.copy_(torch.rand(2, len(BOUNDS), dtype=torch.float64) + 0.5)
    with torch.compiler.set_stance("default"):
        compiled = torch.compile(slot_scales._backward_scales, backend=count, fullgraph=True)
        for row in range(2):
            made = compiled(do, table.bounds[row], table.scales[row], torch.tensor(4.0), geometry, 8)
            scaler = slot_scales.TableScaler(table, SlotGauge(2), row, geometry)
            assert torch.equal(made, scaler.backward_scales(do, num_keys=8, amax_qkv=torch.tensor(4.0)))
    assert len(graphs) == 1


def test_without_a_compiler_the_backward_scales_are_made_as_they_are(monkeypatch):
    from megatron_geoscale.scaling import slot_scales

    def broken(*args):
        raise RuntimeError("Cannot find a working triton installation\nand so on")

    monkeypatch.setattr(slot_scales, "_on_gpu", broken)
    monkeypatch.setattr(slot_scales, "_backward_scales", lambda *args: args)
    with pytest.warns(UserWarning, match="cannot be compiled, which makes each step slower: Cannot find a working"):
        assert slot_scales._compiled(1, 2) == (1, 2)
    assert slot_scales._compiled(3) == (3,)
