"""Bounds of normalised queries and keys: against a dense float64 search, and attacked through the real norm modules."""

import math

import pytest
import torch

from megatron_geoscale.bounds.qk_norm import (
    HeadNorm,
    normalised_entry_bound,
    normalised_logit_bound,
    normalised_vector_norm_bound,
)

SLACK = 1 + 1e-12  # of float64 sums, in the bounds and in what attacks them
ROTATIONS = [(0, False), (8, False), (8, True), (4, False), (4, True)]


def head_norm(head_dim, shifted, seed, spread=1.0):
    """Gains of both signs that differ by orders of magnitude, and shifts."""
    generator = torch.Generator().manual_seed(seed)
    gain, size, shift = torch.randn(3, head_dim, generator=generator, dtype=torch.float64)
    return HeadNorm(gain * torch.exp(spread * size), shift if shifted else None)


def pairs_of(head_dim, rotary_dim, interleaved):
    """Rows that turn together, then each other row."""
    half = rotary_dim // 2
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    return pairs + [(row,) for row in range(rotary_dim, head_dim)]


def rotation(head_dim, pairs, angles):
    """R with one angle for each pair, dense."""
    r = torch.eye(head_dim, dtype=torch.float64)
    for (i, j), angle in zip([pair for pair in pairs if len(pair) == 2], angles):
        r[i, i] = r[j, j] = math.cos(angle)
        r[i, j], r[j, i] = -math.sin(angle), math.sin(angle)
    return r


def on_sphere(x):
    return x * math.sqrt(x.shape[-1]) / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def apply(norm, n):
    return norm.gain * n + (0.0 if norm.shift is None else norm.shift)


def ascend(value, *shapes, steps=60):
    """Largest value(n, ...) that gradient ascent over points of the sphere of radius sqrt(d_h) finds."""
    points = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    optimizer = torch.optim.Adam(points, lr=0.2)
    best = 0.0
    for _ in range(steps):
        values = value(*(on_sphere(point) for point in points))
        best = max(best, float(values.detach().max()))
        optimizer.zero_grad()
        (-values.log().sum()).backward()
        optimizer.step()
    return best


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("rotary_dim", "interleaved"), ROTATIONS)
def test_logits_and_entries_are_bounded_and_nearly_attained(rotary_dim, interleaved, shifted):
    torch.manual_seed(0)
    head_dim = 8
    pairs = pairs_of(head_dim, rotary_dim, interleaved)
    rotary = dict(rotary_dim=rotary_dim, interleaved=interleaved)
    query, key = head_norm(head_dim, shifted, 0), head_norm(head_dim, shifted, 100)
    sigma, bound = normalised_logit_bound(query, key, softmax_scale=0.3, **rotary)
    entry = normalised_entry_bound(query, **rotary)
    # A quarter turn, or none, aligns the larger gains of a pair.
    angles = torch.cat([torch.zeros(1, 4), torch.full((1, 4), math.pi / 2), 2 * math.pi * torch.rand(30, 4)])
    r = torch.stack([rotation(head_dim, pairs, angle.tolist()) for angle in angles])
    assert torch.linalg.matrix_norm(query.gain[:, None] * r * key.gain, 2).max() <= sigma * SLACK

    def rotated(n):
        return torch.einsum("rnd,rde->rne", apply(query, n), r)

    def length(n):
        return torch.linalg.vector_norm(apply(query, n), dim=-1)

    points = (len(r), 32, head_dim)
    found = ascend(lambda n, m: 0.3 * (rotated(n) * apply(key, m)).sum(-1).abs(), points, points)
    assert (0.5 if shifted else 0.99) * bound <= found <= bound * SLACK
    found = ascend(lambda n: rotated(n).abs().amax(-1), points)
    assert (0.6 if shifted else 0.99) * entry <= found <= entry * SLACK
    found, bound = ascend(length, points), normalised_vector_norm_bound(query)
    assert (0.6 if shifted else 0.99) * bound <= found <= bound * SLACK


def test_bounds_are_those_of_the_diagonal_projections_and_tighter_than_the_search():
    """gain as diag(gain), shift as bias, d_h as d: THEORY 3 for ordinary projections says the same, more loosely."""
    from megatron_geoscale.bounds.logits import certified_logit_bound
    from megatron_geoscale.bounds.tensors import entry_bound, vector_norm_bound
    from megatron_geoscale.spectral import Moments, Projections, gram

    query, key = head_norm(16, True, 1), head_norm(16, True, 2)
    w_q, w_k = torch.diag(query.gain)[None], torch.diag(key.gain)[None]
    p = Projections(w_q, query.shift[None], w_k, key.shift[None], w_k, None)
    for rotary_dim, interleaved in [(0, False), (16, False), (16, True), (8, False)]:
        rotary = dict(rotary_dim=rotary_dim, interleaved=interleaved)
        mine = normalised_logit_bound(query, key, softmax_scale=0.25, **rotary)
        theirs = certified_logit_bound(Moments.of(p), softmax_scale=0.25, input_norm=4.0, **rotary)
        for tight, loose in zip(mine, theirs):
            assert 0.6 * float(loose) <= float(tight) <= float(loose) * (1 + 1e-7)
        entry = entry_bound(gram(w_q), query.shift[None], input_norm=4.0, **rotary)
        assert float(normalised_entry_bound(query, **rotary)) == pytest.approx(float(entry), rel=1e-6)
    length = vector_norm_bound(gram(w_q), query.shift[None], input_norm=4.0)
    assert float(normalised_vector_norm_bound(query)) == pytest.approx(float(length), rel=1e-6)


def test_one_dimension_zero_gains_and_a_rotary_dim_that_does_not_fit():
    one = HeadNorm(torch.tensor([-3.0], dtype=torch.float64))
    assert [float(x) for x in normalised_logit_bound(one, one, softmax_scale=0.5, rotary_dim=0)] == [9.0, 4.5]
    zero = HeadNorm(torch.zeros(4, dtype=torch.float64))
    assert float(normalised_entry_bound(zero, rotary_dim=4)) == 0.0
    with pytest.raises(ValueError, match="rotary_dim"):
        normalised_entry_bound(zero, rotary_dim=6)


def real_norms(kind, dtype, head_dim=16):
    """(module, HeadNorm) of a norm as a model holds it, weights off their start."""
    from types import SimpleNamespace

    from megatron.core.transformer.torch_norm import L2Norm

    from megatron_geoscale.training.norm import TorchNorm

    torch.manual_seed(1)
    if kind == "L2Norm":
        return L2Norm(head_dim, eps=1e-5), HeadNorm(torch.ones(head_dim, dtype=torch.float64))
    name, centred = kind.split("-1p")[0], kind.endswith("-1p")
    config = SimpleNamespace(normalization=name, layernorm_zero_centered_gamma=centred, params_dtype=dtype,
                             sequence_parallel=False)
    module = TorchNorm(config, head_dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape))
    gain = module.weight.detach().double() + (1.0 if centred else 0.0)
    return module, HeadNorm(gain, None if module.bias is None else module.bias.detach().double())


def adversarial_inputs(norm, dtype):
    """[points, d_h]: single entries, pairs, what the gain lengthens most, with magnitudes from nothing to huge."""
    head_dim = len(norm.gain)
    eye = torch.eye(head_dim)
    pairs = (eye[:, None] + eye[None]).flatten(0, 1)
    gain, noise, spread = norm.gain.float()[None], torch.randn(200, head_dim), torch.randn(200, head_dim)
    points = torch.cat([eye, -eye, pairs, eye - eye.roll(1, 0), gain, gain.sign(), noise, noise * torch.exp(spread)])
    offset = points + 100.0  # a mean far above the deviations
    sizes = (0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12) if dtype != torch.float16 else (0.0, 1e-6, 1e-3, 1.0, 100.0)
    return torch.cat([size * x for size in sizes for x in (points, offset)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["RMSNorm", "RMSNorm-1p", "LayerNorm", "LayerNorm-1p", "L2Norm"])
def test_no_input_to_the_real_norms_passes_the_bounds(megatron, kind, dtype):
    from megatron_geoscale.bounds.tensors import rounding_allowance

    params = torch.float32 if dtype == torch.float64 else dtype
    module, norm = real_norms(kind, params)
    inputs = adversarial_inputs(norm, dtype)
    out = module(inputs).detach().double()
    assert torch.isfinite(out).all()
    coarse = torch.float32 if kind == "L2Norm" and dtype == torch.float64 else dtype  # it computes in float32
    allowance = rounding_allowance(16, unit_roundoff=torch.finfo(coarse).eps / 2)
    for rotary_dim, interleaved in [(0, False), (16, False), (16, True)]:
        rotated = out
        if rotary_dim:
            pairs = pairs_of(16, 16, interleaved)
            angles = (torch.rand(8) * 2 * math.pi).tolist()
            rotated = out @ rotation(16, pairs, angles)
        entry = normalised_entry_bound(norm, rotary_dim=rotary_dim, interleaved=interleaved) * allowance
        assert float(rotated.abs().max()) <= float(entry)
    assert float(out.abs().max()) >= 0.9 * float(normalised_entry_bound(norm, rotary_dim=0))
    length = float(torch.linalg.vector_norm(out, dim=-1).max())
    assert 0.9 * length <= length <= float(normalised_vector_norm_bound(norm)) * allowance
    _, bound = normalised_logit_bound(norm, norm, softmax_scale=0.25, rotary_dim=0)
    logits = 0.25 * (out @ out.T).abs().max()
    assert 0.5 * float(bound) <= float(logits) <= float(bound) * allowance**2
