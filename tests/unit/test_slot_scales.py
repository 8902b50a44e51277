"""Scales made from bounds, attacked: on a real layer with inputs built against them, and slot by slot."""

import math

import pytest
import torch

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.slots import SLOTS
from megatron_geoscale.scaling.table import BOUNDS
from tests.distributed.test_engine import HEAD_DIM, HEADS, HIDDEN, LENGTH, model_flags, pairs_of, randomise, rotation
from tests.functional.common import succeed

pytestmark = pytest.mark.usefixtures("megatron")


def unit(x):
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def worst_sequences(projections, args):
    """[sequences, LENGTH, HIDDEN]: normalised tokens that lie along the rows, pairs and products of the weights."""
    p, sequences = projections, []

    def along(matrix, bias):
        """The input that `matrix` lengthens most, on the side where the bias adds to it."""
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return vh[0] if bias is None or u[:, 0] @ bias >= 0 else -vh[0]

    def same(token):
        sequences.append(token.expand(LENGTH, HIDDEN))

    for weight, bias, pairs in (
        (p.q, p.q_bias, pairs_of(args)),
        (p.k, p.k_bias, pairs_of(args)),
        (p.v, p.v_bias, [(row,) for row in range(HEAD_DIM)]),
    ):
        for head in range(len(weight)):
            for pair in pairs:
                rows = list(pair)
                same(along(weight[head][rows], None if bias is None else bias[head][rows]))
    for head in range(HEADS):
        group = head * len(p.k) // HEADS
        for distance in range(LENGTH):
            u, _, vh = torch.linalg.svd(p.q[head].T @ rotation(args, -distance) @ p.k[group])
            for sign in (1, -1):  # biases add to one of them
                tokens = unit(torch.randn(LENGTH, HIDDEN, dtype=torch.float64))
                tokens[0], tokens[distance] = sign * vh[0], sign * u[:, 0]
                sequences.append(tokens)
    return torch.stack(sequences)


def attack(trainer, go):
    """Saturated values and range in use, by slot, of one layer under crafted and climbing inputs; and of a control run
    with scales that are a little too large."""
    from megatron.core.utils import unwrap_model

    torch.manual_seed(0)
    randomise(trainer)
    engine, args = trainer.run.scaling, trainer.args
    engine.refresh()
    model = unwrap_model(trainer.run.chunks[0]).train()
    layer, described = model.decoder.layers[0], engine.layers[0]
    rope = model.rotary_pos_emb(LENGTH) if args.position_embedding_type == "rope" else None
    seen = {}
    layer.self_attention.core_attention.register_forward_pre_hook(lambda _, inputs: seen.update(qkv=inputs[:3]))
    layer.self_attention.core_attention.register_forward_hook(lambda _, inputs, out: seen.update(out=out))

    def run(hidden):
        layer(hidden.to(args.params_dtype), attention_mask=None, rotary_pos_emb=rope)

    def backward(hidden):
        """Gradients that lie along the values, and tiny ones, and ones of every size."""
        out, value = seen["out"], seen["qkv"][2]
        along = value.repeat_interleave(HEADS // value.shape[2], dim=2)[:1].expand(LENGTH, -1, -1, -1).flatten(2)
        noise = torch.randn_like(out)
        for grad in (1e3 * along, along.sign(), 1e-6 * noise, noise * torch.exp(8 * torch.randn_like(noise))):
            torch.autograd.grad(out, hidden, grad.to(out.dtype), retain_graph=True)

    def crafted(amplitude):
        hidden = (amplitude * worst_sequences(described.projections(), args)).transpose(0, 1).float()
        hidden.requires_grad_()
        run(hidden)
        backward(hidden)

    def climb():
        hidden = torch.randn(LENGTH, 8, HIDDEN, requires_grad=True)
        optimizer = torch.optim.Adam([hidden], lr=0.1)
        for _ in range(40):
            run(hidden)
            query, key, value = (x.float() for x in seen["qkv"])
            logits = torch.einsum("ibhd,jbhd->bhij", query, key.repeat_interleave(HEADS // key.shape[2], dim=2))
            goals = (query.abs().amax((0, 2, 3)), key.abs().amax((0, 2, 3)), value.abs().amax((0, 2, 3)),
                     logits.tril().abs().amax((1, 2, 3)))
            loss = -sum(goal.log().sum() for goal in goals)
            hidden.grad = torch.autograd.grad(loss, hidden)[0]
            optimizer.step()

    engine.gauge.reset()
    for amplitude in (1.0, 1e-2, 1e4):  # the norm's epsilon, and what it adds up, matter little
        crafted(amplitude)
    climb()
    saturated, overrange = by_slot(engine.gauge.saturated), by_slot(engine.gauge.overrange)
    engine.gauge.reset()
    engine.table.scales.mul_(1.3)
    crafted(1.0)
    return saturated, overrange, by_slot(engine.gauge.saturated)


def by_slot(table):
    """The first layer's row."""
    return dict(zip(SLOTS, table[0].tolist(), strict=True))


@pytest.mark.parametrize(
    ("model", "flags", "in_use"),
    [
        ("llama", "", {"qkv": 0.9, "o": 0.8}),
        ("llama", "--bf16 --geoscale-logits-dtype fp8", {"qkv": 0.9, "o": 0.8, "logits": 0.6}),
        ("llama-partial-interleaved", "--geoscale-logits-dtype fp8", {"qkv": 0.9, "logits": 0.6}),
        ("rms-1p-bias", "--bf16", {"qkv": 0.9, "o": 0.8}),
        ("gpt2", "--geoscale-logits-dtype fp8", {"qkv": 0.9, "o": 0.8, "logits": 0.6}),
        ("gpt2", "--bf16 --geoscale-logits-dtype fp8", {"qkv": 0.9, "o": 0.8, "logits": 0.6}),
        ("llama", "--attention-dropout 0.5", {"qkv": 0.9, "o": 0.8, "s": 0.99}),
        ("gpt2", "--attention-dropout 0.1 --bf16", {"qkv": 0.9, "o": 0.8, "s": 0.99}),
    ],
)
def test_no_input_to_a_real_layer_saturates_a_certified_scale(model, flags, in_use):
    (run,) = succeed(model_flags(model, flags), watch=attack)
    saturated, overrange, control = run.value
    assert saturated == dict.fromkeys(SLOTS, 0)
    for slot, least in in_use.items():  # the attack comes close, and would have been seen
        assert least <= overrange[slot] <= 1.0, (slot, overrange)
    assert control["qkv"] > 0


def test_margin_leaves_that_share_of_the_range_free():
    (run,) = succeed(model_flags("gpt2", "--geoscale-margin 0.5 --geoscale-logits-dtype fp8"), watch=attack)
    saturated, overrange, _ = run.value
    assert saturated == dict.fromkeys(SLOTS, 0)
    for slot, least in (("qkv", 0.45), ("o", 0.4), ("logits", 0.3)):
        assert least <= overrange[slot] <= 0.5, slot
    assert 0.99 <= overrange["s"] <= 1.0  # a probability needs no margin


def geometry_of(**changes):
    from megatron_geoscale.scaling.geometry import AttentionGeometry

    constants = dict(hidden_size=64, num_heads=4, num_groups=4, head_dim=16, softmax_scale=0.25, max_sequence_length=32)
    return AttentionGeometry(**(constants | changes))


def bounds_of(**values):
    """One row of bounds; all 1 but for `values` and the softmax scale of `geometry_of`."""
    values = {"softmax_scale": 0.25} | values
    return torch.tensor([[float(values.get(name, 1.0)) for name in BOUNDS]], dtype=torch.float64)


def scales_of(geometry=None, config=None, **values):
    from megatron_geoscale.scaling.slot_scales import scales_from_bounds

    row = scales_from_bounds(bounds_of(**values), geometry or geometry_of(), config or GeoScaleConfig())
    assert row.dtype == torch.float32 and row.shape == (1, len(SLOTS))
    return dict(zip(SLOTS, row[0].tolist(), strict=True))


def test_each_scale_maps_its_bound_just_below_the_maximum():
    scales = scales_of(amax_q=3, amax_k=5, amax_v=2, logit_bound=1000, query_norm=4, key_norm=6)
    assert 0.999 < scales["qkv"] * 5 / 448 < 1  # the largest of the three: they share one
    assert 0.99 < scales["logits"] * (1000 + 0.25 * 4 * 6 * ((17 / 16) ** 2 - 1)) / 448 < 1
    assert scales["s"] == 448
    assert 0.98 < scales["o"] * 2 * (17 / 16) ** 2 / 448 < 1
    assert scales["do"] == scales["dp"] == scales["dqkv"] == 0  # they come from the tensors


def test_scales_answer_to_what_makes_values_larger():
    plain = scales_of()
    dropped = scales_of(geometry_of(dropout=0.5))
    assert dropped["s"] == 224 and dropped["qkv"] == plain["qkv"]
    assert dropped["o"] == pytest.approx(plain["o"] / 2, rel=1e-3)
    bf16 = scales_of(geometry_of(unit_roundoff=2.0**-9))
    assert all(bf16[slot] < plain[slot] for slot in ("qkv", "logits", "o")) and bf16["s"] == plain["s"]
    half = scales_of(config=GeoScaleConfig(margin=0.5))
    assert half["qkv"] == pytest.approx(plain["qkv"] / 2, rel=1e-6)
    assert half["s"] == plain["s"]
    for name, slots in (("amax_q", {"qkv", "logits", "o"}), ("amax_v", {"qkv", "logits", "o"}),
                        ("logit_bound", {"logits"}), ("query_norm", {"logits"}), ("sigma", set())):
        doubled = scales_of(**{name: 2})
        assert {slot for slot in SLOTS if doubled[slot] < plain[slot]} == slots, name


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-30, 1e30, 1e300])
def test_scales_stay_usable_for_weights_of_any_size(size):
    scales = scales_of(**dict.fromkeys(BOUNDS, size))
    for slot in ("qkv", "logits", "s", "o"):
        scale = torch.tensor(scales[slot])
        assert 0 < scale < math.inf and 0 < scale.reciprocal() < math.inf


class Attention:
    """`fp8_attention` under a TableScaler whose table holds the exact bounds of its inputs."""

    def __init__(self, query, key, value, dropout=0.0):
        from megatron_geoscale.attention.emulated import fp8_attention
        from megatron_geoscale.scaling.gauge import SlotGauge
        from megatron_geoscale.scaling.slot_scales import TableScaler, scales_from_bounds
        from megatron_geoscale.scaling.table import ScaleTable

        geometry = geometry_of(head_dim=query.shape[-1], dropout=dropout, max_sequence_length=len(key))
        norms = [float(torch.linalg.vector_norm(x, dim=-1).max()) for x in (query, key, value)]
        bounds = bounds_of(amax_q=query.abs().max(), amax_k=key.abs().max(), amax_v=value.abs().max(),
                           query_norm=norms[0], key_norm=norms[1], value_norm=norms[2],
                           logit_bound=geometry.softmax_scale * norms[0] * norms[1])
        self.table, self.gauge = ScaleTable(1, torch.device("cpu")), SlotGauge(1)
        self.table.swap(scales_from_bounds(bounds, geometry, GeoScaleConfig()), bounds)
        self.scaler = TableScaler(self.table, self.gauge, 0, geometry)
        self.inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        factors = (torch.rand(query.shape[1], query.shape[2], len(query), len(key)) >= dropout) / (1 - dropout)
        self.out = fp8_attention(*self.inputs, scaler=self.scaler, softmax_scale=geometry.softmax_scale,
                                 dropout=factors if dropout else None, fp8_logits=True)

    def backward(self, grad):
        return torch.autograd.grad(self.out, self.inputs, grad, retain_graph=True)

    def in_use(self, slot):
        return float(self.gauge.overrange[0, SLOTS.index(slot)])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_softmax_gradient_bound_is_nearly_reached_and_never_passed(size, dropout):
    """Two keys of equal weight and opposite values, a gradient along them: |P (1 - P)| is 1/4, the range twice |dP|."""
    torch.manual_seed(0)
    value = size * unit(torch.randn(1, 16, 1, 16)) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    attention = Attention(size * torch.zeros(4, 16, 1, 16), torch.randn(2, 16, 1, 16), value, dropout)
    direction = value[:1].expand(4, -1, -1, -1)
    for grad in (1e-6, 1.0, 1e6):
        attention.gauge.reset()
        attention.backward(grad * direction)
        assert attention.gauge.saturated.sum() == 0
        assert 0.35 < attention.in_use("dp") <= 1
        attention.backward(grad * torch.randn(4, 16, 1, 16) * torch.exp(5 * torch.randn(4, 16, 1, 16)))
        assert attention.gauge.saturated.sum() == 0


def test_every_entry_at_its_bound_saturates_nothing():
    """Q, K and V whose every entry is as large as their bound, of signs that make the products as large as can be."""
    sign = torch.randint(2, (1, 2, 4, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    query = 3.1 * sign.expand(8, -1, -1, -1)
    attention = Attention(query, query * torch.linspace(-1, 1, 8).view(8, 1, 1, 1), query)
    attention.backward(sign.expand(8, -1, -1, -1))
    assert attention.gauge.saturated.sum() == 0
    assert attention.in_use("qkv") > 0.999 and attention.in_use("o") > 0.85 and attention.in_use("logits") > 0.8


def test_backward_scales_are_powers_of_two_that_fit_the_gradient():
    query = torch.randn(8, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    attention = Attention(query, query, query)
    used = {}
    scale = attention.scaler.scale
    attention.scaler.scale = lambda slot, *tensors: used.setdefault(slot, scale(slot, *tensors))
    attention.backward(torch.randn(8, 2, 4, 16))
    assert set(used) == {"do", "dp", "dqkv"}
    assert all(math.frexp(float(value))[0] == 0.5 for value in used.values())
    assert 0.5 <= attention.in_use("do") <= 1  # its own amax; the others are bounded before they are there
    assert 0 < attention.in_use("dp") <= 1 and 0 < attention.in_use("dqkv") <= 1
