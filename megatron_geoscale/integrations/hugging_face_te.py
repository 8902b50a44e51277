"""Transformer Engine's fused FP8 attention in models of transformers, through the module that Megatron models use.

The kernels take whole causal sequences: no padding, no window, no cache of keys. Which models they run on a machine
is `attention.obstacles`.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_geoscale.attention.transformer_engine import TransformerEngineAttention
from megatron_geoscale.checkpoints.families import Family

_HALF = {torch.bfloat16: {"bf16": True}, torch.float16: {"fp16": True}}


def fused_attention(family: Family, number: int, dtype: torch.dtype) -> TransformerEngineAttention:
    """The core attention of layer `number`, from 1, computed in `dtype`; without scales yet."""
    config = TransformerConfig(
        num_layers=family.num_layers,
        hidden_size=family.hidden_size,
        num_attention_heads=family.num_heads,
        num_query_groups=family.num_groups,
        kv_channels=family.head_dim,
        attention_dropout=family.attention_dropout,
        window_size=None if family.sliding_window is None else (family.sliding_window - 1, 0),
        params_dtype=dtype,
        **_HALF.get(dtype, {}),
    )
    scale = family.softmax_scale(number)
    return TransformerEngineAttention(config, number, AttnMaskType.causal, "self", softmax_scale=scale)


def attend(
    kernel: TransformerEngineAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    training: bool,
) -> Tensor:
    """query [b, heads, s, d], key and value [b, groups, s, d], mask None for a causal one -> [b, s, heads, d].

    Raises ValueError for what the kernels do not compute.
    """
    if mask is not None or query.size(2) != key.size(2):
        raise ValueError("padding, windows, packed sequences and cached keys are not for --geoscale-attention te: use "
                         "--geoscale-attention emulated")
    kernel.training = training  # dropout
    rows = (x.permute(2, 0, 1, 3).contiguous() for x in (query, key, value))
    out: Tensor = kernel(*rows, None, AttnMaskType.causal)
    return out.unflatten(-1, (query.size(1), -1)).transpose(0, 1)
