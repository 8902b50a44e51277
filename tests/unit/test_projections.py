"""spectral/projections.py: Megatron's row order, norm folding, and what LayerNorm's mean is worth under rounding."""

import math

import pytest
import torch

from megatron_geoscale.spectral import fold_norm, input_norm_bound, split_linear_qkv


def test_split_takes_the_rows_where_megatron_puts_them():
    groups, per_group, d_h, d = 3, 2, 4, 5
    weight = torch.arange(groups * (per_group + 2) * d_h * d, dtype=torch.float32).view(-1, d)
    w_q, b_q, w_k, b_k, w_v, b_v = split_linear_qkv(
        weight, weight[:, 0], num_groups=groups, heads_per_group=per_group, head_dim=d_h
    )
    # Megatron: view(groups, (per_group + 2) * d_h), then split at per_group * d_h and (per_group + 1) * d_h.
    rows = weight.view(groups, (per_group + 2) * d_h, d)
    for g in range(groups):
        for h in range(per_group):
            assert torch.equal(w_q[g * per_group + h], rows[g, h * d_h : (h + 1) * d_h])
        assert torch.equal(w_k[g], rows[g, per_group * d_h : (per_group + 1) * d_h])
        assert torch.equal(w_v[g], rows[g, (per_group + 1) * d_h :])
    for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)):
        assert torch.equal(b, w[..., 0])
    assert (
        split_linear_qkv(weight, None, num_groups=groups, heads_per_group=per_group, head_dim=d_h)[1::2] == (None,) * 3
    )


@pytest.mark.parametrize("weight_rows, bias_rows", [(63, None), (64, 63)])
def test_split_refuses_rows_that_do_not_add_up(weight_rows, bias_rows):
    bias = None if bias_rows is None else torch.zeros(bias_rows)
    with pytest.raises(ValueError, match="rows"):
        split_linear_qkv(torch.zeros(weight_rows, 8), bias, num_groups=4, heads_per_group=2, head_dim=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_folded_projection_equals_norm_then_projection(dtype, has_bias, layer_norm):
    torch.manual_seed(1)
    n, d_h, d = 3, 4, 32
    w, gain, shift = torch.randn(n, d_h, d).to(dtype), torch.randn(d).to(dtype), torch.randn(d).to(dtype)
    b = torch.randn(n, d_h).to(dtype) if has_bias else None
    shift = shift if layer_norm else None
    folded, offset = fold_norm(w, b, gain=gain, shift=shift)
    assert folded.dtype == torch.float64
    xhat = torch.randn(d, dtype=torch.float64)
    x = gain.double() * xhat + (0 if shift is None else shift.double())
    expected = w.double() @ x + (0 if b is None else b.double())
    torch.testing.assert_close(folded @ xhat + (0 if offset is None else offset), expected, rtol=1e-12, atol=1e-12)
    assert (offset is None) == (not has_bias and not layer_norm)


def test_no_gain_gives_float64_too():
    assert fold_norm(torch.randn(1, 2, 3), None, gain=None, shift=None)[
        0
    ].dtype == (torch.float64)


def test_common_mode_is_kept_because_a_computed_layer_norm_does_not_remove_it():
    """A (I - 11^T/d) would be tighter and wrong: rounding leaves a mean, and a large common mode amplifies it."""
    torch.manual_seed(3)
    d = 256
    tokens = torch.nn.functional.layer_norm(torch.randn(2000, d) * 3 + 1, (d,)).to(torch.bfloat16).double()
    w = torch.randn(1, 1, d, dtype=torch.float64) * 1e-4 + 100.0
    largest = (tokens @ w[0].T).abs().max()
    centred = w - w.mean(-1, keepdim=True)
    assert largest > centred.norm() * math.sqrt(d)
    folded, _ = fold_norm(w, None, gain=None, shift=None)
    assert largest <= folded.norm() * input_norm_bound(d)


