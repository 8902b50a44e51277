"""Megatron-LM's --spec with Transformer Engine's attention: scales made in the layer's forward reach TE's slots."""

import os
import sys
import types

import pytest

import te_stub


def build(**changes):
    """A GPTModel of two layers from our --spec, without head and final norm; the rest of TE has no CPU stand-in."""
    import torch
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.spec_utils import import_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {
        "num_layers": 2, "hidden_size": 256, "num_attention_heads": 2, "kv_channels": 128, "normalization": "RMSNorm",
        "add_bias_linear": False, "bf16": True, "params_dtype": torch.bfloat16, "attention_dropout": 0.0,
        "hidden_dropout": 0.0, "transformer_impl": "local", "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False, "masked_softmax_fusion": False, "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }
    spec = import_module(["megatron_geoscale.integrations.megatron_lm", "gpt_layer_spec"])
    return GPTModel(
        TransformerConfig(**(fields | changes)), spec, vocab_size=32, max_sequence_length=64,
        position_embedding_type="rope", post_process=False,
    )


def one_step(model):
    """Two microbatches of megatron-core's schedule."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(_, model):
        tokens = torch.arange(64)[None] % 32
        output = model(tokens, torch.arange(64)[None], None)
        return output, lambda out: (out.float().square().mean(), {})

    get_forward_backward_func()(forward_step_func=forward, data_iterator=None, model=model, num_microbatches=2,
                                seq_length=64, micro_batch_size=1, forward_only=False)


def used_and_true(model):
    """Scale of every forward slot as TE's quantizers hold it, and as one engine makes it from the weights."""
    from megatron_geoscale.attention.te_contract import attention_quantizers
    from megatron_geoscale.integrations.megatron_lm import config_from_environment
    from megatron_geoscale.scaling.engine import GeoScaleEngine
    from megatron_geoscale.scaling.layers import find_attention_layers
    from megatron_geoscale.scaling.slots import SLOTS

    layers = find_attention_layers([model])
    reference = GeoScaleEngine(layers, config_from_environment(), device=layers[0].device)
    reference.refresh()
    used, true = [], []
    for layer in layers:
        for slot in ("qkv", "s", "o"):
            used.append(float(attention_quantizers(layer.core_attention)[slot].scale))
            true.append(float(reference.table.scales[layer.number - 1, SLOTS.index(slot)]))
    return used, true


def check(rank):
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from megatron_geoscale.integrations.megatron_lm import report

    os.environ["GEOSCALE_ARGS"] = "--geoscale-attention te"
    args = types.SimpleNamespace(max_position_embeddings=64, position_embedding_type="rope", rotary_percent=1.0,
                                 qk_l2_norm=False)
    sys.modules["megatron.training"] = types.ModuleType("megatron.training")
    sys.modules["megatron.training"].get_args = lambda: args
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model, seen = build(), []
    for _ in range(2):
        one_step(model)
        seen.append(used_and_true(model))
        with torch.no_grad():
            for layer in model.decoder.layers:
                layer.self_attention.linear_qkv.weight.mul_(4)
    saturated = [row["saturated"] for row in report([model])]
    keys = [key for key, value in model.state_dict().items() if "core_attention" in key and value.numel()]
    refused = []
    for changes in ({"attention_dropout": 0.1}, {"kv_channels": 64}):
        try:
            one_step(build(**changes))
        except ValueError as error:
            refused.append(str(error))
    return seen, saturated, keys, refused


@pytest.mark.parametrize("version", te_stub.VERSIONS[::2])
def test_scales_reach_te(version):
    (first, second), saturated, keys, refused = te_stub.run(version, check)
    for used, true in (first, second):
        assert used == true
    assert second[0][0] == first[0][0] / 4
    assert saturated == [0, 0] and keys == []
    assert "--attention-dropout 0.1" in refused[0] and "--kv-channels 64" in refused[1]
