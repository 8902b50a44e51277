"""All bounds of a batch of layers by the config's recipe: what their rows of the table are made from."""

from __future__ import annotations

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
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.spectral.moments import Moments

BATCH_BYTES = 256 << 20
"""Of Gram matrices that are bounded together; bounding them takes about ten times as much at its peak."""


def layers_at_once(num_heads: int, head_dim: int) -> int:
    """How many layers of `num_heads` query heads are bounded together: `BATCH_BYTES` of Gram matrices, at least one."""
    matrices = 4 * num_heads  # of Q, K, V and, for an isotropic bound, of Q with K; fewer under GQA
    return max(1, BATCH_BYTES // (8 * head_dim**2 * matrices))


def bound_heads(
    geometry: AttentionGeometry,
    moments: Moments,
    sigma: torch.Tensor,
    head_norms: tuple[HeadNorm, HeadNorm] | None,
    config: GeoScaleConfig,
    *,
    num_layers: int,
) -> dict[str, torch.Tensor]:
    """The columns of `table.BOUNDS` for one layer's heads, or for those of several layers of equal `geometry`.

    float64, each of as many entries as fits its column: [n_q], [n_kv] or one a layer, in the order of the layers.
    sigma: the estimator's, [n_q]. head_norms: of queries and keys, where they are normalised, gains [layers, head_dim].
    `num_layers` of the whole model: what an isotropic bound is to cover at once.
    """
    rotary: dict[str, Any] = {"rotary_dim": geometry.rotary_dim, "interleaved": geometry.rotary_interleaved}
    constants = {"softmax_scale": geometry.softmax_scale, "input_norm": geometry.input_norm}
    entry_norm = length_norm = geometry.input_norm
    # (token, head, layer) triples of one sequence; entries are those of Q, K and V (THEORY 4, 5.1).
    num_tokens = num_layers * geometry.num_heads * geometry.max_sequence_length
    num_pairs = num_tokens * geometry.max_sequence_length
    shape, delta = (geometry.hidden_size, geometry.head_dim), config.failure_probability
    # Alpha is about normalised tokens, which the norms of the latents hide: their bounds are certified by any recipe.
    recipe = "certified" if geometry.latent else config.recipe
    split_at = geometry.rotary_dim if geometry.latent else 0
    if recipe == "paper":
        entry_norm = isotropic_input_norm(
            geometry.hidden_size, num_entries=3 * num_tokens * geometry.head_dim, delta=delta
        )
        rank_aware = alpha.rank_aware(*shape, num_pairs=num_pairs, num_tokens=num_tokens, delta=delta)
        sigma_bound = sigma
        logit_bound = isotropic_logit_bound(sigma, moments, alpha=rank_aware, **constants, **rotary)
        logit_worst = isotropic_logit_bound(sigma, moments, alpha=1.0, **constants, **rotary)
    else:
        sigma_bound, logit_worst = certified_logit_bound(moments, split_keys=geometry.latent, **constants, **rotary)
        logit_bound = logit_worst
    if recipe == "rank_aware":
        isotropic = isotropic_constants(*shape, num_pairs=num_pairs, num_tokens=num_tokens, delta=delta)
        entry_norm, length_norm = isotropic.entry_norm, isotropic.length_norm
        logit_bound = rank_aware_logit_bound(
            moments,
            certified=(sigma_bound, logit_worst),
            constants=isotropic,
            hidden_size=geometry.hidden_size,
            **constants,
        )
    m = moments
    bounds = {
        "sigma": sigma,
        "sigma_bound": sigma_bound,
        "logit_bound": logit_bound,
        "logit_worst": logit_worst,
        "amax_q": entry_bound(m.q, m.q_bias, input_norm=entry_norm, **rotary),
        "amax_k": entry_bound(m.k, m.k_bias, input_norm=entry_norm, **rotary),
        "amax_v": entry_bound(m.v, m.v_bias, input_norm=entry_norm, rotary_dim=0),
        "query_norm": vector_norm_bound(m.q, m.q_bias, input_norm=length_norm),
        "key_norm": vector_norm_bound(m.k, m.k_bias, input_norm=length_norm, split_at=split_at),
        "value_norm": vector_norm_bound(m.v, m.v_bias, input_norm=length_norm),
        "offset_size": m.offset_size,
        "softmax_scale": torch.full_like(m.offset_size, geometry.softmax_scale),
    }
    return bounds if head_norms is None else bounds | _normalised_bounds(geometry, head_norms, rotary)


def _normalised_bounds(
    geometry: AttentionGeometry, norms: tuple[HeadNorm, HeadNorm], rotary: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The columns that QK-norm decides, certified under every recipe: alpha is about inputs of W_Q and W_K, which its
    norms hide. V's stay, and so does sigma, ||A^T B|| of the projections, from which nothing is bounded here."""
    query, key = norms
    sigma_bound, logit_bound = normalised_logit_bound(query, key, softmax_scale=geometry.softmax_scale, **rotary)
    return {
        "sigma_bound": sigma_bound,
        "logit_bound": logit_bound,
        "logit_worst": logit_bound,
        "amax_q": normalised_entry_bound(query, **rotary),
        "amax_k": normalised_entry_bound(key, **rotary),
        "query_norm": normalised_vector_norm_bound(query),
        "key_norm": normalised_vector_norm_bound(key),
    }
