"""What must hold of our attention inside Transformer Engine's own Python.

Each function named `check_*` is one test of `test_te_attention.py`, run for every version that `te_stub` installs, and
one of `tests/gpu`, where a real Transformer Engine computes. They fail by assertion.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformer_engine.pytorch as te
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import TEDotProductAttention, te_checkpoint
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from transformer_engine.common.recipe import DelayedScaling, Format
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_geoscale.attention.te_contract import attention_quantizers
from megatron_geoscale.attention.transformer_engine import BACKWARD_SWITCH, RECIPE, TransformerEngineAttention
from megatron_geoscale.scaling.amax_history import AmaxHistory
from megatron_geoscale.scaling.formats import sqnr_db
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.kernel_slots import KernelSlots
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, FORWARD_SLOTS, SLOTS
from megatron_geoscale.scaling.table import ScaleTable

HEADS, GROUPS, WIDTH, LENGTH, BATCH = 4, 2, 128, 64, 2
LAYER = 2  # of three: a row that is neither the first nor the only one
SCALES = {"qkv": 50.0, "s": 448.0, "o": 100.0}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKWARD = torch.tensor([2.0**20, 2.0**22, 2.0**19], device=DEVICE)


class Scaler:
    """Backward scales that tell one pass from another: BACKWARD times a power of two made of dO's amax."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.Tensor, int, torch.Tensor | None]] = []

    def backward_scales(
        self, do: torch.Tensor, *, num_keys: int, amax_qkv: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.asked.append((do.clone(), num_keys, amax_qkv))
        return BACKWARD * 2.0 ** -torch.round(torch.log2(do.abs().amax().float() / 1e-3))


def config(**changes: Any) -> TransformerConfig:
    fields: dict[str, Any] = {
        "num_layers": 3, "hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS, "num_query_groups": GROUPS,
        "kv_channels": WIDTH, "bf16": True, "params_dtype": torch.bfloat16, "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    return TransformerConfig(**(fields | changes))


def stock() -> TEDotProductAttention:
    return TEDotProductAttention(config(), LAYER, AttnMaskType.causal, "self").to(DEVICE)


def ours(backward: str = "bound") -> tuple[TransformerEngineAttention, ScaleTable, KernelSlots, SlotGauge]:
    """Our attention on a table that holds SCALES in its row."""
    table, gauge = ScaleTable(3, DEVICE), SlotGauge(3, DEVICE)
    history = AmaxHistory(3, device=DEVICE) if backward == "delayed" else None
    slots = KernelSlots(table, [gauge], history=history)
    attention = TransformerEngineAttention(config(), LAYER, AttnMaskType.causal, "self").to(DEVICE)
    attention.scaler = Scaler()
    attention.take_over(slots, backward=backward)
    set_scales(table, SCALES)
    return attention, table, slots, gauge


def set_scales(table: ScaleTable, scales: dict[str, float]) -> None:
    row = torch.zeros_like(table.scales)
    row[LAYER - 1] = torch.tensor([scales.get(slot, 0.0) for slot in SLOTS])
    table.swap(row, table.bounds)


def inputs(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(LENGTH, BATCH, heads, WIDTH, generator=generator).bfloat16().to(DEVICE).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def gradient(seed: int = 0, size: float = 1e-3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 100)
    return (torch.rand(LENGTH, BATCH, HEADS * WIDTH, generator=generator) * size).bfloat16().to(DEVICE)


def run(attention: Any, qkv: list[torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = attention(*qkv, None, AttnMaskType.causal)
    return out


def grads(qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    found = [tensor.grad.clone() for tensor in qkv]  # type: ignore[union-attr]
    for tensor in qkv:
        tensor.grad = None
    return found


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Gradients: bit by bit, but for the order in which a GPU's kernel adds them up."""
    if DEVICE.type == "cpu":
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    return all(sqnr_db(a, b) > 40.0 for a, b in zip(left, right, strict=True))


def delayed() -> DelayedScaling:
    """What Megatron puts round a layer under --fp8-recipe delayed, with a short history."""
    return DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=4, amax_compute_algo="max", fp8_dpa=True)


def buffers() -> dict[str, list[torch.Tensor]]:
    """TE's global amax buffers."""
    state = getattr(FP8GlobalStateManager, "quantization_state", FP8GlobalStateManager)
    found: dict[str, list[torch.Tensor]] = state.global_amax_buffer
    return found


def scale_of(attention: Any, slot: str) -> float:
    return float(attention_quantizers(attention)[slot].scale)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, values):
        yield


def check_it_is_bit_by_bit_stock_attention_with_the_same_scales() -> None:
    attention, _, _, _ = ours()
    reference = stock()
    with te.autocast(enabled=True, recipe=RECIPE):
        reference.init_fp8_metadata(num_gemms=3)
    for slot, scale in {**SCALES, **dict(zip(BACKWARD_SLOTS, BACKWARD.tolist(), strict=True))}.items():
        attention_quantizers(reference)[slot].scale.fill_(scale)
    ours_qkv, stock_qkv = inputs(), inputs()
    out = run(attention, ours_qkv)
    with te.autocast(enabled=False), te.autocast(enabled=True, recipe=RECIPE):
        expected = run(reference, stock_qkv)
    assert torch.equal(out, expected) and out.shape == (LENGTH, BATCH, HEADS * WIDTH)
    out.backward(gradient())
    expected.backward(gradient())
    assert same(grads(ours_qkv), grads(stock_qkv))


def check_no_entry_in_the_global_buffers_and_scales_stay_through_autocast_exits() -> None:
    attention, _, _, _ = ours()
    reference, before = stock(), sum(map(len, buffers().values()))
    for microbatch in range(3):
        with te.autocast(enabled=True, recipe=delayed()):
            total = run(attention, inputs(microbatch)) + run(reference, inputs(microbatch))
        total.backward(gradient(microbatch))
    assert sum(map(len, buffers().values())) == before + 2, "the stock module's two entries, and no other"
    assert {slot: scale_of(attention, slot) for slot in SCALES} == SCALES
    assert scale_of(reference, "qkv") not in (1.0, SCALES["qkv"]), "delayed scaling ran, so the test can fail"


def check_leaving_the_nested_autocast_updates_no_other_module() -> None:
    attention, _, _, _ = ours()
    reference = stock()
    with te.autocast(enabled=False), te.autocast(enabled=True, recipe=delayed()):
        run(reference, inputs())
    before = scale_of(reference, "qkv")
    run(attention, inputs())  # outside every autocast: ours is the outermost that is enabled
    assert scale_of(reference, "qkv") == before
    assert not FP8GlobalStateManager.is_fp8_enabled()
    with te.autocast(enabled=True, recipe=delayed()):
        outer = FP8GlobalStateManager.get_autocast_state()
        run(attention, inputs())
        assert FP8GlobalStateManager.get_autocast_state() == outer
    assert scale_of(reference, "qkv") != before, "leaving the outermost autocast does update, so the test can fail"


def check_every_recipe_may_be_round_it() -> None:
    from transformer_engine.common import recipe as recipes

    expected = run(ours()[0], inputs())
    for name in ("Float8CurrentScaling", "MXFP8BlockScaling", "Float8BlockScaling"):
        attention = ours()[0]
        # Only attention runs inside, so the machine need not have the recipe's kernels.
        available = {f"is_{kind}_available": lambda *a, **k: (True, "") for kind in ("mxfp8", "fp8_block_scaling")}
        with mock.patch.multiple(FP8GlobalStateManager, **available), \
                mock.patch("transformer_engine.pytorch.quantization.check_recipe_support"), \
                te.autocast(enabled=True, recipe=getattr(recipes, name)()):
            assert torch.equal(run(attention, inputs()), expected), name
        assert {slot: scale_of(attention, slot) for slot in SCALES} == SCALES, name


def check_a_refresh_reaches_the_kernels_without_host_code_and_at_the_same_addresses() -> None:
    attention, table, _, _ = ours()
    run(attention, inputs())
    addresses = {slot: q.scale.data_ptr() for slot, q in attention_quantizers(attention).items()}
    kept = attention_quantizers(attention)
    changed = {"qkv": 7.0, "s": 400.0, "o": 9.0}
    set_scales(table, changed)  # as a captured graph would see it: nothing of the module runs
    assert {slot: float(kept[slot].scale) for slot in changed} == changed
    out = run(attention, inputs())
    assert {slot: q.scale.data_ptr() for slot, q in attention_quantizers(attention).items()} == addresses
    table_memory = range(table.scales.data_ptr(), table.scales.data_ptr() + table.scales.numel() * 4)
    assert all(addresses[slot] in table_memory for slot in SCALES)
    assert not torch.equal(out, run(ours()[0], inputs())), "other scales round otherwise"


def check_each_backward_pass_has_its_own_scales() -> None:
    """1F1B order: two forward passes, then their backward passes, the second with a gradient 8 times as large."""
    attention, _, slots, _ = ours()
    first, second = inputs(1), [4.0 * x.detach() for x in inputs(2)]
    second = [x.requires_grad_() for x in second]
    outs = [run(attention, first), run(attention, second)]
    outs[0].backward(gradient(1))
    one = slots.backward_scales[LAYER - 1].clone()
    outs[1].backward(gradient(2, size=8e-3))
    assert torch.equal(one, 8.0 * slots.backward_scales[LAYER - 1]) and torch.equal(one, BACKWARD)
    asked = attention.scaler.asked
    assert [tuple(do.shape) for do, _, _ in asked] == [(LENGTH, BATCH, HEADS, WIDTH)] * 2
    assert torch.equal(asked[0][0].flatten(2), gradient(1)) and asked[0][1] == LENGTH
    for (_, _, amax), qkv in zip(asked, (first, second), strict=True):
        assert float(amax) == max(float(x.abs().amax()) for x in qkv)
    assert slots.scale(LAYER - 1, "dp").data_ptr() == attention_quantizers(attention)["dp"].scale.data_ptr()


def check_no_gradient_no_hook() -> None:
    attention, _, _, _ = ours()
    with torch.no_grad():
        run(attention, inputs())
    assert run(attention, [x.detach() for x in inputs()]).grad_fn is None
    assert attention.scaler.asked == []


def check_recompute_casts_the_second_time_as_the_first() -> None:
    attention, _, slots, _ = ours()
    qkv = inputs()
    run(attention, qkv).backward(gradient())
    expected = grads(qkv)
    amax = slots.amax.clone()
    for checkpoint in (
        lambda call: tensor_parallel.checkpoint(call, False, *qkv),
        lambda call: te_checkpoint(call, False, tensor_parallel.random.get_cuda_rng_tracker, None, *qkv),
    ):
        for recipe in (None, delayed()):
            with te.autocast(enabled=recipe is not None, recipe=recipe):
                out = checkpoint(lambda *args: run(attention, list(args)))
            out.backward(gradient())
            assert same(grads(qkv), expected)
            assert torch.equal(slots.amax, amax)
    assert {slot: scale_of(attention, slot) for slot in SCALES} == SCALES


def check_checkpoints_with_and_without_our_attention_load_into_each_other() -> None:
    attention, _, _, _ = ours()
    reference = stock()
    for _ in range(2):
        run(attention, inputs()).backward(gradient())
        with te.autocast(enabled=True, recipe=delayed()):
            run(reference, inputs()).backward(gradient())
    with mock.patch("torch.cuda.synchronize"):
        of_stock = reference.state_dict()
    of_ours = attention.state_dict()
    assert list(of_ours) == list(of_stock)
    assert of_ours["_extra_state"].numel() == 0 < of_stock["_extra_state"].numel()
    file = io.BytesIO()
    torch.save(of_ours, file)
    file.seek(0)
    before = scale_of(reference, "qkv")
    reference.load_state_dict(torch.load(file), strict=True)
    assert scale_of(reference, "qkv") == before
    attention.load_state_dict(of_stock, strict=True)
    assert {slot: scale_of(attention, slot) for slot in SCALES} == SCALES
    metadata = {"dp_cp_group": None}
    assert attention.sharded_state_dict(prefix="a.", metadata=metadata) == {}
    assert reference.sharded_state_dict(prefix="a.", metadata=metadata) == {}
    assert pickle.dumps(of_ours["_extra_state"])


def check_graph_capture_may_give_it_the_linear_layers_recipe_and_history_length() -> None:
    """As TE's graph.py and megatron-core's cuda_graphs.py do with every module of TE that they find."""
    attention, _, _, _ = ours()
    expected, before = run(attention, inputs()), sum(map(len, buffers().values()))
    attention.adjust_amax_history_length(1024)
    attention.fp8_meta["recipe"] = delayed()
    FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(attention.fp8_meta)
    saved = attention.get_fp8_meta_tensors()
    with te.autocast(enabled=True, recipe=delayed()):
        assert torch.equal(run(attention, inputs()), expected)
    attention.reset_fp8_meta_tensors(saved)
    assert {slot: scale_of(attention, slot) for slot in SCALES} == SCALES
    assert sum(map(len, buffers().values())) == before


def check_the_gauge_shows_what_the_kernels_saw() -> None:
    attention, table, slots, gauge = ours()
    qkv = inputs()
    run(attention, qkv).backward(gradient(size=1e-3))
    run(attention, inputs(3)).backward(gradient(size=4e-3))
    slots.collect()
    row = dict(zip(SLOTS, gauge.overrange[LAYER - 1].tolist(), strict=True))
    amax = max(float(x.abs().amax()) for x in [*qkv, *inputs(3)])
    assert abs(row["qkv"] - amax * 50.0 / 448.0) < 1e-6 and row["s"] == 1.0 and row["logits"] == 0.0
    # The same share of the range in both passes, for their scales differ by as much as their gradients.
    assert abs(row["do"] / (float(gradient().abs().amax()) * 2.0**20 / 57344.0) - 1.0) < 0.02
    assert row["dp"] > 0 and row["dqkv"] > 0 and int(gauge.saturated.sum()) == 0
    assert not gauge.amax[0].any() and not slots.amax.any()

    set_scales(table, {"qkv": 5000.0, "s": 448.0, "o": 100.0})
    run(attention, qkv)
    slots.collect()
    assert gauge.saturated[LAYER - 1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert int(gauge.flushed.sum()) == 0


def check_the_backward_pass_in_bf16() -> None:
    with environment():
        os.environ.pop(BACKWARD_SWITCH, None)
        attention, _, slots, _ = ours("bf16")
        assert os.environ[BACKWARD_SWITCH] == "0"
        qkv = inputs()
        run(attention, qkv).backward(gradient())
        found = grads(qkv)
        slots.collect()
    assert attention.scaler.asked == []
    with environment():
        attention, _, _, _ = ours()
        run(attention, qkv).backward(gradient())
    cast = grads(qkv)
    for exact, rounded in zip(found, cast, strict=True):
        error = (exact - rounded).float().norm() / exact.float().norm()
        assert 0.005 < error < 0.2
    for value, backward in (("1", "bf16"), ("0", "bound")):
        with environment(**{BACKWARD_SWITCH: value}):
            raises(ValueError, f"{BACKWARD_SWITCH}={value}", lambda b=backward: ours(b))


def check_delayed_scales_of_the_backward_pass_come_from_the_step_before() -> None:
    attention, _, slots, _ = ours("delayed")
    run(attention, inputs()).backward(gradient())
    assert slots.backward_scales[LAYER - 1].tolist() == [1.0, 1.0, 1.0] and attention.scaler.asked == []
    amax = slots.amax[LAYER - 1, len(FORWARD_SLOTS) :].clone()
    assert (amax > 0).all()
    slots.collect()
    slots._history.end_step()
    assert torch.equal(slots.backward_scales[LAYER - 1], torch.full_like(amax, 57344.0) / amax)
    assert scale_of(attention, "do") == float(slots.backward_scales[LAYER - 1, 0])


def check_a_fallback_is_noticed_after_the_first_step() -> None:
    attention, _, slots, _ = ours()
    slots.expect(LAYER - 1)  # as if another backend had computed it
    raises(RuntimeError, f"attention of layer {LAYER} did not run", slots.collect)
    attention, _, slots, _ = ours()
    with environment(**{BACKWARD_SWITCH: "0"}):  # set behind our back
        run(attention, inputs()).backward(gradient())
    raises(RuntimeError, f"backward pass of attention of layer {LAYER} did not run", slots.collect)
    attention, _, slots, _ = ours()
    run(attention, inputs()).backward(gradient())
    slots.collect()
    slots.collect()


def check_state_that_transformer_engine_replaces_is_noticed() -> None:
    attention, _, _, _ = ours()
    attention.fp8_meta_tensors_initialized = False
    attention.fp8_initialized = False
    raises(RuntimeError, f"has replaced the FP8 state of attention layer {LAYER}", lambda: run(attention, inputs()))


def check_what_has_no_fp8_kernel_is_refused() -> None:
    attention, _, _, _ = ours()
    for name, text in (("packed_seq_params", "packed sequences"), ("attention_bias", "an attention bias")):
        raises(ValueError, f"{text}", lambda name=name: attention(*inputs(), None, AttnMaskType.causal, **{name: 1}))


def check_a_forward_pass_without_scales_is_refused() -> None:
    attention = TransformerEngineAttention(config(), LAYER, AttnMaskType.causal, "self")
    raises(RuntimeError, f"attention layer {LAYER} ran before scales were attached", lambda: run(attention, inputs()))


def raises(kind: type[Exception], text: str, call: Any) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), error
        return
    raise AssertionError(f"no {kind.__name__} was raised")
