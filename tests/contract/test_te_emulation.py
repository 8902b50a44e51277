"""Our FP8 attention against Transformer Engine's own emulation of it, forward and backward, on equal scales.

TE >= 2.16 computes FP8 attention in plain torch under NVTE_UnfusedDPA_Emulate_FP8=1. It casts what we cast, and differs
from the fused kernels, whom we follow, in three things: its dP slot holds dS before softmax_scale is multiplied in; K
and V are repeated for every query head before their gradient is cast; and between the casts it computes in the dtype of
its inputs. With one head a group, a power of two as softmax_scale and float32 inputs none of them matters, and every
element must be the same.
"""

import pytest
import torch

import te_stub
from megatron_geoscale.scaling.formats import sqnr_db

SCALES = dict(qkv=100.0, logits=1.0, s=448.0, o=120.0, do=8192.0, dp=8192.0, dqkv=16384.0)
NAMES = ("out", "dq", "dk", "dv")
VERSIONS = [version for version in te_stub.VERSIONS if tuple(map(int, version.split(".")[:2])) >= (2, 16)]


class Fixed:
    """LayerScaler with `SCALES`."""

    def __init__(self):
        self.saturated = {}

    def before_backward(self, do, *, num_keys, amax_qkv):
        pass

    def scale(self, slot, *tensors):
        return torch.tensor(SCALES[slot])

    def observe(self, slot, amax, saturated, flushed):
        self.saturated[slot] = int(saturated)


def ours(query, key, value, grad, softmax_scale):
    """(out, dQ, dK, dV), and what saturated."""
    from megatron_geoscale.attention.fp8_function import fp8_attention

    leaves, scaler = [x.clone().requires_grad_() for x in (query, key, value)], Fixed()
    masked = torch.ones(len(query), len(key), dtype=torch.bool).triu(1)
    out = fp8_attention(*leaves, scaler=scaler, softmax_scale=softmax_scale, masked=masked)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad)), scaler.saturated


def theirs(query, key, value, grad, softmax_scale):
    """The same from TE, its dP scaled so that dS falls on the same FP8 numbers."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    def quantizer(slot, dtype, factor=1.0):
        return Float8Quantizer(torch.tensor([SCALES[slot] * factor]), torch.zeros(1), dtype)

    e4m3, e5m2 = tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2
    forward, backward = [None] * 9, [None] * 6
    forward[utils.META_QKV], forward[utils.META_S], forward[utils.META_O] = (
        quantizer(slot, e4m3) for slot in ("qkv", "s", "o"))
    backward[utils.META_DO], backward[utils.META_DQKV] = quantizer("do", e5m2), quantizer("dqkv", e5m2)
    backward[utils.META_DP] = quantizer("dp", e5m2, softmax_scale)
    attention = backends.UnfusedDotProductAttention(softmax_scale)
    # TE masks in place what its emulation returned, which autograd refuses unless the logits were converted from BF16.
    attention.scale_mask_softmax.mask_func = lambda scores, mask: scores.masked_fill(mask, -10000.0)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    with te.autocast(enabled=True, recipe=DelayedScaling(fp8_dpa=True)):
        out = attention({}, *leaves, qkv_layout="sbhd_sbhd_sbhd", attn_mask_type="causal", window_size=(-1, 0),
                        fp8=True, fp8_meta={}, quantizers={"scaling_fwd": forward, "scaling_bwd": backward})
    out = out.view(query.shape)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def compare(groups, width, dtype, softmax_scale):
    """Our saturated casts; and for O, dQ, dK, dV: how many elements differ, of how many, the SQNR of ours on TE's."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(24, 2, heads, width, generator=generator).to(dtype) for heads in (4, groups, groups, 4))
    query[3, 0, 1] *= 4.0  # beyond the range of Q, K, V: both must saturate
    grad[5, 1, 2] *= 4.0
    mine, saturated = ours(query, key, value, grad, softmax_scale)
    other = theirs(query, key, value, grad, softmax_scale)
    return saturated, {
        name: (int((a != b).sum()), a.numel(), sqnr_db(b, a)) for name, a, b in zip(NAMES, mine, other, strict=True)
    }


EXACT = {"heads of 16": (4, 16, torch.float32), "heads of 64": (4, 64, torch.float32)}
CLOSE = {  # what is still exact, and the SQNR of the rest on TE's, in decibels
    # dK and dV of a group are the sum of FP8 numbers in TE, and one FP8 number here and in the kernels, which saturates
    # elsewhere.
    "groups": ((2, 16, torch.float32), ("out", "dq"), 15.0),
    # softmax_scale is no power of two: dS before it, and with it, fall on either side of a tie now and then.
    "heads of 128": ((4, 128, torch.float32), ("out", "dv"), 40.0),
    # TE's logits, P, dP and sums are BF16 numbers; the kernels' and ours are float32.
    "BF16": ((4, 64, torch.bfloat16), (), 20.0),
}


def compare_all(rank):
    shapes = EXACT | {name: shape for name, (shape, *_) in CLOSE.items()}
    return {name: compare(*shape, shape[1] ** -0.5) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=VERSIONS)
def found(request):
    """What `compare` says of every case, under one version of TE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVTE_MASKED_SOFTMAX_FUSION", "0")  # a kernel of TE's; read where its module is made
        return te_stub.run(request.param, compare_all)


@pytest.mark.parametrize("case", EXACT)
def test_every_element_equals_te_s_emulation(found, case):
    saturated, results = found[case]
    assert saturated["qkv"] > 0 and saturated["do"] > 0 and saturated["dqkv"] > 0
    for name, (different, of, sqnr) in results.items():
        assert different == 0, (name, different, of, sqnr)


@pytest.mark.parametrize("case", CLOSE)
def test_where_te_rounds_elsewhere_the_results_are_close(found, case):
    _, exact, least = CLOSE[case]
    for name, (different, of, sqnr) in found[case][1].items():
        print(case, name, different, "of", of, "differ,", f"{sqnr:.1f} dB")
        if name in exact:
            assert different == 0, (name, different, of, sqnr)
        else:
            assert different > 0 and sqnr > least, (name, sqnr)
