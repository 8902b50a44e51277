"""Gram matrices and norm bounds from weights that no rank holds whole, by all-reduce (THEORY 2.1, 2.2).

How a weight is cut decides what can be known without moving it:
- along columns, the hidden dimension: W W^T is the sum of the local Gram matrices (`all_reduced_gram`), and everything
  that takes `grams=` is exact.
- along rows or flat (`FlatShard`): each entry of W W^T needs two rows, and a product that recovered them (W^T applied
  to a basis) would be the rows themselves, O(weights) of traffic. `row_sharded_grams` gives what adds up instead:
  W W^T for heads that lie on one rank, an upper bound for the others; `row_sharded_norm_bound` is the certificate.

Traffic is d_h^2 numbers per head, a fraction d_h / d of the weights, in one all-reduce for all layers of a stack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_geoscale.spectral.gram import GRAM_ROUNDING, certified_norm, gram, per_query_head, trace
from megatron_geoscale.spectral.sharded import FlatShard, all_reduced, check_pairs, check_shards


def all_reduced_gram(w_local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """W W^T per head of weights cut along the hidden dimension, by one all-reduce (THEORY 2.2).

    w_local: [n, d_h, d_local] or, stacked over layers, [layers, n, d_h, d_local], any columns of W, possibly none ->
    [(layers,) n, d_h, d_h] float64, for the `grams=` of `gram_norm`, `certified_norm` and the bounds, a layer at a
    time. ValueError for any other number of dimensions.
    """
    if w_local.dim() not in (3, 4):
        raise ValueError(f"Weights must be [(layers,) heads, head_dim, hidden], got shape {list(w_local.shape)}.")
    grams = gram(w_local.flatten(0, -3))
    return all_reduced(grams, group).view(*w_local.shape[:-1], w_local.shape[-2])


def row_sharded_grams(
    shards: Sequence[FlatShard], *, head_dim: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Sums of the ranks' own Gram matrices, and over how many ranks each head is spread (THEORY 2.2).

    shards: one per layer, of weights [n * head_dim, d] -> grams [layers, n, head_dim, head_dim] float64, parts
    [layers, n] float64; one all-reduce. With W = sum of W_i, W_i what rank i holds and zeros elsewhere, G = sum of
    W_i W_i^T is W W^T without the products across ranks:
    - parts = 1: G = W W^T;
    - always: W W^T <= parts * G as quadratic forms (Cauchy-Schwarz), and lambda_max(G_A G_B) grows with either, so
      every bound of a norm that takes `grams=` stays a bound with `parts[..., None, None] * grams`;
    - always: the diagonal of G is exact, for the elements are disjoint: squared norms of rows, and their sum ||W||_F^2.
    ValueError if the shards' shapes differ or do not hold whole heads.
    """
    n = check_shards(shards, head_dim)
    # The count travels with the matrices; sizes are equal on all ranks whatever they hold.
    packed = shards[0].flat.new_zeros((len(shards), n, head_dim * head_dim + 1), dtype=torch.float64)
    for shard, out in zip(shards, packed, strict=True):
        for head in shard.heads(head_dim):
            out[head, :-1] = gram(shard.dense(head * head_dim, (head + 1) * head_dim)[None]).flatten()
            out[head, -1] = 1.0
    packed = all_reduced(packed, group)
    return packed[..., :-1].reshape(len(shards), n, head_dim, head_dim), packed[..., -1]


def row_sharded_norm_bound(
    shards_q: Sequence[FlatShard],
    shards_k: Sequence[FlatShard],
    *,
    head_dim: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Upper bound of ||A_h^T B_g(h)||_2 from flat shards by two all-reduces: [layers, n_q] float64 (THEORY 2.2).

    It is `certified_norm` of the whole weights for a head that lies on one rank and whose key group does. With the head
    spread over p ranks and its group over p' it is about sqrt(p p') too large, more for heads that nearly cancel, and
    never above ||A_h||_F ||B_g||_F; it jumps when the number of ranks changes. What narrows it from below is
    `sharded_power_iteration`. ValueError as `row_sharded_grams`, and unless n_q is a multiple of the key groups.
    """
    check_pairs(shards_q, shards_k, head_dim)
    bounds = []
    per_layer = (row_sharded_grams(shards, head_dim=head_dim, group=group) for shards in (shards_q, shards_k))
    (grams_q, parts_q), (grams_k, parts_k) = per_layer
    for g_q, p_q, g_k, p_k in zip(grams_q, parts_q, grams_k, parts_k, strict=True):
        above = p_q[:, None, None] * g_q, p_k[:, None, None] * g_k
        frobenius = trace(g_q).sqrt() * per_query_head(trace(g_k).sqrt(), g_q)
        bounds.append(torch.minimum(certified_norm(*above, grams=above), frobenius * (1.0 + GRAM_ROUNDING)))
    return torch.stack(bounds)
