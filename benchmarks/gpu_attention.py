"""FP8 attention on real kernels, on one H100 or H200 with Transformer Engine: `python benchmarks/gpu_attention.py`.

Prints, and writes with --json: the checks of tests/contract on this Transformer Engine; saturation under the four
transients at the attention shape of Llama-2-7B, delayed scaling beside; the time of one layer's core attention, forward
and backward, at several lengths, in BF16, under delayed scaling and under ours; the refresh of the scales of one GPU's
shard of Llama-2-70B (TP=8, 80 layers) against the time of reading its weights once; and CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _measure import megatron_on_one_rank, number, parser, progress, table, write_json

PARTS = ("checks", "transients", "steps", "refresh", "graph")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    options.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384], metavar="N")
    options.add_argument("--rounds", type=int, default=20, help="of each timing (default: 20)")
    return options.parse_args(argv)


def checks() -> list[dict[str, Any]]:
    """The contract checks of one attention module, on this machine's Transformer Engine."""
    from contract import attention_checks

    rows = []
    for name in [name for name in vars(attention_checks) if name.startswith("check_")]:
        try:
            getattr(attention_checks, name)()
            rows.append({"check": name.removeprefix("check_").replace("_", " "), "failed": ""})
        except Exception:
            rows.append({"check": name, "failed": traceback.format_exc()})
            progress(rows[-1]["failed"])
    print(table("gpu checks", ("check", ""), [(r["check"], "failed" if r["failed"] else "holds") for r in rows]))
    return rows


def transients() -> list[dict[str, Any]]:
    from _gpu import LLAMA_2_7B, SCENARIOS, Model

    rows = []
    for scenario, run in SCENARIOS.items():
        for kind in ("delayed", "geoscale"):
            progress(f"{scenario}: {kind}")
            rows.append({"scenario": scenario, "kind": kind, **asdict(run(Model(LLAMA_2_7B, kind)))})
    cells = [(r["scenario"], r["kind"], str(r["saturated"]), number(r["overrange"]), f"{r['sqnr_db']:.1f}",
              "yes" if r["finite"] else "no") for r in rows]
    columns = ("scenario", "scales", " saturated", " worst over-range", " SQNR, dB", "finite")
    print(table("gpu transients", columns, cells))
    return rows


def steps(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    from _gpu import KINDS, LLAMA_2_7B, step_times

    rows = []
    for length in lengths:
        progress(f"core attention, {length} tokens")
        times = step_times(replace(LLAMA_2_7B, length=length), rounds=rounds, inner=10, warm_up=10)
        ratio = statistics.median(a / b for a, b in zip(times["geoscale"], times["delayed"], strict=True))
        rows.append({"length": length, **{kind: statistics.median(times[kind]) for kind in KINDS}, "ratio": ratio,
                     "samples_ms": times})
    cells = [(str(r["length"]), *(number(r[kind]) for kind in KINDS), f"{r['ratio']:.3f}") for r in rows]
    print(table("gpu steps", (" tokens", " BF16, ms", " delayed, ms", " geoscale, ms", " geoscale / delayed"), cells))
    return rows


def refresh(rounds: int) -> dict[str, float]:
    from _gpu import LLAMA_2_70B_SHARD, refresh_times

    progress("refresh of 80 layers")
    found = refresh_times(LLAMA_2_70B_SHARD, rounds=rounds)
    print(table("gpu refresh", (" weights, GB", " refresh, ms", " reading once, ms", " share of the floor"),
                [(number(found["gigabytes"]), number(found["refresh"]), number(found["floor"]),
                  f"{100 * found['floor'] / found['refresh']:.0f} %")]))
    return found


def graph() -> dict[str, Any]:
    from _gpu import LLAMA_2_7B, graph_of_attention

    progress("CUDA graph")
    found = graph_of_attention(LLAMA_2_7B)
    print(f"A replayed graph of attention follows a refresh: {'yes' if found['follows'] else 'no'}.")
    print(f"A refresh in a graph of its own: {found['refresh_captured'] or 'captured'}.")
    return found


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from megatron_geoscale.attention.obstacles import installed_te

    version, problem = installed_te()
    if version is None or not torch.cuda.is_available():
        why = f"Transformer Engine cannot be used: {problem}" if version is None else "there is no CUDA GPU"
        print(f"gpu_attention.py: error: {why}", file=sys.stderr)
        return 2
    results: dict[str, Any] = {}
    with megatron_on_one_rank():
        from _gpu import machine

        about = machine()
        print(about)
        work = {"checks": checks, "transients": transients, "steps": lambda: steps(options.lengths, options.rounds),
                "refresh": lambda: refresh(options.rounds), "graph": graph}
        for part in options.only:
            try:
                results[part] = work[part]()
            except Exception as error:  # the parts are separate facts: go on
                traceback.print_exc()
                results[part] = {"failed": f"{type(error).__name__}: {error}"}
    write_json(options.json, {"machine": about}, results)
    return int(any(isinstance(result, dict) and "failed" in result for result in results.values())
               or any(row["failed"] for row in results.get("checks", []) if isinstance(row, dict)))


if __name__ == "__main__":
    sys.exit(main())
