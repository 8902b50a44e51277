"""Models beyond GPT and Llama, in real layers: QK-norm, shared key/value groups, output gates, RoPE scaling."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.distributed.test_engine import HEAD_DIM, HEADS, HIDDEN, LENGTH, base, heads_of, measure, norm2, randomise
from tests.functional.common import close, column, flags_of, launch, layer_column, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

QK_NORM = "--qk-layernorm"
ONE_GROUP = "--num-query-groups 1"
GATE = "--attention-output-gate"
MODELS = {
    "rms": ("llama", QK_NORM),
    "rms-1p-interleaved": ("llama", f"{QK_NORM} --apply-layernorm-1p --rotary-percent 0.5 --rotary-interleaved"),
    "l2": ("llama", "--qk-l2-norm"),
    "layernorm": ("gpt2", QK_NORM),
    "yarn": ("llama", f"{QK_NORM} --position-embedding-type yarn --yarn-rotary-scaling-factor 40"),
    "layernorm-rope-bf16": ("gpt2", f"{QK_NORM} --position-embedding-type rope --bf16"),
}


def flags_for(model, *more):
    style, extra = MODELS[model]
    return base(extra, "--train-iters 1", *more, model=style)


def attack_head_norms(trainer, go):
    """Saturated values, range in use and shares of the bounds, of a layer whose head norms see crafted inputs."""
    from megatron.core.utils import unwrap_model

    torch.manual_seed(0)
    randomise(trainer)
    engine, args = trainer.run.scaling, trainer.args
    engine.refresh()
    model = unwrap_model(trainer.run.chunks[0]).train()
    layer = model.decoder.layers[0]
    attention = layer.self_attention
    rope = model.rotary_pos_emb(LENGTH) if args.position_embedding_type in ("rope", "yarn") else None
    rope = rope[0] if args.position_embedding_type == "yarn" else rope
    seen, replaced = {}, {}
    attention.core_attention.register_forward_pre_hook(lambda _, inputs: seen.update(qkv=inputs[:3]))
    for name in ("q_layernorm", "k_layernorm"):  # the norms then see what no projection would make
        getattr(attention, name).register_forward_pre_hook(
            lambda _, inputs, name=name: replaced.get(name, inputs[0]).to(inputs[0].dtype)
        )
    hidden = torch.randn(LENGTH, 8, HIDDEN)

    def run():
        layer(hidden.to(args.params_dtype), attention_mask=None, rotary_pos_emb=rope)

    engine.gauge.reset()
    for size in (1e-6, 1.0, 1e6):
        for _ in range(4):  # single entries, of either sign
            for name, heads in (("q_layernorm", HEADS), ("k_layernorm", 2)):
                entry = torch.randint(HEAD_DIM, (LENGTH, 8, heads, 1))
                sign = torch.randint(2, entry.shape) * 2.0 - 1.0
                replaced[name] = torch.zeros(LENGTH, 8, heads, HEAD_DIM).scatter_(-1, entry, size * sign)
            run()
    points = {name: torch.randn(LENGTH, 8, heads, HEAD_DIM, requires_grad=True)
              for name, heads in (("q_layernorm", HEADS), ("k_layernorm", 2))}
    optimizer = torch.optim.Adam(points.values(), lr=0.2)
    for _ in range(40):
        replaced.update(points)
        run()
        query, key = (x.float() for x in seen["qkv"][:2])
        logits = torch.einsum("ibhd,jbhd->bhij", query, key.repeat_interleave(HEADS // key.shape[2], dim=2))
        goals = (query.abs().amax((0, 2, 3)), key.abs().amax((0, 2, 3)), logits.tril().abs().amax((1, 2, 3)))
        gradients = torch.autograd.grad(-sum(goal.log().sum() for goal in goals), points.values())
        for point, gradient in zip(points.values(), gradients):
            point.grad = gradient
        optimizer.step()
    used = dict(query=query.abs().max(), key=key.abs().max(), logits=args.kv_channels**-0.5 * logits.tril().abs().max())
    bounds = {name: engine.table.bound(1, name) for name in ("amax_q", "amax_k", "logit_bound")}
    shares = [float(value) / bound for value, bound in zip(used.values(), bounds.values())]
    return int(engine.gauge.saturated[0].sum()), float(engine.gauge.overrange[0].max()), shares


@pytest.mark.parametrize("model", MODELS)
def test_no_input_to_the_head_norms_saturates_a_certified_scale(model):
    (run,) = succeed(flags_for(model, "--geoscale-logits-dtype fp8"), watch=attack_head_norms)
    saturated, overrange, shares = run.value
    assert saturated == 0
    assert 0.6 < overrange <= 1
    assert all(0.6 < share <= 1.04 for share in shares), shares  # bf16 rounds up by less than its allowance


@pytest.mark.parametrize("recipe", ["certified", "paper"])
@pytest.mark.parametrize("model", ["rms", "layernorm"])
def test_head_norms_replace_the_projections_in_every_bound_of_queries_and_keys(model, recipe):
    def read(trainer, go):
        found, *_ = measure(trainer, go)
        layer = trainer.run.scaling.layers[0]
        norms = [(m.weight.detach().double(), None if m.bias is None else m.bias.detach().double())
                 for m in (layer.attention.q_layernorm, layer.attention.k_layernorm)]
        return found[0], norms

    (run,) = succeed(flags_for(model, "--geoscale-recipe", recipe, "--geoscale-estimator gram"), watch=read)
    (_, whole, gain, shift, bounds), norms = run.value
    root = math.sqrt(HEAD_DIM)
    assert bounds["sigma"] == pytest.approx(max(norm2(h[0].T @ h[2]) for h in heads_of(whole, gain, shift)), rel=1e-5)
    for name, (g, b) in zip(("query_norm", "key_norm"), norms):
        extra = 0.0 if b is None else float(torch.linalg.vector_norm(b))
        assert bounds[name] == pytest.approx(root * float(g.abs().max()) + extra, rel=1e-9)
    if model == "rms":  # RoPE over pairs (i, i + 4)
        (g_q, _), (g_k, _) = norms
        pairs = [(i, i + 4) for i in range(4)]
        products = [max(abs(float(g_q[i])) for i in pair) * max(abs(float(g_k[i])) for i in pair) for pair in pairs]
        assert bounds["sigma_bound"] == pytest.approx(max(products), rel=1e-9)
        assert bounds["logit_bound"] == pytest.approx(root * max(products), rel=1e-9)
        assert bounds["amax_q"] == pytest.approx(root * float(g_q.abs().max()), rel=1e-9)


def check_against_one_rank(folder, start, layouts, steps=8):
    """Training from one checkpoint in `layouts` gives one rank's losses and table. Gradients are not cast to FP8, where
    rounding would be another in each layout: each rank scales by what it sees of dO."""
    start = [*start, *flags_of("--geoscale-backward bf16")]
    succeed([*start, *flags_of("--train-iters 0 --save", folder)])
    flags = [*start, *flags_of("--train-iters", steps, "--load", folder)]
    alone = train(flags)
    assert column(alone, "geoscale.saturated") == [0] * steps
    for ranks, extra in layouts:
        records = train([*flags, *flags_of(extra)], ranks)
        assert records[0]["geoscale"]["digest"] == alone[0]["geoscale"]["digest"], extra
        assert column(records, "geoscale.saturated") == [0] * steps
        assert close(column(records, "lm_loss"), column(alone, "lm_loss"), 1e-5), extra
        for name in ("sigma", "logit_bound", "amax_q", "amax_k", "amax_v"):
            assert close(layer_column(records[-1], name), layer_column(alone[-1], name), 1e-4), (extra, name)
    return alone


TP2 = "--tensor-model-parallel-size 2"
SLOW = "--lr 1e-3 --lr-decay-iters 8"


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_qk_layernorm_trains_at_any_tensor_parallel_size(model, tmp_path):
    alone = check_against_one_rank(tmp_path, base(SLOW, QK_NORM, model=model), [(2, f"{TP2} --sequence-parallel")])
    losses = column(alone, "lm_loss")
    assert abs(losses[-1] - losses[0]) > 1e-3 * losses[0]  # a hundred times what the layouts may differ by


def test_qk_norm_makes_a_weight_spike_harmless_to_queries_and_keys():
    before, spike = train(base(QK_NORM, "--train-iters 2 --lr 1e-9 --geoscale-fault-injection weight_spike:2:4"))
    for name, factor in (("amax_q", 1), ("logit_bound", 1), ("sigma", 16), ("amax_v", 4)):
        assert close(layer_column(spike, name), [factor * old for old in layer_column(before, name)], 1e-5), name


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", ["certified", "paper"])
def test_ranks_that_share_a_key_value_group_make_one_ranks_table(model, recipe, tmp_path):
    start = base(SLOW, ONE_GROUP, "--geoscale-recipe", recipe, model=model)
    if recipe == "paper":
        start += flags_of("--geoscale-granularity layer")
    check_against_one_rank(tmp_path, start, [(2, TP2)] if recipe == "paper" else [(2, f"{TP2} --sequence-parallel")])


def test_heads_of_shared_groups_are_the_ranks_own():
    """What `projections` picks, applied to an activation, against megatron-core's own split of linear_qkv's output."""

    def read(trainer, go):
        randomise(trainer)
        layer = trainer.run.scaling.layers[0]
        p = layer.projections()
        hidden = torch.randn(1, 1, HIDDEN, generator=torch.Generator().manual_seed(0))
        normed = layer.norm(hidden)
        tensors = layer.attention.get_query_key_value_tensors(normed, output_gate=trainer.args.attention_output_gate)
        query, key, value = (x[0, 0].detach().double() for x in tensors[:3])
        xhat = normed[0, 0].detach().double() / layer.norm.weight.detach().double()
        return [float((w @ xhat - x).abs().max()) for w, x in ((p.q, query), (p.k, key), (p.v, value))], len(p.q)

    for extra, heads in ((f"{TP2} {ONE_GROUP}", 2), (f"{TP2} --num-query-groups 2", 2), (f"{TP2} {GATE}", 2)):
        for run in succeed(base(extra, "--train-iters 1"), 2, watch=read):
            errors, found = run.value
            assert max(errors) < 1e-5 and found == heads, extra


@pytest.mark.parametrize(("ranks", "groups"), [(4, 2), (8, 2), (4, 1), (8, 4)])
def test_any_number_of_ranks_may_share_a_group(ranks, groups, monkeypatch):
    """Each rank's heads from its shard alone and a gather that is played back, FP8 primary weights included."""
    from megatron_geoscale.scaling import layers, weights
    from megatron_geoscale.spectral.projections import split_linear_qkv

    class Float8:
        """Stores half of what it stands for, as a quantized tensor stores other numbers than its values."""

        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self, values):
            self.stored = values / 2

        def dequantize(self):
            return 2 * self.stored

    heads, dim, hidden = 8, 4, 6
    whole = torch.randn(groups * (heads // groups + 2) * dim, hidden)
    bias = torch.randn(len(whole))
    monkeypatch.setattr(weights, "is_float8tensor", lambda tensor: isinstance(tensor, Float8))
    monkeypatch.setattr(layers.dist, "all_gather_into_tensor",
                        lambda out, mine, group: out.copy_(whole if mine.dim() == 2 else bias))
    dense = split_linear_qkv(whole, bias, num_groups=groups, heads_per_group=heads // groups, head_dim=dim)
    for rank in range(ranks):
        config = SimpleNamespace(num_attention_heads=heads, num_query_groups=groups,
                                 layernorm_zero_centered_gamma=False)
        linear = SimpleNamespace(weight=Float8(whole.chunk(ranks)[rank]), bias=bias.chunk(ranks)[rank],
                                 tp_group=SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank))
        attention = SimpleNamespace(config=config, linear_qkv=linear, num_query_groups_per_partition=1,
                                    hidden_size_per_attention_head=dim)
        norm = SimpleNamespace(weight=torch.ones(hidden), bias=None)
        p = layers.AttentionLayer(1, attention, norm, "rope", 1.0, 8).projections()
        mine = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        group = slice(rank * groups // ranks, rank * groups // ranks + 1)
        found = (p.q, p.q_bias, p.k, p.k_bias, p.v, p.v_bias)
        for part, expected in zip(found, (dense[0][mine], dense[1][mine], *(rows[group] for rows in dense[2:]))):
            assert torch.equal(part, expected.double())


def test_a_nan_in_a_shared_key_is_named_on_every_rank():
    flags = base(ONE_GROUP, TP2, "--train-iters 3 --geoscale-fault-injection nan_weight:2")
    for run in launch(flags, 2):
        assert run.code not in (0, None) and "layer 2, head 0, W_K" in run.err, run.err[-2000:]


def test_a_nan_in_the_gain_of_a_head_norm_is_named():
    def spoil(trainer, go):
        layer = trainer.run.scaling.layers[1]
        with torch.no_grad():
            layer.attention.k_layernorm.weight[3] = float("nan")
        with pytest.raises(RuntimeError) as stop:
            trainer.run.scaling.refresh()
        return str(stop.value)

    (run,) = succeed(base(QK_NORM, "--train-iters 1"), watch=spoil)
    assert "layer 2, head 0, k_layernorm" in run.value


def test_output_gates_are_left_out_of_the_bounds(tmp_path):
    check_against_one_rank(tmp_path, base(SLOW, GATE), [(2, TP2)])


def test_rope_scaling_is_a_rotation_and_changes_no_scale(tmp_path):
    succeed(base("--train-iters 0 --init-method-std 0.5 --save", tmp_path))
    flags = base("--train-iters 2 --load", tmp_path)
    plain = train(flags)
    for extra in ("--use-rope-scaling --rope-scaling-factor 4", "--rotary-seq-len-interpolation-factor 4"):
        scaled = train([*flags, *flags_of(extra)])
        assert scaled[0]["geoscale"]["digest"] == plain[0]["geoscale"]["digest"]
        assert column(scaled, "geoscale.saturated") == [0, 0]
        assert scaled[0]["lm_loss"] != plain[0]["lm_loss"]


def test_softmax_scale_of_the_config_scales_the_logit_bound_alone():
    def double(trainer, go):
        engine = trainer.run.scaling
        engine.refresh()
        return engine.layers[0].geometry.softmax_scale, engine.table.bounds.clone()

    def prepare():
        from megatron_geoscale.training import model

        plain = model.TransformerConfig
        model.TransformerConfig = lambda **fields: plain(**fields, softmax_scale=1.0)

    (plain,), (scaled,) = (succeed(base("--train-iters 1"), watch=double, prepare=p) for p in (None, prepare))
    from megatron_geoscale.scaling.table import BOUNDS

    assert plain.value[0] == pytest.approx(HEAD_DIM**-0.5) and scaled.value[0] == 1.0
    for name, before, after in zip(BOUNDS, plain.value[1].T, scaled.value[1].T):
        factor = HEAD_DIM**0.5 if name in ("logit_bound", "logit_worst", "softmax_scale") else 1.0
        assert torch.allclose(after, factor * before, rtol=1e-12), name
