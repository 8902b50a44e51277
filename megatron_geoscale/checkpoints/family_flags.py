"""A family as pretrain.py's flags, and back: which models both formats can hold.

What one side computes and the other does not is refused in one sentence, never dropped.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_geoscale.checkpoints.families import Experts, Family
from megatron_geoscale.checkpoints.rope_flags import rope_flags, rope_of

_GPT2_ACTIVATIONS = {"gelu_new": ["--openai-gelu"], "gelu_pytorch_tanh": ["--openai-gelu"], "gelu": []}


def flags_of(family: Family) -> list[str]:
    """pretrain.py's flags of the model. ValueError for what megatron-core computes otherwise."""
    flags = [
        "--num-layers", family.num_layers, "--hidden-size", family.hidden_size,
        "--num-attention-heads", family.num_heads, "--kv-channels", family.head_dim,
        "--ffn-hidden-size", family.ffn_hidden_size, "--max-position-embeddings", family.max_positions,
        "--normalization", family.norm, "--norm-epsilon", repr(family.norm_epsilon),
        "--attention-dropout", family.attention_dropout, "--hidden-dropout", family.hidden_dropout,
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


def same_activation(one: Family, other: Family) -> bool:
    """Whether both names mean the same to megatron-core; transformers rounds its two GELUs by tanh differently."""
    return _GPT2_ACTIVATIONS.get(one.activation, one.activation) == _GPT2_ACTIVATIONS.get(
        other.activation, other.activation
    )


def _llama_flags(family: Family) -> list[Any]:
    if family.activation != "silu":
        raise ValueError(f"hidden_act {family.activation!r} is not supported, only silu is")
    if family.output_bias or family.mlp_bias:
        raise ValueError("attention_bias and mlp_bias are not supported: no model of these families has been "
                         "released with them")
    assert family.rope is not None, "only GPT-2 has none"
    flags = ["--swiglu", "--disable-bias-linear", *rope_flags(family.rope, family.max_positions)]
    if family.qkv_bias:
        flags.append("--add-qkv-bias")
    if family.qk_norm:
        flags.append("--qk-layernorm")
    if family.experts is not None:
        flags += _expert_flags(family.experts, family.ffn_hidden_size)
    if family.sliding_window is not None:
        if family.model_type not in ("mistral", "mixtral"):
            raise ValueError("use_sliding_window is not supported: in this family only some layers have a window")
        flags += ["--window-size", family.sliding_window - 1, 0]  # Megatron counts the keys before the query
    return flags


def _expert_flags(experts: Experts, ffn_hidden_size: int) -> list[Any]:
    if experts.per_token == 1 and experts.sums_to_one:
        raise ValueError("num_experts_per_tok 1 is not supported where the weights of a token's experts sum to one: "
                         "megatron-core refuses a router that cannot learn")
    flags = ["--num-experts", experts.count, "--moe-router-topk", experts.per_token,
             "--moe-ffn-hidden-size", ffn_hidden_size]
    return flags if experts.sums_to_one else [*flags, "--moe-router-pre-softmax"]


_PLAIN = {
    "multi_latent_attention": False, "attention_output_gate": False, "qk_l2_norm": False, "apply_layernorm_1p": False,
    "softmax_type": "vanilla", "rotary_interleaved": False, "rotary_percent": 1.0,
    "window_attn_skip_freq": None,
    "moe_router_score_function": "softmax", "moe_router_topk_scaling_factor": None,
}
"""Flags that no family has a counterpart for. A flag that a checkpoint is older than had this value then."""
_READ = {
    **dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                     "kv_channels", "max_position_embeddings", "rotary_base", "padded_vocab_size",
                     "tokenizer_vocab_size"), int),
    **dict.fromkeys(("norm_epsilon", "attention_dropout", "hidden_dropout", "rope_scaling_factor"), float),
    **dict.fromkeys(("swiglu", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "use_rope_scaling",
                     "untie_embeddings_and_output_weights"), bool),
    **dict.fromkeys(("position_embedding_type", "normalization"), str),
}


def family_of(args: argparse.Namespace) -> Family:
    """The family that the flags of a checkpoint describe, with its vocabulary without padding.

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
    experts = _experts_of(args)
    is_gpt2 = args.normalization == "LayerNorm"
    if is_gpt2:
        _need(args, "normalization LayerNorm", position_embedding_type="learned_absolute", swiglu=False,
              disable_bias_linear=False, qk_layernorm=False, window_size=None, num_experts=None,
              num_query_groups=args.num_attention_heads, kv_channels=args.hidden_size // args.num_attention_heads)
    else:
        position = "yarn" if args.position_embedding_type == "yarn" else "rope"
        _need(args, "normalization RMSNorm", position_embedding_type=position, swiglu=True, disable_bias_linear=True)
    return Family(
        model_type="gpt2" if is_gpt2 else _model_type(args),
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_heads=args.num_attention_heads,
        num_groups=args.num_query_groups,
        head_dim=args.kv_channels,
        vocab_size=getattr(args, "model_vocab_size", args.tokenizer_vocab_size),
        max_positions=args.max_position_embeddings,
        norm=args.normalization,
        rope=None if is_gpt2 else rope_of(args),
        qkv_bias=is_gpt2 or args.add_qkv_bias,
        output_bias=is_gpt2,
        qk_norm=args.qk_layernorm,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        sliding_window=window[0] + 1 if window else None,
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        ffn_hidden_size=args.ffn_hidden_size if experts is None else args.moe_ffn_hidden_size,
        norm_epsilon=args.norm_epsilon,
        activation="silu" if not is_gpt2 else "gelu_new" if getattr(args, "openai_gelu", False) else "gelu",
        mlp_bias=is_gpt2,
        experts=experts,
    )


_MODEL_TYPES = {
    (): "llama", ("window_size",): "mistral", ("add_qkv_bias",): "qwen2", ("qk_layernorm",): "qwen3",
    ("num_experts",): "mixtral", ("window_size", "num_experts"): "mixtral",
    ("qk_layernorm", "num_experts"): "qwen3_moe",
    ("qk_layernorm", "num_experts", "moe_router_pre_softmax"): "qwen3_moe",
}
"""Of a model with RMSNorm, by what it has besides."""


def _model_type(args: argparse.Namespace) -> str:
    names = ("add_qkv_bias", "qk_layernorm", "window_size", "num_experts", "moe_router_pre_softmax")
    given = tuple(name for name in names if getattr(args, name, None))
    if given not in _MODEL_TYPES:
        raise ValueError(f"{' and '.join(map(_flag, given))} together have no counterpart in the supported families")
    return _MODEL_TYPES[given]


def _experts_of(args: argparse.Namespace) -> Experts | None:
    if getattr(args, "num_experts", None) is None:  # a checkpoint may be older than the flag
        return None
    sizes = [getattr(args, name, None) for name in ("num_experts", "moe_router_topk", "moe_ffn_hidden_size")]
    pre_softmax = getattr(args, "moe_router_pre_softmax", None)
    if not all(type(size) is int and size > 0 for size in sizes) or type(pre_softmax) is not bool:
        raise ValueError("it has no complete flags of a mixture of experts: pretrain.py did not save it")
    return Experts(sizes[0], sizes[1], sums_to_one=not pre_softmax)


def _need(args: argparse.Namespace, case: str, **needed: Any) -> None:
    for name, value in needed.items():
        if getattr(args, name, value) != value:
            raise ValueError(f"{_flag(name)} {getattr(args, name)} with --{case} has no counterpart in the supported "
                             "families")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
