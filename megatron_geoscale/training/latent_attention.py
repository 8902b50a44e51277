"""Multi-latent attention over megatron-core's own linear layers, without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


class LocalLatentAttention(MLASelfAttention):
    """MLASelfAttention whose gradients do not depend on the tensor-parallel size, as megatron-core 0.16.1's do.

    The local linear_kv_down_proj shards its output. Megatron gathers it, and on the way back each rank keeps its slice
    of its own gradient: that of the rotated key, which the heads of all ranks read, is the gradient of one rank's
    heads. Here it is summed over the ranks. And Megatron sums the gradient of whatever is called q_layernorm over the
    ranks, as a norm of one head needs; that of a latent is whole on each rank unless the sequence is split.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.tp_group.size() > 1:
            self.linear_kv_down_proj.register_forward_hook(self._gather)
            if self.config.q_lora_rank is not None and not self.config.sequence_parallel:
                for parameter in self.q_layernorm.parameters():
                    parameter.register_hook(lambda grad: grad / self.tp_group.size())

    def _gather(self, linear: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> Any:
        """All of linear_kv_down_proj's output, as the duplicated layer that MLASelfAttention also knows returns it."""
        combined, bias = output
        combined = gather_from_tensor_model_parallel_region(combined, group=self.tp_group)
        if self.config.sequence_parallel:  # MLASelfAttention gathers the key's tokens again, which sums gradients
            return scatter_to_sequence_parallel_region(combined, group=self.tp_group), bias
        latent, key = combined.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        if key.requires_grad:
            key.register_hook(self._sum_over_ranks)
        return torch.cat([latent, key], dim=-1), bias

    def _sum_over_ranks(self, grad: torch.Tensor) -> torch.Tensor:
        # megatron-core's own copy to the region sums a copy of a strided gradient and returns the gradient unsummed.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=self.tp_group)
        return grad


class LatentDotProductAttention(DotProductAttention):
    """DotProductAttention that takes multi-latent attention's arguments; `config.kv_channels` is the values'."""

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert v_channels in (None, self.config.kv_channels)


def use_local_latent_attention(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Make multi-latent attention in a local decoder block spec `LocalLatentAttention`, in place; returns `block`."""
    # megatron-core 0.16.1 takes its own wrapper's import for Transformer Engine's, and asks isinstance of a stand-in.
    multi_latent_attention.HAVE_TE = isinstance(multi_latent_attention.TELinear, type)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        attention.module = LocalLatentAttention
        if attention.submodules.core_attention is DotProductAttention:
            attention.submodules.core_attention = LatentDotProductAttention
    return block
