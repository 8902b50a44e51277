"""Reads a multi-latent attention layer of megatron-core (`MLASelfAttention`) for its bounds (THEORY 3).

Queries come from a normalised latent (or from the layer's normalised input), the unrotated part of keys and the values
from another, and one rotated key part, shared by all heads, from the layer's normalised input itself. What lies before
a latent's norm bounds nothing and is read only to find what is not finite. Each input's radius, the root of its size,
is part of the projection that reads it, so to the bounds every input has a norm of 1 at most. The rotated rows come
first, as everywhere in this package; in Megatron they come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.weights import as_used, holds_norm, norm_constants
from megatron_geoscale.spectral.gram import gram, norm_of_grams
from megatron_geoscale.spectral.moments import Moments
from megatron_geoscale.spectral.projections import fold_norm, offset_size


@dataclass(frozen=True)
class LatentLayer:
    """One multi-latent attention layer of this rank; what `AttentionLayer` is for other self-attention."""

    number: int
    """Global layer number, from 1, all pipeline stages and chunks included."""
    attention: MLASelfAttention
    norm: torch.nn.Module
    """The norm of the layer's input."""
    max_sequence_length: int

    @property
    def config(self) -> MLATransformerConfig:
        return self.attention.config

    @cached_property
    def geometry(self) -> AttentionGeometry:
        """What the layer's bounds depend on besides its weights."""
        config, core = self.config, self.core_attention
        return AttentionGeometry(
            hidden_size=max(config.hidden_size, config.kv_lora_rank, config.q_lora_rank or 0),
            num_heads=config.num_attention_heads,
            num_groups=config.num_attention_heads,
            head_dim=config.qk_head_dim + config.qk_pos_emb_head_dim,
            value_dim=config.v_head_dim,
            softmax_scale=float(core.softmax_scale),
            max_sequence_length=self.max_sequence_length,
            rotary_dim=config.qk_pos_emb_head_dim,
            # Megatron sorts the even before the odd entries and then rotates half-split: pairs are (2i, 2i + 1).
            rotary_interleaved=True,
            rotary_scale=self.rotary_scale,
            logit_multiplier=float(getattr(core, "logit_multiplier", 1.0)),
            dropout=float(core.attention_dropout),
            unit_roundoff=torch.finfo(self.attention.linear_kv_up_proj.weight.dtype).eps / 2,
            fp8_projection=config.fp8 is not None,
            latent=True,
        )

    @property
    def rotary_scale(self) -> float:
        """What the cosines and sines of this layer's rotary embedding are multiplied by."""
        rotary = self.attention.rotary_pos_emb
        if not isinstance(rotary, YarnRotaryEmbedding):
            return 1.0
        return float(_yarn_get_concentration_factor(rotary.scaling_factor, rotary.mscale, rotary.mscale_all_dim))

    @property
    def core_attention(self) -> torch.nn.Module:
        return self.attention.core_attention

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.attention.linear_kv_up_proj.tp_group

    @property
    def num_local_heads(self) -> int:
        """Heads of this tensor-parallel rank."""
        return self.config.num_attention_heads // self.tp_group.size()

    @property
    def first_head(self) -> int:
        """Global number, from 0, of this rank's first head."""
        return self.tp_group.rank() * self.num_local_heads

    @property
    def device(self) -> torch.device:
        return self.attention.linear_kv_up_proj.weight.device

    def head_norms(self) -> None:
        """None: queries and keys are not normalised per head."""

    @torch.no_grad()
    def moments(self, *, with_cross: bool, look: Callable[..., None]) -> Moments:
        """Of this rank's heads, every input's radius folded in. `with_cross` and `look`, which serve alpha and power
        iteration, are not used. A collective where the shared key's rows are spread over tensor-parallel ranks."""
        config, attention = self.config, self.attention
        nope, rope, heads = config.qk_head_dim, config.qk_pos_emb_head_dim, self.num_local_heads
        hidden = self._constants(self.norm)
        if config.q_lora_rank is None:
            query_linear, query_input, spoilt = attention.linear_q_proj, hidden, 0.0
        else:
            query_linear = attention.linear_q_up_proj
            query_input = self._constants(self.query_norm)
            spoilt = _zero_if_finite(attention.linear_q_down_proj.weight)
        query = _Projection(as_used(query_linear.weight).view(heads, nope + rope, -1).roll(rope, dims=1), *query_input)
        query.scale_rotated(rope, self.rotary_scale)
        shared = _Projection(self._shared_key_rows()[None], *hidden)
        shared.scale_rotated(rope, self.rotary_scale)
        latent = _Projection(
            as_used(attention.linear_kv_up_proj.weight).view(heads, nope + config.v_head_dim, -1),
            *self._constants(self.key_value_norm),
        )

        blocks = latent.gram() + _zero_if_finite(attention.linear_kv_down_proj.weight)
        keys = blocks.new_zeros(heads, rope + nope, rope + nope)
        keys[:, :rope, :rope] = shared.gram()
        keys[:, rope:, rope:] = blocks[:, :nope, :nope]
        key_bias = value_bias = None
        if latent.offset is not None:
            key_bias = torch.cat([shared.offset.expand(heads, -1), latent.offset[:, :nope]], dim=1)
            value_bias = latent.offset[:, nope:]
        return Moments(
            q=query.gram() + spoilt,
            k=keys,
            v=blocks[:, nope:, nope:].contiguous(),
            q_bias=query.offset,
            k_bias=key_bias,
            v_bias=value_bias,
            cross=None,
            offset_size=torch.stack([query.offset_size, shared.offset_size, latent.offset_size]).amax().reshape(1),
        )

    @property
    def query_norm(self) -> torch.nn.Module:
        """Of the latent of queries, where there is one."""
        linear = self.attention.linear_q_up_proj
        return linear if holds_norm(linear) else self.attention.q_layernorm

    @property
    def key_value_norm(self) -> torch.nn.Module:
        """Of the latent of keys and values."""
        linear = self.attention.linear_kv_up_proj
        return linear if holds_norm(linear) else self.attention.kv_layernorm

    def _constants(self, norm: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        return norm_constants(norm, zero_centered=self.config.layernorm_zero_centered_gamma)

    def _shared_key_rows(self) -> torch.Tensor:
        """The rows of linear_kv_down_proj that make the rotated key: its last, [qk_pos_emb_head_dim, hidden size].

        TE's linear holds all rows on every rank; the local one spreads them over tensor-parallel ranks, and then the
        rows are summed from them, each rank adding its own to zeros: exact, in float32.
        """
        weight, rope = as_used(self.attention.linear_kv_down_proj.weight), self.config.qk_pos_emb_head_dim
        mine = weight[self._first_shared_row() :]
        if len(weight) == self.config.kv_lora_rank + rope:
            return mine
        rows = torch.zeros(rope, weight.shape[1], dtype=torch.float32, device=weight.device)
        before = max(0, self.tp_group.rank() * len(weight) - self.config.kv_lora_rank)
        rows[before : before + len(mine)] = mine.float()
        dist.all_reduce(rows, group=self.tp_group)
        return rows

    def _first_shared_row(self) -> int:
        """Number of the first row of this rank's linear_kv_down_proj that makes the rotated key; its size if none."""
        rows = len(self.attention.linear_kv_down_proj.weight)
        all_rows = self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim
        earlier = 0 if rows == all_rows else self.tp_group.rank() * rows
        return min(max(0, self.config.kv_lora_rank - earlier), rows)

    def projection_tensors(self) -> list[torch.Tensor]:
        """This rank's weights that Q, K and V are proportional to; those of the latents' down-projections are not."""
        attention = self.attention
        query = attention.linear_q_proj if self.config.q_lora_rank is None else attention.linear_q_up_proj
        shared = attention.linear_kv_down_proj.weight[self._first_shared_row() :]
        return [query.weight, attention.linear_kv_up_proj.weight, shared]

    def last_key_row(self) -> torch.Tensor:
        """The first row of this rank's last head's unrotated key: [kv_lora_rank]."""
        return self.attention.linear_kv_up_proj.weight[-(self.config.qk_head_dim + self.config.v_head_dim)]

    def obstacles(self) -> list[tuple[bool, str]]:
        """What would leave the layer without a bound, and whether it is there."""
        config = self.config
        norms = [self.key_value_norm] + ([] if config.q_lora_rank is None else [self.query_norm])
        return [
            (any(isinstance(norm, IdentityOp) for norm in norms), "--multi-latent-attention without --qk-layernorm"),
            (config.rotary_interleaved, "--multi-latent-attention with --rotary-interleaved"),
        ]


class _Projection:
    """A projection of heads [n, rows, inputs] and the norm before it: W norm(x) = A xhat + a, radius folded into A."""

    def __init__(self, weight: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor | None) -> None:
        folded, self.offset = fold_norm(weight, None, gain=gain, shift=shift)
        self.matrix = folded.mul_(math.sqrt(weight.shape[-1]))
        self.offset_size = offset_size(weight, None, shift=shift)

    def scale_rotated(self, rotary_dim: int, factor: float) -> None:
        """Multiply the first `rotary_dim` rows by the factor that RoPE's cosines and sines carry."""
        for rows in (self.matrix, self.offset):
            if rows is not None:
                rows[:, :rotary_dim] *= factor
        self.offset_size = self.offset_size * max(1.0, factor)

    def gram(self) -> torch.Tensor:
        return gram(self.matrix)


def _zero_if_finite(weight: torch.Tensor) -> torch.Tensor:
    """0, or NaN where an element is not finite: float64, 0-dim. float32's range cannot overflow the sum."""
    return 0.0 * as_used(weight).sum(dtype=torch.float64)


def latent_norm(moments: Moments, rotary_dim: int) -> torch.Tensor:
    """||A_r^T B_r|| + ||A_u^T B_u|| of rotated and unrotated rows, without rotation, [n_q]: sigma of such a layer,
    whose parts have inputs of their own."""
    r, u = slice(0, rotary_dim), slice(rotary_dim, None)
    rotated, unrotated = (norm_of_grams(moments.q[:, rows, rows], moments.k[:, rows, rows]) for rows in (r, u))
    return rotated + unrotated
