"""Finds the attention layers of a Megatron model and reads their weights as the next forward will use them.

Everything that knows the names of megatron-core's modules is here; `spectral` and `bounds` see plain tensors. What
the bounds do not cover yet is refused here by its flag, when the engine attaches, never bounded wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.folding import drop_output_gates, effective_gain, fold_attention, fold_head_norm
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.latent_layers import LatentLayer
from megatron_geoscale.scaling.weights import as_used, holds_norm, norm_constants
from megatron_geoscale.spectral.moments import Moments
from megatron_geoscale.spectral.projections import Projections, split_linear_qkv

ROTARY_KINDS = {"rope": True, "yarn": True, "learned_absolute": False, "none": False}


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer of this rank: where its weights are, and the constants that its bounds need."""

    number: int
    """Global layer number, from 1, all pipeline stages and chunks included."""
    attention: SelfAttention
    norm: torch.nn.Module
    """The module that holds the gain applied just before `linear_qkv`: a norm, or TE's fused linear."""
    position_embedding_type: str
    rotary_percent: float
    max_sequence_length: int
    rotary_scale: float = 1.0
    """What RoPE's cosines and sines are multiplied by (YaRN's mscale)."""

    @property
    def config(self) -> TransformerConfig:
        return self.attention.config

    @cached_property
    def geometry(self) -> AttentionGeometry:
        """What the layer's bounds depend on besides its weights."""
        config, core = self.config, self.core_attention
        rotary = ROTARY_KINDS[self.position_embedding_type]
        return AttentionGeometry(
            hidden_size=config.hidden_size,
            num_heads=self.num_heads,
            num_groups=config.num_query_groups,
            head_dim=self.head_dim,
            softmax_scale=float(core.softmax_scale),
            max_sequence_length=self.max_sequence_length,
            rotary_dim=int(self.head_dim * min(1.0, self.rotary_percent)) if rotary else 0,
            rotary_interleaved=config.rotary_interleaved,
            rotary_scale=self.rotary_scale,
            logit_multiplier=float(getattr(core, "logit_multiplier", 1.0)),
            dropout=float(core.attention_dropout),
            unit_roundoff=torch.finfo(self.dtype).eps / 2,
            fp8_projection=config.fp8 is not None,
        )

    @property
    def core_attention(self) -> torch.nn.Module:
        return self.attention.core_attention

    @property
    def tp_group(self) -> torch.distributed.ProcessGroup:
        return self.attention.linear_qkv.tp_group

    @property
    def num_heads(self) -> int:
        """Query heads of the whole layer."""
        return self.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.attention.hidden_size_per_attention_head

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_local_heads(self) -> int:
        """Query heads of this tensor-parallel rank."""
        return self.num_heads // self.tp_group.size()

    @property
    def first_head(self) -> int:
        """Global number, from 0, of this rank's first query head."""
        return self.tp_group.rank() * self.num_local_heads

    @property
    def heads_per_group(self) -> int:
        """Query heads of the whole layer that read one key and value."""
        return self.num_heads // self.config.num_query_groups

    @property
    def ranks_per_group(self) -> int:
        """Tensor-parallel ranks that hold a copy of one key and value; above 1 with fewer groups than ranks."""
        return max(1, self.tp_group.size() // self.config.num_query_groups)

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic that makes Q, K and V."""
        return self.attention.linear_qkv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.attention.linear_qkv.weight.device

    @torch.no_grad()
    def projections(self) -> Projections:
        """This rank's heads with norm gain, norm bias and projection bias folded in (THEORY 1), float64.

        A collective over tensor parallelism where `ranks_per_group` is above 1: all ranks of the group must call it.
        """
        linear = self.attention.linear_qkv
        gain, shift = norm_constants(self.norm, zero_centered=self.config.layernorm_zero_centered_gamma)
        bias = getattr(linear, "bias", None)
        if bias is not None and bias.numel() == 0:  # TE keeps an empty tensor where there is no bias
            bias = None
        w_q, b_q, w_k, b_k, w_v, b_v = split_linear_qkv(
            self._rows_of_groups(as_used(linear.weight)),
            None if bias is None else self._rows_of_groups(bias),
            num_groups=self.attention.num_query_groups_per_partition,
            heads_per_group=self.heads_per_group,
            head_dim=self.head_dim,
        )
        if self.ranks_per_group > 1:  # the group's query heads are spread over the ranks that share its key and value
            first = self.first_head % self.heads_per_group
            mine = slice(first, first + self.num_local_heads)
            w_q, b_q = w_q[mine], None if b_q is None else b_q[mine]
        rotary_dim = 0 if self.rotary_scale == 1.0 else self.geometry.rotary_dim
        heads = {"query": (w_q, b_q), "key": (w_k, b_k), "value": (w_v, b_v)}
        return fold_attention(**heads, gain=gain, shift=shift, rotary_dim=rotary_dim, rotary_scale=self.rotary_scale)

    def moments(self, *, with_cross: bool, look: Callable[[AttentionLayer, Projections], None]) -> Moments:
        """Of `projections`, which `look` is shown before they are dropped. A collective where `projections` is one."""
        projections = self.projections()
        look(self, projections)
        return Moments.of(projections, with_cross=with_cross)

    def _rows_of_groups(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of this rank's query groups, output gates left out, from its shard of `linear_qkv`'s weight or bias.

        Where ranks share a group, the rows that a rank holds are not those of its heads: the layer's are gathered.
        """
        if self.ranks_per_group > 1:
            ranks = self.tp_group.size()
            whole = rows.new_empty((ranks * rows.shape[0], *rows.shape[1:]))
            dist.all_gather_into_tensor(whole, rows.detach().contiguous(), group=self.tp_group)
            rows = whole.chunk(self.config.num_query_groups)[self.tp_group.rank() // self.ranks_per_group]
        if getattr(self.config, "attention_output_gate", False):
            rows = drop_output_gates(rows, heads_per_group=self.heads_per_group, head_dim=self.head_dim)
        return rows

    @torch.no_grad()
    def head_norms(self) -> tuple[HeadNorm, HeadNorm] | None:
        """Of the queries and of the keys, where the layer normalises them per head (THEORY 3, QK-norm), else None."""
        query, key = _head_norm_modules(self.attention)
        if query is None or key is None:
            return None
        return self._head_norm(query), self._head_norm(key)

    def _head_norm(self, module: torch.nn.Module) -> HeadNorm:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is None:  # L2Norm
            gain = torch.ones(self.head_dim, dtype=torch.float64, device=self.device)
        else:
            gain = effective_gain(weight, zero_centered=self.config.layernorm_zero_centered_gamma)
        return fold_head_norm(gain, bias, rotary_dim=self.geometry.rotary_dim, rotary_scale=self.rotary_scale)

    def projection_tensors(self) -> list[torch.Tensor]:
        """This rank's weights and biases that Q, K and V are proportional to."""
        linear = self.attention.linear_qkv
        return [linear.weight] + ([] if getattr(linear, "bias", None) is None else [linear.bias])

    def last_key_row(self) -> torch.Tensor:
        """The first row, as far as this rank holds it, of its last key's weight: [hidden size]."""
        weight = self.attention.linear_qkv.weight
        # The last group's key lies before its value; where ranks share the group it may begin on an earlier one.
        return weight[max(0, weight.shape[0] - 2 * self.head_dim)]

    def obstacles(self) -> list[tuple[bool, str]]:
        """What would leave the layer without a bound, and whether it is there."""
        config, position = self.config, self.position_embedding_type
        head_norms = [norm for norm in _head_norm_modules(self.attention) if norm is not None]
        return [
            (
                not isinstance(self.attention, SelfAttention),
                f"{type(self.attention).__name__} as self attention",
            ),
            (config.multi_latent_attention, "--multi-latent-attention with another self attention than Megatron's"),
            (len(head_norms) == 1, "a norm of the queries or the keys alone"),
            (
                not all(_is_norm_of_a_head(norm, self.head_dim) for norm in head_norms),
                "a norm of queries and keys that is not one of a head's entries",
            ),
            (position not in ROTARY_KINDS, f"--position-embedding-type {position}"),
        ]


def find_attention_layers(
    model_chunks: Sequence[torch.nn.Module], *, takes_scales: bool = True
) -> list[AttentionLayer | LatentLayer]:
    """Every self-attention layer of `model_chunks` (wrapped in DDP and Float16Module or not), in layer order.

    takes_scales: only those whose core attention takes FP8 scales. Raises ValueError where there is none.
    """
    layers: list[AttentionLayer | LatentLayer] = []
    for chunk in model_chunks:
        model = unwrap_model(chunk)
        layers += [describe_layer(layer, model) for layer in _transformer_layers(model, takes_scales)]
    if not layers:
        raise ValueError(
            "no attention layer with FP8 attention was found in the model: build it from a layer spec that "
            "megatron_geoscale.attention.spec.use_emulated_attention has been applied to"
        )
    return sorted(layers, key=lambda layer: layer.number)


def _transformer_layers(model: torch.nn.Module, takes_scales: bool) -> Iterator[TransformerLayer]:
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            core_attention = getattr(module.self_attention, "core_attention", None)
            if core_attention is not None and (hasattr(core_attention, "scaler") or not takes_scales):
                yield module


def describe_layer(layer: TransformerLayer, model: Any) -> AttentionLayer | LatentLayer:
    """What the bounds need of `layer`. `model`: the GPTModel, or another object with its `max_sequence_length`,
    `position_embedding_type` and `rotary_percent`."""
    attention, number, length = layer.self_attention, layer.layer_number, model.max_sequence_length
    if isinstance(attention, MLASelfAttention):
        return LatentLayer(number, attention, layer.input_layernorm, length)
    config, linear = attention.config, getattr(attention, "linear_qkv", None)
    position = getattr(model, "position_embedding_type", "none")
    if config.no_rope_freq and config.no_rope_freq[number - 1]:
        position = "none"
    rotary_percent = 1.0 if position == "yarn" else getattr(model, "rotary_percent", 1.0)  # YaRN rotates all rows
    return AttentionLayer(
        number=number,
        attention=attention,
        norm=linear if holds_norm(linear) else layer.input_layernorm,
        position_embedding_type=position,
        rotary_percent=rotary_percent,
        max_sequence_length=length,
        # megatron-core applies it to whatever is rotated, by what the config says.
        rotary_scale=_yarn_get_concentration_factor_from_config(config) if ROTARY_KINDS.get(position) else 1.0,
    )


def _head_norm_modules(attention: torch.nn.Module) -> list[torch.nn.Module | None]:
    """The norms of one head's query and key; None for one that is not there."""
    norms = [getattr(attention, name, None) for name in ("q_layernorm", "k_layernorm")]
    return [None if isinstance(norm, IdentityOp) else norm for norm in norms]


def _is_norm_of_a_head(module: torch.nn.Module, head_dim: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, L2Norm) if weight is None else tuple(weight.shape) == (head_dim,)


def refuse_unbounded(layer: AttentionLayer | LatentLayer, config: GeoScaleConfig) -> None:
    """Raise ValueError, in one sentence naming layer and flag, where the bounds do not cover `layer` under `config`."""
    unnormalised = isinstance(layer.norm, IdentityOp) or layer.config.normalization not in ("LayerNorm", "RMSNorm")
    for unsupported, what in (
        *layer.obstacles(),
        (unnormalised, "attention whose input is not normalised by LayerNorm or RMSNorm"),
    ):
        if unsupported:
            raise ValueError(f"layer {layer.number}: {what} has no certified bound yet, so --geoscale-recipe must be "
                             "delayed, current or none")
    if isinstance(layer, LatentLayer):
        for flag, value, other in (
            ("--geoscale-estimator", config.estimator, "gram"), ("--geoscale-granularity", config.granularity, "head")
        ):
            if value != other:
                raise ValueError(f"layer {layer.number}: {flag} {value} is not for --multi-latent-attention, whose "
                                 f"heads have no query-key matrix of one input: use {flag} {other}")
