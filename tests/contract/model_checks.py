"""A GPT whose attention runs in Transformer Engine's Python on scales from its weights; after `te_stub.install`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnMaskType

from contract.attention_checks import LAYER, Scaler, config, gradient, raises
from megatron_geoscale.attention.spec import attach_scaling, use_fp8_attention
from megatron_geoscale.attention.transformer_engine import TransformerEngineAttention
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.engine import GeoScaleEngine
from megatron_geoscale.scaling.formats import sqnr_db
from megatron_geoscale.scaling.kernel_slots import KernelSlots
from megatron_geoscale.scaling.slots import SLOTS
from megatron_geoscale.scaling.table import ScaleTable
from megatron_geoscale.training.norm import use_torch_norm

LENGTH, VOCABULARY = 64, 96


def gpt(geoscale: GeoScaleConfig | None, **changes: Any) -> GPTModel:
    """None: Transformer Engine's own attention."""
    torch.manual_seed(0)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    fields = config(add_bias_linear=False, normalization="RMSNorm", attention_softmax_in_fp32=True,
                    gradient_accumulation_fusion=False, masked_softmax_fusion=False, **changes)
    spec = use_torch_norm(
        get_gpt_decoder_block_spec(fields, use_transformer_engine=False, normalization="RMSNorm")
    )
    if geoscale is not None:
        use_fp8_attention(spec, geoscale)
    else:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = TEDotProductAttention
    model = GPTModel(config=fields, transformer_layer_spec=spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH,
                     position_embedding_type="rope")
    return model.bfloat16()


def step(model: GPTModel, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    loss = model(tokens, torch.arange(LENGTH)[None].expand(2, -1), None, labels=tokens).mean()
    loss.backward()
    return loss.detach()


def trained(attention: str, steps: int = 2, **changes: Any) -> tuple[GPTModel, GeoScaleEngine, list[float]]:
    """The model after `steps` forward and backward passes on a refreshed table, with its engine and losses."""
    geoscale = GeoScaleConfig(attention=attention, **changes)
    model = gpt(geoscale)
    engine = attach_scaling([model], geoscale)
    assert isinstance(engine, GeoScaleEngine)
    losses = []
    for seed in range(steps):
        engine.refresh()
        engine.begin_step()
        losses.append(float(step(model, seed)))
        engine.end_step()
    return model, engine, losses


def check_the_model_computes_what_the_emulation_computes() -> None:
    kernel, kernel_engine, kernel_losses = trained("te")
    emulated, emulated_engine, emulated_losses = trained("emulated")
    assert kernel_engine.digest() == emulated_engine.digest()
    assert all(abs(a - b) < 2e-3 for a, b in zip(kernel_losses, emulated_losses, strict=True))
    expected = dict(emulated.named_parameters())
    for name, parameter in kernel.named_parameters():
        assert sqnr_db(expected[name].grad, parameter.grad) > 20, name
    shares, reference = kernel_engine.gauge.overrange, emulated_engine.gauge.overrange
    assert float(shares.max()) <= 1.0 and int(kernel_engine.gauge.saturated.sum()) == 0
    for slot in ("qkv", "s", "o", "do", "dp", "dqkv"):
        column = SLOTS.index(slot)
        assert torch.allclose(shares[:, column], reference[:, column], rtol=0.15), slot


def check_every_row_has_its_own_scales_and_amax() -> None:
    model, engine, _ = trained("te")
    layers = [layer.core_attention for layer in engine.layers]
    assert all(isinstance(layer, TransformerEngineAttention) for layer in layers) and engine.kernels is not None
    for row, core in enumerate(layers):
        quantizer = core.quantizers["scaling_fwd"]
        table = engine.table.scales[row]
        assert {float(q.scale) for q in quantizer} - {1.0} == {float(table[SLOTS.index(s)]) for s in ("qkv", "s", "o")}
    with torch.no_grad():
        model.decoder.layers[1].self_attention.linear_qkv.weight.mul_(2.0)
    before = engine.table.scales.clone()
    engine.refresh()
    assert torch.allclose(engine.table.scales[1, 0] * 2.0, before[1, 0], rtol=1e-3)
    assert torch.equal(engine.table.scales[0], before[0])


def check_calibration_sees_the_kernels() -> None:
    _, engine, _ = trained("te", steps=3, recipe="calibrated", burn_in_steps=2)
    assert engine.calibrator is not None and not engine.calibrator.burning_in
    assert float(engine.calibrator.alpha_of(0)["qkv"]) < 1.0
    assert int(engine.gauge.saturated.sum()) == 0


def check_the_delayed_backward_pass() -> None:
    _, engine, _ = trained("te", backward="delayed")
    assert engine.history is not None
    assert (engine.history.scales[:, SLOTS.index("do") :] > 1.0).all()


def check_keys_of_checkpoints_are_those_without_us() -> None:
    model, _, _ = trained("te")
    reference = gpt(None)
    assert list(model.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(reference.state_dict(), strict=True)
    metadata = {"dp_cp_group": dist.group.WORLD}
    ours, stock = (m.sharded_state_dict(prefix="", metadata=metadata) for m in (model, reference))
    assert list(ours) == list(stock) and not any("core_attention" in name for name in ours)


def check_what_would_not_run_in_fp8_is_refused_when_scales_are_attached() -> None:
    geoscale = GeoScaleConfig(attention="te")
    for change, text in (
        ({"kv_channels": 64}, "--kv-channels 64: on sm90 FP8 attention trains with 128 channels a head only"),
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1"),
    ):
        raises(ValueError, f"attention layer 1 would not run in FP8: {text}",
               lambda change=change: attach_scaling([gpt(geoscale, **change)], geoscale))
    for change, text in (
        ({"recipe": "current"}, "--geoscale-recipe current"),
        ({"logits_dtype": "fp8"}, "--geoscale-logits-dtype fp8"),
    ):
        raises(ValueError, f"{text} is not for --geoscale-attention te",
               lambda change=change: gpt(GeoScaleConfig(attention="te", **change)))


def check_stock_attention_keeps_its_scales_under_the_delayed_recipe() -> None:
    geoscale = GeoScaleConfig(attention="te", recipe="delayed")
    spec = get_gpt_decoder_block_spec(config(), use_transformer_engine=True)
    use_fp8_attention(spec, geoscale)
    assert spec.layer_specs[0].submodules.self_attention.submodules.core_attention is TEDotProductAttention
    assert attach_scaling([], geoscale) is None


def check_ranks_of_a_context_parallel_group_share_the_backward_scales(rank: int = 0) -> None:
    """On two ranks: they exchange gradients as FP8 numbers, so the larger gradient decides for both."""
    group = dist.group.WORLD
    for kind, divisor in (("p2p", 1.0), ("a2a", float(dist.get_world_size(group)))):
        slots = KernelSlots(ScaleTable(3, torch.device("cpu")), [])
        attention = TransformerEngineAttention(config(), LAYER, AttnMaskType.causal, "self")
        attention.scaler = Scaler()
        attention.take_over(slots)
        attention.config = config(context_parallel_size=2)
        attention.cp_group, attention.cp_comm_type = group, kind
        attention._before_backward(128, LENGTH, None, gradient(size=1e-3 * 4.0**rank))
        largest = gradient(size=1e-3 * 4.0 ** (dist.get_world_size(group) - 1))
        expected = Scaler().backward_scales(largest, num_keys=LENGTH)
        expected[2] /= divisor
        assert torch.equal(slots.backward_scales[LAYER - 1], expected)
        assert attention.scaler.asked[0][1] == LENGTH * dist.get_world_size(group)
