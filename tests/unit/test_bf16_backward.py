"""FP8 forward, BF16 backward: the gradients of a kernel that gets the original Q, K, V, the cast O and the softmax
statistics of the FP8 forward pass, computed here in float64, a head at a time."""

import pytest
import torch

from megatron_geoscale.attention.fp8_function import fp8_attention
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.formats import SLOT_FORMATS, sqnr_db
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS
from tests.unit.test_emulated import SCALES, Fixed, causal, make_inputs


def kernel(q, k, v, out, grad, softmax_scale, dropout):
    """dQ, dK, dV of [s, b, heads, d] and [s, b, groups, d]; `out` as the FP8 forward pass gave it."""
    q, k, v, out, grad = (x.double() for x in (q, k, v, out, grad))
    fmt, scale = SLOT_FORMATS["qkv"], SCALES["qkv"]
    q8, k8 = ((x * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).double() / scale for x in (q, k))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    hidden, ratio = causal(len(q)), q.size(2) // k.size(2)
    for b in range(q.size(1)):
        for h in range(q.size(2)):
            g = h // ratio
            statistics = (softmax_scale * q8[:, b, h] @ k8[:, b, g].T).masked_fill(hidden, -torch.inf).logsumexp(1)
            own = (softmax_scale * q[:, b, h] @ k[:, b, g].T).masked_fill(hidden, -torch.inf)
            probs = (own - statistics[:, None]).exp()
            kept = torch.ones_like(probs) if dropout is None else dropout[b, h]
            mean = (grad[:, b, h] * out[:, b, h]).sum(1, keepdim=True)
            ds = softmax_scale * probs * (kept * (grad[:, b, h] @ v[:, b, g].T) - mean)
            dq[:, b, h] = ds @ k[:, b, g]
            dk[:, b, g] += ds.T @ q[:, b, h]
            dv[:, b, g] += (probs * kept).T @ grad[:, b, h]
    return dq, dk, dv


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 100.0), (torch.bfloat16, 40.0)])
@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
def test_gradients_are_those_of_a_bf16_kernel(groups, with_dropout, dtype, least):
    q, k, v, grad = make_inputs(groups=groups, std=1.5, dtype=dtype)
    dropout = None
    if with_dropout:
        dropout = (torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.8).float() / 0.8
    scaler, leaves = Fixed(**SCALES), [x.clone().requires_grad_() for x in (q, k, v)]
    out = fp8_attention(*leaves, scaler=scaler, softmax_scale=0.3, masked=causal(9), dropout=dropout,
                        fp8_backward=False)
    found = torch.autograd.grad(out, leaves, grad)
    assert not set(scaler.observed) & set(BACKWARD_SLOTS)
    for name, mine, exact in zip("qkv", found, kernel(q, k, v, out.detach(), grad, 0.3, dropout)):
        assert mine.dtype == dtype
        assert sqnr_db(exact, mine) > least, name


def test_the_rule_that_counts_by_recipe():
    assert GeoScaleConfig().backward == GeoScaleConfig(recipe="paper").backward == "bound"
    assert GeoScaleConfig(recipe="delayed").backward is None and GeoScaleConfig(recipe="current").backward is None
    assert GeoScaleConfig(recipe="delayed", backward="bf16").backward == "bf16"
    with pytest.raises(ValueError, match=r"--geoscale-backward delayed needs a recipe .*--geoscale-recipe current"):
        GeoScaleConfig(recipe="current", backward="delayed")
    with pytest.raises(ValueError, match="--geoscale-backward must be one of bound, delayed, bf16, not 'fp8'"):
        GeoScaleConfig(backward="fp8")
