"""What a config.json and a directory of safetensors are taken for, and how a wrong one is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_geoscale.checkpoints.families import Experts, read_family
from megatron_geoscale.checkpoints.safetensors_dir import INDEX, SINGLE, SafetensorsDirectory

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096, "vocab_size": 32000,
}
LLAMA_31_8B = LLAMA_2_70B | {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 131072,
    "vocab_size": 128256, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE,
}
MISTRAL_NEMO = LLAMA_31_8B | {
    "model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128, "sliding_window": None,
    "rope_theta": 1e6, "rope_scaling": None,
}
QWEN_25_7B = LLAMA_31_8B | {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rope_theta": 1e6, "rope_scaling": None, "sliding_window": 131072,
    "use_sliding_window": False,
}
QWEN3_8B = LLAMA_31_8B | {"model_type": "qwen3", "head_dim": 128, "rope_scaling": None, "tie_word_embeddings": True}
MIXTRAL = LLAMA_31_8B | {"model_type": "mixtral", "rope_theta": 1e6, "rope_scaling": None}
QWEN3_MOE = QWEN3_8B | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
                        "moe_intermediate_size": 768, "intermediate_size": 6144, "num_key_value_heads": 4}
GPT2_XL = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25,
           "n_positions": 1024, "vocab_size": 50257}


def write(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA_2_70B, dict(num_layers=80, head_dim=128, num_groups=8, max_positions=4096, qkv_bias=False,
                           output_bias=False, qk_norm=False, norm="RMSNorm", tied_embeddings=False)),
        (LLAMA_2_70B | {"attention_bias": True}, dict(qkv_bias=True, output_bias=True)),
        ({**LLAMA_2_70B, "num_key_value_heads": None}, dict(num_groups=64)),
        (LLAMA_31_8B, dict(vocab_size=128256, sliding_window=None)),
        (MISTRAL_NEMO, dict(head_dim=128, num_heads=32, hidden_size=5120, sliding_window=None)),
        (MISTRAL_NEMO | {"sliding_window": 4096}, dict(sliding_window=4096)),
        (QWEN_25_7B, dict(qkv_bias=True, output_bias=False, sliding_window=None, head_dim=128)),
        (QWEN_25_7B | {"use_sliding_window": True}, dict(sliding_window=131072)),
        (QWEN3_8B, dict(qk_norm=True, qkv_bias=False, tied_embeddings=True)),
        (MIXTRAL, dict(model_type="mixtral", num_groups=8, experts=Experts(8, 2, True), ffn_hidden_size=14336)),
        (QWEN3_MOE, dict(num_groups=4, qk_norm=True, experts=Experts(128, 8, True), ffn_hidden_size=768)),
        (QWEN3_MOE | {"num_experts": None, "num_local_experts": 16, "norm_topk_prob": False},
         dict(experts=Experts(16, 8, False))),
        (GPT2_XL, dict(head_dim=64, num_groups=25, norm="LayerNorm", rope=None, qkv_bias=True, tied_embeddings=True,
                       attention_dropout=0.1)),
    ],
    ids=lambda value: value.get("model_type", "") if isinstance(value, dict) else None,
)
def test_families(tmp_path, config, expected):
    family = read_family(write(tmp_path, config))
    assert {name: getattr(family, name) for name in expected} == expected


def test_tensor_names_and_shapes(tmp_path):
    llama = read_family(write(tmp_path, LLAMA_2_70B)).attention(80, "model.")
    assert {what: (stored.name, stored.shape) for what, stored in llama.items()} == {
        "gain": ("model.layers.79.input_layernorm.weight", (8192,)),
        "q": ("model.layers.79.self_attn.q_proj.weight", (8192, 8192)),
        "k": ("model.layers.79.self_attn.k_proj.weight", (1024, 8192)),
        "v": ("model.layers.79.self_attn.v_proj.weight", (1024, 8192)),
    }
    qwen2 = read_family(write(tmp_path, QWEN_25_7B)).attention(1)
    assert (qwen2["k_bias"].name, qwen2["k_bias"].shape) == ("layers.0.self_attn.k_proj.bias", (512,))
    qwen3 = read_family(write(tmp_path, QWEN3_8B)).attention(1)
    assert (qwen3["q_norm"].name, qwen3["q_norm"].shape) == ("layers.0.self_attn.q_norm.weight", (128,))
    gpt2 = read_family(write(tmp_path, GPT2_XL)).attention(1, "transformer.")
    assert (gpt2["qkv"].name, gpt2["qkv"].shape) == ("transformer.h.0.attn.c_attn.weight", (1600, 4800))
    assert gpt2["shift"].name == "transformer.h.0.ln_1.bias" and gpt2["qkv_bias"].shape == (4800,)


def test_prefix_is_the_checkpoints(tmp_path):
    llama, gpt2 = (read_family(write(tmp_path, config)) for config in (LLAMA_2_70B, GPT2_XL))
    assert llama.prefix(["model.layers.0.input_layernorm.weight"]) == "model."
    assert llama.prefix(["layers.0.input_layernorm.weight"]) == ""
    assert gpt2.prefix(["transformer.h.0.ln_1.weight"]) == "transformer."
    assert gpt2.prefix(["h.0.ln_1.weight"]) == ""


def test_rope_settings_of_both_formats(tmp_path):
    before = read_family(write(tmp_path, LLAMA_31_8B)).rope
    renamed = {key: value for key, value in LLAMA_31_8B.items() if not key.startswith("rope")}
    after = read_family(write(tmp_path, renamed | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}})).rope
    assert (before.kind, before.theta, before.scale) == (after.kind, after.theta, after.scale) == ("llama3", 5e5, 1.0)
    assert before.settings["factor"] == 8.0
    oldest = read_family(write(tmp_path, LLAMA_2_70B | {"rope_scaling": {"type": "linear", "factor": 2.0}})).rope
    assert (oldest.kind, oldest.theta, oldest.scale) == ("linear", 1e4, 1.0)


def test_gpt2_softmax_scales(tmp_path):
    assert read_family(write(tmp_path, GPT2_XL)).softmax_scale(3) == 0.125
    assert read_family(write(tmp_path, GPT2_XL | {"scale_attn_weights": False})).softmax_scale(3) == 1.0
    assert read_family(write(tmp_path, GPT2_XL | {"scale_attn_by_inverse_layer_idx": True})).softmax_scale(4) == 0.03125


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object"),
        (b"\xff\xfe".decode("latin-1") * 3, "is not JSON"),
        ({}, "no architecture (model_type None)"),
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "GemmaForCausalLM (model_type gemma)"),
        ({**LLAMA_2_70B, "num_hidden_layers": None}, "no num_hidden_layers"),
        (LLAMA_2_70B | {"hidden_size": "8192"}, "hidden_size must be a positive integer"),
        (LLAMA_2_70B | {"num_attention_heads": 0}, "num_attention_heads must be"),
        (LLAMA_2_70B | {"num_attention_heads": 7}, "not divisible by num_attention_heads 7"),
        (LLAMA_2_70B | {"num_key_value_heads": 7}, "cannot share 7"),
        (LLAMA_2_70B | {"head_dim": 127}, "RoPE rotates pairs"),
        (LLAMA_2_70B | {"attention_dropout": 1}, "attention_dropout must lie in [0, 1)"),
        (LLAMA_2_70B | {"attention_bias": "no"}, "attention_bias must be true or false"),
        (LLAMA_2_70B | {"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        (LLAMA_2_70B | {"rope_scaling": "yarn"}, "rope_parameters must be an object"),
        (LLAMA_2_70B | {"rope_scaling": {"rope_type": "yarn", "factor": -2.0}}, "factor must be a positive number"),
        (LLAMA_2_70B | {"rope_scaling": {"rope_type": "yarn"}}, "original_max_position_embeddings must be"),
        (LLAMA_2_70B | {"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        (LLAMA_2_70B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA_2_70B | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (GPT2_XL | {"add_cross_attention": True}, "add_cross_attention"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the number of experts, 8"),
        (MIXTRAL | {"num_local_experts": 0}, "num_local_experts must be a positive integer"),
        (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step are not supported"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, "mlp_only_layers and"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_configs(tmp_path, config, word):
    path = write(tmp_path, config)
    with pytest.raises(ValueError) as error:
        read_family(path)
    assert word in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def sharded(tmp_path):
    """Two shards, each of one tensor, and their index."""
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_and_one_file_read_alike(sharded, tmp_path):
    shards = SafetensorsDirectory(sharded)
    assert shards.names() == ["a", "b"] and "c" not in shards and shards.shape("a") == (2, 3)
    assert torch.equal(shards.tensor("a"), torch.arange(6.0).view(2, 3)) and shards.tensor("b").dtype == torch.bfloat16
    save_file({"a": torch.zeros(1)}, tmp_path / SINGLE)  # as in transformers, it goes before the index
    assert SafetensorsDirectory(tmp_path).shape("a") == (1,)


def test_shards_may_be_links(sharded, tmp_path_factory):
    """As in the cache of a download."""
    linked = tmp_path_factory.mktemp("links")
    for path in sharded.iterdir():
        (linked / path.name).symlink_to(path)
    assert torch.equal(SafetensorsDirectory(linked).tensor("a"), SafetensorsDirectory(sharded).tensor("a"))


def truncate(folder):
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def lie_about_the_header(folder):
    (folder / "one.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def forget_a_tensor(folder):
    save_file({"z": torch.zeros(1)}, folder / "one.safetensors")


def only_a_pickle(folder):
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncate, "one.safetensors is not a whole safetensors file"),
        (lie_about_the_header, "one.safetensors is not a whole safetensors file"),
        (lambda folder: (folder / "one.safetensors").write_bytes(b""), "one.safetensors is not a whole"),
        (lambda folder: (folder / "one.safetensors").unlink(), "one.safetensors is missing"),
        (forget_a_tensor, "one.safetensors holds a, and it does not"),
        (only_a_pickle, "pytorch_model.bin is a pickle"),
        (lambda folder: (folder / INDEX).unlink(), f"holds neither {SINGLE} nor {INDEX}"),
        (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
        (lambda folder: write_index(folder, {"a": "../one.safetensors"}), "'../one.safetensors', which is not a file"),
        (lambda folder: write_index(folder, {"a": "/etc/passwd"}), "'/etc/passwd', which is not a file"),
        (lambda folder: write_index(folder, {"a": "pytorch_model.bin"}), "only .safetensors files are read"),
        (lambda folder: write_index(folder, {"a": 3}), "only .safetensors files are read"),
        (lambda folder: (folder / SINGLE).mkdir(), "is a directory"),
    ],
)
def test_wrong_directories(sharded, damage, word):
    damage(sharded)
    with pytest.raises(ValueError) as error:
        SafetensorsDirectory(sharded)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_absent_tensor_is_named(sharded):
    with pytest.raises(ValueError, match="holds no tensor d"):
        SafetensorsDirectory(sharded).tensor("d")
