"""Tokens that make logits and entries of Q, K and V as large as the norm in front of attention lets them be.

For one token fixed, a logit S = (A x + a)^T R (B y + b) is largest on the sphere ||x|| = m where x points along the
gradient A^T R (B y + b). The attack therefore ascends by turns: each token jumps to the radius times its gradient, with
the sign that the rest of the logit has, so no step decreases |S|. It starts from random tokens at many distances, all
heads at once, and polishes each head's best. Entries are linear in one token: their gradient gives the maximum itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Side:
    """A x + a of n heads, ||x|| <= radius, and sum x = 0 if `centred`. float64: weight [n, d_h, d], offset [n, d_h]."""

    weight: Tensor
    offset: Tensor
    radius: float
    centred: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, many, d] -> [n, many, d_h]."""
        return x @ self.weight.mT + self.offset[:, None]

    def ascend(self, direction: Tensor) -> Tensor:
        """The x that makes |direction . (A x + a)| largest: direction [n, many, d_h] -> [n, many, d]."""
        gradient = direction @ self.weight
        if self.centred:
            gradient = gradient - gradient.mean(-1, keepdim=True)
        sign = torch.where((direction @ self.offset[..., None])[..., 0] < 0, -1.0, 1.0)
        length = torch.linalg.vector_norm(gradient, dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        return gradient * (self.radius * sign / length)[..., None]


def rotate(x: Tensor, positions: Tensor, rotary_dim: int) -> Tensor:
    """RoPE, half-split pairs: x [..., many, d_h] at positions [..., many]; the identity for rotary_dim 0."""
    half = rotary_dim // 2
    frequencies = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = positions[..., None] * frequencies
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attack_logits(
    query: Side, key: Side, *, rotary_dim: int, length: int, starts: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, distance) of each head's largest |q . k| that was found: [n, d], [n, d] and [n].

    Sides of the same n heads. Under RoPE the query is `distance` < `length` tokens behind the key; `starts` distances
    are tried, the small ones all, the others spread evenly by their logarithm.
    """
    n, d = len(key.weight), key.weight.shape[-1]
    few = torch.arange(starts // 2, dtype=torch.float64)
    distances = torch.cat([few, torch.logspace(0, 1, starts - len(few), base=length - 1.0, dtype=torch.float64)])
    distances = distances.round().clamp_max(length - 1.0).expand(n, -1)
    y = torch.randn(n, starts, d, generator=generator, dtype=torch.float64)
    if key.centred:
        y = y - y.mean(-1, keepdim=True)
    y = y * (key.radius / torch.linalg.vector_norm(y, dim=-1, keepdim=True))

    def ascend(y: Tensor, distances: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        x = y
        for _ in range(steps):
            x = query.ascend(rotate(key(y), -distances, rotary_dim))
            y = key.ascend(rotate(query(x), distances, rotary_dim))
        return x, y, (rotate(query(x), distances, rotary_dim) * key(y)).sum(-1).abs()

    _, y, found = ascend(y, distances, steps)
    best = found.topk(min(8, starts), dim=1).indices
    y = y.gather(1, best[..., None].expand(-1, -1, d))
    x, y, found = ascend(y, distances.gather(1, best), 10 * steps)
    head, one = torch.arange(n), found.argmax(dim=1)
    return x[head, one], y[head, one], distances.gather(1, best)[head, one]


def attack_entries(side: Side, *, rotary_dim: int, length: int, positions: int) -> tuple[Tensor, Tensor]:
    """(x, position) of each head's largest entry of R (A x + a) at `positions` evenly spread positions: [n, d], [n].

    The largest over the sphere itself, entry by entry; only positions are sampled.
    """
    n, d_h, _ = side.weight.shape
    places = torch.linspace(0, length - 1, positions if rotary_dim else 1, dtype=torch.float64).round()
    best = torch.full((n,), -1.0, dtype=torch.float64)
    tokens, where = side.weight.new_zeros(n, side.weight.shape[-1]), torch.zeros(n, dtype=torch.float64)
    for place in places:
        # Row r of R is what picks entry r of R q out of q.
        rows = rotate(torch.eye(d_h, dtype=torch.float64), place.expand(d_h), rotary_dim).mT.expand(n, -1, -1)
        x = side.ascend(rows)
        found, entry = (rows * side(x)).sum(-1).abs().max(dim=1)
        better = found > best
        best = torch.where(better, found, best)
        tokens = x[torch.arange(n), entry].where(better[:, None], tokens)
        where = place.where(better, where)
    return tokens, where
