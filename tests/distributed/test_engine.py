"""The engine on real models: sigma and bounds against dense float64, attacks on the scales, and when it refreshes."""

import math
import zlib

import pytest
import torch
import torch.distributed as dist

from tests.functional.common import base, close, column, flags_of, layer_column, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

HEADS, GROUPS, HEAD_DIM, HIDDEN, LENGTH = 4, 2, 8, 32, 16
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
MODELS = {
    "llama": ("llama", ""),
    "llama-partial-interleaved": ("llama", "--rotary-percent 0.5 --rotary-interleaved"),
    "rms-1p-bias": ("llama", "--apply-layernorm-1p --add-qkv-bias"),
    "gpt2": ("gpt2", ""),
    "gpt2-1p": ("gpt2", "--apply-layernorm-1p"),
}


def model_flags(name, *more):
    style, extra = MODELS[name]
    return base(extra, "--train-iters 1", *more, model=style)


@torch.no_grad()
def randomise(trainer):
    """Weights, gains and biases that are nobody's start values; replicas of a parameter stay equal."""
    for chunk in trainer.run.chunks:
        for name, p in chunk.named_parameters():
            rank = dist.get_rank() if getattr(p, "tensor_model_parallel", False) else 0
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {rank}".encode())))
            p.add_((0.3 if p.dim() == 1 else 0.2) * noise)
    trainer.run.optimizer.reload_model_params()


def measure(trainer, go):
    """Bounds of the table by layer, and what they must follow from: the gathered weights, their norm, the constants."""
    from megatron_geoscale.scaling.table import BOUNDS

    randomise(trainer)
    engine = trainer.run.scaling
    engine.refresh()
    found = []
    for layer in engine.layers:
        linear, norm = layer.attention.linear_qkv, layer.norm
        whole = {}
        for name in ("weight", "bias"):
            mine = getattr(linear, name, None)
            if mine is not None:
                parts = [torch.empty_like(mine) for _ in range(layer.tp_group.size())]
                dist.all_gather(parts, mine.detach(), group=layer.tp_group)
                whole[name] = torch.cat(parts).double()
        shift = getattr(norm, "bias", None)
        gain = norm.weight.detach().double() + (1 if trainer.args.apply_layernorm_1p else 0)
        row = engine.table.bounds[layer.number - 1].tolist()
        bounds = dict(zip(BOUNDS, row, strict=True))
        found.append((layer.number, whole, gain, None if shift is None else shift.detach().double(), bounds))
    return found, engine.digest(), trainer.args


def heads_of(whole, gain, shift):
    """(A, a, B, b, C, c) of each query head, dense float64, from Megatron's interleaved rows (THEORY 1)."""
    rows = HEADS // GROUPS + 2
    weight = whole["weight"].view(GROUPS, rows, HEAD_DIM, HIDDEN)
    bias = whole.get("bias", torch.zeros(GROUPS * rows * HEAD_DIM, dtype=torch.float64)).view(GROUPS, rows, HEAD_DIM)
    if shift is not None:
        bias = bias + weight @ shift
    folded = weight * gain
    for group in range(GROUPS):
        for query in range(HEADS // GROUPS):
            yield tuple(t for row in (query, -2, -1) for t in (folded[group, row], bias[group, row]))


def pairs_of(args):
    """Rows that RoPE rotates together, and each row that it leaves alone."""
    if args.position_embedding_type != "rope":
        return [(row,) for row in range(HEAD_DIM)]
    dim = int(HEAD_DIM * args.rotary_percent)
    step = 1 if args.rotary_interleaved else dim // 2
    starts = range(0, dim, 2) if args.rotary_interleaved else range(dim // 2)
    return [(row, row + step) for row in starts] + [(row,) for row in range(dim, HEAD_DIM)]


def rotation(args, distance):
    """R of THEORY 1 for one distance between query and key, dense."""
    r = torch.eye(HEAD_DIM, dtype=torch.float64)
    pairs = [pair for pair in pairs_of(args) if len(pair) == 2]
    for number, (i, j) in enumerate(pairs):
        angle = distance * args.rotary_base ** (-number / len(pairs))
        r[i, i] = r[j, j] = math.cos(angle)
        r[i, j], r[j, i] = -math.sin(angle), math.sin(angle)
    return r


def norm2(matrix):
    return float(torch.linalg.svdvals(matrix)[0]) if matrix.dim() == 2 else float(torch.linalg.vector_norm(matrix))


def logit_bound(a_, a, b_, b, r):
    """THEORY 3, for one rotation."""
    terms = math.sqrt(HIDDEN) * (norm2(a_.T @ (r @ b)) + norm2(b_.T @ (r.T @ a))) + abs(float(a @ r @ b))
    return (HIDDEN * norm2(a_.T @ r @ b_) + terms) / math.sqrt(HEAD_DIM)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigma_and_bounds_are_those_of_the_dense_gathered_weights(model, ranks):
    flags = model_flags(model, "--tensor-model-parallel-size", ranks)
    runs = succeed(flags, ranks, watch=measure)
    assert len({run.value[1] for run in runs}) == 1
    layers, _, args = runs[0].value
    root = math.sqrt(HIDDEN)
    assert [number for number, *_ in layers] == [1, 2]
    for _, whole, gain, shift, bounds in layers:
        heads = list(heads_of(whole, gain, shift))
        expected = {
            "sigma": max(norm2(a_.T @ b_) for a_, _, b_, *_ in heads),
            "amax_v": max(root * norm2(row) + abs(float(c)) for *_, c_, cs in heads for row, c in zip(c_, cs)),
        }
        for name, at in (("query_norm", 0), ("key_norm", 2), ("value_norm", 4)):
            expected[name] = max(root * norm2(head[at]) + norm2(head[at + 1]) for head in heads)
        for name, at in (("amax_q", 0), ("amax_k", 2)):
            expected[name] = max(
                root * norm2(head[at][list(pair)]) + norm2(head[at + 1][list(pair)])
                for head in heads
                for pair in pairs_of(args)
            )
        for name, value in expected.items():
            assert bounds[name] == pytest.approx(value, rel=1e-5), name
        worst = [max(logit_bound(*h[:4], rotation(args, t)) for t in range(-LENGTH, LENGTH + 1)) for h in heads]
        if args.position_embedding_type != "rope":
            assert bounds["sigma_bound"] == pytest.approx(expected["sigma"], rel=1e-5)
            assert bounds["logit_bound"] == pytest.approx(max(worst), rel=1e-5)
        else:
            split = [HIDDEN * norm2(h[0]) * norm2(h[2]) / math.sqrt(HEAD_DIM) for h in heads]
            biases = [logit_bound(h[0] * 0, h[1], h[2] * 0, h[3], rotation(args, 0)) for h in heads]
            assert max(worst) <= bounds["logit_bound"]
            if not any(biases):
                assert bounds["logit_bound"] <= max(split) * (1 + 1e-9)


def test_power_iteration_reaches_the_dense_norm_and_never_passes_it():
    (run,) = succeed(model_flags("llama", "--geoscale-estimator power"), watch=measure)
    for _, whole, gain, shift, bounds in run.value[0]:
        dense = max(norm2(a_.T @ b_) for a_, _, b_, *_ in heads_of(whole, gain, shift))
        assert dense * (1 - 1e-3) <= bounds["sigma"] <= dense * (1 + 1e-9)


@pytest.mark.parametrize("recipe", ["paper", "certified"])
def test_paper_recipe_does_not_depend_on_the_layout(recipe, tmp_path):
    """Under head granularity the power iteration's vectors belong to heads, not to ranks."""
    flags = base("--num-layers 4 --lr 1e-3 --lr-decay-iters 3 --geoscale-recipe", recipe)
    succeed([*flags, *flags_of("--train-iters 0 --save", tmp_path)])
    flags += flags_of("--train-iters 3 --load", tmp_path)
    alone = train(flags)
    for ranks, extra in ((2, TP2), (4, f"{TP2} {PP2} --sequence-parallel")):
        records = train([*flags, *flags_of(extra)], ranks)
        assert records[0]["geoscale"]["digest"] == alone[0]["geoscale"]["digest"]
        assert close(column(records, "lm_loss"), column(alone, "lm_loss"), 1e-4)
        for mine, theirs in zip(records, alone, strict=True):
            assert close(layer_column(mine, "sigma"), layer_column(theirs, "sigma"), 1e-4)
    if recipe == "paper":  # rank-aware alpha and isotropic entries are far below the worst case
        certified = train([*flags, "--geoscale-recipe", "certified"])
        for name in ("logit_bound", "amax_q", "amax_v"):
            both = zip(layer_column(alone[0], name), layer_column(certified[0], name), strict=True)
            assert all(paper <= worst for paper, worst in both), name
        assert close(layer_column(alone[0], "sigma"), layer_column(certified[0], "sigma"), 1e-3)


def skip_second(trainer, go):
    """State after each step of a run whose second and third steps are skipped."""
    from megatron_geoscale.scaling.table import BOUNDS

    run, seen = trainer.run, []
    step, plain = run.optimizer.step, trainer._step
    run.optimizer.step = lambda: (False, None, None) if run.state.iteration in (2, 3) else step()

    def watched():
        plain()
        vectors = {number: vector.clone() for number, vector in run.scaling.estimator.vectors.items()}
        sigma = run.scaling.table.bounds[:, BOUNDS.index("sigma")].clone()
        seen.append((run.scaling.digest(), vectors, sigma, run.optimizer.param_groups[0]["lr"]))

    trainer._step = watched
    go()
    return seen, run.state.skipped_iterations, run.state.consumed_samples


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_skipped_step_changes_no_scale_and_no_power_vector(granularity):
    flags = base("--train-iters 5 --geoscale-recipe paper --geoscale-granularity", granularity)
    (run,) = succeed(flags, watch=skip_second)
    steps, skipped, samples = run.value
    assert skipped == 2 and samples == 5 * 4
    digests = [digest for digest, *_ in steps]
    # Scales seen at step n come from the weights that step n - 1 left.
    assert digests[1] == digests[2] == digests[3]
    assert len({digests[0], digests[1], digests[4]}) == 3
    for layer, vector in steps[1][1].items():
        assert torch.equal(vector, steps[2][1][layer]) and torch.equal(vector, steps[3][1][layer])
        assert not torch.equal(vector, steps[4][1][layer])
    assert torch.equal(steps[1][2], steps[3][2])
    assert steps[1][3] == steps[2][3] == steps[0][3] != steps[3][3]  # the schedule waits too
    assert "number of skipped iterations:   1" in run.out.splitlines()[1]
    assert "number of skipped iterations:   0" in run.out.splitlines()[0]


def test_overflowing_fp16_loss_scale_skips_steps_for_real():
    """A loss scale of 2**32 overflows float16 gradients at first: nothing is applied, and the table stays."""
    records = train(base("--train-iters 3 --fp16"))
    assert column(records, "learning_rate")[0] == column(records, "learning_rate")[1]
    assert len(set(column(records, "geoscale.digest"))) == 1
    assert column(records, "geoscale.refresh_ms")[1:] == [0.0, 0.0]


def test_refresh_interval_counts_applied_steps():
    records = train(base("--train-iters 7 --geoscale-refresh-interval 3"))
    digests = column(records, "geoscale.digest")
    assert digests[0] == digests[1] == digests[2] != digests[3] == digests[4] == digests[5] != digests[6]
    assert [ms > 0 for ms in column(records, "geoscale.refresh_ms")] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(1, ""), (1, "--bf16"), (2, "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")],
)
def test_scales_follow_a_spike_at_once_and_in_proportion(ranks, extra):
    """And at the next step still: the optimizer's own copies of bf16 weights were hit too."""
    records = train(base("--train-iters 3 --lr 1e-9 --geoscale-fault-injection weight_spike:2:4", extra), ranks)
    before, spike, after = records
    for name, power in (("sigma", 16), ("logit_bound", 16), ("amax_q", 4), ("amax_v", 4), ("scale_qkv", 1 / 4)):
        for old, new in zip(layer_column(before, name), layer_column(spike, name), strict=True):
            assert new == pytest.approx(power * old, rel=1e-5), name
        assert close(layer_column(after, name), layer_column(spike, name), 1e-5)
    assert column(records, "geoscale.saturated") == [0, 0, 0]
