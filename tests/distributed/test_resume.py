"""A run that stops and goes on is the run that did not stop: bit for bit in its layout, to rounding in another."""

import pytest
import torch

from tests.functional.common import base, close, column, flags_of, layer_column, read_records, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

STEPS, STOP = 12, 6
TP2, PP2, SP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--sequence-parallel"
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
CASES = {  # name: (ranks, flags)
    "certified": (1, ""),
    "certified-dropout": (1, DROPOUT),
    "paper": (1, "--geoscale-recipe paper"),
    "paper-layer-tp2": (2, f"{TP2} --geoscale-recipe paper --geoscale-granularity layer"),
    "paper-dropout-tp2-sp": (2, f"{TP2} {SP} {DROPOUT} --geoscale-recipe paper"),
    "none": (1, "--geoscale-recipe none"),
    "current": (1, "--geoscale-recipe current"),
    "dp2-distopt": (2, "--use-distributed-optimizer"),
    "dp2-distopt-overlap": (2, OVERLAP),
    "dp2-distopt-overlap-bf16": (2, f"{OVERLAP} --bf16"),
    "bf16": (1, "--bf16"),
    "pp2-dropout": (2, f"{PP2} {DROPOUT}"),
    "pp2-interleaved": (2, f"{PP2} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"),
    "tp2-pp2-sp-dropout": (4, f"{TP2} {PP2} {SP} {DROPOUT}"),
    "rampup": (1, "--rampup-batch-size 2 2 12 --micro-batch-size 1"),
    "refresh-interval": (1, "--geoscale-refresh-interval 3"),
}


def flags_for(*more, steps=STEPS):
    return base("--train-iters", steps, "--lr-decay-iters", STEPS, "--lr-decay-style cosine", *more)


def stop_and_go_on(tmp_path, flags, ranks=1, resume=None, resume_ranks=None, **options):
    """Records of a run that leaves at STOP, and of the one that takes up its checkpoint."""
    first = train([*flags, *flags_of("--exit-interval", STOP, "--save", tmp_path)], ranks)
    flags = flags if resume is None else resume
    return first, train([*flags, "--load", tmp_path], resume_ranks or ranks, **options)


@pytest.mark.parametrize("case", CASES)
def test_resumed_curve_is_the_uninterrupted_one_bit_for_bit(tmp_path, case):
    ranks, extra = CASES[case]
    flags = flags_for(extra)
    whole = train(flags, ranks)
    first, rest = stop_and_go_on(tmp_path, flags, ranks)
    assert column(first + rest, "iteration") == column(whole, "iteration") == list(range(1, STEPS + 1))
    for name in ("lm_loss", "grad_norm", "learning_rate"):
        assert column(first + rest, name) == column(whole, name), name
    if whole[0]["geoscale"] is not None:
        for name in ("geoscale.digest", "geoscale.saturated"):
            assert column(first + rest, name) == column(whole, name), name
        for mine, theirs in zip(first + rest, whole, strict=True):
            assert layer_column(mine, "sigma") == layer_column(theirs, "sigma")
    assert len(set(column(whole, "lm_loss"))) == STEPS


def test_a_run_may_be_stopped_again_and_again(tmp_path):
    whole, parts = train(flags_for(DROPOUT)), []
    for _ in range(4):  # 5, 10, 12, and one that finds nothing left to do
        parts += train(flags_for(DROPOUT, "--exit-interval 5 --save", tmp_path, "--load", tmp_path))
    assert column(parts, "lm_loss") == column(whole, "lm_loss")
    saved = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert saved == ["iter_0000005", "iter_0000010", "iter_0000012"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "12"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, TP2), (1, "")),
        ((1, ""), (2, PP2)),
        ((2, f"{TP2} {SP}"), (2, PP2)),
        ((2, "--use-distributed-optimizer"), (1, "")),
        ((1, "--use-distributed-optimizer"), (2, f"{OVERLAP}")),
        ((2, f"{TP2} --geoscale-recipe paper"), (1, "--geoscale-recipe paper")),
        ((4, f"{TP2} {SP} {PP2} --use-distributed-optimizer"), (2, OVERLAP)),
        ((2, OVERLAP), (4, f"{TP2} --use-distributed-optimizer")),
    ],
    ids=["tp2-tp1", "pp1-pp2", "tp2-pp2", "distopt-plain", "dp1-dp2", "tp2-tp1-paper", "tp2-pp2-dp2", "dp2-tp2-dp2"],
)
def test_resharded_run_goes_on(tmp_path, before, after):
    (ranks, extra), (resume_ranks, resume_extra) = before, after
    calm = "--lr 1e-3"
    if ("--use-distributed-optimizer" in extra) != ("--use-distributed-optimizer" in resume_extra):
        resume_extra += " --no-load-optim"  # two kinds of optimizer state, in Megatron too
    whole = train(flags_for(extra, calm), ranks)
    _, rest = stop_and_go_on(
        tmp_path, flags_for(extra, calm), ranks, flags_for(resume_extra, calm), resume_ranks
    )
    assert column(rest, "iteration") == list(range(STOP + 1, STEPS + 1))
    assert rest[0]["geoscale"]["digest"] == whole[STOP]["geoscale"]["digest"]
    for name in ("sigma", "logit_bound", "amax_v"):
        assert layer_column(rest[0], name) == pytest.approx(layer_column(whole[STOP], name), rel=1e-6)
    last = 1 if "--no-load-optim" in resume_extra else STEPS
    assert close(column(rest, "lm_loss")[:last], column(whole, "lm_loss")[STOP:][:last], 1e-4)


def test_power_vectors_reshard_with_their_heads(tmp_path):
    """They are taken up, not made anew: one warm step on them gives an estimate that convergence would not."""

    def vectors(trainer, go):
        loaded = {number: vector.clone() for number, vector in trainer.run.scaling.estimator.vectors.items()}
        go()
        return loaded

    flags = flags_for("--geoscale-recipe paper")
    succeed([*flags, *flags_of(TP2, "--exit-interval", STOP, "--save", tmp_path)], 2)
    (one,) = succeed([*flags, "--load", tmp_path], watch=vectors)
    halves = succeed([*flags, *flags_of(TP2), "--load", tmp_path], 2, watch=vectors)
    assert set(one.value) == {1, 2}
    for layer, whole in one.value.items():
        assert whole.shape == (4, 32)
        assert torch.equal(whole, torch.cat([half.value[layer] for half in halves]))
        assert torch.allclose(torch.linalg.vector_norm(whole, dim=-1), torch.ones(4, dtype=whole.dtype))


def test_refreshes_keep_their_rhythm_across_a_resume(tmp_path):
    """Scales are not saved, so the first step after a resume refreshes; the next refresh comes when it would have."""
    flags = flags_for("--geoscale-refresh-interval 4")
    first, rest = stop_and_go_on(tmp_path, flags)
    refreshed = [record["iteration"] for record in first + rest if record["geoscale"]["refresh_ms"] > 0]
    assert refreshed == [1, 5, STOP + 1, 9]


def test_delayed_scaling_resumes_with_an_empty_history(tmp_path):
    """As Megatron with TE: nothing of its attention state is in a checkpoint. The baseline's fault, and documented."""
    flags = flags_for("--geoscale-recipe delayed")
    whole = train(flags)
    first, rest = stop_and_go_on(tmp_path, flags)
    assert column(first, "lm_loss") == column(whole, "lm_loss")[:STOP]
    assert layer_column(whole[0], "scale_qkv") == layer_column(rest[0], "scale_qkv") == [1.0, 1.0]
    assert all(scale > 1 for scale in layer_column(whole[STOP], "scale_qkv"))
    assert column(rest, "lm_loss")[0] != column(whole, "lm_loss")[STOP]


def watch_tokens(seen):
    """A `prepare` under which the rank writes down each micro batch it is given."""

    def prepare():
        from megatron_geoscale.training import loop

        plain = loop.get_batch

        def get_batch(*args):
            batch = plain(*args)
            seen.append(batch["tokens"].tolist())
            return batch

        loop.get_batch = get_batch

    return prepare


def batches(flags, ranks=1):
    """The micro batches of each rank, in the order in which they were read."""
    seen = []

    def run(trainer, go):
        go()
        return list(seen)

    return [rank.value for rank in succeed(flags, ranks, watch=run, prepare=watch_tokens(seen))]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_reads_what_was_not_read_yet(tmp_path, workers):
    """In micro batches of 2, over more than one epoch of the data."""
    flags = flags_for("--num-workers", workers, "--global-batch-size 32 --seq-length 32")
    (whole,) = batches(flags)
    (first,) = batches([*flags, *flags_of("--exit-interval", STOP, "--save", tmp_path)])
    (rest,) = batches([*flags, "--load", tmp_path])
    assert len(whole) == STEPS * 16 and len(first) == STOP * 16
    assert first + rest == whole
    assert len({str(batch) for batch in whole}) == len(whole)
    one, other = batches([*flags, "--load", tmp_path], 2)  # under two replicas the same samples, alternating
    assert [batch for turn in zip(one, other, strict=True) for batch in turn] == rest


def test_finetune_takes_the_weights_and_nothing_else(tmp_path):
    flags = flags_for(DROPOUT)
    whole = train(flags)
    _, tuned = stop_and_go_on(tmp_path, flags, resume=[*flags, "--finetune"])
    assert column(tuned, "iteration") == list(range(1, STEPS + 1))
    assert column(tuned, "learning_rate") == column(whole, "learning_rate")
    assert tuned[0]["geoscale"]["digest"] == whole[STOP]["geoscale"]["digest"]
    (fresh,) = batches(flags)
    (again,) = batches([*flags, "--finetune", "--load", tmp_path])
    assert again == fresh


def test_parts_of_a_checkpoint_can_be_left_out(tmp_path):
    flags = flags_for(DROPOUT)
    whole = train(flags)
    _, no_rng = stop_and_go_on(tmp_path, flags, resume=[*flags, "--no-load-rng"])
    no_optimizer = train([*flags, "--no-load-optim", "--load", tmp_path])
    for rest in (no_rng, no_optimizer):
        assert column(rest, "iteration") == list(range(STOP + 1, STEPS + 1))
        assert rest[0]["geoscale"]["digest"] == whole[STOP]["geoscale"]["digest"]
    assert no_rng[0]["lm_loss"] != whole[STOP]["lm_loss"]
    assert no_rng[0]["learning_rate"] == whole[STOP]["learning_rate"]
    assert no_optimizer[0]["lm_loss"] == whole[STOP]["lm_loss"]
    assert no_optimizer[1]["lm_loss"] != whole[STOP + 1]["lm_loss"]


def test_an_older_checkpoint_can_be_named_and_its_successor_is_replaced(tmp_path):
    log = tmp_path / "log.jsonl"
    flags = flags_for("--save", tmp_path / "save", "--save-interval 4", "--geoscale-log-jsonl", log)
    succeed(flags)
    succeed([*flags, *flags_of("--load", tmp_path / "save", "--ckpt-step 4")])
    records = read_records(log)  # the log is appended to
    assert column(records, "iteration") == [*range(1, 13), *range(5, 13)]
    assert column(records[12:], "lm_loss") == column(records[4:12], "lm_loss")
    saved = sorted(path.name for path in (tmp_path / "save").glob("iter_*"))
    assert saved == [f"iter_{i:07d}" for i in (4, 8, 12)]


def test_loading_from_a_directory_without_checkpoint_starts_anew(tmp_path):
    (run,) = succeed(flags_for("--load", tmp_path / "none", steps=2))
    assert f"no checkpoint in {tmp_path / 'none'} yet: starting from random weights" in run.out
    assert "iteration        1/" in run.out


def test_validation_leaves_no_trace_in_training(tmp_path):
    """Neither in the weights, nor in the power iteration, nor in what is read next, nor across a resume."""
    flags = flags_for(DROPOUT, "--geoscale-recipe paper --eval-interval 2")
    without = train(flags)
    flags += ["--eval-iters", "2"]
    whole = train(flags)
    assert column(whole, "lm_loss") == column(without, "lm_loss")
    assert column(whole, "geoscale.digest") == column(without, "geoscale.digest")
    logs = {}

    def validations(name, *more):
        (run,) = succeed([*flags, *flags_of(*more)])
        logs[name] = [line.split("] ")[1] for line in run.out.splitlines() if "validation loss" in line]

    validations("whole")
    validations("first", "--exit-interval", STOP, "--save", tmp_path)
    validations("rest", "--load", tmp_path)
    assert logs["first"] + logs["rest"] == logs["whole"] and len(logs["whole"]) == STEPS // 2
