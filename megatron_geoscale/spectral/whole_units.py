"""Whole heads from weights that are cut anywhere, by moving only what a boundary cuts (THEORY 2.2).

A Gram matrix needs all rows of its head on one rank. A boundary between two ranks cuts at most one head of each matrix,
so a rank sends at most its part of one head and gets at most the rest of another: d_h x d numbers each, whatever the
number of heads and ranks, and a rank never holds more of a weight than its own share and one head. The unit is whatever
must stay together: a head's d_h x d block, or one row of a transposed weight.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """How one weight lies over the ranks of a group; every rank describes it alike."""

    edges: tuple[int, ...]
    """Rank r holds elements [edges[r], edges[r + 1]) of W.reshape(-1); [0] is 0 and [-1] the number of elements."""
    unit: int
    """Elements that must stay together, a divisor of the number of elements."""
    copies: tuple[tuple[int, int], ...] = ()
    """(unit, rank): ranks other than the owner that need a unit too."""

    def owner(self, unit: int) -> int:
        """The rank that makes `unit` whole: the one with its first element."""
        return bisect_right(self.edges, unit * self.unit) - 1

    def held(self, rank: int) -> range:
        """Units that `rank` holds whole."""
        start, stop = self.edges[rank : rank + 2]
        first = -(-start // self.unit)
        return range(first, max(first, stop // self.unit))

    def moves(self) -> Iterator[_Move]:
        """Everything that has to be sent, in one order on all ranks."""
        cut = {edge // self.unit for edge in self.edges if edge % self.unit}
        wanted = [(unit, self.owner(unit)) for unit in sorted(cut)]
        wanted += [pair for pair in self.copies if pair not in wanted]
        for unit, target in wanted:
            first, last = unit * self.unit, (unit + 1) * self.unit
            for source in range(bisect_right(self.edges, first) - 1, len(self.edges) - 1):
                start, stop = max(first, self.edges[source]), min(last, self.edges[source + 1])
                if start >= last:
                    break
                if start < stop and source != target:
                    yield _Move(unit, source, target, start, stop)


@dataclass(frozen=True)
class _Move:
    """Elements [start, stop) of a weight, of one unit, from one rank to another."""

    unit: int
    source: int
    target: int
    start: int
    stop: int


@dataclass
class Units:
    """What a rank has of one weight once the exchange is done."""

    runs: list[tuple[int, Tensor]] = field(default_factory=list)
    """(first unit, [n, unit]): consecutive units that this rank owns, each unit on one rank only. Views of the shard
    where it held them."""
    copies: dict[int, Tensor] = field(default_factory=dict)
    """[unit] of the units that `Cut.copies` asked for."""


class UnitExchange:
    """Makes the cut units of many weights whole, in one all-to-all for all of them."""

    def __init__(self, cuts: Sequence[Cut], *, group: dist.ProcessGroup) -> None:
        """`cuts`: of all weights, equal on all ranks of `group`. ValueError for edges that do not belong to it."""
        self._cuts, self._group = list(cuts), group
        self._rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        for cut in cuts:
            if len(cut.edges) != ranks + 1 or list(cut.edges) != sorted(cut.edges) or cut.edges[-1] % cut.unit:
                raise ValueError(f"A cut over {ranks} ranks of units of {cut.unit} elements cannot have the edges "
                                 f"{list(cut.edges)}.")
        moves = [(index, move) for index, cut in enumerate(cuts) for move in cut.moves()]
        self._any = bool(moves)
        self._sent = [[m for m in moves if m[1].source == self._rank and m[1].target == rank] for rank in range(ranks)]
        self._got = [[m for m in moves if m[1].target == self._rank and m[1].source == rank] for rank in range(ranks)]

    @property
    def elements_sent(self) -> int:
        """By this rank in each exchange."""
        return sum(move.stop - move.start for moves in self._sent for _, move in moves)

    def __call__(self, shards: Sequence[Tensor]) -> list[Units]:
        """This rank's flat parts of the weights, of one dtype and device and without padding -> the units it owns.

        Collective over the group, one all-to-all; none where no boundary cuts a unit.
        """
        pieces: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}  # of (weight, unit): (start, elements)
        for index, move, elements in self._exchange(shards) if self._any else ():
            pieces.setdefault((index, move.unit), []).append((move.start, elements))
        found = []
        for cut, shard in zip(self._cuts, shards, strict=True):
            start, units = cut.edges[self._rank], Units()
            held = cut.held(self._rank)
            if held:
                elements = shard[held.start * cut.unit - start : held.stop * cut.unit - start]
                units.runs.append((held.start, elements.view(len(held), cut.unit)))
            found.append(units)
        for (index, unit), parts in pieces.items():
            cut = self._cuts[index]
            whole = self._joined(cut, shards[index], unit, parts)
            if cut.owner(unit) == self._rank:
                found[index].runs.append((unit, whole[None]))
            else:
                found[index].copies[unit] = whole
        return found

    def _joined(self, cut: Cut, shard: Tensor, unit: int, parts: list[tuple[int, Tensor]]) -> Tensor:
        """One unit from what came and what this rank has of it."""
        first, begin = unit * cut.unit, cut.edges[self._rank]
        whole = shard.new_empty(cut.unit)
        start, stop = max(first, begin), min(first + cut.unit, begin + shard.numel())
        if start < stop:
            whole[start - first : stop - first] = shard[start - begin : stop - begin]
        for start, elements in parts:
            whole[start - first : start - first + elements.numel()] = elements
        return whole

    def _exchange(self, shards: Sequence[Tensor]) -> Iterator[tuple[int, _Move, Tensor]]:
        """What this rank gets, after the one collective."""
        begins = [cut.edges[self._rank] for cut in self._cuts]
        sending = [
            shards[index].detach()[move.start - begins[index] : move.stop - begins[index]]
            for moves in self._sent
            for index, move in moves
        ]
        sizes = [
            [sum(move.stop - move.start for _, move in moves) * shards[0].element_size() for moves in side]
            for side in (self._sent, self._got)
        ]
        outgoing = torch.cat(sending) if sending else shards[0].new_empty(0)
        incoming = shards[0].new_empty(sum(sizes[1]) // shards[0].element_size())
        # As bytes: not every backend moves every dtype.
        as_bytes = (incoming.view(torch.uint8), outgoing.view(torch.uint8))
        dist.all_to_all_single(*as_bytes, sizes[1], sizes[0], group=self._group)
        position = 0
        for moves in self._got:
            for index, move in moves:
                size = move.stop - move.start
                yield index, move, incoming[position : position + size]
                position += size
