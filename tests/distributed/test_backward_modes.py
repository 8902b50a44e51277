"""--geoscale-backward in a training: what each choice casts, reports and keeps, and that ranks agree."""

import pytest
import torch

from megatron_geoscale.scaling.formats import E5M2
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, SLOTS
from tests.functional.common import base, column, read_records, succeed

pytestmark = pytest.mark.usefixtures("megatron")

STEPS, BACKWARD = 3, [SLOTS.index(slot) for slot in BACKWARD_SLOTS]


def observe(trainer, go):
    """Of each step: the amax of the backward slots, before the report empties the gauge; and the history's scales."""
    engine, seen = trainer.run.scaling, []
    end_step = engine.end_step

    def recorded():
        before = None if engine.history is None else engine.history.scales[:, BACKWARD].clone()
        end_step()
        seen.append((before, None if engine.history is None else engine.history.scales[:, BACKWARD].clone()))

    amax, reset = [], engine.gauge.reset
    engine.gauge.reset = lambda: (amax.append(engine.gauge.amax[:, BACKWARD].clone()), reset())
    engine.end_step = recorded
    go()
    return amax, seen


@pytest.fixture(scope="module")
def runs(megatron, tmp_path_factory):
    """{mode: (records, what `observe` returns on each of two tensor-parallel ranks)}."""
    found = {}
    for mode in ("bound", "delayed", "bf16"):
        path = tmp_path_factory.mktemp(mode) / "log.jsonl"
        flags = base("--train-iters", STEPS, "--tensor-model-parallel-size 2 --geoscale-backward", mode,
                     "--geoscale-log-jsonl", path)
        ranks = succeed(flags, 2, watch=observe)
        found[mode] = read_records(path), [rank.value for rank in ranks]
    return found


def test_the_forward_pass_is_the_same_and_the_gradients_are_not(runs):
    first = {mode: records[0] for mode, (records, _) in runs.items()}
    for name in ("lm_loss", "geoscale.digest"):
        assert len({column([record], name)[0] for record in first.values()}) == 1
    assert len({record["grad_norm"] for record in first.values()}) == 3
    for records, _ in runs.values():
        assert all(record["geoscale"]["utilization_max"] < 1 for record in records)
    assert all(record["geoscale"]["saturated"] == 0 for mode in ("bound", "bf16") for record in runs[mode][0])


def test_without_casts_nothing_is_reported(runs):
    for mode, (_, ranks) in runs.items():
        for amax, _ in ranks:
            assert len(amax) == STEPS
            assert all(bool((step > 0).all()) == (mode != "bf16") for step in amax)


def test_history_is_that_of_all_ranks(runs):
    assert all(scales == (None, None) for mode in ("bound", "bf16") for _, seen in runs[mode][1] for scales in seen)
    (amax, seen), (other, theirs) = runs["delayed"][1]
    assert any(not torch.equal(a, b) for a, b in zip(amax, other))  # each rank has its own heads
    largest = torch.zeros_like(amax[0])
    for step, (before, after) in enumerate(seen):
        assert torch.equal(before, theirs[step][0]) and torch.equal(after, theirs[step][1])
        assert torch.equal(before, torch.ones_like(before) if step == 0 else seen[step - 1][1])
        largest = torch.stack([largest, amax[step], other[step]]).amax(0)
        torch.testing.assert_close(after, E5M2.max / largest)
