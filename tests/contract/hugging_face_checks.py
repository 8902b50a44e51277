"""What must hold of Transformer Engine's FP8 attention in a model of transformers; as `attention_checks`."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.integrations import fsdp
from megatron_geoscale.scaling.slots import SLOTS

LENGTH = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model(**changes):
    fields = dict(vocab_size=96, hidden_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                  head_dim=128, intermediate_size=64, max_position_embeddings=LENGTH)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(fields | changes))).to(DEVICE, torch.bfloat16)


def tokens():
    return (torch.arange(2 * LENGTH, device=DEVICE).view(2, LENGTH) * 7) % 96


def train_step(llama, scales):
    """Logits, gradients of the first layer's W_K, and the gauge's saturated values."""
    out = llama(input_ids=tokens(), labels=tokens(), use_cache=False)
    out.loss.backward()
    return out.logits.detach().float(), llama.model.layers[0].self_attn.k_proj.weight.grad.float(), scales.saturated()


def check_kernels_and_emulation_agree_on_the_models_output_and_gradients():
    found = []
    for attention in ("te", "emulated"):
        llama = model().train()
        scales = fsdp.attach(llama, GeoScaleConfig(attention=attention), optimizer=None)
        found.append((*train_step(llama, scales), scales.digest()))
        assert llama.state_dict().keys() == model().state_dict().keys()  # nothing of it is in a checkpoint
        assert (scales.gauge.amax[:, SLOTS.index("qkv")] > 0).all()
    (logits, gradient, saturated, digest), (expected, expected_gradient, none, same) = found
    assert digest == same and saturated == none == 0
    assert (logits - expected).norm() < 0.06 * expected.norm()
    assert (gradient - expected_gradient).norm() < 0.25 * expected_gradient.norm()
    assert logits.norm() > 1 and gradient.norm() > 0


def check_the_kernels_read_a_refreshed_table():
    llama = model().train()
    optimizer = torch.optim.SGD(llama.parameters(), lr=1e-2)
    scales = fsdp.attach(llama, GeoScaleConfig(attention="te"), optimizer=optimizer)
    kernel, digest = llama.model.layers[0].self_attn.geoscale.kernel, scales.digest()
    train_step(llama, scales)
    optimizer.step()
    assert scales.digest() != digest
    train_step(llama, scales)
    scale = kernel.quantizers["scaling_fwd"]
    assert any(float(quantizer.scale) == scales.table.scale(1, "qkv") for quantizer in scale if quantizer is not None)


def check_what_the_kernels_do_not_compute_is_refused():
    for options, says in (
        (dict(recipe="calibrated"), "--geoscale-recipe calibrated is not for models of transformers under"),
        (dict(logits_dtype="fp8"), "--geoscale-logits-dtype fp8 is not for models of transformers under"),
    ):
        with pytest.raises(ValueError, match=says):
            fsdp.attach(model(), GeoScaleConfig(attention="te", **options), optimizer=None)
    with pytest.raises(ValueError, match="would not run in FP8"):
        fsdp.attach(model().float(), GeoScaleConfig(attention="te"), optimizer=None)
    llama = model()
    fsdp.attach(llama, GeoScaleConfig(attention="te"), optimizer=None)
    mask = torch.ones_like(tokens())
    llama(input_ids=tokens(), attention_mask=mask, use_cache=False)
    mask[0, :5] = 0
    with pytest.raises(ValueError, match="padding, windows, packed sequences"):
        llama(input_ids=tokens(), attention_mask=mask, use_cache=False)
