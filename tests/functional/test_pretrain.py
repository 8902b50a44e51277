"""pretrain.py as a user meets it: what it prints and writes, every recipe, real launches, data from everywhere."""

import math
import os
import re
import subprocess
import sys

import pytest

from megatron_geoscale.config import ESTIMATORS, GEOMETRIC_RECIPES, GRANULARITIES
from tests.functional.common import (
    BATCH,
    LLAMA,
    MODEL,
    NO_DROPOUT,
    VOCABULARY,
    base,
    close,
    column,
    corpus,
    flags_of,
    layer_column,
    read_records,
    succeed,
    train,
    write_corpus,
)
from tests.harness import ROOT, free_port, run_torchrun

pytestmark = pytest.mark.usefixtures("megatron")

LAYER_KEYS = {"layer", "sigma", "sigma_bound", "logit_bound", "amax_q", "amax_k", "amax_v", "scale_qkv", "saturated"}
RECIPES = [
    *((recipe, f"--geoscale-estimator {estimator} --geoscale-granularity {granularity}")
      for recipe in GEOMETRIC_RECIPES for estimator in ESTIMATORS for granularity in GRANULARITIES),
    ("certified", "--geoscale-logits-dtype fp8"),
    ("paper", "--geoscale-logits-dtype fp8"),
    ("delayed", ""),
    ("current", ""),
]


@pytest.fixture(scope="module")
def reference(megatron):
    """Three steps without FP8 attention."""
    return train(base("--train-iters 3 --lr 1e-3 --geoscale-recipe none"))


@pytest.mark.parametrize(("recipe", "extra"), RECIPES)
def test_every_recipe_trains_under_every_estimator_and_granularity(reference, recipe, extra):
    records = train(base("--train-iters 3 --lr 1e-3 --geoscale-recipe", recipe, extra))
    assert close(column(records, "lm_loss"), column(reference, "lm_loss"), 0.01)
    if recipe != "delayed":
        assert column(records, "geoscale.saturated") == [0, 0, 0]
    bounded = recipe in GEOMETRIC_RECIPES
    for record in records:
        assert [value is not None for value in layer_column(record, "sigma")] == [bounded] * 2
        assert [value is not None for value in layer_column(record, "scale_qkv")] == [recipe != "current"] * 2


def test_jsonl_holds_what_the_design_lists(tmp_path):
    log = tmp_path / "deep" / "log.jsonl"  # the folder is made
    succeed(base("--train-iters 3 --geoscale-log-jsonl", log))
    records = read_records(log)
    assert column(records, "iteration") == [1, 2, 3]
    for record in records:
        assert {"iteration", "lm_loss", "grad_norm", "learning_rate", "tokens_per_second", "geoscale"} <= set(record)
        assert 0 < record["step_ms"] < math.inf
        assert all(math.isfinite(record[name]) and record[name] > 0 for name in ("lm_loss", "grad_norm"))
        assert record["tokens_per_second"] > 0
        geoscale = record["geoscale"]
        assert {"digest", "saturated", "utilization_max", "refresh_ms", "layers"} <= set(geoscale)
        assert re.fullmatch("[0-9a-f]{16}", geoscale["digest"])
        assert geoscale["saturated"] == sum(layer_column(record, "saturated")) == 0
        assert 0 < geoscale["utilization_max"] <= 1 and geoscale["refresh_ms"] > 0
        assert [set(layer) >= LAYER_KEYS for layer in geoscale["layers"]] == [True, True]
        assert layer_column(record, "layer") == [1, 2]
        for layer in geoscale["layers"]:
            largest = max(layer["amax_q"], layer["amax_k"], layer["amax_v"])
            assert 0.99 < layer["scale_qkv"] * largest / 448 <= 1  # TE's convention, less what rounding may add
            assert 0 < layer["sigma"] <= layer["sigma_bound"]
    assert column(records, "learning_rate") == pytest.approx([1e-2 * (1 - i / 3) for i in (1, 2, 3)], abs=1e-12)


def test_every_number_is_written_so_that_json_can_be_read_anywhere(tmp_path):
    """NaN and Infinity are no JSON, strict readers (jq, JavaScript) stop at them; fp16 gradients overflow at first."""
    log = tmp_path / "log.jsonl"
    succeed(base("--train-iters 2 --fp16 --geoscale-log-jsonl", log))
    assert not re.search(r"[^\"](NaN|Infinity)[^\"]", log.read_text())
    assert not math.isfinite(float(column(read_records(log), "geoscale.overrange_max")[0]))


def test_log_line_is_megatrons():
    (run,) = succeed(base("--train-iters 4 --log-interval 2 --log-throughput --geoscale-recipe delayed"))
    lines = [line for line in run.out.splitlines() if " iteration " in line]
    assert len(lines) == 2
    date, float6 = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]", r"\d\.\d{6}E[+-]\d\d"
    for number, line in zip((2, 4), lines, strict=True):
        parts = (
            rf" {date} iteration +{number}/ +4",
            rf"consumed samples: +{4 * number}",
            r"elapsed time per iteration \(ms\): \d+\.\d",
            r"tokens per second: \d+",
            rf"learning rate: {float6}",
            r"global batch size: +4",
            rf"lm loss: {float6}",
            r"loss scale: 1\.0",
            r"grad norm: \d+\.\d{3}",
            r"number of skipped iterations: +0",
            r"saturated values: \d+",
            r"refresh \(ms\): \d+\.\d",
        )
        assert re.fullmatch(r" \| ".join(parts) + r" \|", line), line


def test_log_line_sums_and_averages_over_its_interval(tmp_path):
    """With the JSONL, which collects at every iteration, and without."""
    flags = base("--train-iters 6 --log-interval 3 --init-method-std 0.2 --geoscale-recipe delayed "
                 "--geoscale-fault-injection weight_spike:2:8")
    log = tmp_path / "log.jsonl"
    (with_log,), (without,) = succeed([*flags, "--geoscale-log-jsonl", log]), succeed(flags)
    records = read_records(log)
    for run in (with_log, without):
        sums = [int(value) for value in re.findall(r"saturated values: (\d+)", run.out)]
        saturated = column(records, "geoscale.saturated")
        assert sums == [sum(saturated[:3]), sum(saturated[3:])] and sums[0] > 0
        means = [float(value) for value in re.findall(r"lm loss: (\S+)", run.out)]
        losses = column(records, "lm_loss")
        assert means == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)


def test_validation_is_printed_and_tensorboard_holds_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = base("--train-iters 4 --eval-iters 2 --eval-interval 2 --tensorboard-dir", tmp_path / "tb")
    (run,) = succeed([*flags, "--geoscale-log-jsonl", tmp_path / "log.jsonl"])
    found = re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+) \| lm loss PPL: (\S+) \|", run.out)
    assert [int(iteration) for iteration, *_ in found] == [2, 4]
    for _, loss, perplexity in found:
        assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-4)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    scalars = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    records = read_records(tmp_path / "log.jsonl")
    for name in ("lm_loss", "grad_norm", "learning_rate"):
        assert scalars[name] == pytest.approx(column(records, name), rel=1e-5)
    assert scalars["geoscale/saturated"] == [0, 0, 0, 0]
    for row, layer in enumerate(records[-1]["geoscale"]["layers"]):
        for name in ("sigma", "sigma_bound", "amax_q", "scale_qkv", "saturated"):
            assert scalars[f"geoscale-layers/{name}/layer-{row + 1}"][-1] == pytest.approx(layer[name], rel=1e-5)
        used = scalars[f"geoscale-layers/utilization/qkv/layer-{row + 1}"][-1]
        assert 0 < used == pytest.approx(layer["utilization"]["qkv"], rel=1e-5)
    histogram = events.Histograms("geoscale/sigma/layers")[-1].histogram_value
    sigmas = column(records[-1]["geoscale"]["layers"], "sigma")
    assert (histogram.num, histogram.max) == (len(sigmas), pytest.approx(max(sigmas)))
    assert scalars["lm loss validation"] == pytest.approx([float(loss) for _, loss, _ in found], rel=1e-5)


def test_validation_under_pipeline_and_data_parallelism_is_that_of_one_rank(tmp_path):
    def validation(ranks, *more):
        runs = succeed(base("--train-iters 2 --eval-iters 2 --eval-interval 2 --lr 1e-4", *more), ranks)
        (loss,) = re.findall(r"validation loss at iteration 2 \| lm loss value: (\S+)", "".join(r.out for r in runs))
        return float(loss)

    succeed(base("--train-iters 0 --save", tmp_path))
    alone = validation(1, "--load", tmp_path)
    assert validation(2, "--load", tmp_path) == pytest.approx(alone, rel=1e-4)
    both = validation(2, "--load", tmp_path, "--pipeline-model-parallel-size 2")
    assert both == pytest.approx(alone, rel=1e-4)


def test_each_validation_reads_samples_of_its_own():
    (run,) = succeed(base("--train-iters 6 --lr 1e-30 --eval-iters 1 --eval-interval 2"))
    losses = re.findall(r"validation loss at iteration \d \| lm loss value: (\S+)", run.out)
    assert len(losses) == len(set(losses)) == 3  # the weights were the same


@pytest.mark.parametrize(
    "recompute",
    ["--recompute-activations", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"],
)
def test_recomputed_activations_change_neither_curve_nor_counts(recompute):
    flags = base("--train-iters 4 --attention-dropout 0.1 --hidden-dropout 0.1 --init-method-std 0.2 "
                 "--geoscale-recipe delayed --geoscale-fault-injection weight_spike:2:8")
    kept, again = train(flags), train([*flags, *flags_of(recompute)])
    for name in ("lm_loss", "grad_norm", "geoscale.saturated_by_slot", "geoscale.flushed", "geoscale.overrange_max"):
        assert column(again, name) == column(kept, name), name
    assert column(kept, "geoscale.saturated")[1] > 0


def with_data(*data):
    return flags_of(MODEL, LLAMA, BATCH, NO_DROPOUT, "--train-iters 3 --tokenizer-type NullTokenizer --vocab-size",
                    VOCABULARY, list(data))


def test_data_from_one_prefix_a_blend_split_by_file_and_none(tmp_path):
    other = write_corpus(tmp_path / "other", [[7] * 40] * 30)
    one = column(train(with_data("--data-path", corpus())), "lm_loss")
    blend = column(train(with_data("--data-path", 0.5, corpus(), 0.5, other)), "lm_loss")
    evaluation = ["--eval-iters", 1, "--eval-interval", 3]
    (run,) = succeed(with_data("--train-data-path", corpus(), "--valid-data-path", other, *evaluation))
    mock = column(train(with_data("--mock-data")), "lm_loss")
    assert len({tuple(losses) for losses in (one, blend, mock)}) == 3
    assert "validation loss at iteration 3" in run.out
    cache = tmp_path / "cache"
    assert column(train(with_data("--data-path", corpus(), "--data-cache-path", cache)), "lm_loss") == one
    assert any(cache.rglob("*.npy"))


def test_flags_about_ends_of_documents_are_heard(tmp_path):
    """Documents end in NullTokenizer's end of document, the last token."""
    prefix = write_corpus(tmp_path / "ends", [[*range(n, n + 9), VOCABULARY] for n in range(40)])
    plain = with_data("--data-path", prefix)
    losses = {flag: column(train([*plain, *flags_of(flag)]), "lm_loss")[0]
              for flag in ("", "--eod-mask-loss", "--reset-attention-mask",
                           "--position-embedding-type learned_absolute",
                           "--position-embedding-type learned_absolute --reset-position-ids")}
    assert len(set(losses.values())) == len(losses)
    tensor_parallel = train([*plain, *flags_of("--reset-attention-mask --tensor-model-parallel-size 2")], 2)
    assert len(tensor_parallel) == 3


def test_torchrun_is_what_the_other_tests_stand_for(tmp_path):
    flags = base("--train-iters 3 --tensor-model-parallel-size 2 --geoscale-log-jsonl")
    result = run_torchrun(["pretrain.py", *flags, tmp_path / "log.jsonl"], 2)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert "training is complete" in result.stdout
    records, forked = read_records(tmp_path / "log.jsonl"), train(flags[:-1], 2)
    for name in ("lm_loss", "grad_norm", "geoscale.digest"):
        assert column(records, name) == column(forked, name)


def test_two_agents_are_one(tmp_path):
    """Two nodes on one host, rendezvous by c10d; the weights are laid over both."""
    flags = base("--train-iters 3 --tensor-model-parallel-size 2")
    port, log, environment = free_port(), tmp_path / "log.jsonl", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two",
               "--local-addr", "127.0.0.1", str(ROOT / "pretrain.py"), *flags, "--geoscale-log-jsonl", str(log)]
    agents = []
    try:
        for number in range(2):
            with open(tmp_path / f"agent{number}", "w") as output:
                agents.append(subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=environment))
        codes = [agent.wait(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # it stops its worker
            agent.wait()
    assert codes == [0, 0], [(tmp_path / f"agent{number}").read_text()[-3000:] for number in range(2)]
    records, one_agent = read_records(log), train(flags, 2)
    assert len(records) == 3  # one rank reports
    for name in ("lm_loss", "grad_norm", "geoscale.digest"):
        assert column(records, name) == column(one_agent, name)
