"""Replicas whose weights are not the same bits are found within --geoscale-check-interval, and named."""

import re

import pytest
import torch

from tests.functional.common import base, column, launch, train

pytestmark = pytest.mark.usefixtures("megatron")

PP2 = "--pipeline-model-parallel-size 2"
OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce"


def flags_for(*more):
    return base("--train-iters 8 --save-interval 3", *more)


SPLIT = "--geoscale-split-over-data-parallel"
DOUBT = ", and nothing tells which is right"
CASES = {  # name: (ranks, flags, fault, interval, stops at, who differs from whom)
    "dp2": (2, "", "flip_bit:4:0", 2, 4, ("rank 1", "rank 0" + DOUBT)),
    "dp3": (3, "--global-batch-size 6", "flip_bit:4:1", 3, 6, ("rank 1", "ranks 0, 2:")),
    "dp2-bf16": (2, "--bf16", "flip_bit:4", 3, 6, ("rank 1", "rank 0")),
    "dp2-pp2-split": (4, f"{PP2} {SPLIT}", "flip_bit:4:2", 3, 6, ("rank 3", "rank 2")),
    # Each step gathers the weights from their owners: they differ until then and no longer.
    "dp2-distopt": (2, OPTIMIZER, "flip_bit:4:0", 1, 4, ("rank 1", "rank 0")),
    "dp2-none": (2, "--geoscale-recipe none", "flip_bit:4", 3, 6, ("rank 1", "rank 0")),
    "before-a-save": (2, "", "flip_bit:4", 100, 7, ("rank 1", "rank 0")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_and_named(tmp_path, case):
    ranks, extra, fault, interval, stops_at, (odd, rest) = CASES[case]
    log = tmp_path / "log.jsonl"
    flags = flags_for(extra, "--geoscale-fault-injection", fault, "--geoscale-check-interval", interval)
    runs = launch([*flags, "--geoscale-log-jsonl", log, "--save", tmp_path / "save"], ranks)
    said = {line for run in runs for line in run.err.splitlines() if line.startswith("pretrain.py")}
    (sentence,) = said
    assert re.match(rf"pretrain.py: error: attention weights of layer 2 on {odd} differ from those of the "
                    rf"data-parallel replica on {rest}", sentence), sentence
    assert [run.code for run in runs] == [1] * ranks
    assert len(log.read_text().splitlines()) == stops_at - 1
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_replicas_that_agree_are_left_alone():
    flags = f"--train-iters 6 {OPTIMIZER} --overlap-param-gather --bf16 --geoscale-check-interval"
    checked, unchecked = (train(base(flags, interval), 2) for interval in (1, 0))
    assert column(checked, "lm_loss") == column(unchecked, "lm_loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1,), (33,), (5, 7), (3, 4, 5)])
def test_every_flipped_bit_changes_the_checksum(dtype, shape):
    from megatron_geoscale.scaling.drift import _INTEGERS, checksum

    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(shape, generator=generator).to(dtype)
    before = checksum(plain)
    integer = _INTEGERS[plain.element_size()]
    for element in range(plain.numel()):
        for bit in range(8 * plain.element_size()):
            spoilt = plain.clone()
            flip = -(2**63) if bit == 63 else 1 << bit
            flat = spoilt.view(integer).view(-1)
            flat[element] ^= torch.tensor(flip, dtype=torch.int64).to(integer)
            assert checksum(spoilt) != before, (element, bit)
    assert checksum(plain.clone()) == before


def test_swapped_rows_and_swapped_parameters_change_it():
    from megatron_geoscale.scaling.drift import checksum

    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    assert checksum(matrix) != checksum(matrix[[1, 0, 2, 3, 4, 5]])
    assert checksum(matrix[:, 0]) != checksum(matrix[[1, 0, 2, 3, 4, 5], 0])


def test_most_replicas_are_believed():
    from megatron_geoscale.scaling.drift import ReplicaDriftError, raise_if_drifted

    table = torch.tensor([[0, 7, 7], [0, 7, 7], [0, 7, 7], [1, 4, 4], [1, 4, 4], [1, 4, 4]])
    raise_if_drifted(table)
    table[4, 2] = 5
    with pytest.raises(ReplicaDriftError, match=r"layer 2 on rank 4 differ from .* on ranks 3, 5:"):
        raise_if_drifted(table)
    table[0, 1], table[1, 1], table[0, 2] = 1, 2, 3
    with pytest.raises(ReplicaDriftError, match=r"layer 1 on ranks 1, 2 differ .* rank 0, and nothing .*layers 2 diff"):
        raise_if_drifted(table)
