"""All bounds of one layer by the config's recipe: what a row of the table is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_geoscale.bounds import alpha
from megatron_geoscale.bounds.isotropic import isotropic_constants, rank_aware_logit_bound
from megatron_geoscale.bounds.logits import certified_logit_bound, isotropic_logit_bound
from megatron_geoscale.bounds.qk_norm import (
    HeadNorm,
    normalised_entry_bound,
    normalised_logit_bound,
    normalised_vector_norm_bound,
)
from megatron_geoscale.bounds.tensors import entry_bound, isotropic_input_norm, vector_norm_bound
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.layers import AttentionLayer
from megatron_geoscale.spectral.gram import gram
from megatron_geoscale.spectral.projections import Projections


@dataclass(frozen=True)
class Grams:
    """Gram matrices of a layer's projections, float64 [heads or groups, d_h, d_h]: made once, read by every bound."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, projections: Projections) -> Grams:
        return cls(gram(projections.q), gram(projections.k), gram(projections.v))


def bound_layer(
    layer: AttentionLayer, p: Projections, grams: Grams, sigma: torch.Tensor, config: GeoScaleConfig, *, num_layers: int
) -> dict[str, torch.Tensor]:
    """The columns of `table.BOUNDS` for this rank's heads of one layer, float64 [heads], [groups] or 0-dim each.

    sigma: the estimator's, [heads] or 0-dim. `num_layers` of the model: what an isotropic bound is to cover at once.
    """
    rotary: dict[str, Any] = {"rotary_dim": layer.rotary_dim, "interleaved": layer.config.rotary_interleaved}
    constants = {"softmax_scale": layer.softmax_scale, "input_norm": layer.input_norm, "grams": (grams.q, grams.k)}
    entry_norm = length_norm = layer.input_norm
    # (token, head, layer) triples of one sequence; entries are those of Q, K and V (THEORY 4, 5.1).
    num_tokens = num_layers * layer.num_heads * layer.max_sequence_length
    delta = config.failure_probability
    if config.recipe == "paper":
        entry_norm = isotropic_input_norm(
            layer.hidden_size, num_entries=3 * num_tokens * layer.head_dim, delta=delta
        )
        rank_aware = alpha.rank_aware(
            layer.hidden_size,
            layer.head_dim,
            num_pairs=num_tokens * layer.max_sequence_length,
            num_tokens=num_tokens,
            delta=delta,
        )
        sigma_bound = sigma
        logit_bound = isotropic_logit_bound(sigma, p, alpha=rank_aware, **constants, **rotary)
        logit_worst = isotropic_logit_bound(sigma, p, alpha=1.0, **constants, **rotary)
    else:
        sigma_bound, logit_worst = certified_logit_bound(p, **constants, **rotary)
        logit_bound = logit_worst
    if config.recipe == "rank_aware":
        isotropic = isotropic_constants(
            layer.hidden_size,
            layer.head_dim,
            num_pairs=num_tokens * layer.max_sequence_length,
            num_tokens=num_tokens,
            delta=delta,
        )
        entry_norm, length_norm = isotropic.entry_norm, isotropic.length_norm
        logit_bound = rank_aware_logit_bound(
            p, (grams.q, grams.k), certified=(sigma_bound, logit_worst), constants=isotropic,
            softmax_scale=layer.softmax_scale, input_norm=layer.input_norm,
        )
    bounds = {
        "sigma": sigma,
        "sigma_bound": sigma_bound,
        "logit_bound": logit_bound,
        "logit_worst": logit_worst,
        "amax_q": entry_bound(p.q, p.q_bias, gram=grams.q, input_norm=entry_norm, **rotary),
        "amax_k": entry_bound(p.k, p.k_bias, gram=grams.k, input_norm=entry_norm, **rotary),
        "amax_v": entry_bound(p.v, p.v_bias, gram=grams.v, input_norm=entry_norm, rotary_dim=0),
        "query_norm": vector_norm_bound(p.q, p.q_bias, gram=grams.q, input_norm=length_norm),
        "key_norm": vector_norm_bound(p.k, p.k_bias, gram=grams.k, input_norm=length_norm),
        "value_norm": vector_norm_bound(p.v, p.v_bias, gram=grams.v, input_norm=length_norm),
        "offset_size": sigma.new_zeros(()) if p.offset_size is None else p.offset_size,
    }
    norms = layer.head_norms()
    return bounds if norms is None else bounds | _normalised_bounds(layer, norms, rotary)


def _normalised_bounds(
    layer: AttentionLayer, norms: tuple[HeadNorm, HeadNorm], rotary: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The columns that QK-norm decides, certified under every recipe: alpha is about inputs of W_Q and W_K, which its
    norms hide. V's stay, and so does sigma, ||A^T B|| of the projections, from which nothing is bounded here."""
    query, key = norms
    sigma_bound, logit_bound = normalised_logit_bound(query, key, softmax_scale=layer.softmax_scale, **rotary)
    return {
        "sigma_bound": sigma_bound,
        "logit_bound": logit_bound,
        "logit_worst": logit_bound,
        "amax_q": normalised_entry_bound(query, **rotary),
        "amax_k": normalised_entry_bound(key, **rotary),
        "query_norm": normalised_vector_norm_bound(query),
        "key_norm": normalised_vector_norm_bound(key),
    }
