"""Bounds of multi-latent attention: real layers attacked through their norms, controls that break, NaN, refusals."""

import math

import pytest
import torch

from tests.distributed.test_engine import HEADS, HIDDEN, LENGTH, randomise
from tests.functional.common import base, launch, succeed

pytestmark = pytest.mark.usefixtures("megatron")

Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 12, 6, 6, 8, 10
SHAPE = (
    f"--multi-latent-attention --kv-lora-rank {KV_RANK} --qk-head-dim {NOPE} --qk-pos-emb-head-dim {ROPE} "
    f"--v-head-dim {VALUE} --qk-layernorm"
)
LORA = f"--q-lora-rank {Q_RANK}"
YARN = "--rope-type yarn --rotary-scaling-factor 40"
MODELS = {
    "yarn": ("llama", f"{LORA} {YARN}"),
    "yarn-softmax-scale-bf16": ("llama", f"{LORA} {YARN} --mscale 2 --mscale-all-dim 1 --bf16"),
    "rope-no-query-latent": ("llama", "--rope-type rope"),
    "layernorm-1p": ("gpt2", f"{LORA} {YARN} --apply-layernorm-1p"),
    "layernorm-no-query-latent-layer-scaling": ("gpt2", "--rope-type rope --apply-query-key-layer-scaling"),
}


def latent(*more, model="yarn"):
    """Flags of a tiny multi-latent run."""
    style, extra = MODELS[model]
    flags = base(SHAPE, extra, *more, model=style)
    at = flags.index("--group-query-attention")
    return [flag for flag in flags[:at] + flags[at + 3 :] if flag != "--add-qkv-bias"]


@torch.no_grad()
def align(trainer):
    """Heads of nearly rank one: an input makes rotated and unrotated parts longest at once, along their keys."""
    for layer in trainer.run.scaling.layers:
        attention = layer.attention
        r, n = torch.ones(ROPE) / math.sqrt(ROPE), torch.ones(NOPE) / math.sqrt(NOPE)
        query = (attention.linear_q_proj if layer.config.q_lora_rank is None else attention.linear_q_up_proj).weight
        query.mul_(0.02).add_(torch.outer(torch.cat([n, r]).repeat(HEADS), torch.randn(query.shape[1])))
        up = attention.linear_kv_up_proj.weight
        key = torch.cat([n, torch.zeros(VALUE)]).repeat(HEADS)
        up.mul_(0.02).add_(torch.outer(key, torch.randn(KV_RANK) * HIDDEN / KV_RANK))
        attention.linear_kv_down_proj.weight[-ROPE:].mul_(0.02).add_(torch.outer(r, torch.randn(HIDDEN)))
    trainer.run.optimizer.reload_model_params()


@torch.no_grad()
def separate(trainer):
    """Queries with even rotated rows alone, a shared key with odd ones: rotation of pairs (2i, 2i + 1) joins them."""
    for layer in trainer.run.scaling.layers:
        query = layer.attention.linear_q_up_proj.weight.view(HEADS, NOPE + ROPE, -1)
        query[:, :NOPE] = query[:, NOPE + 1 :: 2] = 0
        layer.attention.linear_kv_down_proj.weight[-ROPE::2] = 0
    trainer.run.optimizer.reload_model_params()


def attack(trainer, go, *, prepare=None):
    """Saturated values, use of the FP8 range, shares of the bounds in use, and the wrong bounds' shares."""
    from megatron.core.utils import unwrap_model

    torch.manual_seed(0)
    randomise(trainer)
    if prepare is not None:
        prepare(trainer)
    engine, args = trainer.run.scaling, trainer.args
    engine.refresh()
    layer = unwrap_model(trainer.run.chunks[0]).train().decoder.layers[1]
    attention, described = layer.self_attention, engine.layers[1]
    points = {"input": torch.randn(LENGTH, 8, HIDDEN), "kv_layernorm": torch.randn(LENGTH, 8, KV_RANK)}
    if args.q_lora_rank is not None:
        points["q_layernorm"] = torch.randn(LENGTH, 8, Q_RANK)
    seen = {}
    attention.core_attention.register_forward_pre_hook(lambda _, inputs: seen.update(qkv=inputs[:3]))
    attention.core_attention.register_forward_hook(lambda _, inputs, out: seen.update(out=out))
    for name in points.keys() - {"input"}:  # the latents are what no down-projection need make
        getattr(attention, name).register_forward_pre_hook(
            lambda _, inputs, name=name: points[name].to(inputs[0].dtype)
        )

    def run():
        layer(points["input"].to(args.params_dtype), attention_mask=None)
        query, key, value = (x.float() for x in seen["qkv"])
        return query, key, value, torch.einsum("ibhd,jbhd->bhij", query, key).tril()

    engine.gauge.reset()
    for point in points.values():
        point.requires_grad_()
    optimizer = torch.optim.Adam(points.values(), lr=0.2)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 80)
        query, key, value, logits = run()
        lengths = [x.norm(dim=-1).amax((0, 2)) for x in (query, key, value)]
        goals = [x.abs().amax((0, 2, 3)) for x in (query, key, value)]
        # Each sequence of the batch climbs one of them, or the logits.
        climbing = [goal[i] for i, goal in enumerate([*goals, *lengths])] + [*logits.abs().amax((1, 2, 3))[6:]]
        score = torch.stack(climbing).log().sum()
        for point, gradient in zip(points.values(), torch.autograd.grad(-score, points.values())):
            point.grad = gradient
        optimizer.step()
    *vectors, logits = run()
    for gradient in (seen["out"].sign(), 1e-6 * torch.randn_like(seen["out"])):
        torch.autograd.grad(seen["out"], points["input"], gradient, retain_graph=True)
    used = {"logit_bound": described.geometry.softmax_scale * float(logits.abs().max())}
    for letter, name, x in zip("qkv", ("query_norm", "key_norm", "value_norm"), vectors):
        used |= {f"amax_{letter}": float(x.abs().max()), name: float(x.norm(dim=-1).max())}
    shares = {name: value / engine.table.bound(2, name) for name, value in used.items()}
    saturated, overrange = int(engine.gauge.saturated[1].sum()), float(engine.gauge.overrange[1].max())
    return saturated, overrange, shares, wrong_bounds(engine, described, used)


def wrong_bounds(engine, layer, used):
    """Shares in use of bounds that take the keys' two inputs for one, or pair rotated rows half-split; and of those
    without YaRN's factor."""
    from megatron_geoscale.bounds import certified_logit_bound, vector_norm_bound
    from megatron_geoscale.scaling.latent_layers import LatentLayer

    moments, geometry = layer.moments(with_cross=False, look=lambda *_: None), layer.geometry
    options = dict(rotary_dim=ROPE, input_norm=1.0, softmax_scale=geometry.softmax_scale)

    def logit_share(**kind):
        return used["logit_bound"] / float(certified_logit_bound(moments, **options, **kind)[1].max())

    unsplit = {
        "logit_bound": logit_share(interleaved=True),
        "half_split": logit_share(interleaved=False, split_keys=True),
        "key_norm": used["key_norm"] / float(vector_norm_bound(moments.k, moments.k_bias, input_norm=1.0).max()),
    }
    LatentLayer.rotary_scale = 1.0
    engine.refresh()
    return unsplit, {name: used[name] / engine.table.bound(2, name) for name in used}


@pytest.mark.parametrize("model", MODELS)
def test_no_input_to_the_norms_saturates_a_certified_scale(model):
    (run,) = succeed(latent("--train-iters 1 --geoscale-logits-dtype fp8", model=model), watch=attack)
    saturated, overrange, shares, _ = run.value
    assert saturated == 0
    assert 0.8 < overrange <= 1
    assert all(share <= 1.04 for share in shares.values()), shares  # bf16 rounds up by less than its allowance
    assert all(shares[name] > 0.6 for name in shares if name != "logit_bound"), shares
    assert shares["logit_bound"] > 0.5, shares


@pytest.mark.parametrize("model", ["yarn", "rope-no-query-latent"])
def test_the_bounds_are_attained_and_those_of_one_input_are_broken(model):
    def attack_aligned(trainer, go):
        return attack(trainer, go, prepare=align)

    (run,) = succeed(latent("--train-iters 1 --geoscale-logits-dtype fp8", model=model), watch=attack_aligned)
    saturated, _, shares, (unsplit, unscaled) = run.value
    assert saturated == 0
    assert 0.85 < shares["logit_bound"] <= 1 and 0.95 < shares["key_norm"] <= 1, shares
    assert unsplit["logit_bound"] > 1.1 and unsplit["key_norm"] > 1.2
    if model == "yarn":  # 1 + 0.1 ln 40 on both sides of a rotated product
        assert unscaled["logit_bound"] > 1.2 and unscaled["amax_q"] > 1.2 and unscaled["amax_k"] > 1.2
    else:
        assert unscaled == pytest.approx(shares)


def test_rotated_rows_are_paired_as_megatron_pairs_them():
    def attack_separate(trainer, go):
        return attack(trainer, go, prepare=separate)

    (run,) = succeed(latent("--train-iters 1 --geoscale-logits-dtype fp8"), watch=attack_separate)
    saturated, _, shares, (wrong, _) = run.value
    assert saturated == 0 and 0.4 < shares["logit_bound"] <= 1
    assert wrong["half_split"] > 10


def test_certified_under_every_recipe_and_sigma_in_units_of_its_bound():
    def read(trainer, go):
        from megatron_geoscale.scaling.table import BOUNDS

        randomise(trainer)
        engine = trainer.run.scaling
        engine.refresh()
        row = dict(zip(BOUNDS, engine.table.bounds[0].tolist(), strict=True))
        attention = engine.layers[0].attention
        weights = [x.detach().double() for x in (
            attention.linear_q_up_proj.weight * attention.q_layernorm.weight,
            attention.linear_kv_up_proj.weight * attention.kv_layernorm.weight,
            attention.linear_kv_down_proj.weight[-ROPE:] * engine.layers[0].norm.weight)]
        return row, weights, float(attention.softmax_scale)

    tables = {}
    for recipe in ("certified", "rank_aware", "paper"):
        flags = latent("--train-iters 1 --geoscale-estimator gram --geoscale-recipe", recipe)
        (run,) = succeed(flags, watch=read)
        tables[recipe] = run.value[0]
    row, (query, key_value, rope), scale = run.value
    assert tables["certified"] == tables["rank_aware"] == tables["paper"]
    mscale = 1 + 0.1 * math.log(40)
    query = math.sqrt(Q_RANK) * query.view(HEADS, NOPE + ROPE, -1)
    key = math.sqrt(KV_RANK) * key_value.view(HEADS, NOPE + VALUE, -1)
    norm = lambda x: torch.linalg.matrix_norm(x, 2)  # noqa: E731
    rotated = norm(query[:, NOPE:].mT @ rope) * math.sqrt(HIDDEN) * mscale**2
    assert row["sigma"] == pytest.approx(float((rotated + norm(query[:, :NOPE].mT @ key[:, :NOPE])).max()), rel=1e-5)
    assert row["logit_bound"] == pytest.approx(scale * row["sigma_bound"], rel=1e-9)
    assert row["sigma_bound"] > row["sigma"]
    lengths = torch.hypot(math.sqrt(HIDDEN) * mscale * norm(rope), norm(key[:, :NOPE]))
    assert row["key_norm"] == pytest.approx(float(lengths.max()), rel=1e-5)
    assert row["value_norm"] == pytest.approx(float(norm(key[:, NOPE:]).max()), rel=1e-5)


SPOILT = {  # parameter: (index, what the error names)
    "linear_q_down_proj.weight": ((1, 3), "W_Q"),
    "linear_q_up_proj.weight": ((-1, 3), "W_Q"),
    "q_layernorm.weight": ((3,), "W_Q"),
    "linear_kv_down_proj.weight": ((0, 3), "W_K"),
    "linear_kv_up_proj.weight": ((-VALUE - 1, 1), "W_K"),
    "kv_layernorm.weight": ((3,), "W_K"),
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_nan_anywhere_before_attention_is_named_on_every_rank(ranks):
    def spoil(trainer, go):
        engine, found = trainer.run.scaling, {}
        layer = engine.layers[1]
        value_row = ("linear_kv_up_proj.weight", ((-1, 0), "W_V"))
        shared_row = ("linear_kv_down_proj.weight", ((-1, 0), "W_K"))
        for case, (name, (index, _)) in enumerate([*SPOILT.items(), value_row, shared_row]):
            parameter = layer.attention.get_parameter(name)
            mine = layer.tp_group.rank() == ranks - 1 or "layernorm" in name
            before = float(parameter[index])
            with torch.no_grad():
                parameter[index] = float("inf" if case % 2 else "nan") if mine else before
            try:
                engine.refresh()
                found[name, index] = "nothing"
            except RuntimeError as error:
                found[name, index] = str(error)
            with torch.no_grad():
                parameter[index] = before
        engine.refresh()
        return found

    runs = succeed(latent("--train-iters 1 --tensor-model-parallel-size", ranks), ranks, watch=spoil)
    assert all(run.value == runs[0].value for run in runs)
    for (name, index), error in runs[0].value.items():
        expected = {"linear_kv_up_proj.weight": "W_V" if index == (-1, 0) else "W_K"}.get(name, SPOILT[name][1])
        assert "layer 2, " in error and expected in error, (name, index, error)


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ("--geoscale-estimator power", "--geoscale-estimator power is not for --multi-latent-attention"),
        ("--geoscale-recipe paper", "--geoscale-estimator power is not for --multi-latent-attention"),
        ("--geoscale-granularity layer", "--geoscale-granularity layer is not for --multi-latent-attention"),
        ("no norms", "--multi-latent-attention without --qk-layernorm"),
    ],
)
def test_what_has_no_bound_is_refused_by_name(flags, culprit):
    flags = latent("--train-iters 1", *([] if flags == "no norms" else [flags]))
    if "without" in culprit:
        flags.remove("--qk-layernorm")
    (run,) = launch(flags)
    assert run.code not in (0, None) and culprit in run.err, run.err[-2000:]
