"""Gradient ascent against the bounds of real engines: every recipe that claims to be certified, on real layers.

The attacked logits are float64 from the layers' own weights, at every distance of the sequence; the bounds are those
that the engine put into its table.
"""

import pytest
import torch

from megatron_geoscale.config import GeoScaleConfig
from tests.distributed.test_engine import HEAD_DIM, HIDDEN, LENGTH, model_flags, randomise, rotation
from tests.functional.common import succeed

pytestmark = pytest.mark.usefixtures("megatron")

ENGINES = {
    "certified, gram, head": {},
    "certified, power, head": {"estimator": "power"},
    "certified, gram, layer": {"granularity": "layer"},
    "certified, power, layer": {"estimator": "power", "granularity": "layer"},
    "calibrated, burning in": {"recipe": "calibrated"},
    "calibrated, power, burning in": {"recipe": "calibrated", "estimator": "power"},
}
VARIANTS = ["random", "spiked", "low-rank", "tied", "1e-15", "1e+15", "zero", "bias-dominated"]


@torch.no_grad()
def change(layer, variant, per_group):
    """Weights of one layer, as the variant says, from the random ones that it has."""
    linear = layer.attention.linear_qkv
    rows = linear.weight.view(-1, per_group + 2, HEAD_DIM, HIDDEN)
    if variant == "spiked":
        rows[0, 0] += 20 * torch.outer(torch.randn(HEAD_DIM), torch.randn(HIDDEN))
    elif variant == "low-rank":
        rows[:] = torch.randn(*rows.shape[:2], HEAD_DIM, 1) @ torch.randn(*rows.shape[:2], 1, HIDDEN)
    elif variant == "tied":
        rows[:, :per_group] = rows[:, -2:-1]
    elif variant in ("1e-15", "1e+15"):
        linear.weight.mul_(float(variant))
    elif variant == "zero":
        rows[:, :-1] = 0.0
    elif variant == "bias-dominated" and getattr(linear, "bias", None) is not None:
        linear.bias.mul_(1e4)


def heads_of(layer, args):
    """(A, a, B, b) of all query heads, [n_q, head_dim, hidden] and [n_q, head_dim], float64 (THEORY 1)."""
    linear, norm = layer.attention.linear_qkv, layer.norm
    groups = layer.config.num_query_groups
    per_group = layer.config.num_attention_heads // groups
    gain = norm.weight.detach().double() + (1 if args.apply_layernorm_1p else 0)
    weight = linear.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if getattr(linear, "bias", None) is not None:
        bias = bias + linear.bias.detach().double()
    if getattr(norm, "bias", None) is not None:
        bias = bias + weight @ norm.bias.detach().double()
    rows = (weight * gain).view(groups, per_group + 2, HEAD_DIM, HIDDEN)
    offsets = bias.view(groups, per_group + 2, HEAD_DIM)
    keys = rows[:, -2].repeat_interleave(per_group, 0), offsets[:, -2].repeat_interleave(per_group, 0)
    return rows[:, :per_group].flatten(0, 1), offsets[:, :per_group].flatten(0, 1), *keys


def ascend(a_, a, b_, b, rotations, steps=30, starts=4):
    """The largest |logit| and |entry| of a layer's heads that gradient ascent over both tokens finds, at all distances.

    A logit is linear in each token: the gradient, put back onto the sphere, is the best that one token can do.
    """
    generator, root = torch.Generator().manual_seed(0), HIDDEN**0.5
    # Unit weights, so that 1e-30 has gradients too; a logit scales with both sizes.
    sizes = [max(w.abs().amax().item(), o.abs().amax().item()) or 1.0 for w, o in ((a_, a), (b_, b))]
    (a_, a), (b_, b) = (a_ / sizes[0], a / sizes[0]), (b_ / sizes[1], b / sizes[1])
    shape = len(a_), len(rotations), starts, HIDDEN
    tokens = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    tokens = [root * t / t.norm(dim=-1, keepdim=True) for t in tokens]
    logit = query_entry = key_entry = 0.0
    for step in range(steps):
        moving = tokens[step % 2] = tokens[step % 2].requires_grad_()
        query = torch.einsum("htsd,hcd->htsc", tokens[0], a_) + a[:, None, None]
        key = torch.einsum("htsd,hcd->htsc", tokens[1], b_) + b[:, None, None]
        key = torch.einsum("tce,htse->htsc", rotations, key)
        logits = (query * key).sum(-1)
        logit = max(logit, logits.abs().max().item())
        query_entry, key_entry = max(query_entry, query.abs().max().item()), max(key_entry, key.abs().max().item())
        (gradient,) = torch.autograd.grad((logits * logits.detach().sign()).sum(), moving)
        tokens[1 - step % 2] = tokens[1 - step % 2].detach()
        tokens[step % 2] = root * gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    return logit * sizes[0] * sizes[1] / HEAD_DIM**0.5, query_entry * sizes[0], key_entry * sizes[1]


def attack(trainer, go):
    """By variant and layer: what the ascent found; and by engine the bounds."""
    from megatron_geoscale.scaling.engine import GeoScaleEngine

    torch.manual_seed(0)
    randomise(trainer)
    args, layers = trainer.args, trainer.run.scaling.layers
    per_group = layers[0].config.num_attention_heads // layers[0].config.num_query_groups
    distances = range(LENGTH) if args.position_embedding_type == "rope" else [0]
    rotations = torch.stack([rotation(args, -distance) for distance in distances])
    engines = {name: GeoScaleEngine.attach(trainer.run.chunks, GeoScaleConfig(**o)) for name, o in ENGINES.items()}
    plain = [(p, p.detach().clone()) for layer in layers for p in layer.attention.linear_qkv.parameters()]
    found = []
    for variant in VARIANTS:
        for layer in layers:
            change(layer, variant, per_group)
        for engine in engines.values():
            engine.refresh()
        for layer in layers:
            bounds = {
                name: [engine.table.bound(layer.number, column) for column in ("logit_bound", "amax_q", "amax_k")]
                for name, engine in engines.items()
            }
            found.append((variant, ascend(*heads_of(layer, args), rotations), bounds))
        with torch.no_grad():
            for parameter, kept in plain:
                parameter.copy_(kept)
    return found


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        ("llama", ""),
        ("llama", "--num-query-groups 1"),
        ("llama-partial-interleaved", ""),
        ("rms-1p-bias", ""),
        ("gpt2", ""),
        ("gpt2", "--num-attention-heads 1 --num-query-groups 1 --kv-channels 8"),
        ("llama", "--num-attention-heads 1 --num-query-groups 1 --kv-channels 8"),
    ],
    ids=["llama", "one-group", "partial-interleaved", "rms-1p-bias", "gpt2", "gpt2-one-head", "llama-one-head"],
)
def test_no_certified_engine_is_exceeded(model, extra):
    (run,) = succeed(model_flags(model, extra), watch=attack)
    assert len(run.value) == 2 * len(VARIANTS)
    for variant, attained, bounds in run.value:
        assert set(bounds) == set(ENGINES)
        for name, bound in bounds.items():
            for reached, limit in zip(attained, bound, strict=True):
                assert reached <= limit, (variant, name)
        logit, limit = attained[0], bounds["certified, gram, head"][0]
        assert limit <= 4 * logit or variant == "zero", variant  # the attack comes near
        assert all(bound == bounds["certified, gram, head"] for bound in bounds.values())
