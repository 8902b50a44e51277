"""Bounds on the attention logits S_ij = c (A xhat_i + a)^T R (B xhat_j + b) of each query head (THEORY 3 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_geoscale.bounds.rotary import (
    Balance,
    balance,
    pair_norms,
    pair_vector_norms,
    partial_bound,
    rotary_pairs,
    split_bound,
)
from megatron_geoscale.spectral.gram import GRAM_ROUNDING, certified_norm_of_grams, per_query_head, trace
from megatron_geoscale.spectral.moments import Moments


def certified_logit_bound(
    moments: Moments,
    *,
    softmax_scale: float,
    rotary_dim: int,
    interleaved: bool = False,
    input_norm: float,
    split_keys: bool = False,
) -> tuple[Tensor, Tensor]:
    """(sigma_bound, logit_bound), [n_q] float64 each: |S_ij| <= logit_bound for all inputs and positions (THEORY 3).

    logit_bound = c (m^2 sigma_bound + m (||A^T R b|| + ||B^T R^T a||) + |a^T R b|), m = `input_norm` (see
    `spectral.input_norm_bound`), c = `softmax_scale`, every term at its worst rotation. Without RoPE (rotary_dim 0) all
    terms are exact. split_keys: the rotated and the unrotated rows of a key have inputs of their own, each of length m
    (multi-latent attention). ValueError for a rotary_dim that does not fit.
    """
    g_q, g_k = moments.q, moments.k
    if split_keys:
        r = slice(0, rotary_dim)
        rotated = balance(g_q[:, r, r], g_k[:, r, r], rotary_dim=rotary_dim, interleaved=interleaved)
        sigma_bound = split_bound(rotated, g_q, g_k, rotary_dim)
        # Each bias term is a sum over rotated and unrotated rows already.
        extra = _bias_terms(moments, rotated, rotary_dim, interleaved, input_norm)
        return sigma_bound, softmax_scale * (input_norm**2 * sigma_bound + extra)
    balanced = balance(g_q, g_k, rotary_dim=rotary_dim, interleaved=interleaved) if rotary_dim else None
    if balanced is None:
        sigma_bound = certified_norm_of_grams(g_q, g_k)
    else:
        sigma_bound = partial_bound(balanced, g_q, g_k, rotary_dim)
    extra = _bias_terms(moments, balanced, rotary_dim, interleaved, input_norm)
    return sigma_bound, softmax_scale * (input_norm**2 * sigma_bound + extra)


def isotropic_logit_bound(
    sigma: Tensor,
    moments: Moments,
    *,
    alpha: float,
    softmax_scale: float,
    rotary_dim: int,
    interleaved: bool = False,
    input_norm: float,
) -> Tensor:
    """alpha c m^2 sigma plus the bias terms of `certified_logit_bound`, which alpha does not touch (THEORY 4): [n_q].

    sigma: [n_q] or anything that broadcasts to it, by any estimator. Holds with the probability for which alpha was
    made (`bounds.alpha`) if tokens are isotropic and sigma is not too small.
    """
    bound = (softmax_scale * alpha * input_norm**2) * sigma.to(torch.float64).expand(len(moments.q))
    if moments.q_bias is None and moments.k_bias is None:
        return bound
    balanced = balance(moments.q, moments.k, rotary_dim=rotary_dim, interleaved=interleaved) if rotary_dim else None
    return bound + softmax_scale * _bias_terms(moments, balanced, rotary_dim, interleaved, input_norm)


def _bias_terms(
    moments: Moments, balanced: Balance | None, rotary_dim: int, interleaved: bool, input_norm: float
) -> Tensor:
    """m (||A^T R b|| + ||B^T R^T a||) + |a^T R b| at the worst rotation R: [n_q]."""
    g_q, g_k = moments.q, per_query_head(moments.k, moments.q)
    a = moments.q_bias
    b = None if moments.k_bias is None else per_query_head(moments.k_bias, g_q)
    pairs = rotary_pairs(g_q.shape[-1], rotary_dim, interleaved=interleaved, device=g_q.device)
    terms = g_q.new_zeros(g_q.shape[0])
    if b is not None:
        norms = None if balanced is None else (balanced.plain_query, balanced.query, 1.0 / balanced.scale)
        terms = terms + input_norm * _cross_term(g_q, b, pairs, norms)
    if a is not None:
        norms = None if balanced is None else (balanced.plain_key, balanced.key, balanced.scale)
        terms = terms + input_norm * _cross_term(g_k, a, pairs, norms)
    if a is not None and b is not None:
        rotated = (pair_vector_norms(a, pairs) * pair_vector_norms(b, pairs)).sum(-1)
        terms = terms + rotated + (a[:, rotary_dim:] * b[:, rotary_dim:]).sum(-1).abs()
        # a.b may cancel: its rounding is relative to the lengths.
        terms = terms + GRAM_ROUNDING * torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return terms * (1.0 + GRAM_ROUNDING)


def _cross_term(
    g: Tensor, bias: Tensor, pairs: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    """max over R of ||W^T R bias||, bounded from the Gram matrix g of W: [n]. norms: (||W||, ||D W||, D^-1).

    The unrotated rows are exact; for the rotated rows the least of ||W|| ||bias||, ||D W|| ||D^-1 bias|| and the sum
    over RoPE pairs of ||W_p|| ||bias_p||, which is the best of them where a few pairs carry the bias.
    """
    rotary_dim = 2 * len(pairs[0])
    fixed, g_fixed = bias[:, rotary_dim:], g[:, rotary_dim:, rotary_dim:]
    exact = (fixed * (g_fixed @ fixed[:, :, None])[:, :, 0]).sum(-1).clamp_min(0.0)
    term = (exact + GRAM_ROUNDING * trace(g_fixed) * fixed.square().sum(-1)).sqrt()
    if norms is None:
        return term
    plain_norm, scaled_norm, inverse_scale = norms
    rotated = bias[:, :rotary_dim]
    by_pairs = (pair_norms(g, pairs) * pair_vector_norms(bias, pairs)).sum(-1)
    plain = plain_norm * torch.linalg.vector_norm(rotated, dim=-1)
    balanced = scaled_norm * torch.linalg.vector_norm(rotated * inverse_scale[:, :rotary_dim], dim=-1)
    return term + torch.minimum(by_pairs, torch.minimum(plain, balanced))
