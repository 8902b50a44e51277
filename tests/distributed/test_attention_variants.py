"""Windows, sinks, layer scaling, YaRN and multi-latent attention: attacked in real layers, trained by pretrain.py."""

import dataclasses
import math

import pytest
import torch

from tests.distributed.test_engine import HEADS, HIDDEN, LENGTH, randomise
from tests.distributed.test_models import SLOW, TP2, check_against_one_rank
from tests.functional.common import base, close, column, flags_of, launch, layer_column, succeed, train
from tests.unit.test_latent import latent

pytestmark = pytest.mark.usefixtures("megatron")

YARN = "--position-embedding-type yarn --yarn-rotary-scaling-factor 40"
VARIANTS = {
    "window": "--window-size 3 0 --window-attn-skip-freq 2",
    "off-by-one": "--softmax-type off-by-one",
    "learnable": "--softmax-type learnable",
    "layer-scaling": "--apply-query-key-layer-scaling",
    "yarn": YARN,
    "yarn-bias-bf16": f"{YARN} --yarn-mscale 2 --add-qkv-bias --bf16",
}


def climb(trainer, go):
    """Saturated values, range in use and shares of the bounds, of the second layer under climbing inputs and gradients
    along its values; then the shares without YaRN's factor."""
    from megatron.core.utils import unwrap_model

    torch.manual_seed(0)
    randomise(trainer)
    engine, args = trainer.run.scaling, trainer.args
    engine.refresh()
    model = unwrap_model(trainer.run.chunks[0]).train()
    layer, described = model.decoder.layers[1], engine.layers[1]
    rope = model.rotary_pos_emb(LENGTH)
    rope = rope[0] if args.position_embedding_type == "yarn" else rope
    core, seen = layer.self_attention.core_attention, {}
    core.register_forward_pre_hook(lambda _, inputs: seen.update(qkv=inputs[:3]))
    core.register_forward_hook(lambda _, inputs, out: seen.update(out=out))
    hidden = torch.randn(LENGTH, 8, HIDDEN, requires_grad=True)
    optimizer = torch.optim.Adam([hidden], lr=0.1)
    engine.gauge.reset()
    for _ in range(60):
        layer(hidden.to(args.params_dtype), attention_mask=None, rotary_pos_emb=rope)
        query, key, value = (x.float() for x in seen["qkv"])
        logits = torch.einsum("ibhd,jbhd->bhij", query, key.repeat_interleave(HEADS // key.shape[2], dim=2)).tril()
        goals = [x.abs().amax((0, 2, 3)) for x in (query, key, value)] + [logits.abs().amax((1, 2, 3))]
        score = sum(goal[2 * i : 2 * i + 2].log().sum() for i, goal in enumerate(goals))
        hidden.grad = torch.autograd.grad(-score, hidden)[0]
        optimizer.step()
    out = seen["out"]
    layer(hidden.to(args.params_dtype), attention_mask=None, rotary_pos_emb=rope)
    along = value.repeat_interleave(HEADS // value.shape[2], dim=2)[:1].expand(LENGTH, -1, -1, -1).flatten(2)
    for gradient in (along, along.sign(), 1e-6 * torch.randn_like(out)):
        torch.autograd.grad(seen["out"], hidden, gradient.to(out.dtype), retain_graph=True)
    used = {f"amax_{letter}": float(x.abs().max()) for letter, x in zip("qkv", (query, key, value))}
    used["logit_bound"] = described.geometry.softmax_scale * float(logits.abs().max())
    shares = {name: value / engine.table.bound(2, name) for name, value in used.items()}
    saturated, overrange = engine.gauge.saturated[1].tolist(), engine.gauge.overrange[1].tolist()
    engine._batches[-1].layers[-1] = dataclasses.replace(described, rotary_scale=1.0)
    engine.refresh()
    without = {name: value / engine.table.bound(2, name) for name, value in used.items()}
    return saturated, overrange, shares, without, described.geometry


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_input_to_a_real_layer_saturates_a_certified_scale(variant):
    (run,) = succeed(base("--train-iters 1 --geoscale-logits-dtype fp8", VARIANTS[variant]), watch=climb)
    saturated, overrange, shares, without, geometry = run.value
    assert not any(saturated)
    assert 0.7 < overrange[0] <= 1 and 0.2 < overrange[1] <= 1 and 0 < overrange[5] <= 1
    assert all(0.4 < share <= 1.04 for share in shares.values()), shares  # bf16 rounds up by less than its allowance
    if "yarn" in variant:
        factor = 1 + (0.2 if "bf16" in variant else 0.1) * math.log(40)
        assert geometry.rotary_scale == pytest.approx(factor) and geometry.rotary_dim == geometry.head_dim
        assert without["amax_q"] > 1.1 and without["amax_k"] > 1.1  # the bounds would be broken
        if variant == "yarn":
            assert without["logit_bound"] == pytest.approx(factor**2 * shares["logit_bound"], rel=1e-3)
    else:
        assert without == shares
    expected = 2.0 if variant == "layer-scaling" else 1.0
    assert geometry.logit_multiplier == expected
    assert geometry.softmax_scale == pytest.approx(geometry.head_dim**-0.5 / expected)


def test_layer_scaling_halves_the_stored_logits_of_the_second_layer(tmp_path):
    succeed(base("--train-iters 0 --save", tmp_path))
    flags = base("--train-iters 2 --lr 1e-9 --load", tmp_path)
    plain, scaled = train(flags), train([*flags, "--apply-query-key-layer-scaling"])
    bounds = [layer_column(records[0], "logit_bound") for records in (plain, scaled)]
    assert bounds[1] == pytest.approx([bounds[0][0], bounds[0][1] / 2])
    assert column(scaled, "lm_loss") == pytest.approx(column(plain, "lm_loss"), rel=1e-6)


MODELS = {**{name: base(flags) for name, flags in VARIANTS.items()}, "latent": None, "latent-rope": None}
"""Flags of each; those of multi-latent attention need its own base."""


def flags_for(model):
    if model == "latent":
        return latent(model="yarn-softmax-scale-bf16")[:-1]  # in float32
    return latent(model="rope-no-query-latent") if model == "latent-rope" else MODELS[model]


@pytest.mark.parametrize("model", MODELS)
def test_trains_as_megatrons_own_attention_does(model, tmp_path):
    """The same weights (a learnable sink's too) and losses as without casts, up to FP8."""
    flags = [*flags_for(model), *flags_of("--init-method-std 0.2", SLOW)]
    succeed([*flags, *flags_of("--geoscale-recipe none --train-iters 0 --save", tmp_path)])
    flags += flags_of("--train-iters 3 --load", tmp_path)
    exact, mine = train([*flags, *flags_of("--geoscale-recipe none")]), train(flags)
    assert column(mine, "geoscale.saturated") == [0] * 3
    assert close(column(mine, "lm_loss"), column(exact, "lm_loss"), 2e-2)


@pytest.mark.parametrize("model", ["latent", "latent-rope"])
def test_latent_attention_trains_at_any_tensor_parallel_size(model, tmp_path):
    start = [*flags_for(model), *flags_of(SLOW)]
    check_against_one_rank(tmp_path, start, [(2, TP2), (2, f"{TP2} --sequence-parallel")], steps=4)


def test_latent_gradients_are_one_ranks_without_casts(tmp_path):
    """megatron-core's own layer would be off by 1e-4, for its gathering of the local linear_kv_down_proj, and by 1e-2,
    for counting the gradient of the queries' latent norm twice."""
    start = [*latent(), *flags_of(SLOW, "--geoscale-recipe none --init-method-std 0.3")]
    succeed([*start, *flags_of("--train-iters 0 --save", tmp_path)])
    flags = [*start, *flags_of("--train-iters 4 --load", tmp_path)]
    alone = train(flags)
    for extra in (TP2, f"{TP2} --sequence-parallel"):
        records = train([*flags, *flags_of(extra)], 2)
        for name in ("lm_loss", "grad_norm"):
            assert close(column(records, name), column(alone, name), 2e-6), (extra, name)


def test_learnable_sinks_shard_with_their_heads(tmp_path):
    check_against_one_rank(tmp_path, base(SLOW, VARIANTS["learnable"]), [(2, f"{TP2} --sequence-parallel")], steps=4)


def test_a_spike_of_latent_weights_is_followed_at_once_and_in_proportion():
    flags = latent("--train-iters 2 --lr 1e-9 --geoscale-fault-injection weight_spike:2:4", TP2)
    before, spike = train(flags, 2)
    for name, power in (("sigma", 2), ("logit_bound", 2), ("amax_q", 1), ("amax_k", 1), ("amax_v", 1)):
        assert close(layer_column(spike, name), [4**power * old for old in layer_column(before, name)], 1e-5)
    assert column([before, spike], "geoscale.saturated") == [0, 0]


def test_a_nan_in_a_latent_key_stops_every_rank():
    for run in launch(latent(TP2, "--train-iters 3 --geoscale-fault-injection nan_weight:2"), 2):
        assert run.code not in (0, None) and "layer 2, head 3, W_K" in run.err, run.err[-2000:]
