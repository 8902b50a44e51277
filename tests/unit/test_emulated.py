"""FP8 attention against float64: an autograd graph with its own casts, put together independently of the kernel."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_geoscale import cpu

cpu.install()  # before megatron-core is imported

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_geoscale.attention import emulated  # noqa: E402
from megatron_geoscale.attention.baselines import CurrentScaling, DelayedScaling  # noqa: E402
from megatron_geoscale.attention.emulated import EmulatedAttention, fp8_attention  # noqa: E402
from megatron_geoscale.scaling.formats import SLOT_FORMATS, cast, sqnr_db  # noqa: E402
from megatron_geoscale.scaling.slots import SLOTS  # noqa: E402


class Fixed:
    """LayerScaler with given scales, which remembers what it was asked and told."""

    def __init__(self, **scales):
        self.scales = {slot: torch.tensor(float(scales.get(slot, 1.0))) for slot in SLOTS}
        self.asked, self.observed = {}, {}

    def scale(self, slot, *tensors):
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        self.asked[slot] = [tensor.clone() for tensor in tensors]
        return self.scales[slot]

    def before_backward(self, do, *, num_keys, amax_qkv):
        self.told = (do.clone(), num_keys, amax_qkv.item())

    def observe(self, slot, amax, saturated, flushed):
        assert slot not in self.observed, "reported twice"
        self.observed[slot] = (amax.item(), saturated.item(), flushed.item())


class Cast64(torch.autograd.Function):
    """FP8 casts in a float64 graph: `fwd` slot on the way forward, `bwd` slot on the gradient's way back."""

    @staticmethod
    def forward(ctx, x, scales, fwd, bwd):
        ctx.scales, ctx.bwd = scales, bwd
        return Cast64.quantise(x, scales, fwd)

    @staticmethod
    def backward(ctx, grad):
        return Cast64.quantise(grad, ctx.scales, ctx.bwd), None, None, None

    @staticmethod
    def quantise(x, scales, slot):
        if slot is None:
            return x
        fmt, scale = SLOT_FORMATS[slot], scales[slot].double()
        return (x * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).double() / scale


def oracle(q, k, v, scales, softmax_scale, masked=None, dropout=None, fp8_logits=False):
    """Float64 attention on K and V repeated for every query head, one head at a time; [sq, b, heads, d]."""
    q, k, v = (Cast64.apply(x, scales, "qkv", "dqkv") for x in (q, k, v))
    ratio = q.size(2) // k.size(2)
    batches = []
    for b in range(q.size(1)):
        heads = []
        for h in range(q.size(2)):
            logits = q[:, b, h] @ k[:, b, h // ratio].T
            # The gradient of the unscaled logits is dS * softmax_scale, what the dp slot holds.
            logits = softmax_scale * Cast64.apply(logits, scales, None, "dp")
            logits = Cast64.apply(logits, scales, "logits" if fp8_logits else None, None)
            if masked is not None:
                logits = logits.masked_fill(masked.expand(q.size(1), q.size(2), *logits.shape)[b, h], -1e30)
            probs = logits.softmax(-1)
            if dropout is not None:
                probs = probs * dropout[b, h]
            heads.append(Cast64.apply(probs, scales, "s", None) @ v[:, b, h // ratio])
        batches.append(torch.stack(heads, dim=1))
    return Cast64.apply(torch.stack(batches, dim=1), scales, "o", "do")


def make_inputs(seed=0, sq=9, sk=9, batch=2, heads=4, groups=2, dim=8, std=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (sq, batch, heads, dim), (sk, batch, groups, dim), (sk, batch, groups, dim), (sq, batch, heads, dim)
    return [(std * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def causal(s):
    return torch.ones(s, s, dtype=torch.bool).triu(1)


SCALES = dict(qkv=100.0, logits=40.0, s=448.0, o=120.0, do=9000.0, dp=9000.0, dqkv=2000.0)


def run_both(q, k, v, grad, scaler, **options):
    """(output, dq, dk, dv) of the kernel and of the oracle."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        if dtype == torch.float32:
            out = fp8_attention(*leaves, scaler=scaler, **options)
        else:
            out = oracle(*leaves, scaler.scales, **options)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))))
    return results


@pytest.mark.parametrize("fp8_logits", [False, True])
@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_output_and_gradients_equal_the_float64_graph(heads, groups, with_dropout, fp8_logits):
    q, k, v, grad = make_inputs(heads=heads, groups=groups)
    generator = torch.Generator().manual_seed(1)
    dropout = (torch.rand(2, heads, 9, 9, generator=generator) < 0.8).float() / 0.8 if with_dropout else None
    options = dict(softmax_scale=0.3, masked=causal(9), dropout=dropout, fp8_logits=fp8_logits)
    got, want = run_both(q, k, v, grad, Fixed(**SCALES), **options)
    for name, mine, exact in zip(("out", "dq", "dk", "dv"), got, want):
        # A cast whose float32 input falls on the other side of a tie moves single elements by one FP8 step.
        close = torch.isclose(mine.double(), exact, rtol=1e-5, atol=1e-7)
        assert close.double().mean() > 0.97, name
        assert sqnr_db(exact, mine) > 40, name


def test_gradients_reach_what_saturated():
    """Straight-through: a saturated value has the gradient of its clipped value, not zero."""
    q, k, v, grad = make_inputs(seed=2)
    scaler = Fixed(**{**SCALES, "qkv": 448.0, "o": 800.0})
    got, want = run_both(q, k, v, grad, scaler, softmax_scale=0.3, masked=causal(9))
    assert scaler.observed["qkv"][1] > 50 and scaler.observed["o"][1] > 5
    for mine, exact in zip(got, want):
        assert sqnr_db(exact, mine) > 40


def test_representable_values_are_exact():
    """Eight keys that look the same: probabilities are 1/8, the output is a mean of small integers."""
    q, k = torch.zeros(3, 1, 2, 4), torch.ones(8, 1, 1, 4)
    v = 16.0 * torch.arange(-16, 16).reshape(8, 1, 1, 4) / 16
    mean = v.mean(0)
    assert mean.abs().max() <= 2 and (mean * 8 == (mean * 8).round()).all()
    scaler = Fixed(qkv=2.0, s=8.0, o=4.0)
    out = fp8_attention(q, k, v, scaler=scaler, softmax_scale=0.5)
    assert torch.equal(out, mean.expand(3, 2, 4).unsqueeze(1))
    assert {slot: seen[1:] for slot, seen in scaler.observed.items()} == dict.fromkeys(("qkv", "s", "o"), (0, 0))


def test_huge_range_selects_rows_exactly():
    """Logits of 16 * 2^10 against 0: the softmax is one-hot and each output is a row of V, whatever its size."""
    q = torch.eye(4).reshape(4, 1, 1, 4) * 64.0
    k = torch.eye(4).roll(1, 0).reshape(4, 1, 1, 4) * 256.0
    v = (2.0 ** torch.arange(-8, 8)).reshape(4, 1, 1, 4)
    out = fp8_attention(q, k, v, scaler=Fixed(qkv=1.0, s=256.0, o=1.0), softmax_scale=1.0)
    assert torch.equal(out, v.roll(-1, 0))


def test_each_slot_holds_what_te_casts():
    q, k, v, grad = make_inputs(heads=4, groups=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scaler = Fixed(**SCALES)
    fp8_attention(*leaves, scaler=scaler, softmax_scale=0.3, masked=causal(9), fp8_logits=True).backward(grad)
    assert list(scaler.asked) == list(SLOTS)  # in the order of a step: do is known before dp asks
    asked = scaler.asked
    for slot, tensors in zip(("qkv", "do"), ((q, k, v), (grad,))):
        assert all(torch.equal(mine, tensor) for mine, tensor in zip(asked[slot], tensors))
    assert [tuple(x.shape) for x in asked["dqkv"]] == [tuple(x.shape) for x in (q, k, v)]
    assert asked["s"][0].shape == asked["dp"][0].shape == asked["logits"][0].shape == (2, 4, 9, 9)
    torch.testing.assert_close(asked["s"][0].sum(-1), torch.ones(2, 4, 9))
    assert asked["s"][0].masked_select(causal(9)).eq(0).all()
    # dS rows sum to zero, and dS * softmax_scale is what reaches dQ.
    torch.testing.assert_close(asked["dp"][0].sum(-1), torch.zeros(2, 4, 9), atol=1e-5, rtol=0.0)


def test_counts_equal_counting_what_was_cast():
    q, k, v, grad = make_inputs(std=3.0)
    q[0, 0, 0, :3] = k[0, 0, 0, :2] = v[0, 0, 0, 0] = 1e-6  # flushed in each of the three that share a cast
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scaler = Fixed(qkv=80.0, logits=60.0, s=300.0, o=120.0, do=1e4, dp=1e4, dqkv=5e3)
    fp8_attention(*leaves, scaler=scaler, softmax_scale=0.5, masked=causal(9), fp8_logits=True).backward(grad)
    assert set(scaler.observed) == set(SLOTS)
    for slot in SLOTS:
        fmt, values = SLOT_FORMATS[slot], torch.cat([x.flatten() for x in scaler.asked[slot]])
        scaled = values * scaler.scales[slot]
        stored = scaled.clamp(-fmt.max, fmt.max).to(fmt.dtype).float()
        saturated = sum(abs(x) > fmt.max for x in scaled.tolist())
        flushed = sum(x != 0 and y == 0 for x, y in zip(values.tolist(), stored.tolist()))
        assert scaler.observed[slot] == (values.abs().max().item(), saturated, flushed), slot
    assert all(scaler.observed[slot][1] > 0 for slot in SLOTS if slot != "s")
    assert scaler.observed["s"][2] > 0 and scaler.observed["qkv"][2] >= 6


def test_masked_logits_are_neither_counted_nor_observed():
    """The future holds logits 1000 times those of the past: with a causal mask nobody may notice."""
    q, k, v, _ = make_inputs(batch=1, heads=1, groups=1, sq=6, sk=6)
    q, k = torch.ones_like(q), torch.full_like(k, 0.125)
    q[:3] = 0.125
    k[3:] = 8.0  # q_i k_j: 0.125 for i, j < 3; 8 for i < 3 <= j, masked; 1 for j < 3 <= i; 64 for i, j >= 3
    for mask, largest, saturated in ((causal(6), 64.0, 6), (causal(6) | (torch.arange(6) > 2), 1.0, 0)):
        scaler = Fixed(qkv=32.0, logits=16.0, s=256.0)
        fp8_attention(q, k, v, scaler=scaler, softmax_scale=1.0, masked=mask, fp8_logits=True)
        assert scaler.observed["logits"] == (largest, saturated, 0)


def test_logits_in_fp8_change_the_softmax_only_in_that_mode():
    q, k, v, _ = make_inputs()
    outs = [
        fp8_attention(q, k, v, scaler=Fixed(**{**SCALES, "logits": 1e-4}), softmax_scale=0.3, fp8_logits=flag)
        for flag in (False, True)
    ]
    # Under a scale that flushes every logit, attention becomes the mean of V.
    fixed = Fixed(**SCALES)
    v8 = cast(v, fixed.scales["qkv"], SLOT_FORMATS["qkv"]).values
    p8 = cast(torch.tensor(1 / 9), fixed.scales["s"], SLOT_FORMATS["s"]).values
    mean = cast(v8.sum(0) * p8, fixed.scales["o"], SLOT_FORMATS["o"]).values.repeat_interleave(2, dim=1)
    assert sqnr_db(mean.expand(9, 2, 4, 8), outs[1]) > 40
    assert sqnr_db(outs[0], outs[1]) < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sqnr_levels_under_current_scaling(dtype):
    """Against unquantised float64: E4M3 outputs near 25 dB, E5M2 gradients near 17 dB, in the dtypes of the inputs."""
    q, k, v, grad = make_inputs(sq=64, sk=64, dim=32, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scaler = CurrentScaling(1).layer(0)
    out = fp8_attention(*leaves, scaler=scaler, softmax_scale=32**-0.5, masked=causal(64))
    grads = torch.autograd.grad(out, leaves, grad)
    assert {x.dtype for x in (out, *grads)} == {dtype}
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    k64, v64 = (x.repeat_interleave(2, dim=2) for x in exact[1:])
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (exact[0], k64, v64)), is_causal=True
    ).permute(2, 0, 1, 3)
    assert 24 < sqnr_db(want, out) < 34
    for mine, reference in zip(grads, torch.autograd.grad(want, exact, grad.double())):
        assert 15 < sqnr_db(reference, mine) < 30


def test_a_row_without_keys_is_finite():
    q, k, v, grad = make_inputs(seed=5)
    masked = causal(9).clone()
    masked[4] = True
    got, want = run_both(q, k, v, grad, Fixed(**SCALES), softmax_scale=0.3, masked=masked)
    for mine, exact in zip(got, want):
        assert torch.isfinite(mine).all() and sqnr_db(exact, mine) > 40


# ---- the module ----


def make_module(scaler=None, train=True, mask_type=AttnMaskType.causal, layer_number=1, **config):
    settings = dict(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0)
    module = EmulatedAttention(
        TransformerConfig(**{**settings, **config}), layer_number, mask_type, attention_type="self"
    )
    module.scaler = scaler
    return module.train(train)


@pytest.fixture
def rng(monkeypatch):
    """Megatron's RNG tracker needs CUDA or our shim; here a fork draws from torch's own stream and counts itself."""
    forks = []

    @contextmanager
    def fork():
        forks.append(1)
        yield

    monkeypatch.setattr(emulated.tensor_parallel, "get_cuda_rng_tracker", lambda: SimpleNamespace(fork=fork))
    return forks


def test_module_has_megatrons_layout_scale_and_mask():
    q, k, v, _ = make_inputs()
    out = make_module(Fixed(**SCALES))(q, k, v, None)
    want = fp8_attention(q, k, v, scaler=Fixed(**SCALES), softmax_scale=8**-0.5, masked=causal(9))
    assert torch.equal(out, want.reshape(9, 2, 32))
    given = make_module(Fixed(**SCALES), mask_type=AttnMaskType.padding)(q, k, v, causal(9)[None, None])
    assert torch.equal(given, out)
    unmasked = make_module(Fixed(**SCALES))(q, k, v, None, attn_mask_type=AttnMaskType.no_mask)
    assert torch.equal(unmasked.view(9, 2, 4, 8), fp8_attention(q, k, v, scaler=Fixed(**SCALES), softmax_scale=8**-0.5))
    last = make_module(Fixed(**SCALES))(q[-1:], k, v, None)  # decoding: the newest query sees every key
    assert torch.equal(last, out[-1:])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_agrees_with_megatrons_own_attention(rng, monkeypatch, groups):
    """Same draws of dropout, same head order, same gradients up to FP8."""
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", parallel_state.GlobalMemoryBuffer())
    q, k, v, grad = make_inputs(sq=32, sk=32, groups=groups)
    mine = make_module(CurrentScaling(1).layer(0), attention_dropout=0.25, num_query_groups=groups)
    one_rank = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    theirs = DotProductAttention(mine.config, 1, AttnMaskType.causal, "self", pg_collection=one_rank)
    results = []
    for module in (theirs, mine):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(11)
        out = module(*leaves, None)
        results.append((out, *torch.autograd.grad(out, leaves, grad.flatten(2))))
    for reference, approximation in zip(*results):
        assert reference.shape == approximation.shape
        assert 15 < sqnr_db(reference, approximation) < 35


def test_causal_output_does_not_see_the_future():
    q, k, v, _ = make_inputs()
    module = make_module(Fixed(**SCALES), train=False)
    before = module(q, k, v, None)
    module.scaler = Fixed(**SCALES)
    k[5:], v[5:] = 7.0, -3.0
    after = module(q, k, v, None)
    assert torch.equal(before[:5], after[:5]) and not torch.equal(before[5:], after[5:])


def test_dropout_follows_the_rng_tracker_and_fills_the_softmax_slot(rng):
    inputs = make_inputs(sq=64, sk=64)[:3]
    module = make_module(Fixed(**{**SCALES, "s": 448.0 * 0.75}), attention_dropout=0.25)
    torch.manual_seed(3)
    out = module(*inputs, None)
    assert len(rng) == 1
    dropped = module.scaler.asked["s"][0]
    allowed = dropped[(~causal(64)).expand_as(dropped)]
    assert 0.22 < (allowed == 0).double().mean() < 0.28
    assert dropped.max() == torch.tensor(1 / 0.75) and module.scaler.observed["s"][1] == 0
    torch.manual_seed(3)
    module.scaler = Fixed(**{**SCALES, "s": 448.0 * 0.75})
    assert torch.equal(out, module(*inputs, None))
    module.eval()
    module.scaler = Fixed(**SCALES)
    module(*inputs, None)
    assert len(rng) == 2 and module.scaler.asked["s"][0].max() == 1.0


def test_dropout_under_sequence_parallelism_stays_in_the_surrounding_stream(rng):
    module = make_module(Fixed(**SCALES), attention_dropout=0.25)
    module.config.sequence_parallel = True
    module(*make_inputs()[:3], None)
    assert not rng


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_recompute_counts_once_and_changes_nothing(rng, dropout):
    """Two microbatches, then evaluation under no_grad, which counts too."""
    results = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=True)):
        owner = DelayedScaling(1)
        owner.scales.copy_(torch.tensor([100.0, 1.0, 300.0, 100.0, 6e4, 6e4, 2e4]))
        module = make_module(owner.layer(0), attention_dropout=dropout)
        module.measure_sqnr = True
        grads = []
        torch.manual_seed(7)
        for seed in (0, 1):
            q, k, v, grad = make_inputs(seed=seed, std=2.0)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = wrap(module, *leaves, None)
            out.backward(grad.flatten(2))
            grads += [x.grad for x in leaves]
        module.eval()
        with torch.no_grad():
            module(*make_inputs(seed=2, std=2.0)[:3], None)
        results.append((owner.gauge, grads, module.sqnr_powers))
    (plain, plain_grads, plain_powers), (recomputed, grads, powers) = results
    assert torch.equal(plain.saturated, recomputed.saturated) and torch.equal(plain.flushed, recomputed.flushed)
    assert torch.equal(plain.amax, recomputed.amax) and torch.equal(plain.overrange, recomputed.overrange)
    assert (plain.saturated[0, [0, 3, 4, 5, 6]] > 0).all() and plain.flushed[0, 2] > 0
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, grads))
    assert plain_powers == powers


def test_every_forward_is_counted_in_full():
    q, k, v, _ = make_inputs(std=2.0)
    for train, gradients, times in ((True, True, 1), (False, False, 1), (False, True, 1), (True, False, 0)):
        owner = CurrentScaling(1)
        with nullcontext() if gradients else torch.no_grad():
            make_module(owner.layer(0), train=train)(q, k, v, None)
        assert (owner.gauge.amax[0, 0] > 0).item() == bool(times), (train, gradients)


def test_measured_sqnr_is_that_of_the_output(rng):
    module = make_module(Fixed(**SCALES), attention_dropout=0.25)
    module.measure_sqnr = True
    signal = noise = 0.0
    for seed in (0, 1):
        q, k, v, _ = make_inputs(seed=seed)
        module.scaler = Fixed(**SCALES)
        out = module(q, k, v, None).view(9, 2, 4, 8).double()
        dropout = (module.scaler.asked["s"][0] != 0).double() / 0.75
        q, k, v = (x.double().permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
        probs = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(causal(9), -1e30).softmax(-1)
        exact = ((probs * dropout) @ v).permute(2, 0, 1, 3)
        signal, noise = signal + exact.square().sum(), noise + (exact - out).square().sum()
    torch.testing.assert_close(torch.stack(module.sqnr_powers), torch.stack([signal, noise]), rtol=1e-4, atol=0.0)
    assert module.sqnr_powers.signal.dtype == torch.float64
    module.reset_sqnr()
    assert module.sqnr_powers is None
