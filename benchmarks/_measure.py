"""What the benchmarks share: paired timing, a description of the machine, Megatron on one rank."""

from __future__ import annotations

import gc
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def milliseconds(work: Callable[[], Any], repetitions: int = 1) -> float:
    """Median wall time of `work` over `repetitions` calls, garbage collected beforehand."""
    gc.collect()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def row(case: str, what: str, times: list[float], against: list[float], note: str = "") -> dict[str, Any]:
    """One line of the table: medians of `times` and of their shares of `against`, measured in the same rounds."""
    share = statistics.median(own / step for own, step in zip(times, against, strict=True))
    ms = statistics.median(times)
    return {"case": case, "what": what, "ms": ms, "share": share, "note": note, "samples_ms": times}


Work = Callable[[], Any]


def paired(
    case: str, reference: tuple[str, Work], others: dict[str, Work], *, rounds: int, inner: int
) -> Iterator[dict[str, Any]]:
    """Time `reference` once and each of `others` `inner` times (its median) in every one of `rounds` rounds.

    Everything runs once beforehand. Yields a row for each, the reference first. What a round's neighbours on the
    machine slow down, they slow down on both sides of its ratios.
    """
    name, step = reference
    progress(f"{case}: warm-up")
    for work in (step, *others.values()):
        work()
    times: dict[str, list[float]] = {what: [] for what in (name, *others)}
    for index in range(rounds):
        progress(f"{case}: round {index + 1} of {rounds}")
        times[name].append(milliseconds(step))
        for what, work in others.items():
            times[what].append(milliseconds(work, inner))
    for what, samples in times.items():
        yield row(case, what, samples, times[name])


def progress(text: str) -> None:
    """One line on stderr, so that stdout holds the table alone."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import megatron.core

    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
    }


def load_average() -> float:
    """Processes that wanted a core over the last minute, this one included."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _cpu_model() -> str:
    """The model name that lscpu prints."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| case | what | ms | share | note |", "|---|---|---:|---:|---|"]
    for r in rows:
        share = f"{100 * r['share']:.2f} %" if r["share"] < 1 else f"{100 * r['share']:.0f} %"
        ms = f"{r['ms']:.1f}" if r["ms"] < 1000 else f"{r['ms']:.0f}"
        lines.append(f"| {r['case']} | {r['what']} | {ms} | {share} | {r['note']} |")
    return "\n".join(lines)


@contextmanager
def megatron_on_one_rank(seed: int = 1234) -> Iterator[None]:
    """megatron-core on this process alone: one gloo group, seeds, quiet. Restores nothing but the process group."""
    from megatron_geoscale import cpu

    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve in a container
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            torch.manual_seed(seed)
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            initialize_rerun_state_machine(mode=RerunMode.DISABLED)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
