"""What megatron-core's layers with experts need from us."""

from __future__ import annotations

from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


def provide_router_product() -> None:
    """Let the router run where Transformer Engine is not installed: it asks whether a product of its is None, and the
    name is missing then."""
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def use_common_norm_name(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Let the norm in front of the experts be `pre_mlp_layernorm` in checkpoints, in place; returns `block`.

    So megatron-core's Transformer Engine spec calls it, where no linear layer can absorb it. The local spec calls it
    `mlp.linear_fc1.layer_norm`, as in front of an MLP, and neither could load what the other has saved.
    """
    for layer in block.layer_specs:
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return block
