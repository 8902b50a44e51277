"""Scales that are known before the backward pass: attacked slot by slot, and with inputs of every size."""

import itertools
import math
from unittest import mock

import pytest
import torch

from megatron_geoscale.scaling.backward_scales import backward_scales, cast_sizes, gradient_sizes
from megatron_geoscale.scaling.formats import E4M3, E5M2, cast, max_abs, scale_from_amax
from megatron_geoscale.scaling.gauge import SlotGauge
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.slot_scales import TableScaler
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, SLOTS
from megatron_geoscale.scaling.table import BOUNDS, ScaleTable


def exact_bounds(q, k, v, softmax_scale, heads=4):
    """A row of the table with the exact bounds of given tensors, and the geometry of their layer."""
    norms = [float(torch.linalg.vector_norm(x, dim=-1).max()) for x in (q, k, v)]
    known = dict(amax_q=q.abs().max(), amax_k=k.abs().max(), amax_v=v.abs().max(), query_norm=norms[0],
                 key_norm=norms[1], value_norm=norms[2], softmax_scale=softmax_scale)
    return torch.tensor([[float(known.get(name, 0.0)) for name in BOUNDS]], dtype=torch.float64)


class Attention:
    """`fp8_attention` under a TableScaler whose table holds the exact bounds of its inputs, and what it cast."""

    def __init__(self, q, k, v, *, softmax_scale=0.25, keep=1.0, overflow="saturate", backward=None):
        from megatron_geoscale.attention.fp8_function import fp8_attention
        from megatron_geoscale.config import GeoScaleConfig
        from megatron_geoscale.scaling.slot_scales import scales_from_bounds

        self.geometry = AttentionGeometry(
            hidden_size=64, num_heads=q.shape[2], num_groups=k.shape[2], head_dim=q.shape[3], value_dim=v.shape[3],
            softmax_scale=softmax_scale, max_sequence_length=len(k), dropout=1.0 - keep)
        bounds = exact_bounds(q, k, v, softmax_scale)
        self.table, self.gauge = ScaleTable(1, torch.device("cpu")), SlotGauge(1)
        self.table.swap(scales_from_bounds(bounds, self.geometry, GeoScaleConfig()), bounds)
        self.scaler = TableScaler(self.table, self.gauge, 0, self.geometry, backward=backward)
        self.inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        # No probability is dropped, the worst that a dropout can do.
        dropout = torch.full((q.shape[1], q.shape[2], len(q), len(k)), 1.0 / keep) if keep < 1.0 else None
        self.out = fp8_attention(*self.inputs, scaler=self.scaler, softmax_scale=softmax_scale, dropout=dropout,
                                 overflow=overflow)

    def backward(self, grad):
        self.gauge.reset()
        grads = torch.autograd.grad(self.out, self.inputs, grad, retain_graph=True)
        assert self.gauge.saturated.sum() == 0
        return grads

    def in_use(self, slot):
        return float(self.gauge.overrange[0, SLOTS.index(slot)])


def attained(slot, grad, attentions):
    """The largest share of the slot's bound that is reached, over several ways to fall between FP8 numbers.

    The slot's scale is not rounded to a power of two here, so that the share is the bound's."""
    column, order, shares = BACKWARD_SLOTS.index(slot), itertools.count(), []

    def unrounded(amax, fmt, *, power_of_two):
        return scale_from_amax(amax, fmt, power_of_two=power_of_two and next(order) % 3 != column)

    with mock.patch("megatron_geoscale.scaling.backward_scales.scale_from_amax", unrounded):
        for attention in attentions:
            attention.backward(grad)
            shares.append(attention.in_use(slot))
    print(f"{slot} attains {max(shares):.3f} of its bound")
    return max(shares)


UP_E5M2 = 1.1251
"""A cast to E5M2 makes it larger by nearly as much as it can: it lies above the middle of 1 and the next number."""


def halves(heads=1, groups=1, queries=8, value=1.0, query=1.0, key=0.0, **options):
    """Attention with two keys that every query gives 1/2 each, with opposite values, several times as its Q, V and dS
    round differently; and a dO along the values: dS is 1/2 of |dO| |v|."""
    do = torch.zeros(queries, 1, heads, 16)
    do[..., 0] = UP_E5M2

    def make():
        scale = options.pop("softmax_scale", 0.25)
        for up, step in itertools.product((1.0, 1.02, 1.04, 1.06), (1.0, 1.05, 1.1, 1.15, 1.2)):
            q = torch.full((queries, 1, heads, 16), query * up)
            k = torch.full((2, 1, groups, 16), key)
            k[:, ..., 1::2] *= -1.0  # so that q.k is zero whatever the key
            k[1] *= -1.0
            v = torch.zeros(2, 1, groups, 16)
            v[0, ..., 0], v[1, ..., 0] = value, -value
            yield Attention(q, k, v, softmax_scale=scale * step, **options)

    return do, make()


@pytest.mark.parametrize("keep", [1.0, 0.6])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 1), (6, 2)])
def test_key_gradients_come_close_to_their_bound(heads, groups, keep):
    """Every query of a group adds to one key's gradient: it grows with their number, and the bound with it."""
    assert 0.6 < attained("dqkv", *halves(heads, groups, softmax_scale=10.0, keep=keep)) <= 1.0


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_query_gradients_come_close_to_their_bound(keep):
    do, attentions = halves(queries=1, query=1e-3, key=1.0, value=30.0, keep=keep)
    assert 0.6 < attained("dqkv", do, attentions) <= 1.0


@pytest.mark.parametrize(("keep", "groups"), [(1.0, 1), (0.6, 2)])
def test_value_gradients_come_close_to_their_bound(keep, groups):
    """One key that gets all probability: its value's gradient is the sum of dO."""
    q, k = torch.full((8, 1, 4, 16), 1e-3), torch.full((1, 1, groups, 16), 1e-3)
    do = torch.zeros(8, 1, 4, 16)
    do[..., 3] = -UP_E5M2
    assert 0.97 < attained("dqkv", do, [Attention(q, k, k, keep=keep)]) <= 1.0


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_softmax_gradient_comes_close_to_its_bound(keep):
    assert 0.75 < attained("dp", *halves(4, 2, keep=keep)) <= 1.0


def kernel_ds(probs, v8, do8, scale_o):
    """|dS| of one query as fused kernels make it: the row's mean of dP is dO.O, with O from cast P and cast again."""
    o = cast(cast(probs.float(), torch.tensor(448.0), E4M3).values @ v8.float(), scale_o, E4M3).values.double()
    return float((probs * (v8.double() @ do8 - do8 @ o)).abs().max())


def test_a_kernels_own_mean_of_dp_needs_and_has_its_room():
    """The mean that is taken from dO and the cast O can be off by 1/8 of |dO| |v|, on which half of the range of dP is
    no bound any more; ours is."""
    scale = torch.tensor(448.0 / 1.1)
    geometry = AttentionGeometry(hidden_size=64, num_heads=1, num_groups=1, head_dim=16, softmax_scale=1.0,
                                 max_sequence_length=33)
    do = torch.full((1, 1, 1, 16), UP_E5M2)
    do8 = cast(do.flatten(), torch.tensor(1.0), E5M2).values.double()
    v8, worst = cast(torch.ones(16), scale, E4M3).values, 0.0
    for share in torch.linspace(0.5, 0.64, 60).tolist():
        for spread in (1, 2, 4, 8, 16, 32):
            # All other keys have values against the first's; their probabilities round the other way.
            probs = torch.tensor([share] + [(1 - share) / spread] * spread, dtype=torch.float64)
            worst = max(worst, kernel_ds(probs, torch.stack([v8] + [-v8] * spread), do8, scale))
    norm = float(torch.linalg.vector_norm(v8.double()))
    assert worst > 0.51 * norm * float(torch.linalg.vector_norm(do8))  # a half would not do
    value = norm / (17 / 16)  # as if the cast had made it as much longer as it can
    bounds = torch.tensor([dict(value_norm=value, amax_v=value).get(name, 0.0) for name in BOUNDS])
    sizes = cast_sizes(bounds, torch.full((len(SLOTS),), float(scale)), geometry, None)
    with mock.patch("megatron_geoscale.scaling.backward_scales.scale_from_amax",
                    lambda amax, fmt, power_of_two: scale_from_amax(amax, fmt)):
        got = backward_scales(gradient_sizes(do, 1), sizes, geometry, num_queries=1, num_keys=33, value_dim=16,
                              heads_per_group=1)
    assert 0.88 < worst * float(got[1]) / E5M2.max <= 1.0


def test_cast_values_come_up_to_their_bounds():
    """Entries of every size up to the bound; below the scale's own, above it, and as the forward pass has seen them."""
    geometry = AttentionGeometry(hidden_size=64, num_heads=1, num_groups=1, head_dim=16, softmax_scale=1.0,
                                 max_sequence_length=8)
    # 1.0626 * 128 lies just above the middle of two E4M3 numbers; 0.9 * 1000 saturates; 1e-5 becomes zero.
    for amax, scale, seen in ((1.0626, 128.0, None), (0.9, 1000.0, None), (7.0, 128.0, 1.0626), (1e-5, 128.0, None)):
        row = torch.full((len(BOUNDS),), amax, dtype=torch.float64)
        row[BOUNDS.index("offset_size")], row[BOUNDS.index("value_norm")] = 0.0, 4.0 * amax
        told = None if seen is None else torch.tensor(seen)
        sizes = cast_sizes(row, torch.full((len(SLOTS),), scale), geometry, told)
        values = cast(torch.linspace(-1, 1, 4001) * (seen or amax), torch.tensor(scale), E4M3).values.abs().amax()
        for bound, reached in ((sizes.query, values), (sizes.key, values), (sizes.value_norm, 4.0 * values)):
            assert reached <= bound * (1 + 1e-6) and (amax < 1e-4 or reached / bound > 0.99), (amax, scale, seen)


def sizes_of_everything():
    """Of dO, values and queries."""
    return itertools.product((1e-30, 1e-6, 1.0, 1e25), (1e-6, 1.0, 1e4), (1e-3, 1e3))


@pytest.mark.parametrize("overflow", ["saturate", "nan"])
def test_hostile_inputs_saturate_nothing(overflow):
    """Heavy tails, one loud token or head, one loud entry, zeros, and sizes whose squares leave float32."""
    g = torch.Generator().manual_seed(0)

    def noise(*shape, tail=0.0):
        return torch.randn(shape, generator=g) * torch.exp(tail * torch.randn(shape, generator=g))

    used = []
    for do_size, value_size, query_size in sizes_of_everything():
        q, k = query_size * noise(12, 2, 4, 16, tail=1.0), query_size * noise(10, 2, 2, 16, tail=1.0)
        v = value_size * noise(10, 2, 2, 8, tail=1.0)
        attention = Attention(q, k, v, overflow=overflow)
        loud_token, loud_entry = torch.zeros(12, 2, 4, 8), torch.zeros(12, 2, 4, 8)
        loud_token[5, 1, 2], loud_entry[3, 0, 1, 7] = 1.0, -1.0
        for grad in (noise(12, 2, 4, 8), noise(12, 2, 4, 8, tail=4.0), loud_token, loud_entry, 0 * loud_token,
                     noise(12, 2, 4, 1, tail=2.0).expand(-1, -1, -1, 8), noise(12, 1, 1, 1).expand(-1, 2, 4, 8)):
            out = attention.backward(do_size * grad)
            assert all(x.isfinite().all() for x in out)
            used.append(attention.in_use("dqkv"))
    assert max(used) <= 1.0


def climbed(slot, steps=60):
    """Gradient ascent on Q, K, V and dO towards the largest |x| of a slot, relative to its bound."""
    from megatron_geoscale.attention.fp8_function import _stack  # the emulation's own layout

    torch.manual_seed(1)
    q, k, v, do = (torch.randn(6, 1, 2, 8, requires_grad=True) for _ in range(4))
    optimizer, best = torch.optim.Adam([q, k, v, do], lr=0.1), 0.0
    for _ in range(steps):
        probs = (0.25 * _stack(q, 2) @ _stack(k, 2).transpose(1, 2)).softmax(-1)
        dp = _stack(do, 2) @ _stack(v, 2).transpose(1, 2)
        ds = 0.25 * probs * (dp - (probs * dp).sum(-1, keepdim=True))
        norms = torch.linalg.vector_norm(do, dim=-1)
        value = torch.linalg.vector_norm(v, dim=-1).max()
        reached = {
            "dk": (ds.transpose(1, 2) @ _stack(q, 2)).abs().max() / (q.abs().max() * value * norms.sum(0).max()),
            "dq": (ds @ _stack(k, 2)).abs().max() / (k.abs().max() * value * norms.max()),
            "dp": ds.abs().max() / (value * norms.max()),
        }[slot]
        attention = Attention(q.detach(), k.detach(), v.detach())
        attention.backward(do.detach())
        best = max(best, float(reached.detach()))
        optimizer.zero_grad()
        (-reached.log()).backward()
        optimizer.step()
    return best / (0.125 if slot != "dq" else 0.25)


@pytest.mark.parametrize("slot", ["dk", "dq", "dp"])
def test_climbing_inputs_saturate_nothing(slot):
    share = climbed(slot)
    print(slot, "by ascent, in exact arithmetic:", share)
    assert 0.5 < share <= 1.0


def scaler_of(q, k, v):
    return Attention(q, k, v).scaler


def test_scales_answer_to_what_makes_gradients_larger():
    g = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(8, 2, 4, 16, generator=g) for _ in range(4))
    scaler = scaler_of(4 * q, 4 * k, 4 * v)
    scales = scaler.backward_scales(do, num_keys=8)
    assert scales.dtype == torch.float32 and scales.shape == (len(BACKWARD_SLOTS),)
    assert all(math.frexp(x)[0] == 0.5 for x in scales.tolist())
    assert torch.equal(scaler.backward_scales(32 * do, num_keys=8) * 32, scales)  # at once, in the step of the jump
    assert torch.equal(scaler.backward_scales(do.bfloat16(), num_keys=8), scales)
    # What the forward pass has seen of Q, K, V tightens dS and dQKV, and never loosens them.
    seen = scaler.backward_scales(do, num_keys=8, amax_qkv=max_abs(q, k, v))
    assert seen[0] == scales[0] and seen[1] >= scales[1] and seen[2] >= 4 * scales[2]
    assert torch.equal(scaler.backward_scales(do, num_keys=8, amax_qkv=torch.tensor(1e9)), scales)
    # More queries: dK and dV grow, dO and dS do not.
    longer = scaler.backward_scales(do.repeat(16, 1, 1, 1), num_keys=8)
    assert torch.equal(longer[:2], scales[:2]) and longer[2] == scales[2] / 16
    more = scaler.backward_scales(do.repeat(1, 5, 1, 1), num_keys=8)
    assert torch.equal(more, scales)  # sequences of a batch share no key
    for bad in (math.nan, math.inf):
        broken = do.clone()
        broken[3, 1, 2, 5] = bad
        assert scaler.backward_scales(broken, num_keys=8).tolist() == [1.0, 1.0, 1.0]


def test_heads_of_a_group_share_a_key_also_where_ranks_split_the_group():
    g = torch.Generator().manual_seed(0)
    q, do = torch.randn(8, 2, 8, 16, generator=g), torch.ones(8, 2, 8, 16)
    eight, two = (scaler_of(q, q[:, :, :groups], q[:, :, :groups]) for groups in (8, 2))
    assert two.backward_scales(do, num_keys=8)[2] * 4 == eight.backward_scales(do, num_keys=8)[2]
    # A rank with two of a group's four heads adds only those.
    assert two.backward_scales(do[:, :, :2], num_keys=8)[2] * 2 == eight.backward_scales(do, num_keys=8)[2]


def test_nothing_waits_for_the_device():
    from tests.unit.test_no_sync import waits

    x = torch.randn(8, 2, 4, 16)
    scaler, seen = scaler_of(x, x, x), max_abs(x)
    assert waits(lambda: scaler.backward_scales(x, num_keys=8, amax_qkv=seen)) == {}


def test_history_scales_the_backward_slots_and_the_table_the_others():
    from megatron_geoscale.scaling.amax_history import AmaxHistory, HistoryScaler

    g = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(8, 2, 4, 16, generator=g) for _ in range(4))
    history = AmaxHistory(1)
    attention = Attention(q, k, v, backward=HistoryScaler(history, 0))
    forward = attention.table.scales.clone()
    attention.backward(do)
    assert all(attention.scaler.scale(slot) == 1.0 for slot in BACKWARD_SLOTS)
    amax = attention.gauge.amax[0].clone()
    history.end_step()
    for column, slot in enumerate(SLOTS):
        expected = E5M2.max / amax[column] if slot in BACKWARD_SLOTS else forward[0, column]
        assert attention.scaler.scale(slot) == expected, slot
    with pytest.raises(AssertionError):  # a jump of dO saturates in the step in which it comes
        attention.backward(4 * do)
    assert Attention(q, k, v).backward(4 * do) is not None  # and bounds follow it


def test_amax_alone_bounds_the_norms_where_squares_leave_float32():
    for size in (1e-38, 1e-30, 1e22, 1e30):
        sizes = gradient_sizes(torch.full((3, 2, 4, 16), size), 2)
        assert size == pytest.approx(float(sizes.amax)) and 4 * size * 0.999 <= float(sizes.row_norm) <= 4 * size * 1.01
        assert 24 * size * 0.999 <= float(sizes.norm_sum) <= 24 * size * 1.01
    assert float(scale_from_amax(torch.tensor(0.0), E5M2)) == float(
        scaler_of(*(torch.ones(2, 1, 1, 4) for _ in range(3))).backward_scales(torch.zeros(2, 1, 1, 4), num_keys=2)[0])
