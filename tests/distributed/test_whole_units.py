"""Units of weights that are cut at any element come together, each on one rank, and hardly anything moves."""

import random

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from megatron_geoscale.spectral.whole_units import Cut, UnitExchange

RANKS, CASES, PER_CASE = 4, 60, 3


def random_cuts(seed):
    """Weights of one refresh: edges anywhere, ranks with nothing and units larger than a rank's part among them."""
    choose = random.Random(seed)
    cuts = []
    for _ in range(PER_CASE):
        unit, count = choose.choice([1, 3, 8]), choose.randint(1, 7)
        inner = sorted(choose.choice([choose.randint(0, unit * count), choose.randint(0, count) * unit])
                       for _ in range(RANKS - 1))
        cut = Cut((0, *inner, unit * count), unit)
        pairs = {(choose.randrange(count), choose.randrange(RANKS)) for _ in range(choose.choice([0, 3]))}
        copies = tuple(sorted(pair for pair in pairs if pair[1] != cut.owner(pair[0])))
        cuts.append(Cut(cut.edges, unit, copies))
    return cuts


def whole(cut, index):
    return torch.arange(cut.edges[-1], dtype=torch.bfloat16) + 100 * index


def exchange(rank, world):
    """Per case: what this rank owns, what it was lent, and how many elements it sent."""
    results = []
    for seed in range(CASES):
        cuts = random_cuts(seed)
        shards = [whole(cut, i)[cut.edges[rank] : cut.edges[rank + 1]] for i, cut in enumerate(cuts)]
        plan = UnitExchange(cuts, group=dist.group.WORLD)
        found = plan(shards)
        owned = [{start + i: unit for start, run in units.runs for i, unit in enumerate(run)} for units in found]
        results.append((owned, [units.copies for units in found], plan.elements_sent))
    return results


def test_every_unit_is_whole_on_the_rank_that_holds_its_first_element():
    ranks = run_ranks(exchange, RANKS)
    moved = 0
    for seed in range(CASES):
        cuts = random_cuts(seed)
        for index, cut in enumerate(cuts):
            units = whole(cut, index).view(-1, cut.unit)
            holders = [ranks[rank][seed][0][index] for rank in range(RANKS)]
            for rank, owned in enumerate(holders):
                assert all(torch.equal(found, units[unit]) for unit, found in owned.items())
                assert all(cut.edges[rank] <= unit * cut.unit < cut.edges[rank + 1] for unit in owned)
                lent = ranks[rank][seed][1][index]
                assert sorted((unit, rank) for unit in lent) == [pair for pair in sorted(cut.copies) if pair[1] == rank]
                assert all(torch.equal(found, units[unit]) for unit, found in lent.items())
            assert sorted(unit for owned in holders for unit in owned) == list(range(len(units)))
        sent = [ranks[rank][seed][2] for rank in range(RANKS)]
        if not any(cut.copies for cut in cuts):
            assert all(count < sum(cut.unit for cut in cuts) for count in sent)  # at most a part of one unit of each
            moved += sum(sent)
    assert moved > 0


def test_nothing_is_sent_where_boundaries_lie_between_units():
    def run(rank, world):
        cut = Cut((0, 8, 8, 12), 4)
        plan = UnitExchange([cut], group=dist.group.WORLD)
        (units,) = plan([torch.arange(12.0)[cut.edges[rank] : cut.edges[rank + 1]]])
        dist.barrier()
        return plan.elements_sent, [(start, len(run)) for start, run in units.runs]

    assert run_ranks(run, 3) == [(0, [(0, 2)]), (0, []), (0, [(2, 1)])]


@pytest.mark.parametrize("edges", [(0, 4), (0, 9, 12), (0, 6, 3, 12), (0, 5, 10)])
def test_edges_that_do_not_belong_to_the_group_are_refused(edges):
    def run(rank, world):
        with pytest.raises(ValueError, match="cannot have the edges"):
            UnitExchange([Cut(edges, 4)], group=dist.group.WORLD)
        dist.barrier()  # a rank that has gone cannot be met

    run_ranks(run, 3 if len(edges) == 3 else 2)
