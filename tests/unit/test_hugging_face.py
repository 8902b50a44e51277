"""The attention and the scales inside a model of transformers, on one process."""

import importlib
import re
import sys

import pytest
import torch

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.checkpoints.attention_weights import open_checkpoint
from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.folding import fold_attention
from megatron_geoscale.scaling.guard import NonFiniteWeightsError
from megatron_geoscale.scaling.layer_bounds import bound_heads
from megatron_geoscale.scaling.slots import SLOTS
from megatron_geoscale.scaling.table import BOUNDS
from megatron_geoscale.spectral.gram import norm_of_grams
from megatron_geoscale.spectral.moments import Moments
from tests.functional.hf_models import FAMILIES, LENGTH, make_model, random_tokens
from tests.sharded_models import model_of


@pytest.fixture(scope="module")
def attached(megatron):
    """`attached(name, optimizer=..., dtype=..., **config)`: a model and its scales."""
    from megatron_geoscale.integrations import fsdp

    def attach(name, optimizer=None, dtype=None, model=None, **config):
        model = model or model_of(name)
        optimizer = optimizer and optimizer(model.parameters())
        return model, fsdp.attach(model, GeoScaleConfig(**config), optimizer=optimizer, dtype=dtype), optimizer

    return attach


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=12, rope_theta=10000.0)


@pytest.mark.parametrize("recipe", ["certified", "rank_aware", "paper"])
@pytest.mark.parametrize("name", [*FAMILIES, "yarn", "gpt2, odd"])
def test_the_table_is_that_of_the_checkpoints_reader(attached, tmp_path, name, recipe):
    """`checkpoints.attention_weights` folds whole layers from the files; each bound is the largest over the heads."""
    model = make_model("qwen2", rope_parameters=YARN) if name == "yarn" else model_of(name)
    _, scales, _ = attached(name, model=model, recipe=recipe, estimator="gram")
    model.save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    for number in range(1, source.num_layers + 1):
        w = source.layer(number)
        g = w.geometry
        p = fold_attention(w.query, w.key, w.value, gain=w.gain, shift=w.shift, rotary_dim=g.rotary_dim,
                           rotary_scale=g.rotary_scale)
        moments = Moments.of(p, with_cross=recipe == "rank_aware")
        norms = w.head_norms and tuple(
            HeadNorm(norm.gain[None], None if norm.shift is None else norm.shift[None]) for norm in w.head_norms
        )
        columns = bound_heads(g, moments, norm_of_grams(moments.q, moments.k), norms, scales.config,
                              num_layers=source.num_layers)
        expected = torch.stack([columns[bound].amax() for bound in BOUNDS])
        torch.testing.assert_close(scales.table.bounds[number - 1], expected, rtol=1e-12, atol=0)
        if name == "yarn":
            assert g.rotary_scale > 1.1


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2)


@torch.no_grad()
def logits(model, tokens, **options):
    return model(input_ids=tokens, use_cache=False, **options).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_the_exact_one_up_to_the_casts(attached, name):
    """Of the first layer, whose inputs are the same. A window, mask or scale that went missing would show."""
    model, tokens, seen = model_of(name).eval(), random_tokens(), []
    layer = model.transformer.h[0].attn.c_proj if name == "gpt2" else model.model.layers[0].self_attn.o_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, tokens)
    attached(name, model=model)
    logits(model, tokens)
    exact, found = seen
    assert 0.005 < float((found - exact).norm() / exact.norm()) < 0.06


def test_the_mask_is_causality_window_and_padding(attached):
    """What a query cannot see does not change its logits by a bit; what it can see does."""
    model, _, _ = attached("mistral")  # a window of 8, two layers
    model.eval()
    tokens, changed = random_tokens(), random_tokens()
    changed[:, 20] = (changed[:, 20] + 1) % 150
    same = (logits(model, tokens) == logits(model, changed)).all(-1)
    assert same[:, :20].all() and not same[:, 20].any()
    assert same[:, 20 + 2 * 7 + 1 :].all() and not same[:, 21:28].any()

    padded = torch.ones_like(tokens)
    padded[0, :21] = 0
    positions = (padded.cumsum(-1) - 1).clamp_min(0)
    mine, theirs = (logits(model, t, attention_mask=padded, position_ids=positions) for t in (tokens, changed))
    assert torch.equal(mine[0, 21:], theirs[0, 21:]) and not torch.equal(mine[1, 21:28], theirs[1, 21:28])


def test_a_cache_gives_the_logits_of_the_whole_sequence(attached):
    """One token at a time: a query of one, keys of all before it."""
    model, _, _ = attached("qwen2")
    model.eval()
    tokens = random_tokens(6)
    whole = logits(model, tokens)
    cache, steps = None, []
    with torch.no_grad():
        for position in range(6):
            out = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-4)


def test_backward_and_forward_casts_are_counted_in_training_only_once(attached):
    model, scales, _ = attached("llama-3.1")
    loss = model(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss
    forward = scales.gauge.amax.clone()
    assert (forward[:, [SLOTS.index(slot) for slot in ("qkv", "s", "o")]] > 0).all()
    assert not forward[:, SLOTS.index("dqkv")].any()
    loss.backward()
    assert (scales.gauge.amax[:, SLOTS.index("dqkv")] > 0).all() and scales.saturated() == 0


def test_dropout_is_that_of_the_model(attached):
    """Probabilities of 1, those of the first token, become 0 or 1 / (1 - p) in training."""
    model, scales, _ = attached("gpt2", model=make_model("gpt2", attn_pdrop=0.5).train())
    model(input_ids=random_tokens(), use_cache=False)
    assert float(scales.gauge.amax[0, SLOTS.index("s")]) == 2.0 and scales.saturated() == 0
    scales.gauge.reset()
    logits(model.eval(), random_tokens())
    assert float(scales.gauge.amax[0, SLOTS.index("s")]) == 1.0


def test_the_table_follows_the_optimizer_at_the_interval(attached):
    model, scales, optimizer = attached("qwen2", optimizer=sgd, refresh_interval=2)
    digests = [scales.digest()]
    for _ in range(4):
        model(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss.backward()
        optimizer.step()
        digests.append(scales.digest())
    assert digests[0] == digests[1] != digests[2] == digests[3] != digests[4]


def test_calibration_sees_training_only_and_goes_on_from_its_state(attached):
    options = dict(recipe="calibrated", burn_in_steps=2)
    model, scales, optimizer = attached("qwen2", optimizer=sgd, **options)
    burning = scales.table.scale(1, "qkv")
    for _ in range(2):
        assert scales.table.scale(1, "qkv") < 1.2 * burning
        model.eval()
        logits(model, 149 - random_tokens())
        model.train()
        model(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss.backward()
        optimizer.step()
    assert scales.table.scale(1, "qkv") > 1.5 * burning  # alpha is below 1 now
    _, again, _ = attached("qwen2", model=model, **options)
    assert again.digest() != scales.digest()
    again.load_state_dict(scales.state_dict())
    assert again.digest() == scales.digest()
    maxima = scales.engine.calibrator.statistics.maxima
    assert (maxima[:, SLOTS.index("qkv")] > 0).all()


def test_evaluation_is_not_what_calibration_observes(attached):
    model, scales, _ = attached("qwen2", recipe="calibrated")
    logits(model.eval(), random_tokens())
    assert scales.gauge.amax.any() and not scales.engine.calibrator.gauge.amax.any()
    model.train()(input_ids=random_tokens(), use_cache=False)
    assert scales.engine.calibrator.gauge.amax.any()


def test_scales_are_for_the_dtype_that_attention_computes_in(attached):
    model, _, _ = attached("llama-3.1")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"attach with dtype=torch\.bfloat16"):
        logits(model, random_tokens())
    model, scales, _ = attached("llama-3.1", dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model.eval(), random_tokens())
    half = model_of("llama-3.1").bfloat16()
    _, rounded, _ = attached("llama-3.1", model=half)
    logits(half.eval(), random_tokens())
    assert rounded.digest() == scales.digest() and rounded.saturated() == 0


def test_a_weight_that_is_not_finite_is_named_and_the_table_kept(attached):
    model, scales, _ = attached("qwen2")
    before = scales.digest()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[20, 3] = float("nan")
    with pytest.raises(NonFiniteWeightsError, match="layer 2, head 2, W_K"):
        scales.refresh()
    assert scales.digest() == before


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dict(recipe="delayed"), "--geoscale-recipe delayed takes no scale from the weights"),
        (dict(recipe="paper"), "--geoscale-estimator power is not for models of transformers"),
        (dict(granularity="layer"), "--geoscale-granularity layer is not for models of transformers"),
        (dict(backward="delayed"), "--geoscale-backward delayed is not for models of transformers"),
    ],
)
def test_what_is_not_for_sharded_weights_is_refused_by_its_flag(attached, config, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        attached("gpt2", **config)


def test_models_that_cannot_be_bounded_are_refused(attached):
    from transformers import BertConfig, BertModel

    with pytest.raises(ValueError, match="Linear is not a model of transformers"):
        attached("", model=torch.nn.Linear(2, 2))
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(ValueError, match="model_type bert"):
        attached("", model=BertModel(small))
    model = model_of("qwen2")
    model.model.layers[0].self_attn.q_proj = torch.nn.utils.parametrizations.weight_norm(
        model.model.layers[0].self_attn.q_proj
    )
    with pytest.raises(ValueError, match=r"no parameter model\.layers\.0\.self_attn\.q_proj\.weight"):
        attached("", model=model)


def test_attention_without_scales_and_masks_of_floats_are_refused(attached):
    model, _, _ = attached("qwen2")
    with pytest.raises(ValueError, match="takes a mask of bools"):
        logits(model, random_tokens(), attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
    with pytest.raises(ValueError, match=f"{LENGTH + 1} keys"):
        logits(model, torch.zeros(1, LENGTH + 1, dtype=torch.long))
    other = model_of("qwen2")
    other.set_attn_implementation("geoscale_fp8")
    with pytest.raises(RuntimeError, match="before scales were attached"):
        logits(other, random_tokens())


@pytest.mark.parametrize(("missing", "extra"), [("deepspeed", "deepspeed"), ("transformers", "hf")])
def test_a_missing_extra_is_named(attached, monkeypatch, missing, extra):
    for name in list(sys.modules):
        if name.startswith("megatron_geoscale.integrations.") and not name.endswith("megatron_lm"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'megatron-geoscale[{extra}]'")):
        importlib.import_module("megatron_geoscale.integrations.deepspeed")
