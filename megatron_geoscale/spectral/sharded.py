"""Power iteration from weights that are cut along rows or flat, as FSDP and ZeRO-3 hold them (THEORY 2.1).

W v and W^T u are sums over the ranks' parts of W, so the iteration runs as on the whole weight with an all-reduce per
product, and no weight moves. All layers and heads share the all-reduce: the number of collectives depends on neither.
Float64 as in `projections`, converted a layer at a time. `sharded_gram` has the bounds for such weights.

`group`, here and there, is the group over which the weights are cut, with each element on exactly one of its ranks;
None means that this rank holds everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_geoscale.spectral.power_iteration import CONVERGENCE_TOLERANCE, MAX_STEPS, Granularity, _Layers


@dataclass(frozen=True, eq=False)
class FlatShard:
    """This rank's part of a weight W [rows, hidden]: elements [start, start + numel) of W.reshape(-1), any float dtype.

    It may begin and end inside rows, and may be empty; padding must have been cut off. A shard of whole rows (FSDP2) is
    `FlatShard(local.reshape(-1), first_row * hidden, rows, hidden)`. `gain` [hidden], if given, is the norm's gain:
    the shard then stands for W diag(gain) (THEORY 1), with no copy of the weight. ValueError if the parts do not fit.
    """

    flat: Tensor
    start: int
    rows: int
    hidden: int
    gain: Tensor | None = None

    def __post_init__(self) -> None:
        if self.flat.dim() != 1 or not self.flat.is_floating_point():
            raise ValueError(
                f"A flat shard must be a vector of floats, got shape {list(self.flat.shape)} of {self.flat.dtype}."
            )
        if self.rows < 1 or self.hidden < 1:
            raise ValueError(f"A sharded weight must have rows and columns, got [{self.rows}, {self.hidden}].")
        if self.flat.numel() and not 0 <= self.start <= self.stop <= self.rows * self.hidden:
            raise ValueError(
                f"Elements [{self.start}, {self.stop}) do not lie in a weight of shape [{self.rows}, {self.hidden}]; "
                "was padding cut off?"
            )
        if self.gain is not None and self.gain.shape != (self.hidden,):
            raise ValueError(f"The gain of a shard must be [{self.hidden}], got {list(self.gain.shape)}.")

    @property
    def stop(self) -> int:
        """The first element after this part."""
        return self.start + self.flat.numel()

    def apply(self, vectors: Tensor) -> Tensor:
        """This part's share of W_h v: vectors [n, p, hidden] float64 -> [n, p, rows / n]; the shares of ranks add up.

        W is read as n blocks W_h of rows / n rows (heads, or n = 1 for the layer), each with p vectors of its own.
        """
        vectors = self._scale(vectors)
        n, p, _ = vectors.shape
        out = vectors.new_zeros(n, p, self.rows // n)
        for blocks, rows, columns, values in self._pieces(self.rows // n):
            out[blocks, :, rows] += vectors[blocks, :, columns] @ values.mT
        return out

    def apply_transposed(self, vectors: Tensor) -> Tensor:
        """This part's share of W_h^T u: vectors [n, p, rows / n] -> [n, p, hidden], otherwise as `apply`."""
        n, p, _ = vectors.shape
        out = vectors.new_zeros(n, p, self.hidden)
        for blocks, rows, columns, values in self._pieces(self.rows // n):
            out[blocks, :, columns] += vectors[blocks, :, rows] @ values
        return self._scale(out)

    def dense(self, first_row: int, last_row: int) -> Tensor:
        """Rows [first_row, last_row) with zeros where other ranks hold the element: [.., hidden] float64."""
        out = self.flat.new_zeros((last_row - first_row) * self.hidden, dtype=torch.float64)
        offset = first_row * self.hidden
        first, last = max(self.start, offset), min(self.stop, last_row * self.hidden)
        if first < last:
            out[first - offset : last - offset] = self.flat.detach()[first - self.start : last - self.start]
        return self._scale(out.view(-1, self.hidden))

    def heads(self, head_dim: int) -> range:
        """The heads of `head_dim` rows of which this part holds an element."""
        size = head_dim * self.hidden
        return range(self.start // size, -(-self.stop // size)) if self.flat.numel() else range(0)

    def _scale(self, wide: Tensor) -> Tensor:
        return wide if self.gain is None else wide * self.gain.detach().to(wide)

    def _pieces(self, block: int) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """Cut into tensors [k, m, w]: columns `w` of rows `m` of each of k blocks of `block` rows, at most nine."""
        values = self.flat.detach().double()
        for first, last in _ranges(self.start, self.stop, self.hidden):
            row, column = divmod(first, self.hidden)
            rows = max(1, (last - first) // self.hidden)
            matrix = values[first - self.start : last - self.start].view(rows, -1)
            for top, bottom in _ranges(row, row + rows, block):
                index, within = divmod(top, block)
                k = max(1, (bottom - top) // block)
                piece = matrix[top - row : bottom - row].view(k, -1, matrix.shape[1])
                yield (
                    slice(index, index + k),
                    slice(within, within + piece.shape[1]),
                    slice(column, column + piece.shape[2]),
                    piece,
                )


def sharded_power_iteration(
    shards_q: Sequence[FlatShard],
    shards_k: Sequence[FlatShard],
    state: Tensor,
    steps: int,
    *,
    num_heads: int,
    num_groups: int,
    head_dim: int,
    granularity: Granularity,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """`power_iteration` of stacked layers from flat shards: (sigma, new state), float64, equal on ranks (THEORY 2.1).

    shards_q, shards_k: one per layer, of weights [num_heads * head_dim, d] and [num_groups * head_dim, d].
    head: state [layers, num_heads, d], sigma [layers, num_heads]. layer: state [layers, d], sigma [layers].
    Each step makes four all-reduces, two of the state's size and two of the d_h-vectors of all heads; with whole heads
    head granularity needs none. ValueError for a wrong shape, granularity or step count.
    """
    if steps < 1:
        raise ValueError(f"Power iteration needs at least one step, got {steps}.")
    layers = _ShardedLayers(shards_q, shards_k, state, (num_heads, num_groups, head_dim), granularity, group)
    for _ in range(steps):
        layers.step()
    return layers.result()


def sharded_converge(
    shards_q: Sequence[FlatShard],
    shards_k: Sequence[FlatShard],
    state: Tensor,
    *,
    num_heads: int,
    num_groups: int,
    head_dim: int,
    granularity: Granularity,
    group: dist.ProcessGroup | None,
    tolerance: float = CONVERGENCE_TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> tuple[Tensor, Tensor, int]:
    """`converge` of stacked layers from flat shards: (sigma, state, steps taken), equal on ranks (THEORY 2.1).

    Arguments and collectives as in `sharded_power_iteration`, a step at a time. Every estimate is made from all-reduced
    vectors under either granularity, so all ranks stop at the same step. ValueError for a wrong shape or granularity.
    """
    layers = _ShardedLayers(shards_q, shards_k, state, (num_heads, num_groups, head_dim), granularity, group)
    steps = layers.converge(tolerance, max_steps)
    return *layers.result(), steps


class _ShardedLayers(_Layers):
    """The running iteration of `power_iteration`, its step and its result, on products from shards."""

    stacked = True

    def __init__(
        self,
        shards_q: Sequence[FlatShard],
        shards_k: Sequence[FlatShard],
        state: Tensor,
        heads: tuple[int, int, int],
        granularity: Granularity,
        group: dist.ProcessGroup | None,
    ) -> None:
        # Not the base class's: it takes whole weights.
        n_q, n_kv, d_h = self.heads = heads
        if granularity not in ("head", "layer"):
            raise ValueError(f"Granularity must be 'head' or 'layer', got {granularity!r}.")
        if (check_shards(shards_q, d_h), check_shards(shards_k, d_h)) != (n_q, n_kv):
            raise ValueError(
                f"{n_q} query heads and {n_kv} key groups of dimension {d_h} do not have the {shards_q[0].rows} and "
                f"{shards_k[0].rows} rows of the weights."
            )
        check_pairs(shards_q, shards_k, d_h)
        self.per_head = granularity == "head"
        expected = (len(shards_q), n_q, shards_q[0].hidden) if self.per_head else (len(shards_q), shards_q[0].hidden)
        if state.shape != expected:
            raise ValueError(f"Power-iteration state must have shape {list(expected)}, got {list(state.shape)}.")
        self.shards_q, self.shards_k, self.group = shards_q, shards_k, group
        self.state = state.to(device=shards_q[0].flat.device, dtype=torch.float64)
        self.sigma = self.state.new_zeros(expected[:-1])

    def _apply(self, vectors: Tensor, *, transposed: bool) -> Tensor:
        """M v, or M^T v, for every layer: two all-reduces, of the d_h-vectors between the two products and of the rest.

        Blocks and vectors per block as in `FlatShard.apply`: a head with its vector, a group with those of its heads;
        in layer granularity all rows are one block with one vector.
        """
        layers, (n_q, n_kv, d_h) = len(vectors), self.heads
        first, second = (self.shards_q, self.shards_k) if transposed else (self.shards_k, self.shards_q)
        if self.per_head:
            blocks, then = (n_q, n_kv) if transposed else (n_kv, n_q)
            inner = self._sum([s.apply(v.view(blocks, n_q // blocks, -1)) for s, v in zip(first, vectors, strict=True)])
            inner = inner.view(layers, then, n_q // then, d_h)
        else:
            inner = self._sum([shard.apply(v[None, None]) for shard, v in zip(first, vectors, strict=True)])
            if transposed:
                inner = inner.view(layers, n_kv, -1, d_h).sum(2)
            else:
                inner = inner.view(layers, n_kv, 1, d_h).expand(-1, -1, n_q // n_kv, -1)
            inner = inner.reshape(layers, 1, 1, -1)
        outer = self._sum([shard.apply_transposed(u) for shard, u in zip(second, inner, strict=True)])
        return outer.view_as(vectors)

    def _sum(self, per_layer: list[Tensor]) -> Tensor:
        return all_reduced(torch.stack(per_layer), self.group)


def all_reduced(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of `group`, in place; unchanged if it is None."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def check_shards(shards: Sequence[FlatShard], head_dim: int) -> int:
    """The number of heads of the layers' weights. ValueError unless all have one shape, of whole heads."""
    shapes = {(shard.rows, shard.hidden) for shard in shards}
    if len(shapes) != 1:
        raise ValueError(f"Stacked layers need shards of weights of one shape, got {sorted(shapes)}.")
    if head_dim < 1 or shards[0].rows % head_dim:
        raise ValueError(f"{shards[0].rows} rows are not a whole number of heads of dimension {head_dim}.")
    return shards[0].rows // head_dim


def check_pairs(shards_q: Sequence[FlatShard], shards_k: Sequence[FlatShard], head_dim: int) -> None:
    """ValueError unless query and key weights fit together, as `gram.check_shapes`."""
    n_q, n_kv = check_shards(shards_q, head_dim), check_shards(shards_k, head_dim)
    hidden_q, hidden_k = shards_q[0].hidden, shards_k[0].hidden
    if len(shards_q) != len(shards_k) or hidden_q != hidden_k or n_q % n_kv:
        raise ValueError(
            f"Query and key shards do not fit together: {len(shards_q)} layers of {n_q} heads and {len(shards_k)} "
            f"layers of {n_kv} groups, hidden sizes {hidden_q} and {hidden_k}."
        )


def _ranges(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) as ranges up to the first multiple of `size`, of whole multiples and of the rest, none empty."""
    first = min(-(-start // size) * size, stop)
    last = max(stop // size * size, first)
    return [(a, b) for a, b in ((start, first), (first, last), (last, stop)) if a < b]
