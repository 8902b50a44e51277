"""The certified logit bound against three searches, for head dimensions 1 to 256, real RoPE tables and all positions.

Everything is float64. A search works on all heads, all pairs of positions and many starts at once; positions are
enumerated as distances, which is all that a rotation depends on.
"""

import math

import pytest
import torch

from megatron_geoscale.bounds import certified_logit_bound
from megatron_geoscale.spectral import Moments, Projections, input_norm_bound

LENGTH, SCALE = 24, 0.35


class Heads:
    """n_q query heads over one key group, with or without biases and RoPE."""

    def __init__(self, d_h, d, *, n_q=3, bias=0.0, rotary_dim=0, interleaved=False, kind="random"):
        g = torch.Generator().manual_seed(d_h + 7 * rotary_dim)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.q, self.k, self.d = draw(n_q, d_h, d), draw(1, d_h, d), d
        if kind == "cancelling":
            basis, half = torch.linalg.qr(draw(d_h, d_h))[0], d_h // 2
            self.q, self.k = basis[:, :half] @ draw(n_q, half, d), basis[:, half:] @ draw(1, d_h - half, d)
            self.k = self.k + 1e-3 * draw(1, d_h, d)
        elif kind == "spiked":
            self.q, self.k = self.q + 30 * draw(n_q, d_h, 1) @ draw(n_q, 1, d), self.k + draw(1, d_h, 1) @ draw(1, 1, d)
        elif kind == "1e-30":
            self.q, self.k = self.q * 1e-30, self.k * 1e-30
        elif kind == "1e+30":
            self.q, self.k = self.q * 1e30, self.k * 1e30
        elif kind == "zero":
            self.k = torch.zeros_like(self.k)
        a, b = (bias * draw(n, d_h) if bias else None for n in (n_q, 1))
        self.a, self.b = (0.0 if offset is None else offset[:, None] for offset in (a, b))
        moments = Moments.of(Projections(self.q, a, self.k, b, self.k, b))
        layout = {"rotary_dim": rotary_dim, "interleaved": interleaved}
        constants = {"softmax_scale": SCALE, "input_norm": input_norm_bound(d)}
        self.bound = certified_logit_bound(moments, **constants, **layout)[1]
        self.rotations = torch.stack([rope(d_h, t, **layout) for t in range(LENGTH if rotary_dim else 1)])

    def logits(self, x, y):
        """c (A x + a)^T R_t (B y + b) for every head and distance t: x, y [n_q, T, starts, d] -> [n_q, T, starts]."""
        query = torch.einsum("htsd,hcd->htsc", x, self.q) + (self.a if isinstance(self.a, float) else self.a[:, None])
        key = torch.einsum("htsd,cd->htsc", y, self.k[0]) + (self.b if isinstance(self.b, float) else self.b[:, None])
        return SCALE * torch.einsum("htsc,tce,htse->hts", query, self.rotations, key)

    def on_sphere(self, x):
        """Tokens as the norm gives them: of length sqrt(d)."""
        size = x.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        x = x / size
        return math.sqrt(self.d) * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-300)

    def tokens(self, starts, seed):
        g = torch.Generator().manual_seed(seed)
        shape = len(self.q), len(self.rotations), starts, self.d
        return [self.on_sphere(torch.randn(shape, generator=g, dtype=torch.float64)) for _ in range(2)]


def rope(d_h, position, *, rotary_dim, interleaved):
    """RoPE's matrix at one position, base 10000, entry by entry."""
    matrix, pairs = torch.eye(d_h, dtype=torch.float64), rotary_dim // 2
    for pair in range(pairs):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        angle = -position * 10000.0 ** (-pair / pairs)
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def gradient_ascent(heads, steps=25, starts=4):
    """The largest |logit| of each head. A logit is linear in each token, so along its gradient one step, back onto the
    sphere, is the best that one token can do; the two take turns."""
    x, y = heads.tokens(starts, 0)
    best = torch.zeros_like(heads.bound)
    for step in range(steps):
        moving = (x, y)[step % 2].requires_grad_()
        logits = heads.logits(x, y)
        best = torch.maximum(best, logits.detach().abs().amax((1, 2)))
        (gradient,) = torch.autograd.grad((logits * logits.detach().sign()).sum(), moving)
        moved = heads.on_sphere(gradient)
        x, y = (moved, y.detach()) if step % 2 == 0 else (x.detach(), moved)
    return best


def random_search(heads, starts=64):
    return heads.logits(*heads.tokens(starts, 1)).abs().amax((1, 2))


def greedy_search(heads, rounds=60):
    """Coordinate by coordinate: a change is kept where it raises the logit of its head and position."""
    g = torch.Generator().manual_seed(2)
    tokens = heads.tokens(1, 3)
    best = heads.logits(*tokens).abs()
    for _ in range(rounds):
        side, coordinate = int(torch.randint(2, (), generator=g)), int(torch.randint(heads.d, (), generator=g))
        for factor in (-1.0, 1.0):
            tried = list(tokens)
            tried[side] = tokens[side].clone()
            tried[side][..., coordinate] += factor * 2.0
            tried[side] = heads.on_sphere(tried[side])
            found = heads.logits(*tried).abs()
            better = found > best
            tokens[side] = tried[side].where(better[..., None], tokens[side])
            best = torch.maximum(best, found)
    return best.amax((1, 2))


def attacks(heads):
    return [search(heads) for search in (gradient_ascent, random_search, greedy_search)]


DIMENSIONS = [(1, 16), (2, 16), (3, 16), (8, 24), (64, 48), (128, 48), (256, 64)]


@pytest.mark.parametrize(("d_h", "d"), DIMENSIONS)
@pytest.mark.parametrize("n_q", [1, 3])
def test_without_rope_and_bias_the_bound_is_within_5_percent_of_the_best_attack(d_h, d, n_q):
    heads = Heads(d_h, d, n_q=n_q)
    ascent, *baselines = attacks(heads)
    for best in (ascent, *baselines):
        assert (best <= heads.bound).all()
    assert (heads.bound <= 1.05 * ascent).all()
    assert all((best <= ascent).all() for best in baselines)


@pytest.mark.parametrize("kind", ["cancelling", "spiked", "1e-30", "1e+30", "zero"])
@pytest.mark.parametrize("d_h", [2, 16])
def test_so_it_is_for_every_kind_of_weights(kind, d_h):
    heads = Heads(d_h, 24, kind=kind)
    ascent, *baselines = attacks(heads)
    for best in (ascent, *baselines):
        assert (best <= heads.bound).all()
    assert (heads.bound <= 1.05 * ascent).all()


LAYOUTS = {"half-split": (1.0, False), "interleaved": (1.0, True), "partial": (0.5, False),
           "partial, interleaved": (0.5, True)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d_h", "d"), DIMENSIONS[1:])
@pytest.mark.parametrize("bias", [0.0, 1e3])
def test_under_rope_no_position_breaks_it(d_h, d, layout, bias):
    share, interleaved = LAYOUTS[layout]
    rotary_dim = max(2, int(d_h * share) // 2 * 2)
    heads = Heads(d_h, d, rotary_dim=rotary_dim, interleaved=interleaved, bias=bias)
    ascent, *baselines = attacks(heads)
    for best in (ascent, *baselines):
        assert (best <= heads.bound).all()
    # Dominant biases: the bound turns each pair to its worst, which no one position does.
    assert (heads.bound <= (16 if bias else 4) * ascent).all()


@pytest.mark.parametrize(("d_h", "d"), DIMENSIONS)
@pytest.mark.parametrize("bias", [0.1, 1e3])
def test_biases_small_and_dominant(d_h, d, bias):
    heads = Heads(d_h, d, bias=bias)
    ascent, *baselines = attacks(heads)
    for best in (ascent, *baselines):
        assert (best <= heads.bound).all()
    assert (heads.bound <= 1.5 * ascent).all()
