"""Norms and bounds for weights of any shape, kind and dtype: they hold for the values that the weights store."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_geoscale.bounds import certified_logit_bound, entry_bound, rotary_norm_bound, vector_norm_bound
from megatron_geoscale.bounds.rotary import rotary_pairs
from megatron_geoscale.spectral import (
    Moments,
    Projections,
    certified_norm,
    gram,
    gram_norm,
    input_norm_bound,
    spectral_norm,
    trace_power_bound,
)
from megatron_geoscale.spectral.gram import (
    GRAM_ROUNDING,
    SQUARINGS,
    _trace_powers,
    norm_of_grams,
    trace_power_interval,
    unit_trace,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["random", "low-rank", "cancelling", "spiked", "tied", "zero", "tiny", "huge"]
EXACT = 1 - 1e-13  # the oracle's own rounding


def make(kind, n_q, n_kv, d_h, d, dtype, seed):
    """(w_q, w_k) of the kind, as stored."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w_q, w_k = draw(n_q, d_h, d), draw(n_kv, d_h, d)
    if kind == "low-rank":
        w_q, w_k = draw(n_q, d_h, 1) @ draw(n_q, 1, d), draw(n_kv, d_h, 1) @ draw(n_kv, 1, d)
    elif kind == "cancelling":  # queries and keys in nearly orthogonal parts of the head
        basis, half = torch.linalg.qr(draw(d_h, d_h))[0], d_h // 2
        w_q, w_k = basis[:, :half] @ draw(n_q, half, d), basis[:, half:] @ draw(n_kv, d_h - half, d) + 1e-4 * w_k
    elif kind == "spiked":
        w_q = w_q + 30 * draw(n_q, d_h, 1) @ draw(n_q, 1, d)
        w_k = w_k + 30 * draw(n_kv, d_h, 1) @ draw(n_kv, 1, d)
    elif kind == "tied":
        w_q = w_k.repeat_interleave(n_q // n_kv, 0)
    elif kind == "zero":
        w_q = torch.zeros_like(w_q)
    half_precision = dtype == torch.float16
    size = {"tiny": 1e-5 if half_precision else 1e-30, "huge": 1e3 if half_precision else 1e30}.get(kind, 1.0)
    return (w_q * size).to(dtype), (w_k * size).to(dtype)


@st.composite
def heads(draw, even=False):
    """(w_q, w_k) of any kind; with an even head dimension if RoPE is to rotate some of it."""
    n_kv, d_h = draw(st.integers(1, 2)), draw(st.integers(1, 8)) * 2 if even else draw(st.integers(1, 16))
    shape = n_kv * draw(st.integers(1, 3)), n_kv, d_h, draw(st.integers(1, 24))
    return make(draw(st.sampled_from(KINDS)), *shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9999)))


@st.composite
def rotated_heads(draw):
    """(w_q, w_k, layout of RoPE): none of a head, part of it or all."""
    w_q, w_k = draw(heads(even=True))
    rotary_dim = 2 * draw(st.integers(0, w_q.shape[1] // 2))
    return w_q, w_k, {"rotary_dim": rotary_dim, "interleaved": draw(st.booleans())}


def shared(w_k, w_q):
    return w_k.double().repeat_interleave(len(w_q) // len(w_k), 0)


def dense(w_q, w_k):
    return torch.linalg.svdvals(w_q.double().mT @ shared(w_k, w_q))[:, 0]


def product_of_norms(w_q, w_k):
    return torch.linalg.matrix_norm(w_q.double(), 2) * torch.linalg.matrix_norm(shared(w_k, w_q), 2)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(heads())
def test_norms_against_a_dense_svd(weights):
    sigma, scale = dense(*weights), product_of_norms(*weights)
    assert ((gram_norm(*weights) - sigma).abs() <= 1e-7 * scale).all()
    assert (certified_norm(*weights) >= EXACT * sigma).all()
    assert (certified_norm(*weights) <= sigma + 1e-4 * scale).all()
    assert (trace_power_bound(*weights) >= EXACT * sigma).all()
    grams = [gram(w) for w in weights]
    for power in (1, 4, 32, 1 << SQUARINGS):
        lower, upper = trace_power_interval(*grams, power=power)
        assert (EXACT * lower <= sigma + 1e-14 * scale).all() and (upper >= EXACT * sigma).all()
    for w, g in zip(weights, grams, strict=True):
        unit, traces = unit_trace(g)
        largest = torch.linalg.matrix_norm(w.double(), 2).square()
        lower, upper = (end.exp() * traces for end in _trace_powers(unit, GRAM_ROUNDING, SQUARINGS))
        assert (EXACT * lower <= largest).all() and (upper >= EXACT * largest).all()
        assert (upper <= largest * (1 + 5e-6)).all()


def orthonormal(n, d_h, d):
    return torch.linalg.qr(torch.randn(n, d, d_h, dtype=torch.float64))[0].mT


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


SPECTRA = {  # what squaring instead of LAPACK, as other devices do, must come near to: heads that do not cancel
    "random": lambda d_h, d: (normal(3, d_h, d), normal(3, d_h, d)),
    "wide": lambda d_h, d: (normal(3, d_h, 8 * d), normal(3, d_h, 8 * d)),
    "flat": lambda d_h, d: (orthonormal(3, d_h, d),) * 2,
    "flat, apart": lambda d_h, d: (orthonormal(1, d_h, d_h), orthonormal(1, d_h, d_h)),
    "decaying": lambda d_h, d: (normal(3, d_h, d) * torch.linspace(0, -8, d_h).double().exp()[:, None],) * 2,
    "rank 1": lambda d_h, d: ((normal(1, d_h, 1) @ normal(1, 1, d)),) * 2,
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("d_h", [1, 2, 8, 64, 128])
def test_squaring_is_within_5e_6_of_the_norm_and_never_below(kind, d_h):
    torch.manual_seed(d_h)
    w_q, w_k = SPECTRA[kind](d_h, 2 * d_h)
    # ||A^T B|| = ||R_A R_B^T||, R the triangles of the QR decompositions of A^T and B^T.
    triangles = [torch.linalg.qr(w.mT)[1] for w in (w_q, w_k)]
    sigma = torch.linalg.matrix_norm(triangles[0] @ triangles[1].mT, 2)
    lower, upper = trace_power_interval(gram(w_q), gram(w_k), power=1 << SQUARINGS)
    assert (sigma * EXACT <= upper).all() and (upper <= sigma * (1 + 5e-6)).all()
    assert (lower <= sigma / EXACT).all()
    torch.testing.assert_close(norm_of_grams(gram(w_q), gram(w_k)), sigma, rtol=1e-9, atol=0.0)


def test_squaring_bounds_a_head_that_cancels():
    for overlap in (0.0, 1e-8, 1e-4, 1e-2):
        torch.manual_seed(0)
        basis = torch.linalg.qr(normal(32, 32))[0]
        w_q, w_k = basis[:, :16] @ normal(1, 16, 64), (basis[:, 16:] + overlap * basis[:, :16]) @ normal(1, 16, 64)
        lower, upper = trace_power_interval(gram(w_q), gram(w_k), power=1 << SQUARINGS)
        assert lower <= dense(w_q, w_k) + 1e-14 * product_of_norms(w_q, w_k)
        assert EXACT * dense(w_q, w_k) <= upper <= 2 * product_of_norms(w_q, w_k)


def turn(w, angles, layout):
    """R w for angles [k, pairs]: w [n, d_h, d] -> [k, n, d_h, d]."""
    first, second = rotary_pairs(w.shape[1], layout["rotary_dim"], interleaved=layout["interleaved"])
    cos, sin = angles.cos()[:, None, :, None], angles.sin()[:, None, :, None]
    one, two = w[:, first], w[:, second]
    turned = torch.stack([one * cos - two * sin, two * cos + one * sin], dim=3).flatten(2, 3)
    rows = torch.stack([first, second], dim=1).flatten()
    order = torch.cat([rows, torch.arange(len(rows), w.shape[1])]).argsort()
    rest = w[:, len(rows) :].expand(len(angles), *w[:, len(rows) :].shape)
    return torch.cat([turned, rest], dim=2)[:, :, order]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rotated_heads(), st.integers(0, 9999))
def test_the_rotary_bound_holds_at_angles_found_by_ascent(case, seed):
    w_q, w_k, layout = case
    bound, scale = rotary_norm_bound(w_q, w_k, **layout), product_of_norms(w_q, w_k)
    assert (bound <= scale * (1 + 1e-8)).all() or layout["rotary_dim"] == 0
    # On unit weights, so that gradients are of order one. ||A^T R B|| = ||R_A^T' R B R_B'|| with the triangles of A, B.
    unit = scale.where(scale > 0, torch.ones_like(scale))
    q, k = w_q.double(), shared(w_k, w_q)
    size = q.abs().amax().clamp_min(1e-300), k.abs().amax().clamp_min(1e-300)
    q, k, unit = q / size[0], k / size[1], unit / size[0] / size[1]
    g = torch.Generator().manual_seed(seed)
    angles = 6.3 * torch.rand(16, layout["rotary_dim"] // 2, generator=g, dtype=torch.float64)
    angles[0] = 0.0
    angles.requires_grad_()
    worst = torch.zeros_like(bound)
    for _ in range(8 if layout["rotary_dim"] else 1):
        product = q.mT @ turn(k, angles, layout) + 0.0
        u, s, vh = torch.linalg.svd(product.detach(), full_matrices=False)
        worst = torch.maximum(worst, s[..., 0].amax(0))
        if layout["rotary_dim"]:
            value = (u[..., :, 0] * (product @ vh[..., 0, :, None])[..., 0]).sum(-1) / unit
            (gradient,) = torch.autograd.grad(value.sum(), angles)
            angles = (angles + 2.0 * gradient).detach().requires_grad_()
    assert (bound >= EXACT * worst * size[0] * size[1]).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rotated_heads(), st.sampled_from([0.0, 0.1, 100.0]), st.integers(0, 9999))
def test_bounds_of_logits_and_entries_hold_for_tokens(case, bias, seed):
    """Logits in float64 from the stored weights; tokens along the singular vectors, along rows, and random."""
    w_q, w_k, layout = case
    g = torch.Generator().manual_seed(seed)
    d_h, d = w_q.shape[1:]
    a, b = ((torch.randn(len(w), d_h, generator=g) * bias * w.float().abs().amax()).double() for w in (w_q, w_k))
    offsets = (a, b) if bias else (None, None)
    m, c = input_norm_bound(d), 0.3
    moments = Moments.of(Projections(w_q.double(), offsets[0], w_k.double(), offsets[1], w_k.double(), offsets[1]))
    _, bound = certified_logit_bound(moments, softmax_scale=c, input_norm=m, **layout)
    angles = 6.3 * torch.rand(8, layout["rotary_dim"] // 2, generator=g, dtype=torch.float64)
    for head in range(len(w_q)):
        group = head * len(w_k) // len(w_q)
        q, k = w_q[head].double(), w_k[group].double()
        u, _, vh = torch.linalg.svd(q.T @ k)
        tokens = torch.cat([u.T, vh, q, k, torch.randn(32, d, generator=g, dtype=torch.float64)])
        length = torch.linalg.vector_norm(tokens / tokens.abs().amax(-1, keepdim=True).clamp_min(1e-300), dim=-1)
        tokens = tokens / tokens.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        tokens = m * tokens[length > 0] / length[length > 0, None]
        query, key = (tokens @ q.T + a[head]).T[None], (tokens @ k.T + b[group]).T[None]
        turned = turn(key, angles, layout)[:, 0]
        assert (c * query[0].T @ turned).abs().max() <= bound[head] / EXACT
        for vectors, grams, offset, index in (
            (turn(query, angles, layout)[:, 0], moments.q, offsets[0], head), (turned, moments.k, offsets[1], group)
        ):
            assert vectors.abs().max() <= entry_bound(grams, offset, input_norm=m, **layout)[index] / EXACT
            longest = torch.linalg.vector_norm(vectors, dim=1).max()
            assert longest <= vector_norm_bound(grams, offset, input_norm=m)[index] / EXACT


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rotated_heads(), st.integers(2, 4), st.booleans(), st.integers(0, 9999))
def test_layers_bounded_together_are_the_layers_alone_bit_for_bit(case, layers, biased, seed):
    w_q, w_k, layout = case
    g = torch.Generator().manual_seed(seed)
    alone = []
    for number in range(layers):
        q, k = (w.double() * (1.0 + number) + w.double().flip(0) * number for w in (w_q, w_k))
        a, b = (torch.randn(w.shape[:2], generator=g).double() if biased else None for w in (q, k))
        alone.append(Moments.of(Projections(q, a, k, b, k, b), with_cross=True))

    def columns(m):
        constants = {"softmax_scale": 0.3, "input_norm": math.sqrt(w_q.shape[-1])}
        yield norm_of_grams(m.q, m.k)
        yield from certified_logit_bound(m, **constants, **layout)
        yield entry_bound(m.q, m.q_bias, input_norm=1.0, **layout)
        yield vector_norm_bound(m.k, m.k_bias, input_norm=1.0)
        yield from trace_power_interval(m.q, m.k, power=32)

    together = Moments.cat(alone)
    for field in ("q", "k", "cross", "q_bias"):
        parts = [getattr(m, field) for m in alone]
        assert parts[0] is None or torch.equal(getattr(together, field), torch.cat(parts))
    for joined, *parts in zip(columns(together), *map(columns, alone), strict=True):
        assert torch.equal(joined, torch.cat(parts))


def test_the_plain_product_is_never_beaten_by_rounding():
    """Balanced never looser than D = I, of heads where D = I is the best there is."""
    w = orthonormal(4, 8, 16)
    bound = rotary_norm_bound(w, w, rotary_dim=8)
    assert (bound <= spectral_norm(w) * spectral_norm(w) * (1 + 1e-8)).all()
