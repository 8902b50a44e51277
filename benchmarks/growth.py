"""How a refresh grows: `python benchmarks/growth.py [--json PATH]`, with layers, heads and tensor parallelism.

The work is a refresh's without a Megatron model: fold the norm into synthetic weights, moments, norms, bounds, layers
batched as the engine batches them. It is set beside this machine's ceilings, measured in the same run, and one head's
norm beside dense ways to get it. docs/BENCHMARKS.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _measure import (
    machine_line,
    milliseconds,
    number,
    paired,
    parser,
    progress,
    set_up,
    svd_of_triangles,
    table,
    write_json,
)

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.geometry import AttentionGeometry
from megatron_geoscale.scaling.guard import find_nonfinite
from megatron_geoscale.scaling.layer_bounds import bound_heads, layers_at_once
from megatron_geoscale.spectral import Moments, Projections, fold_norm, gram_norm, power_iteration, start_vectors
from megatron_geoscale.spectral.gram import norm_of_grams

LLAMA_2_70B = {"hidden": 8192, "heads": 64, "groups": 8, "head_dim": 128}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
POWER_STEPS = 20
PARTS = ("fold", "gram", "bounds")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    options.add_argument("--rounds", type=int, default=3, help="every time is the median of them (default: 3)")
    options.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 80], metavar="N",
                         help="layer counts, of Llama-2-70B's TP=8 shard")
    options.add_argument("--heads", type=int, nargs="+", default=[4, 8, 16, 32, 64], metavar="N",
                         help="head counts, as many groups, hidden size 4096")
    options.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N",
                         help="sizes that cut Llama-2-70B's layer")
    options.add_argument("--dense-hidden", type=int, nargs="+", default=[1024, 2048, 4096], metavar="D",
                         help="hidden sizes of the head beside dense methods; an SVD of 4096 takes half a minute")
    options.add_argument("--shrink", type=int, default=1, metavar="F",
                         help="divide all other hidden sizes and head dimensions by F, to try the script out")
    return options.parse_args(argv)


@dataclass
class Shard:
    """What one rank holds of a layer, by shapes alone, and its weights, one set for all layers: nothing depends on
    the values, and 80 different layers would not fit everywhere."""

    hidden: int
    heads: int
    """Query heads of the rank; `groups` of keys and values."""
    groups: int
    head_dim: int
    dtype: torch.dtype
    weights: tuple[torch.Tensor, ...] = field(init=False)
    gain: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        counts = (self.heads, self.groups, self.groups)
        shapes = [(n, self.head_dim, self.hidden) for n in counts]
        self.weights = tuple(0.02 * torch.randn(shape, dtype=self.dtype) for shape in shapes)
        self.gain = torch.ones(self.hidden, dtype=torch.float64)

    @property
    def geometry(self) -> AttentionGeometry:
        """RoPE on the whole head, as in a Llama."""
        return AttentionGeometry(
            hidden_size=self.hidden, num_heads=self.heads, num_groups=self.groups, head_dim=self.head_dim,
            softmax_scale=self.head_dim**-0.5, max_sequence_length=4096, rotary_dim=self.head_dim,
        )

    @property
    def elements(self) -> int:
        """Of the layer's query, key and value weights on this rank."""
        return (self.heads + 2 * self.groups) * self.head_dim * self.hidden

    @property
    def bytes_read(self) -> int:
        """The weights once, in their dtype."""
        return self.elements * self.dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        """Per element: read it, write the float64 copy, read and write that for the gain, read it for the Gram matrix.
        What the kernel does to hand out zeroed pages is not in it, nor are the d_h x d_h matrices."""
        return self.elements * (self.dtype.itemsize + 4 * 8)

    @property
    def flops(self) -> int:
        """Of the Gram matrices, half of each with its diagonal: n m (m + 1) d. Eigenvalues and bounds are not in it."""
        return self.elements * (self.head_dim + 1)

    def refresh(self, num_layers: int, seconds: dict[str, float]) -> None:
        """Refresh `num_layers` layers and add to `seconds` where the time went."""
        geometry, config = self.geometry, GeoScaleConfig()
        most = layers_at_once(self.heads, self.head_dim)
        for first in range(0, num_layers, most):
            batch, read = min(most, num_layers - first), []
            for _ in range(batch):
                t0 = time.perf_counter()
                folded = [part for w in self.weights for part in fold_norm(w, None, gain=self.gain, shift=None)]
                t1 = time.perf_counter()
                read.append(Moments.of(Projections(*folded)))
                del folded
                t2 = time.perf_counter()
                seconds["fold"] += t1 - t0
                seconds["gram"] += t2 - t1
            t0 = time.perf_counter()
            moments = Moments.cat(read)
            find_nonfinite(
                moments, None, num_layers=batch, first_head=0, heads_per_group=geometry.heads_per_group
            )
            sigma = norm_of_grams(moments.q, moments.k)
            bound_heads(geometry, moments, sigma, None, config, num_layers=num_layers)
            seconds["bounds"] += time.perf_counter() - t0


class Ceilings:
    """The most that this machine was seen to do: float64 products, GFLOP/s, and copying, GB/s read and written.

    Measured again before every case, the best kept: a neighbour's work can only lower it."""

    def __init__(self, shard: Shard, square: int) -> None:
        self._a = torch.randn(square, square, dtype=torch.float64)
        self._w = torch.randn(shard.head_dim, shard.hidden, dtype=torch.float64)
        self._source = torch.ones(8 * square**2, dtype=torch.float64)  # 268 MB at 2048: beyond any cache
        self._target, self._out = torch.empty_like(self._source), torch.empty_like(self._a)
        self.best = {"matmul_gflops": 0.0, "gram_gflops": 0.0, "copy_gbps": 0.0}

    def measure(self) -> None:
        """Large square product, W W^T of one head's shape, copy."""
        a, w, copied = self._a, self._w, 2 * self._source.numel() * self._source.itemsize
        for name, size, repetitions, work in (
            ("matmul_gflops", 2 * len(a) ** 3, 5, lambda: torch.mm(a, a, out=self._out)),
            ("gram_gflops", 2 * len(w) * w.numel(), 50, lambda: torch.mm(w, w.mT)),
            ("copy_gbps", copied, 10, lambda: self._target.copy_(self._source)),
        ):
            self.best[name] = max(self.best[name], size / milliseconds(work, repetitions, pick=min) / 1e6)


def grown(
    case: str, shards: list[tuple[str, Shard, int]], rounds: int, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """One row for each (label, shard, layers): medians over rounds, in each of which all of them take their turn. More
    than eight layers are timed in the first round alone: they are an average already."""
    samples: list[list[dict[str, float]]] = [[] for _ in shards]
    for index in range(rounds):
        progress(f"{case}: round {index + 1} of {rounds}")
        ceilings.measure()
        for (_, shard, layers), own in zip(shards, samples, strict=True):
            if index > 0 and layers > 8:
                continue
            if index == 0:
                shard.refresh(1, dict.fromkeys(PARTS, 0.0))
            seconds = dict.fromkeys(PARTS, 0.0)
            shard.refresh(layers, seconds)
            own.append({part: 1e3 * spent / layers for part, spent in seconds.items()})
    return [_row(case, *what, own) for what, own in zip(shards, samples, strict=True)]


def _row(case: str, label: str, shard: Shard, layers: int, samples: list[dict[str, float]]) -> dict[str, Any]:
    """Milliseconds and bytes per layer; rates over the whole time, and of the parts that move and multiply."""
    ms = {part: statistics.median(sample[part] for sample in samples) for part in PARTS}
    total = statistics.median(sum(sample.values()) for sample in samples)
    return {
        "case": case, "label": label, "layers": layers, "heads": shard.heads, "groups": shard.groups,
        "hidden": shard.hidden, "head_dim": shard.head_dim, "ms_per_layer": total,
        **{f"{part}_ms": value for part, value in ms.items()},
        "bytes_read": shard.bytes_read, "bytes_moved": shard.bytes_moved, "flops": shard.flops,
        "gbps": shard.bytes_moved / total / 1e6, "gflops": shard.flops / total / 1e6,
        "fold_gbps": shard.elements * (shard.dtype.itemsize + 3 * 8) / ms["fold"] / 1e6,
        "gram_gflops": shard.flops / ms["gram"] / 1e6,
        "samples_ms": samples,
    }


def add_shares(rows: list[dict[str, Any]], ceiling: dict[str, float]) -> None:
    """What the rates are of the ceilings."""
    for r in rows:
        r["share_of_copy"] = r["gbps"] / ceiling["copy_gbps"]
        r["share_of_matmul"] = r["gflops"] / ceiling["matmul_gflops"]
        r["fold_share_of_copy"] = r["fold_gbps"] / ceiling["copy_gbps"]
        r["gram_share_of_gram_shaped"] = r["gram_gflops"] / ceiling["gram_gflops"]


def dense(hidden: int, head_dim: int, rounds: int) -> list[dict[str, Any]]:
    """||A^T B|| of one head, from float64 weights: from Gram matrices, by QR, implicitly, and from the d x d matrix."""
    w_q, w_k = (torch.randn(1, head_dim, hidden, dtype=torch.float64) for _ in range(2))
    vector = start_vectors(hidden, layer=1, heads=range(1))

    def power_of_m() -> torch.Tensor:
        m, v = w_q[0].mT @ w_k[0], vector[0]
        for _ in range(POWER_STEPS):
            u = m @ v
            v = m.mT @ (u / u.norm())
            v = v / v.norm()
        return (m @ v).norm()

    others: dict[str, Callable[[], Any]] = {
        f"power iteration, implicit, {POWER_STEPS} steps": lambda: power_iteration(
            w_q, w_k, vector, POWER_STEPS, granularity="head"
        ),
        "QR of A^T and B^T, SVD of R_A R_B^T": lambda: svd_of_triangles(w_q, w_k),
        f"power iteration on M = A^T B, {POWER_STEPS} steps": power_of_m,
        "SVD of M = A^T B": lambda: torch.linalg.svdvals(w_q[0].mT @ w_k[0]),
    }
    first = ("Gram matrices", lambda: gram_norm(w_q, w_k))
    rows = paired(f"hidden size {hidden}", first, others, rounds=1 if hidden > 2048 else rounds, inner=1)
    return [{**r, "hidden": hidden, "head_dim": head_dim} for r in rows]


def growth_table(rows: list[dict[str, Any]]) -> str:
    columns = ("case", " layers", " heads", " groups", " ms per layer", " fold", " Gram", " bounds", " MB read",
               " MB moved", " GB/s", " of copy", " GFLOP/s", " of matmul", " fold: of copy", " Gram: of its product")
    cells = []
    for r in rows:
        times = [number(r[key]) for key in ("ms_per_layer", *(f"{part}_ms" for part in PARTS))]
        megabytes = [number(r[key] / 1e6) for key in ("bytes_read", "bytes_moved")]
        percent = [
            f"{100 * r[key]:.0f} %"
            for key in ("share_of_copy", "share_of_matmul", "fold_share_of_copy", "gram_share_of_gram_shaped")
        ]
        cells.append((r["label"], str(r["layers"]), str(r["heads"]), str(r["groups"]), *times, *megabytes,
                      number(r["gbps"]), percent[0], number(r["gflops"]), percent[1], *percent[2:]))
    return table("growth", columns, cells)


def dense_table(rows: list[dict[str, Any]]) -> str:
    cells = [(r["case"], r["what"], number(r["ms"]), number(r["share"])) for r in rows]
    return table("dense", ("one head", "norm by", " ms", " times Gram"), cells)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    about = set_up(options.threads)
    about["weights"] = options.dtype
    torch.manual_seed(0)
    dtype, shrink = DTYPES[options.dtype], options.shrink
    hidden, head_dim = LLAMA_2_70B["hidden"] // shrink, LLAMA_2_70B["head_dim"] // shrink

    def llama_shard(size: int) -> Shard:
        return Shard(hidden, LLAMA_2_70B["heads"] // size, max(1, LLAMA_2_70B["groups"] // size), head_dim, dtype)

    shard = llama_shard(8)
    ceilings = Ceilings(shard, 2048 // shrink)
    layers = [("Llama-2-70B, TP=8", shard, n) for n in options.layers]
    heads = [(f"hidden {4096 // shrink}", Shard(4096 // shrink, n, n, head_dim, dtype), 1) for n in options.heads]
    cut = [(f"Llama-2-70B, TP={size}", llama_shard(size), 1) for size in options.tensor_parallel]
    rows = []
    for case, shards in (("layers", layers), ("heads", heads), ("TP", cut)):
        rows += grown(case, shards, options.rounds, ceilings)
    beside = [r for size in options.dense_hidden for r in dense(size, head_dim, options.rounds)]
    ceiling = ceilings.best
    add_shares(rows, ceiling)
    of_layers = [r for r in rows if r["case"] == "layers"]
    few, many = min(of_layers, key=lambda r: r["layers"]), max(of_layers, key=lambda r: r["layers"])

    print(f"{machine_line(about)} {options.dtype} weights.\n")
    print(
        f"Ceilings: {ceiling['matmul_gflops']:.0f} GFLOP/s in a large float64 product, {ceiling['gram_gflops']:.0f} "
        f"in one of the Gram matrix's shape, {ceiling['copy_gbps']:.1f} GB/s copied (read + written).\n"
        f"All {many['layers']} layers of a shard of Llama-2-70B (TP=8): measured "
        f"{many['layers'] * many['ms_per_layer'] / 1e3:.2f} s; {many['layers']} times the time of "
        f"{few['layers']} is {many['layers'] * few['ms_per_layer'] / 1e3:.2f} s.\n"
    )
    print(f"{growth_table(rows)}\n\n{dense_table(beside)}")
    write_json(options.json, about, {"ceilings": ceiling, "growth": rows, "dense": beside})


if __name__ == "__main__":
    main()
