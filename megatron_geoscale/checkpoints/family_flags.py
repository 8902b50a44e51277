"""A family as pretrain.py's flags, and back: which models both formats can hold.

What one side computes and the other does not is refused in one sentence, never dropped.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_geoscale.checkpoints.families import Family, Rope

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What megatron-core's RotaryEmbedding has built in; only `factor` is a flag."""
_GPT2_ACTIVATIONS = {"gelu_new": ["--openai-gelu"], "gelu_pytorch_tanh": ["--openai-gelu"], "gelu": []}


def flags_of(family: Family) -> list[str]:
    """pretrain.py's flags of the model. ValueError for what megatron-core computes otherwise."""
    flags = [
        "--num-layers", family.num_layers, "--hidden-size", family.hidden_size,
        "--num-attention-heads", family.num_heads, "--kv-channels", family.head_dim,
        "--ffn-hidden-size", family.ffn_hidden_size, "--max-position-embeddings", family.max_positions,
        "--normalization", family.norm, "--norm-epsilon", repr(family.norm_epsilon),
        "--attention-dropout", family.attention_dropout,
    ]
    if family.num_groups != family.num_heads:
        flags += ["--group-query-attention", "--num-query-groups", family.num_groups]
    if not family.tied_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    flags += _gpt2_flags(family) if family.is_fused else _llama_flags(family)
    return list(map(str, flags))


def _gpt2_flags(family: Family) -> list[Any]:
    if not family.scales_logits or family.scales_by_layer:
        raise ValueError("scale_attn_weights false and scale_attn_by_inverse_layer_idx true are not supported: "
                         "megatron-core's attention has no such scale")
    if family.activation not in _GPT2_ACTIVATIONS:
        raise ValueError(f"activation_function {family.activation!r} is not supported, only "
                         f"{', '.join(_GPT2_ACTIVATIONS)} are")
    return ["--position-embedding-type", "learned_absolute", *_GPT2_ACTIVATIONS[family.activation]]


def _llama_flags(family: Family) -> list[Any]:
    if family.model_type == "mixtral":
        raise ValueError("mixtral is a mixture of experts, which is not converted")
    if family.activation != "silu":
        raise ValueError(f"hidden_act {family.activation!r} is not supported, only silu is")
    if family.output_bias or family.mlp_bias:
        raise ValueError("attention_bias and mlp_bias are not supported: no model of these families has been "
                         "released with them")
    flags = ["--position-embedding-type", "rope", "--swiglu", "--disable-bias-linear", *_rope_flags(family)]
    if family.qkv_bias:
        flags.append("--add-qkv-bias")
    if family.qk_norm:
        flags.append("--qk-layernorm")
    if family.sliding_window is not None:
        if family.model_type != "mistral":
            raise ValueError("use_sliding_window is not supported: in this family only some layers have a window")
        flags += ["--window-size", family.sliding_window - 1, 0]  # Megatron counts the keys before the query
    return flags


def _rope_flags(family: Family) -> list[Any]:
    rope = family.rope
    assert rope is not None, "only GPT-2 has none"
    if not rope.theta.is_integer():
        raise ValueError(f"rope_theta must be an integer, as --rotary-base is, not {rope.theta}")
    flags = ["--rotary-base", int(rope.theta)]
    if rope.kind == "default":
        return flags
    if rope.kind != "llama3":
        raise ValueError(f"rope_type {rope.kind} is not converted, only default and llama3 are")
    for name, built_in in LLAMA3_ROPE.items():
        if name != "rope_type" and rope.settings.get(name) != built_in:
            raise ValueError(f"{name} of the llama3 rotary embedding is {rope.settings.get(name)}, and megatron-core "
                             f"has {built_in} built in")
    factor = rope.settings.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise ValueError(f"factor of the llama3 rotary embedding must be a positive number, not {factor!r}")
    return [*flags, "--use-rope-scaling", "--rope-scaling-factor", float(factor)]


_PLAIN = {
    "multi_latent_attention": False, "attention_output_gate": False, "qk_l2_norm": False, "apply_layernorm_1p": False,
    "softmax_type": "vanilla", "rotary_interleaved": False, "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": None, "window_attn_skip_freq": None,
}
"""Flags that no family has a counterpart for. A flag that a checkpoint is older than had this value then."""
_READ = {
    **dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                     "kv_channels", "max_position_embeddings", "rotary_base", "padded_vocab_size",
                     "tokenizer_vocab_size"), int),
    **dict.fromkeys(("norm_epsilon", "attention_dropout", "rope_scaling_factor"), float),
    **dict.fromkeys(("swiglu", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "use_rope_scaling",
                     "untie_embeddings_and_output_weights"), bool),
    **dict.fromkeys(("position_embedding_type", "normalization"), str),
}


def family_of(args: argparse.Namespace) -> Family:
    """The family that the flags of a checkpoint describe, with the vocabulary of its tokenizer.

    A Llama and a Mistral without a window are the same model: it is called llama. Raises ValueError naming the flag for
    what no family has.
    """
    for name, kind in _READ.items():
        value = getattr(args, name, None)
        if type(value) is not kind or (kind is int and value < 1):
            raise ValueError(f"it has {value!r} for {_flag(name)}: pretrain.py did not save it")
    for name, plain in _PLAIN.items():
        if getattr(args, name, plain) != plain:
            raise ValueError(f"{_flag(name)} {getattr(args, name)} has no counterpart in the supported families")
    window = getattr(args, "window_size", None)
    is_gpt2 = args.normalization == "LayerNorm"
    if is_gpt2:
        _need(args, "normalization LayerNorm", position_embedding_type="learned_absolute", swiglu=False,
              disable_bias_linear=False, qk_layernorm=False, window_size=None,
              num_query_groups=args.num_attention_heads, kv_channels=args.hidden_size // args.num_attention_heads)
    else:
        _need(args, "normalization RMSNorm", position_embedding_type="rope", swiglu=True, disable_bias_linear=True)
        marks = {"add_qkv_bias": args.add_qkv_bias, "qk_layernorm": args.qk_layernorm, "window_size": bool(window)}
        if sum(marks.values()) > 1:
            both = " and ".join(_flag(name) for name, given in marks.items() if given)
            raise ValueError(f"{both} together have no counterpart in the supported families")
    rope = None
    if not is_gpt2:
        scaling = {**LLAMA3_ROPE, "factor": args.rope_scaling_factor} if args.use_rope_scaling else {}
        rope = Rope(scaling.get("rope_type", "default"), float(args.rotary_base), scaling)
    return Family(
        model_type="gpt2" if is_gpt2 else "qwen2" if args.add_qkv_bias else "qwen3" if args.qk_layernorm
        else "mistral" if window else "llama",
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_heads=args.num_attention_heads,
        num_groups=args.num_query_groups,
        head_dim=args.kv_channels,
        vocab_size=args.tokenizer_vocab_size,
        max_positions=args.max_position_embeddings,
        norm=args.normalization,
        rope=rope,
        qkv_bias=is_gpt2 or args.add_qkv_bias,
        output_bias=is_gpt2,
        qk_norm=args.qk_layernorm,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        sliding_window=window[0] + 1 if window else None,
        attention_dropout=args.attention_dropout,
        ffn_hidden_size=args.ffn_hidden_size,
        norm_epsilon=args.norm_epsilon,
        activation="silu" if not is_gpt2 else "gelu_new" if getattr(args, "openai_gelu", False) else "gelu",
        mlp_bias=is_gpt2,
    )


def _need(args: argparse.Namespace, case: str, **needed: Any) -> None:
    for name, value in needed.items():
        if getattr(args, name, value) != value:
            raise ValueError(f"{_flag(name)} {getattr(args, name)} with --{case} has no counterpart in the supported "
                             "families")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
