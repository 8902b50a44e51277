"""What the bounds read of a layer's projections: d_h-sized moments, made in one pass over the d-wide weights.

Layers of equal shape join by concatenation along the heads (`Moments.cat`): every bound takes n heads whose n_q / n_kv
query heads share a group, so a stack of layers is one call, and a head's digits do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megatron_geoscale.spectral.gram import check_shapes, gram
from megatron_geoscale.spectral.projections import Projections


@dataclass(frozen=True)
class Moments:
    """Second moments and offsets of the heads of one layer or several; float64."""

    q: Tensor
    """Gram matrices A A^T of the queries, [n_q, d_h, d_h]; `k` of the keys and `v` of the values, [n_kv, d_h, d_h]."""
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    """As in `Projections`: [n_q, d_h]; `k_bias`, `v_bias` [n_kv, d_h]; all None or none."""
    k_bias: Tensor | None
    v_bias: Tensor | None
    cross: Tensor | None
    """C = B A^T of each query head with its key group, [n_q, d_h, d_h]: tr M and tr M^2 of THEORY 4.5. None unless
    asked for."""
    offset_size: Tensor
    """[layers]: `Projections.offset_size`, 0 where there are no offsets."""

    @classmethod
    def of(cls, p: Projections, *, with_cross: bool = False) -> Moments:
        """Of one layer. ValueError if the shapes of queries and keys do not fit together."""
        check_shapes(p.q, p.k)
        size = p.q.new_zeros(1, dtype=torch.float64) if p.offset_size is None else p.offset_size.reshape(1)
        cross = cross_gram(p.q, p.k) if with_cross else None
        return cls(gram(p.q), gram(p.k), gram(p.v), p.q_bias, p.k_bias, p.v_bias, cross, size)

    @classmethod
    def cat(cls, layers: Sequence[Moments]) -> Moments:
        """Of all `layers`, which must have equal shapes; heads in the order of the layers."""
        if len(layers) == 1:
            return layers[0]
        joined: dict[str, Any] = {}
        for field in fields(cls):
            parts = [getattr(layer, field.name) for layer in layers]
            joined[field.name] = None if parts[0] is None else torch.cat(parts)
        return cls(**joined)


def cross_gram(w_q: Tensor, w_k: Tensor) -> Tensor:
    """C = B A^T of each query head with its key group: [n_q, d_h, d_h] float64, head by head as `spectral.gram`."""
    per_group = w_q.shape[0] // w_k.shape[0]
    crosses = w_q.new_empty((w_q.shape[0], w_q.shape[1], w_q.shape[1]), dtype=torch.float64)
    for head, (query, out) in enumerate(zip(w_q.detach(), crosses, strict=True)):
        torch.mm(w_k[head // per_group].detach().to(torch.float64), query.to(torch.float64).mT, out=out)
    return crosses
