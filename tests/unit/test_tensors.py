"""bounds/tensors.py: entries of Q, K, V and the length of V, against the tokens that attain the bounds."""

import math

import pytest
import torch

from megatron_geoscale.bounds import entry_bound, isotropic_input_norm, rounding_allowance, vector_norm_bound
from megatron_geoscale.bounds.rotary import rotary_pairs
from megatron_geoscale.spectral import fold_norm, gram, input_norm_bound

M = 6.0


def head(seed, n=3, d_h=8, d=20):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, d_h, d), (n, d_h)))


@pytest.mark.parametrize("rotary_dim, interleaved", [(0, False), (8, False), (4, False), (8, True), (4, True)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_entry_bound_is_the_dense_formula(rotary_dim, interleaved, with_bias):
    w, b = head(rotary_dim)
    b = b if with_bias else None
    first, second = (rows.tolist() for rows in rotary_pairs(8, rotary_dim, interleaved=interleaved))
    groups = [[i, j] for i, j in zip(first, second, strict=True)] + [[row] for row in range(rotary_dim, 8)]
    bound = entry_bound(gram(w), b, rotary_dim=rotary_dim, interleaved=interleaved, input_norm=M)
    for h in range(3):
        expected = max(
            M * torch.linalg.matrix_norm(w[h, rows], 2) + (0.0 if b is None else b[h, rows].norm()) for rows in groups
        )
        assert bound[h].item() == pytest.approx(expected.item(), rel=1e-9)
        assert bound[h] >= expected * (1 - 1e-15)


def test_the_entry_bound_is_attained_by_a_token_and_a_position_and_never_exceeded():
    w, _ = head(9, n=1)
    u, s, vh = torch.linalg.svd(w[0, [2, 6]])
    token = M * vh[0]  # the pair's longest image ...
    angle = math.atan2(u[1, 0], u[0, 0])  # ... turned onto its first axis
    x, y = (w[0, 2] @ token).item(), (w[0, 6] @ token).item()
    pair_bound = entry_bound(gram(w[:, [2, 6]]), None, rotary_dim=2, input_norm=M).item()
    assert abs(math.cos(angle) * x + math.sin(angle) * y) == pytest.approx(pair_bound, rel=1e-9)
    assert pair_bound >= M * s[0].item()
    tokens = torch.randn(4000, 20, dtype=torch.float64)
    q = (M * tokens / tokens.norm(dim=-1, keepdim=True)) @ w[0].T
    angles = torch.rand(4000, 4, dtype=torch.float64) * 100
    q = torch.cat(
        [q[:, :4] * angles.cos() - q[:, 4:] * angles.sin(), q[:, 4:] * angles.cos() + q[:, :4] * angles.sin()], 1
    )
    assert q.abs().max() <= entry_bound(gram(w), None, rotary_dim=8, input_norm=M)[0]


def test_vector_norm_bound_is_attained():
    w, b = head(10)
    bound = vector_norm_bound(gram(w), b, input_norm=M)
    expected = M * torch.linalg.matrix_norm(w, 2) + b.norm(dim=-1)
    torch.testing.assert_close(bound, expected, rtol=1e-9, atol=0.0)
    assert (bound >= expected).all()
    u, _, vh = torch.linalg.svd(w[0])
    aligned = b[0].norm() * u[:, 0]  # a bias along the longest image
    attained = (w[0] @ (M * vh[0]) + aligned).norm()
    bound = vector_norm_bound(gram(w[:1]), aligned[None], input_norm=M)
    assert attained.item() == pytest.approx(bound.item(), rel=1e-9)


def test_isotropic_input_norm_holds_at_its_probability():
    """100 runs of 20,000 entries each at delta = 0.1: at most a few runs may exceed (the union bound is loose)."""
    torch.manual_seed(0)
    d, entries, delta, runs = 64, 20_000, 0.1, 100
    norm = isotropic_input_norm(d, num_entries=entries, delta=delta)
    assert norm < math.sqrt(d)
    failures = 0
    for _ in range(runs):
        tokens = torch.randn(entries, d)
        first = tokens[:, 0] / tokens.norm(dim=-1) * math.sqrt(d)
        failures += int(first.abs().max() > norm)
    assert failures <= 0.1 * runs + 9  # three standard deviations
    assert isotropic_input_norm(16, num_entries=10**9, delta=1e-6) == 4.0  # never worse than certified


@pytest.mark.parametrize("dtype, u", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2.0**-24)])
def test_rounded_layer_stays_within_the_allowance(dtype, u):
    """RMSNorm, projection, bias and RoPE in the layer's dtype, on tokens that attain the exact bound."""
    torch.manual_seed(1)
    d, d_h = 128, 8
    w, b = (torch.randn(d_h, d) / 8).to(dtype), torch.randn(d_h).to(dtype)
    gain = (1 + 0.2 * torch.randn(d)).to(dtype)
    folded, offset = fold_norm(w[None], b[None], gain=gain, shift=None)
    exact = entry_bound(gram(folded), offset, rotary_dim=d_h, input_norm=input_norm_bound(d))[0]
    worst = 0.0
    for pair in range(d_h // 2):
        _, _, vh = torch.linalg.svd(folded[0, [pair, pair + d_h // 2]])
        for sign in (1.0, -1.0):
            h = (sign * vh[0] * torch.linspace(1, 1.001, 50, dtype=torch.float64)[:, None]).to(dtype).float()
            xhat = (h * h.square().mean(-1, keepdim=True).rsqrt()).to(dtype)
            x = xhat * gain
            q = torch.nn.functional.linear(x, w) + b
            angles = torch.rand(50, d_h // 2) * 100
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            left, right = q[:, : d_h // 2], q[:, d_h // 2 :]
            worst = max(
                worst, (left * cos - right * sin).abs().max().item(), (right * cos + left * sin).abs().max().item()
            )
    assert worst <= exact * rounding_allowance(d, unit_roundoff=u)
    assert worst >= 0.8 * exact  # the attack comes close, so the allowance is what keeps the bound


def test_rounding_allowance_values_and_errors():
    assert rounding_allowance(4096, unit_roundoff=2.0**-8) == pytest.approx((1 + 2.0**-8) ** 8, rel=1e-3)
    assert 1.0 < rounding_allowance(8192, unit_roundoff=2.0**-24) < 1.002
    for hidden, u in ((0, 0.1), (2**24, 0.1), (8, 1.0), (8, -0.1)):
        with pytest.raises(ValueError, match="unit_roundoff"):
            rounding_allowance(hidden, unit_roundoff=u)
    for hidden, entries, delta in ((0, 1, 0.1), (1, 0, 0.1), (1, 1, 0.0), (1, 1, 1.0)):
        with pytest.raises(ValueError, match="num_entries"):
            isotropic_input_norm(hidden, num_entries=entries, delta=delta)
