"""Attention layers of full-size models: weights of one layer at a time, tokens at its input, its Q, K and V.

Weights, unless a Hugging Face directory gives them (`synthesise`): W_h = s_h Q diag(k^(-1/4)) G for every head h, with
G [d_h, d] of independent N(0, 1/d) entries and Q a random rotation of the head's d_h dimensions, so that singular
values decay as k^(-1/4). s_h makes the entries of queries and keys 2 in root mean square for isotropic tokens, 4 in
every eighth head, and those of values 0.5. Norm gains are 1 + 0.1 N(0, 1); GPT-2's shifts and biases 0.1 N(0, 1).

Tokens (`draw_tokens`): N(0, 1) entries, times exp(N(0, 1/4)) by channel, the same for all tokens of a layer; four
channels are 20 times as large; a direction that all tokens share is added with half their length; one token in 64 is
ten times as long before the norm. Far from isotropic, as real ones are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_geoscale.checkpoints.attention_weights import AttentionSource
from megatron_geoscale.spectral.projections import Projections, fold_norm, offset_size

LEARNING_RATE = 1e-4
"""What a learning-rate spike multiplies."""


@dataclass(frozen=True)
class Shape:
    """One model's attention."""

    layers: int
    hidden_size: int
    heads: int
    groups: int
    head_dim: int
    seq_length: int
    rotary: bool
    layer_norm: bool
    """LayerNorm with shift, and projections with bias; else RMSNorm without either."""


SHAPES = {
    "gpt2-xl": Shape(48, 1600, 25, 25, 64, 1024, rotary=False, layer_norm=True),
    "mistral-7b": Shape(32, 4096, 32, 8, 128, 4096, rotary=True, layer_norm=False),
    "llama2-13b": Shape(40, 5120, 40, 40, 128, 4096, rotary=True, layer_norm=False),
    "llama2-70b": Shape(80, 8192, 64, 8, 128, 4096, rotary=True, layer_norm=False),
}


@dataclass
class Weights:
    """One layer: w_q [n_q, d_h, d], w_k, w_v [n_kv, d_h, d]; biases [n, d_h] or None; gain, shift [d]; float32."""

    w: tuple[Tensor, Tensor, Tensor]
    b: tuple[Tensor | None, Tensor | None, Tensor | None]
    gain: Tensor
    shift: Tensor | None

    def projections(self) -> Projections:
        """Folded (THEORY 1)."""
        folded: list[Any] = []
        for weight, bias in zip(self.w, self.b):
            folded += fold_norm(weight, bias, gain=self.gain, shift=self.shift)
        if self.shift is None and self.b[0] is None:
            return Projections(*folded)
        sizes = [offset_size(weight, bias, shift=self.shift) for weight, bias in zip(self.w, self.b)]
        return Projections(*folded, offset_size=torch.stack(sizes).amax())

    def map(self, change: Callable[[Tensor], Tensor]) -> Weights:
        """`change` applied to the projections, their biases included."""
        w, b = tuple(map(change, self.w)), tuple(x if x is None else change(x) for x in self.b)
        return Weights(w, b, self.gain, self.shift)


def generator(*seed: object) -> torch.Generator:
    """A stream of its own for every purpose, layer and step; the same on every machine."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, seed)).encode()))


def synthesise(shape: Shape, layer: int, device: torch.device) -> Weights:
    """A trained-like layer, see the module's docstring; `layer` is its number, and the seed."""
    g = generator("weights", layer)
    decay = torch.arange(1, shape.head_dim + 1) ** -0.25
    decay = decay / decay.square().mean().sqrt()

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device)

    def heads(n: int, rms: float, louder: int) -> Tensor:
        w = draw(n, shape.head_dim, shape.hidden_size).mul_(shape.hidden_size**-0.5)
        rotation = torch.linalg.qr(draw(n, shape.head_dim, shape.head_dim))[0]
        size = torch.full((n, 1, 1), rms, device=device)
        size[::louder] *= 2
        return (rotation * decay.to(device) * size) @ w

    w = (heads(shape.heads, 2.0, 8), heads(shape.groups, 2.0, 8), heads(shape.groups, 0.5, shape.groups + 1))
    gain = 1 + 0.1 * draw(shape.hidden_size)
    if not shape.layer_norm:
        return Weights(w, (None, None, None), gain, None)
    b = tuple(0.1 * draw(len(x), shape.head_dim) for x in w)
    return Weights(w, b, gain, 0.1 * draw(shape.hidden_size))


def stored_layer(source: AttentionSource, shape: Shape, number: int, device: torch.device) -> Weights:
    """Layer `number` of a checkpoint. ValueError where it is not of this `shape`."""
    stored = source.layer(number)
    g = stored.geometry
    found = Shape(source.num_layers, g.hidden_size, g.num_heads, g.num_groups, g.head_dim, shape.seq_length,
                  rotary=g.rotary_dim == g.head_dim, layer_norm=stored.shift is not None)  # fmt: skip
    if found != shape or stored.head_norms is not None or g.rotary_scale != 1.0:
        raise ValueError(f"--weights holds {source.name} with attention of another shape than --shape: {found}")
    parts = [stored.query, stored.key, stored.value]
    w = tuple(weight.to(device, torch.float32) for weight, _ in parts)
    b = tuple(None if bias is None else bias.to(device, torch.float32) for _, bias in parts)
    shift = None if stored.shift is None else stored.shift.to(device, torch.float32)
    return Weights(w, b, stored.gain.to(device, torch.float32), shift)


def untrained(trained: Weights, layer: int) -> Weights:
    """The same shapes with N(0, 0.02) entries, gain 1, no offsets' size."""
    g = generator("untrained", layer)

    def change(x: Tensor) -> Tensor:
        return 0.02 * torch.randn(x.shape, generator=g).to(x) if x.dim() == 3 else torch.zeros_like(x)

    fresh = trained.map(change)
    fresh.gain = torch.ones_like(trained.gain)
    fresh.shift = None if trained.shift is None else torch.zeros_like(trained.shift)
    return fresh


def spiked_update(trained: Weights, shape: Shape, layer: int, factor: float) -> Weights:
    """`trained` after one Adam-like update at `factor` times the learning rate: every entry moves by it, along the sign
    of a gradient of rank 1, some gradient of the outputs times the direction that all tokens share."""
    g, shared = generator("update", layer), _channels(shape, layer)[1].sign()

    def change(x: Tensor) -> Tensor:
        rows = torch.randn(x.shape[:2], generator=g).sign().to(x)
        return x + factor * LEARNING_RATE * (rows[..., None] * shared.to(x) if x.dim() == 3 else rows)

    return trained.map(change)


def draw_tokens(shape: Shape, layer: int, step: int, tokens: int, device: torch.device) -> Tensor:
    """Hidden states [tokens, d] in front of the layer's norm, see the module's docstring."""
    fresh, (channels, shared) = generator("tokens", layer, step), _channels(shape, layer)
    h = torch.randn(tokens, shape.hidden_size, generator=fresh) * channels + shared
    h[torch.randperm(tokens, generator=fresh)[: max(1, tokens // 64)]] *= 10
    return h.to(device)


def _channels(shape: Shape, layer: int) -> tuple[Tensor, Tensor]:
    """Size of each channel, and the part that all tokens share: [d] each."""
    g, d = generator("channels", layer), shape.hidden_size
    channels = (0.5 * torch.randn(d, generator=g)).exp()
    channels[torch.randperm(d, generator=g)[:4]] *= 20
    shared = torch.randn(d, generator=g)
    return channels, 0.5 * channels.norm() / shared.norm() * shared


def qkv(shape: Shape, weights: Weights, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [tokens, 1, heads, d_h] as the layer computes them in float32, RoPE from position 0."""
    size = hidden.shape[-1:]
    x = F.layer_norm(hidden, size, eps=1e-5) if shape.layer_norm else F.rms_norm(hidden, size, eps=1e-5)
    x = x * weights.gain if weights.shift is None else x * weights.gain + weights.shift
    made = []
    for w, b in zip(weights.w, weights.b):
        y = (x @ w.flatten(0, 1).T).view(len(x), len(w), -1)
        made.append(y if b is None else y + b)
    if shape.rotary:
        half = shape.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(len(x), device=x.device)[:, None, None] * frequencies
        for index in (0, 1):
            first, second = made[index].split(half, dim=-1)
            turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
            made[index] = torch.cat(turned, dim=-1)
    return tuple(y[:, None] for y in made)
