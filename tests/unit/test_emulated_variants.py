"""Windows, sinks, layer scaling and values of another head dim in `EmulatedAttention`, against megatron-core's own; and
what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_geoscale import cpu

cpu.install()  # before megatron-core is imported

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_geoscale.attention import fp8_function  # noqa: E402
from megatron_geoscale.attention.baselines import CurrentScaling, DelayedScaling  # noqa: E402
from megatron_geoscale.attention.emulated import EmulatedAttention, fp8_attention  # noqa: E402
from megatron_geoscale.scaling.formats import SLOT_FORMATS, Cast, cast, sqnr_db  # noqa: E402
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, SLOTS  # noqa: E402
from tests.unit.test_emulated import SCALES, Fixed, causal, make_inputs, make_module, run_both  # noqa: E402

ONE_RANK = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1, rank=lambda: 0), dp_cp=None)


def make_both(layer_number=1, **config):
    """Megatron's attention and ours for one config, with equal sinks."""
    settings = dict(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0)
    config = TransformerConfig(**{**settings, **config}, init_method=lambda x: torch.nn.init.normal_(x, std=2.0))
    modules = []
    for kind in (DotProductAttention, EmulatedAttention):
        torch.manual_seed(3)
        modules.append(kind(config, layer_number, AttnMaskType.causal, attention_type="self", pg_collection=ONE_RANK))
    modules[1].scaler = Fixed(**SCALES)
    return modules


@pytest.fixture
def without_casts(monkeypatch):
    """Casts that change nothing: what is left is the attention itself."""
    zero = torch.tensor(0)
    monkeypatch.setattr(fp8_function, "cast", lambda x, scale, fmt, **_: Cast(x, x.abs().max(), zero, zero))
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", parallel_state.GlobalMemoryBuffer())
    tracker = SimpleNamespace(fork=lambda: torch.enable_grad())
    monkeypatch.setattr("megatron.core.tensor_parallel.get_cuda_rng_tracker", lambda: tracker)


VARIANTS = {
    "window": (1, dict(window_size=(3, 0))),
    "window-of-one-key": (1, dict(window_size=(0, 0))),
    "window-skipped": (2, dict(window_size=(3, 0), window_attn_skip_freq=2)),
    "window-by-list": (3, dict(window_size=(3, 0), window_attn_skip_freq=[0, 0, 1, 0])),
    "off-by-one": (1, dict(softmax_type="off-by-one")),
    "learnable": (1, dict(softmax_type="learnable")),
    "layer-scaling": (3, dict(apply_query_key_layer_scaling=True)),
    "all": (3, dict(window_size=(3, 0), softmax_type="learnable", apply_query_key_layer_scaling=True)),
    "all-bf16": (3, dict(window_size=(3, 0), softmax_type="learnable", apply_query_key_layer_scaling=True, bf16=True,
                         params_dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("fp8_backward", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_casts_output_and_gradients_are_megatrons(variant, fp8_backward, without_casts):
    number, config = VARIANTS[variant]
    dtype = config.get("params_dtype", torch.float32)
    results = []
    for module in make_both(number, **config):
        module.fp8_backward = fp8_backward
        q, k, v, grad = make_inputs(sq=16, sk=16, std=2.0, dtype=dtype)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)] + list(module.parameters())
        results.append(dict(zip(("out", "dq", "dk", "dv", "dsink"), [out := module(*leaves[:3], None)] + list(
            torch.autograd.grad(out, leaves, grad.flatten(2))))))
    theirs, mine = results
    assert mine.keys() == theirs.keys() and ("dsink" in mine) == (config.get("softmax_type") == "learnable")
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype
        if variant != "window-of-one-key":  # whose softmax has nothing to learn
            assert mine[name].abs().max() > 1e-2, name
        if dtype == torch.float32:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
        else:  # Megatron rounds logits and probabilities to bf16
            assert sqnr_db(theirs[name].double(), mine[name].double()) > 30, name


@pytest.mark.parametrize("variant", ["window", "off-by-one", "learnable", "layer-scaling"])
def test_each_variant_changes_the_output(variant, without_casts):
    number, config = VARIANTS[variant]
    q, k, v, _ = make_inputs(sq=16, sk=16, std=2.0)
    plain, changed = (make_both(number, **c)[1](q, k, v, None) for c in ({}, config))
    if variant == "layer-scaling":  # changes what is stored, not what comes out
        torch.testing.assert_close(plain, changed)
    else:
        assert (plain - changed).abs().max() > 0.1


def test_a_window_takes_keys_away_from_any_mask():
    q, k, v, _ = make_inputs()
    _, module = make_both(window_size=(2, 0))
    position = torch.arange(9)
    outside = position[None] < position[:, None] - 2
    other = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.2
    for given, expected in ((None, causal(9) | outside), (other, causal(9) | outside | other)):
        module.scaler = Fixed(**SCALES)
        out = module(q, k, v, given)
        want = fp8_attention(q, k, v, scaler=Fixed(**SCALES), softmax_scale=8**-0.5, masked=expected)
        assert torch.equal(out, want.flatten(2))
    _, ahead = make_both(window_size=(-1, 2))  # no limit before; the causal mask allows none behind
    ahead.scaler = Fixed(**SCALES)
    assert torch.equal(ahead(q, k, v, None), fp8_attention(
        q, k, v, scaler=Fixed(**SCALES), softmax_scale=8**-0.5, masked=causal(9)).flatten(2))
    module.scaler = Fixed(**SCALES)
    last = module(q[-1:], k, v, None)  # decoding: the newest query sees the last three keys
    module.scaler = Fixed(**SCALES)
    assert torch.equal(last, module(q, k, v, None)[-1:])


def test_stored_logits_and_their_gradient_carry_the_layers_share():
    q, k, v, grad = make_inputs()
    _, module = make_both(3, apply_query_key_layer_scaling=True)
    module.fp8_logits = True
    assert (module.softmax_scale, module.logit_multiplier) == (pytest.approx(8**-0.5 / 3), 3.0)
    plain = make_both()[1]
    asked = []
    for attention in (plain, module):
        attention.fp8_logits = True
        attention.scaler = Fixed(**{**SCALES, "logits": 40.0 if attention is plain else 120.0})
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attention(*leaves, None).backward(grad.flatten(2))
        asked.append(attention.scaler.asked)
    torch.testing.assert_close(3 * asked[1]["logits"][0], asked[0]["logits"][0])
    torch.testing.assert_close(asked[1]["dp"][0], asked[0]["dp"][0], rtol=1e-3, atol=1e-6)


def test_what_a_sink_takes_is_missing_from_every_row():
    q, k, v, _ = make_inputs()
    _, module = make_both(softmax_type="off-by-one")
    module(q, k, v, None)
    q8, k8 = (cast(x, module.scaler.scales["qkv"], SLOT_FORMATS["qkv"]).values for x in (q, k))
    logits = 8**-0.5 * torch.einsum("ibhd,jbhd->bhij", q8, k8.repeat_interleave(2, 2))
    total = logits.exp().masked_fill(causal(9), 0.0).sum(-1)
    torch.testing.assert_close(module.scaler.asked["s"][0].sum(-1), total / (1 + total))


@pytest.mark.parametrize("sink", [False, True])
def test_values_may_have_their_own_head_dim(sink):
    q, k, _, _ = make_inputs(dim=8)
    _, _, v, grad = make_inputs(seed=4, dim=5)
    if not sink:
        got, want = run_both(q, k, v, grad, Fixed(**SCALES), softmax_scale=0.3, masked=causal(9))
        assert got[0].shape == (9, 2, 4, 5)
        for mine, exact in zip(got, want):
            assert sqnr_db(exact, mine) > 40
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                               attention_dropout=0.0, softmax_type="off-by-one" if sink else "vanilla")
    module = EmulatedAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.3, k_channels=8, v_channels=5)
    module.scaler, module.measure_sqnr = Fixed(**SCALES), True
    assert module(q, k, v, None).shape == (9, 2, 20)
    assert 20 < 10 * float((module.sqnr_powers.signal / module.sqnr_powers.noise).log10()) < 60  # of the same attention


def test_a_learnable_sink_is_saved_as_megatrons():
    theirs, mine = make_both(softmax_type="learnable")
    assert torch.equal(theirs.softmax_offset, mine.softmax_offset) and list(mine.state_dict()) == ["softmax_offset"]
    assert mine.softmax_offset.tensor_model_parallel and mine.softmax_offset.partition_dim == 0
    metadata = {"dp_cp_group": SimpleNamespace(size=lambda: 1, rank=lambda: 0)}
    saved = [module.sharded_state_dict("prefix.", (), metadata) for module in (theirs, mine)]
    (key,) = saved[0]
    assert list(saved[1]) == [key] == ["prefix.softmax_offset"]
    a, b = (state[key] for state in saved)
    for field in ("key", "global_shape", "global_offset", "axis_fragmentations", "replica_id", "dtype"):
        assert getattr(a, field) == getattr(b, field), field
    for kind in ("vanilla", "off-by-one"):
        assert make_both(softmax_type=kind)[1].sharded_state_dict("prefix.", (), metadata) == {}


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (dict(qk_clip=True), "--qk-clip"),
        (dict(log_max_attention_logit=True), "--log-max-attention-logit"),
        (dict(context_parallel_size=2), "--context-parallel-size"),
    ],
)
def test_refuses_what_it_does_not_compute(config, flag):
    with pytest.raises(ValueError, match=flag):
        make_module(**config)


def test_refuses_inputs_it_does_not_compute():
    q, k, v, _ = make_inputs()
    module = make_module(Fixed(**SCALES))
    with pytest.raises(ValueError, match="packed sequences"):
        module(q, k, v, None, packed_seq_params=object())
    with pytest.raises(ValueError, match="attention bias"):
        module(q, k, v, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="padding needs an attention_mask"):
        module(q, k, v, None, attn_mask_type=AttnMaskType.padding)
    with pytest.raises(RuntimeError, match="layer 3 ran before scales"):
        make_module(layer_number=3)(q, k, v, None)
    with pytest.raises(ValueError, match="cross attention"):
        EmulatedAttention(module.config, 1, AttnMaskType.causal, "cross")


def test_nothing_goes_into_a_checkpoint():
    module = make_module(DelayedScaling(1).layer(0))
    assert module.sharded_state_dict("prefix.", (), {}) == {} and not module.state_dict()


def test_nan_shows_in_the_output_and_the_gauge():
    q, k, v, _ = make_inputs()
    owner = CurrentScaling(1)
    v[2, 0, 0, 0] = math.nan
    out = make_module(owner.layer(0))(q, k, v, None).view(9, 2, 4, 8)
    assert out[2:, 0, :2, 0].isnan().all() and not out[:, 1].isnan().any()
    assert owner.gauge.amax[0, 0].isnan() and not owner.gauge.saturated.any()
    assert not owner.gauge.amax[0, [SLOTS.index(slot) for slot in BACKWARD_SLOTS]].any()
