"""What a checkpoint and the model that loads it must agree on."""

from __future__ import annotations

import argparse
from pathlib import Path

_SHAPE_FLAGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "disable_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "softmax_type",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "apply_layernorm_1p",
    "norm_epsilon",
    "openai_gelu",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "untie_embeddings_and_output_weights",
    "padded_vocab_size",
)
_ROTARY_FLAGS = ("rotary_percent", "rotary_interleaved", "rotary_base")
"""The same, where queries and keys are rotated."""


def check_shape(args: argparse.Namespace, saved: argparse.Namespace, directory: Path) -> None:
    """Raises ValueError naming the first flag whose values differ; `saved` are the flags in `directory`."""
    by_position = {"learned_absolute": ("max_position_embeddings",), "none": ()}
    position = by_position.get(args.position_embedding_type, _ROTARY_FLAGS)
    for name in (*_SHAPE_FLAGS, *position):
        ours = getattr(args, name)
        theirs = getattr(saved, name, ours)  # a flag that did not exist when it was saved changed nothing then
        if ours != theirs:
            flag = "--vocab-size, padded," if name == "padded_vocab_size" else "--" + name.replace("_", "-")
            raise ValueError(f"{directory} has another shape: {flag} was {theirs} when it was saved and is {ours} now")
