"""Our list of obstacles against Transformer Engine's own choice of a backend, over a grid of facts and four versions.

TE's Python decides a part; what it asks the compiled module, which is not there, is answered by `kernel_exists`, the
rule of TE's fused_attn.cpp for FP8 in our words.
"""

import dataclasses
import itertools
import os
from unittest import mock

import pytest
import torch

import te_stub
from harness import run_ranks
from megatron_geoscale.attention.obstacles import AttentionFacts, fp8_attention_obstacles

AXES = {
    "capability": [(9, 0), (8, 9), (10, 0), (12, 0)],
    "cudnn_version": [(9, 19, 0), (9, 3, 0), (9, 7, 0), (9, 10, 0), (9, 13, 1), (9, 21, 0)],
    "head_dims": [(128, 128), (64, 64), (256, 256), (72, 72), (192, 128), (128, 64)],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "layout": ["sbhd", "bshd", "thd"],
    "mask": ["causal", "no_mask", "padding", "padding_causal", "causal_bottom_right", "arbitrary"],
    "bias": [False, True],
    "window": [None, (63, 0), (-1, 0)],
    "softmax_type": ["vanilla", "off-by-one", "learnable"],
    "dropout": [0.0, 0.1],
    "max_logit": [False, True],
    "deterministic": [False, True],
    "context": [(1, "p2p"), (2, "p2p"), (2, "all_gather"), (2, "a2a")],
    "num_groups": [8, 1],
    "environment": [{}, {"NVTE_FUSED_ATTN": "0"}, {"NVTE_DPA_FP8_RECIPE": "F16"}],
}
STRICTER = ("--attention-dropout", "--cp-comm-type all_gather", "cuDNN", "--window-size", "--softmax-type",
            "--multi-latent-attention", "mask", "--kv-channels 72")
"""What we refuse, at least somewhere, though the choice of a backend does not."""


def facts_of(point):
    """AttentionFacts at a point of the grid, for a training step in FP8."""
    (qk, v), (size, kind) = point["head_dims"], point["context"]
    named = {name: value for name, value in point.items() if name not in ("head_dims", "context")}
    return AttentionFacts(
        **named, head_dim_qk=qk, head_dim_v=v, context_parallel_size=size, cp_comm_type=kind
    )


def grid():
    """The first value of every axis, and every pair of other values."""
    first = {name: values[0] for name, values in AXES.items()}
    others = [(name, value) for name, values in AXES.items() for value in values[1:]]
    points = [first, *({**first, name: value} for name, value in others)]
    for (name, value), (other, second) in itertools.combinations(others, 2):
        if name != other:
            points.append({**first, name: value, other: second})
    return points


def kernel_exists(facts, te_version, mask):
    """Whether the compiled module has FP8 kernels for a training step; sequences of 256 tokens."""
    if facts.capability < (9, 0) or facts.bias or facts.max_logit or facts.layout == "thd":
        return False
    cudnn, qk, v = facts.cudnn_version, facts.head_dim_qk, facts.head_dim_v
    hopper, recent = facts.capability < (10, 0), te_version >= (2, 15) and cudnn >= (9, 21, 0)
    if cudnn == (9, 10, 0) or (facts.softmax_type != "vanilla" and not recent):
        return False
    plain = mask in ("causal", "no_mask")
    largest = qk == v == 128 if hopper else qk <= 128 and v <= 128
    whole = qk % 16 == 0 and v % 16 == 0
    return (
        (cudnn >= (9, 2, 1) and hopper and qk == v == 128 and plain)
        or (cudnn >= (9, 7, 0) and largest and whole and (plain or mask in ("padding", "padding_causal")))
        or (recent and not hopper and qk <= 192 and v <= 128 and whole and (plain or mask == "causal_bottom_right"))
    )


def te_choice(facts, te_version):
    """Whether TE's Python selects fused FP8 attention at these facts."""
    import transformer_engine.pytorch.attention.dot_product_attention.utils as utils
    import transformer_engine_torch as tex
    from transformer_engine.common.recipe import DelayedScaling

    def backend(*args):
        packed = len(args) == 1
        mask = (args[0].attn_mask_type if packed else args[5]).removeprefix("NVTE_").removesuffix("_MASK").lower()
        dtype = int(args[0].qkv_dtype if packed else args[1])
        kinds, fp8 = tex.NVTE_Fused_Attn_Backend, dtype in (te_stub.DType.kFloat8E4M3, te_stub.DType.kFloat8E5M2)
        mask = {"no": "no_mask"}.get(mask, mask)
        kind = kinds.NVTE_FP8 if kernel_exists(facts, te_version, mask) else kinds.NVTE_No_Backend
        kind = kind if fp8 else kinds.NVTE_F16_arbitrary_seqlen
        return (kind, "") if packed else kind

    heads, length = facts.num_heads, 256
    window = facts.window or ((-1, 0) if "causal" in facts.mask else (-1, -1))
    bias = "1hss" if te_version < (2, 20) else (1, heads, length, length)
    # dot_product_attention.py, init_fp8_metadata: with NVTE_DPA_FP8_RECIPE=F16 the recipe is no longer one of FP8 DPA.
    recipe = DelayedScaling(fp8_dpa=facts.environment.get("NVTE_DPA_FP8_RECIPE") != "F16")
    values = {
        "qkv_dtype": facts.dtype,
        "qkv_layout": "_".join(3 * [facts.layout]),
        "num_heads": heads,
        "num_gqa_groups": facts.num_groups,
        "max_seqlen_q": length,
        "max_seqlen_kv": length,
        "head_dim_qk": facts.head_dim_qk,
        "head_dim_v": facts.head_dim_v,
        "attn_mask_type": facts.mask,
        "window_size": window,
        "core_attention_bias_type": "post_scale_bias" if facts.bias else "no_bias",
        "core_attention_bias_shape": bias if facts.bias else None,
        "core_attention_bias_requires_grad": False,
        "attention_dropout": facts.dropout,
        "context_parallel": facts.context_parallel_size > 1,
        "cp_comm_type": facts.cp_comm_type,
        "cp_size": facts.context_parallel_size,
        "deterministic": facts.deterministic,
        "is_training": True,
        "fp8": True,
        "fp8_meta": {"recipe": recipe},
        "softmax_type": facts.softmax_type,
        "return_max_logit": facts.max_logit,
    }
    known = {field.name for field in dataclasses.fields(utils.AttentionParams)}
    with (
        mock.patch.object(utils, "get_device_compute_capability", lambda: facts.capability),
        mock.patch.object(utils, "get_cudnn_version", lambda: facts.cudnn_version),
        mock.patch.object(tex, "get_fused_attn_backend", backend),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch.dict(os.environ, facts.environment),
    ):
        answer = utils.get_attention_backend(
            utils.AttentionParams(**{name: value for name, value in values.items() if name in known})
        )
    return bool(answer[2]) and answer[3] is not None and int(answer[3]) == tex.NVTE_Fused_Attn_Backend.NVTE_FP8


def compare(rank, world_size, version):
    """Where TE and our list differ: unsafe ones, and needless refusals at points of one changed fact."""
    te_stub.install(version)
    te_version = tuple(map(int, version.split(".")))
    unsafe, needless, chosen = [], [], 0
    for index, point in enumerate(grid()):
        facts = dataclasses.replace(facts_of(point), te_version=te_version)
        obstacles, fp8 = fp8_attention_obstacles(facts), te_choice(facts, te_version)
        chosen += fp8
        if not fp8 and not obstacles:
            unsafe.append(point)
        single = index <= sum(len(values) - 1 for values in AXES.values())
        if single and fp8 and any(all(name not in sentence for name in STRICTER) for sentence in obstacles):
            needless.append(obstacles)
    return unsafe, needless, chosen


@pytest.mark.parametrize("version", te_stub.VERSIONS)
def test_where_te_drops_fp8_attention_we_say_why(version):
    te_stub.folder(version)
    ((unsafe, needless, chosen),) = run_ranks(compare, 1, version)
    assert unsafe == []
    assert needless == []
    assert chosen > 100, "a grid on which TE never selects FP8 would show nothing"
