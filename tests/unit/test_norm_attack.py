"""Tokens that try to break the certified logit bound: gradient ascent on the norm's sphere, and random tokens.

The attacked logits are computed from the layer's own weights (norm, projection, RoPE at a distance, scale) in float64,
not from the folded matrices the bound is made of.
"""

import math

import pytest
import torch

from megatron_geoscale.bounds import certified_logit_bound
from megatron_geoscale.spectral import Moments, Projections, fold_norm, input_norm_bound

D_H, D, SCALE = 8, 24, 0.35
U = 2.0**-24


def rotate(x, angles, rotary_dim, interleaved):
    """RoPE on the first rotary_dim entries of x [..., d_h] by angles [..., rotary_dim / 2]."""
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    a, b = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    left, right = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    turned = torch.stack([left, right], -1).flatten(-2) if interleaved else torch.cat([left, right], -1)
    return torch.cat([turned, rest], dim=-1)


class Layer:
    """One head with its norm: what the attack evaluates, and the bound that it attacks."""

    def __init__(self, kind, *, layer_norm=False, bias=0.0, rotary_dim=0, interleaved=False, seed=0):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.w_q, self.w_k = draw(D_H, D), draw(D_H, D)
        if kind == "low_rank":
            self.w_q, self.w_k = draw(D_H, 1) @ draw(1, D), draw(D_H, 2) @ draw(2, D)
        elif kind == "cancelling":  # queries and keys live in nearly orthogonal subspaces of the head
            basis, half = torch.linalg.qr(draw(D_H, D_H))[0], D_H // 2
            self.w_q = basis[:, :half] @ draw(half, D)
            self.w_k = basis[:, half:] @ draw(half, D) + 1e-3 * draw(D_H, D)
        elif kind == "spiked":
            self.w_q, self.w_k = self.w_q + 30 * draw(D_H, 1) @ draw(1, D), self.w_k + 30 * draw(D_H, 1) @ draw(1, D)
        elif kind == "tied":
            self.w_k = self.w_q.clone()
        elif kind == "mismatched":
            content = torch.linspace(0, -6, D_H, dtype=torch.float64).exp()[:, None]
            self.w_q, self.w_k = self.w_q * content, self.w_k * content.flip(0)
        elif kind == "tiny":
            self.w_q, self.w_k = self.w_q * 1e-30, self.w_k * 1e-30
        elif kind == "huge":
            self.w_q, self.w_k = self.w_q * 1e30, self.w_k * 1e30
        elif kind == "zero":
            self.w_q = torch.zeros_like(self.w_q)
        self.b_q, self.b_k = (bias * draw(D_H), bias * draw(D_H)) if bias else (None, None)
        self.gain = 1 + 0.3 * draw(D)
        self.shift = 0.3 * draw(D) if layer_norm else None
        self.layer_norm, self.rotary_dim, self.interleaved = layer_norm, rotary_dim, interleaved
        fold = {"gain": self.gain, "shift": self.shift}
        q, a = fold_norm(self.w_q[None], None if self.b_q is None else self.b_q[None], **fold)
        k, b = fold_norm(self.w_k[None], None if self.b_k is None else self.b_k[None], **fold)
        layout = {"rotary_dim": rotary_dim, "interleaved": interleaved}
        self.bound = certified_logit_bound(
            Moments.of(Projections(q, a, k, b, k, b)),
            softmax_scale=SCALE,
            input_norm=input_norm_bound(D),
            **layout,
        )[1].item()

    def project(self, h, w, b):
        x = h - h.mean(-1, keepdim=True) if self.layer_norm else h
        x = x / x.square().mean(-1, keepdim=True).clamp_min(1e-30).sqrt() * self.gain  # exactly on the norm's sphere
        x = x if self.shift is None else x + self.shift
        return x @ w.T + (0.0 if b is None else b)

    def logits(self, h_i, h_j, angles):
        q = self.project(h_i, self.w_q, self.b_q)
        k = self.project(h_j, self.w_k, self.b_k)
        return SCALE * (q * rotate(k, angles, self.rotary_dim, self.interleaved)).sum(-1)


def attack(layer, seed=0, starts=64, steps=150):
    """The largest |logit| that gradient ascent finds over both tokens and, under RoPE, the angles."""
    g = torch.Generator().manual_seed(seed)
    shape = (starts, D)
    h = [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    angles = 6.3 * torch.rand(starts, layer.rotary_dim // 2, generator=g, dtype=torch.float64)
    angles = angles.requires_grad_(layer.rotary_dim > 0)
    parameters = [*h, angles] if layer.rotary_dim else h
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    unit = layer.bound or 1.0  # ascend on a logit of order one, whatever the magnitude of the weights
    best = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / steps)
        logits = layer.logits(*h, angles)
        best = max(best, logits.abs().max().item())
        optimizer.zero_grad()
        (-(logits / unit).abs().sum()).backward()
        optimizer.step()
    return best


KINDS = ["random", "low_rank", "cancelling", "spiked", "tied", "mismatched", "tiny", "huge", "zero"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_without_rope_the_bound_holds_and_is_attained(kind, layer_norm):
    layer = Layer(kind, layer_norm=layer_norm, seed=KINDS.index(kind))
    best = attack(layer)
    assert best <= layer.bound
    if not layer_norm:  # the shift of a LayerNorm acts as a bias, whose terms need not be attained together
        assert layer.bound <= 1.05 * best or layer.bound == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotary_dim, interleaved", [(D_H, False), (D_H, True), (4, False)])
def test_under_rope_no_tokens_and_distance_break_the_bound(kind, rotary_dim, interleaved):
    layer = Layer(kind, rotary_dim=rotary_dim, interleaved=interleaved, seed=20 + KINDS.index(kind))
    best = attack(layer)
    assert best <= layer.bound
    assert layer.bound <= 4 * best or layer.bound == 0.0


@pytest.mark.parametrize("bias", [0.1, 10.0, 1e4])
@pytest.mark.parametrize("rotary_dim, interleaved", [(0, False), (D_H, False), (D_H, True), (4, True)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_biases_small_and_dominant(bias, rotary_dim, interleaved, layer_norm):
    layer = Layer("random", bias=bias, rotary_dim=rotary_dim, interleaved=interleaved, layer_norm=layer_norm, seed=50)
    best = attack(layer)
    assert best <= layer.bound <= 3 * best


def test_the_attack_finds_the_optimum_that_the_svd_knows():
    """The attack is worth something: without RoPE and biases it attains the top singular pair."""
    layer = Layer("random", seed=3)
    folded = [w * layer.gain for w in (layer.w_q, layer.w_k)]
    sigma = torch.linalg.matrix_norm(folded[0].T @ folded[1], 2).item()
    assert attack(layer) == pytest.approx(SCALE * D * sigma, rel=1e-3)
    # The top pair itself, computed rather than searched for, stays below the bound to the last digit.
    u, _, vh = torch.linalg.svd(folded[0].T @ folded[1])
    best = layer.logits(u[:, 0], vh[0], torch.zeros(0, dtype=torch.float64)).abs().item()
    assert best <= layer.bound <= best * (1 + 1e-6)


def test_random_tokens_at_every_position_of_a_sequence():
    """Half-split RoPE with base 10000 at all distances of a 512-token sequence: all pairs, one head."""
    layer = Layer("mismatched", rotary_dim=D_H, seed=70)
    length = 512
    tokens = torch.randn(length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    frequencies = 10000.0 ** (-torch.arange(D_H // 2, dtype=torch.float64) / (D_H // 2))
    angles = torch.arange(length)[:, None] * frequencies
    q = rotate(layer.project(tokens, layer.w_q, None), angles, D_H, False)
    k = rotate(layer.project(tokens, layer.w_k, None), angles, D_H, False)
    assert math.isfinite(layer.bound) and (SCALE * q @ k.T).abs().max() <= layer.bound


def test_the_plain_norm_is_broken_by_rotation():
    """THEORY 3: the bound for R = I, applied to a model with RoPE, is exceeded; the rotary bound is not."""
    broken = 0
    for seed in range(5):
        unrotated = Layer("cancelling", seed=seed)
        rotated = Layer("cancelling", rotary_dim=D_H, seed=seed)
        best = attack(rotated, starts=16, steps=60)
        assert best <= rotated.bound
        broken += best > 2 * unrotated.bound
    assert broken == 5
