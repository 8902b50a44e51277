"""Every part of every family: there and back bit by bit, rows in Megatron's order, every cell used exactly once."""

import json
import re

import pytest
import torch

from megatron_geoscale.checkpoints.families import Stored, read_family
from megatron_geoscale.checkpoints.family_flags import family_of, flags_of
from megatron_geoscale.checkpoints.mapping import model_parts
from megatron_geoscale.checkpoints.rope_flags import LLAMA3_ROPE
from megatron_geoscale.training.arguments import parse_args

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 4, "n_positions": 16, "vocab_size": 21}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 64, "vocab_size": 21}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | {"tie_word_embeddings": False, "n_inner": 20},
    "llama, ratio 1": LLAMA | {"num_key_value_heads": 4},
    "llama, ratio 2": LLAMA,
    "llama, ratio 4": LLAMA | {"num_key_value_heads": 1},
    "llama, head dim": LLAMA | {"head_dim": 10},
    "llama, no padding": LLAMA | {"vocab_size": 32},
    "llama 3.1": LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}},
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": LLAMA | {"rope_scaling": YARN | {"beta_fast": 16.0}},
    "yarn, attention factor": LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.25}},
    "yarn, mscale": LLAMA | {"rope_scaling": YARN | {"mscale": 0.75, "mscale_all_dim": 0.5}},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 8, "rms_norm_eps": 1e-5},
    "qwen2": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 10, "num_key_value_heads": 1},
    "mixtral": LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "sliding_window": 8},
    "qwen3_moe": LLAMA | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2,
                          "moe_intermediate_size": 12, "norm_topk_prob": True},
    "qwen3_moe, one a token": LLAMA | {"model_type": "qwen3_moe", "num_local_experts": 3, "num_experts_per_tok": 1,
                                       "moe_intermediate_size": 12},
}
PADDED = 32


@pytest.fixture
def family(request, tmp_path):
    return make_family(tmp_path, CONFIGS[request.param])


def make_family(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return read_family(path)


every_family = pytest.mark.parametrize("family", CONFIGS, indirect=True)


def parts_of(family):
    return list(model_parts(family, padded_vocab_size=PADDED, prefix="m."))


def random_tensors(part, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(stored.shape, generator=generator) for stored in part.sources]


@every_family
def test_there_and_back_bit_by_bit(family):
    for part in parts_of(family):
        tensors = random_tensors(part)
        merged = part.to_megatron(tensors)
        assert merged.shape == part.sizes and merged.is_contiguous()
        again = part.to_huggingface(merged)
        assert len(again) == len(tensors)
        for mine, theirs in zip(tensors, again):
            assert theirs.is_contiguous() and torch.equal(mine, theirs), part.key
        is_padded = part.key in ("embedding.word_embeddings.weight", "output_layer.weight")
        padding = (PADDED - family.vocab_size) * family.hidden_size if is_padded else 0
        elements = sum(tensor.numel() for tensor in tensors)
        assert merged.numel() == elements + padding
        assert int((merged == 0).sum()) == merged.numel() - elements  # the padding is zero, and nothing else is


@every_family
def test_parts_tile_every_tensor_and_no_source_is_used_twice(family):
    covered, sources = {}, []
    for part in parts_of(family):
        times = covered.setdefault(part.key, torch.zeros(part.shape, dtype=torch.int))
        assert times.shape == part.shape
        times[tuple(slice(first, first + size) for first, size in zip(part.offsets, part.sizes))] += 1
        sources += [stored.name for stored in part.sources]
    assert all((times == 1).all() for times in covered.values())
    assert len(set(sources)) == len(sources)
    stacked = [key for key in covered if key.startswith("decoder.layers.")]
    assert len(stacked) >= 6 and all(covered[key].shape[0] == family.num_layers for key in stacked)


@every_family
def test_a_group_has_its_queries_then_its_key_then_its_value(family):
    """Row by row: what is written into a row of Q, K or V says which it is."""
    h, n, g = family.head_dim, family.num_heads, family.num_groups
    tags = {"q": [f"q{i}" for i in range(n * h)], "k": [f"k{i}" for i in range(g * h)],
            "v": [f"v{i}" for i in range(g * h)]}
    expected = []
    for group in range(g):
        for letter, heads in (("q", n // g), ("k", 1), ("v", 1)):
            expected += tags[letter][group * heads * h : (group + 1) * heads * h]
    number = {tag: float(i) for i, tag in enumerate(tags["q"] + tags["k"] + tags["v"])}
    seen = 0
    for part in parts_of(family):
        if ".linear_qkv." not in part.key or "norm" in part.key:
            continue
        columns = [torch.tensor([number[tag] for tag in tags[letter]]) for letter in "qkv"]
        if family.is_fused:
            columns = [torch.cat(columns)]
        tensors = [
            column if len(stored.shape) == 1
            else column.expand(stored.shape) if family.is_fused else column[:, None].expand(stored.shape)
            for column, stored in zip(columns, part.sources)
        ]
        merged = part.to_megatron(tensors)[0]
        rows = merged if merged.dim() == 1 else merged[:, -1]
        assert rows.tolist() == [number[tag] for tag in expected]
        seen += 1
    assert seen == family.num_layers * (2 if family.qkv_bias else 1)


def test_conv1d_is_transposed_and_a_gate_stands_on_the_other_half(tmp_path):
    def of(parts, key, row=0):
        (part,) = (p for p in parts if p.key == f"decoder.layers.{key}" and p.offsets[:2] == (1, row))
        return part

    gpt2, llama = (parts_of(make_family(tmp_path, config)) for config in (GPT2, LLAMA))
    for key, name in (("mlp.linear_fc1.weight", "mlp.c_fc"), ("mlp.linear_fc2.weight", "mlp.c_proj"),
                      ("self_attention.linear_proj.weight", "attn.c_proj")):
        part = of(gpt2, key)
        (tensor,) = random_tensors(part)
        assert torch.equal(part.to_megatron([tensor])[0], tensor.t())
        assert part.sources == (Stored(f"m.h.1.{name}.weight", tuple(tensor.shape)),)
    gate, up = (of(llama, "mlp.linear_fc1.weight", row) for row in (0, 20))
    assert gate.sources[0].name == "m.layers.1.mlp.gate_proj.weight" and gate.shape == (2, 40, 24)
    assert up.sources[0].name == "m.layers.1.mlp.up_proj.weight" and up.sizes == (1, 20, 24)


@every_family
def test_flags_and_back(family, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = parse_args([*flags_of(family), "--seq-length", "8", "--mock-data", "--vocab-size", "20", "--lr", "1",
                       "--micro-batch-size", "1", "--train-iters", "1"])
    args.padded_vocab_size, args.tokenizer_vocab_size = PADDED, family.vocab_size
    again = family_of(args)
    assert {name: value for name, value in vars(again).items() if name != "rope"} == {
        name: value for name, value in vars(family).items() if name != "rope"
    }
    if family.rope is not None:
        assert (again.rope.kind, again.rope.theta) == (family.rope.kind, family.rope.theta)
        assert again.rope.settings.get("factor") == family.rope.settings.get("factor")
        assert again.rope.scale == pytest.approx(family.rope.scale, rel=1e-14)
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)) if family.rope.kind == "yarn" else ():
            assert again.rope.settings[name] == family.rope.settings.get(name, default)


def test_a_window_counts_the_query_itself(tmp_path):
    flags = flags_of(make_family(tmp_path, CONFIGS["mistral"]))
    assert flags[flags.index("--window-size") + 1 :][:2] == ["7", "0"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_are_the_same_experts(tmp_path, name):
    """Layer by layer, from the tensors of single experts and from transformers' stacks of them."""
    family = make_family(tmp_path, CONFIGS[name])
    single = parts_of(family)
    fused = list(model_parts(family, padded_vocab_size=PADDED, prefix="m.", fused_experts=True))
    tensors = {part.sources[0].name: random_tensors(part, seed)[0] for seed, part in enumerate(single)
               if ".experts." in part.key}
    by_layer = {}
    for part in single:
        if part.sources[0].name in tensors:
            whole = by_layer.setdefault((part.key, part.offsets[0]), torch.zeros(1, *part.shape[1:]))
            where = tuple(slice(first, first + size) for first, size in zip((0, *part.offsets[1:]), part.sizes))
            whole[where] = part.to_megatron([tensors[part.sources[0].name]])
    gate, up, down = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    seen = 0
    for part in fused:
        if ".experts." not in part.key:
            continue
        (source,) = part.sources
        layer, what = source.name.removeprefix("m.").split(".mlp.experts.")
        stack = torch.stack([
            torch.cat([tensors[f"m.{layer}.{block}.experts.{i}.{n}.weight"] for n in names])
            for i in range(3) for names in [(gate, up) if what == "gate_up_proj" else (down,)]
        ])
        assert stack.shape == source.shape
        assert torch.equal(part.to_megatron([stack]), by_layer[part.key, part.offsets[0]])
        assert torch.equal(part.to_huggingface(by_layer[part.key, part.offsets[0]])[0], stack)
        seen += 1
    assert seen == len(by_layer) == 4
    gates = [part.sources[0].name for part in fused if part.key.endswith("router.weight")]
    assert gates == [f"m.layers.{i}.mlp.gate.weight" for i in range(2)]


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"attention_bias": True}, "attention_bias and mlp_bias"),
    ({"mlp_bias": True}, "attention_bias and mlp_bias"),
    ({"rope_theta": 10000.5}, "rope_theta must be an integer"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, "factor of the linear rotary embedding must be an int"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic is not converted, only default, li"),
    ({"rope_scaling": YARN | {"truncate": False}}, "truncate false of the yarn rotary embedding"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "factor of the yarn rotary embedding must be at least 1"),
    ({"rope_scaling": YARN | {"beta_slow": -1.0}}, "beta_slow of the yarn rotary embedding must be a positive number"),
    ({"rope_scaling": YARN | {"factor": 1.0, "attention_factor": 1.5}}, "attention_factor 1.5 of the yarn rotary"),
    ({"rope_scaling": LLAMA3_ROPE | {"factor": 8.0, "original_max_position_embeddings": 4096}},
     "original_max_position_embeddings of the llama3 rotary embedding is 4096, and megatron-core has 8192"),
    ({"rope_scaling": LLAMA3_ROPE | {"factor": 8.0, "high_freq_factor": 2.0}}, "high_freq_factor"),
    ({"rope_scaling": LLAMA3_ROPE}, "factor of the llama3 rotary embedding must be a positive number, not None"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    ({"model_type": "mixtral", "num_experts_per_tok": 1}, "num_experts_per_tok 1 is not supported where the weights"),
])
def test_what_megatron_computes_otherwise_is_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        flags_of(make_family(tmp_path, LLAMA | change))


@pytest.mark.parametrize(("change", "words"), [
    ({"activation_function": "relu"}, "activation_function 'relu'"),
    ({"scale_attn_weights": False}, "scale_attn_weights false"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx true"),
])
def test_what_megatron_computes_otherwise_is_refused_of_gpt2(tmp_path, change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        flags_of(make_family(tmp_path, GPT2 | change))


@pytest.mark.parametrize(("config", "flags", "words"), [
    (LLAMA, "--softmax-type learnable", "--softmax-type learnable has no counterpart"),
    (LLAMA, "--qk-layernorm --add-qkv-bias", "--add-qkv-bias and --qk-layernorm together"),
    (LLAMA, "--apply-layernorm-1p", "--apply-layernorm-1p True has no counterpart"),
    (LLAMA, "--rotary-percent 0.5", "--rotary-percent 0.5 has no counterpart"),
    (LLAMA, "--num-experts 2 --add-qkv-bias", "--add-qkv-bias and --num-experts together"),
    (LLAMA, "--num-experts 2 --moe-router-pre-softmax", "--num-experts and --moe-router-pre-softmax together"),
    (LLAMA, "--num-experts 2 --moe-router-score-function sigmoid", "--moe-router-score-function sigmoid has no"),
    (LLAMA, "--use-rope-scaling --rotary-seq-len-interpolation-factor 2",
     "--rotary-seq-len-interpolation-factor and --use-rope-scaling together"),
    (GPT2, "--swiglu", "--swiglu True with --normalization LayerNorm"),
    (GPT2, "--position-embedding-type rope", "--position-embedding-type rope with --normalization LayerNorm"),
])
def test_a_model_that_no_family_has_is_refused(tmp_path, monkeypatch, config, flags, words):
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = parse_args([*flags_of(make_family(tmp_path, config)), *flags.split(), "--seq-length", "8", "--mock-data",
                       "--vocab-size", "20", "--lr", "1", "--micro-batch-size", "1", "--train-iters", "1"])
    args.padded_vocab_size, args.tokenizer_vocab_size = PADDED, 21
    with pytest.raises(ValueError, match=re.escape(words)):
        family_of(args)
    del args.num_layers
    with pytest.raises(ValueError, match="it has None for --num-layers"):
        family_of(args)
