"""`refresh(check=False)`: weights that are not finite leave the table alone until `check_finite` is asked."""

import pytest
import torch
import torch.distributed as dist

from tests.functional.common import base, succeed

pytestmark = pytest.mark.usefixtures("megatron")


def late_check(trainer, go):
    """Whether the table stayed, what was said, and whether the table moves again, for a NaN on one rank."""
    engine, said = trainer.run.scaling, []
    engine.refresh()
    weight = engine.layers[1].attention.linear_qkv.weight
    scales, bounds, address = engine.table.scales.clone(), engine.table.bounds.clone(), engine.table.scales.data_ptr()
    with torch.no_grad():
        weight.mul_(2.0)
        good = weight.clone()
        if dist.get_rank() == dist.get_world_size() - 1:
            weight[0, 3] = float("nan")
    engine.refresh(check=False)
    kept = torch.equal(engine.table.scales, scales) and torch.equal(engine.table.bounds, bounds)
    for _ in range(2):  # asked twice, it says so twice
        try:
            engine.check_finite()
        except RuntimeError as error:
            said.append(str(error))
    with torch.no_grad():
        weight.copy_(good)
    engine.refresh(check=False)
    engine.check_finite()
    ratio = engine.table.bound(2, "amax_q") / float(bounds[1, 4])
    return kept, said, ratio, engine.table.scales.data_ptr() == address, engine.digest()


@pytest.mark.parametrize("recipe", ["certified", "calibrated", "paper"])
@pytest.mark.parametrize("extra", ["--tensor-model-parallel-size 2", ""], ids=["tp2", "dp2"])
def test_the_table_stays_and_every_rank_says_the_same(recipe, extra):
    runs = succeed(base("--train-iters 1 --geoscale-recipe", recipe, extra), 2, watch=late_check)
    head = 2 if extra else 0  # the first head of the rank that holds the NaN
    for run in runs:
        kept, said, ratio, in_place, _ = run.value
        assert kept and in_place
        assert said == runs[0].value[1] and len(said) == 2
        assert said[0].startswith(f"non-finite attention weights in layer 2, head {head}, W_Q")
        assert ratio == pytest.approx(2.0)
    assert runs[0].value[4] == runs[1].value[4]
