"""What the benchmarks share: options, paired timing, the machine's description, tables, Megatron on one rank."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore", module=r"megatron\.core")  # of what it does not find on a CPU


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has: --json and --threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write machine and rows to PATH")
    parser.add_argument("--threads", type=int, default=_cores(), help="of torch (default: one a core)")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def milliseconds(
    work: Callable[[], Any], repetitions: int = 1, pick: Callable[[list[float]], float] = statistics.median
) -> float:
    """Wall time of `work`, picked from `repetitions` calls, the median unless told; garbage collected beforehand."""
    gc.collect()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return pick(times)


def row(case: str, what: str, times: list[float], against: list[float]) -> dict[str, Any]:
    """One line of the table: medians of `times` and of their shares of `against`, measured in the same rounds."""
    share = statistics.median(own / step for own, step in zip(times, against, strict=True))
    return {"case": case, "what": what, "ms": statistics.median(times), "share": share, "samples_ms": times}


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


def set_up(threads: int) -> dict[str, Any]:
    """Set torch's threads; what the numbers depend on besides the code. Says on stderr that the machine is busy."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        progress(f"{load:.1f} processes were busy here over the last minute: the times will be those of a busy machine")
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "load_before": load,
    }


def _cpu_model() -> str:
    """The model name that lscpu prints."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine_line(about: dict[str, Any]) -> str:
    """What `set_up` found, as a sentence."""
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, Python {about['python']}, "
        f"torch {about['torch']}, megatron-core {about['megatron_core']}, load average before "
        f"{about['load_before']:.1f}, {about['date']}."
    )


def write_json(path: Path | None, about: dict[str, Any], content: dict[str, Any]) -> None:
    """{"machine": about, ...content} to `path`, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, **content}, indent=2) + "\n")


def table(name: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table between the markers of docs/BENCHMARKS.md, to be pasted there whole. A column whose name begins
    with a space is aligned right."""
    lines = ["| " + " | ".join(column.strip() for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if column.startswith(" ") else "---" for column in columns) + "|")
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([f"<!-- table: {name} -->", *lines, f"<!-- end of table: {name} -->"])


def number(value: float) -> str:
    """Three significant digits or all integer ones: 0.0123, 1.23, 12.3, 1234."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def shares(rows: Iterable[dict[str, Any]]) -> str:
    """The rows of `paired` as a table."""
    cells = []
    for r in rows:
        share = f"{100 * r['share']:.2f} %" if r["share"] < 1 else f"{100 * r['share']:.0f} %"
        cells.append((r["case"], r["what"], number(r["ms"]), share))
    return table("refresh", ("case", "what", " ms", " share"), cells)


def svd_of_triangles(w_q: torch.Tensor, w_k: torch.Tensor) -> torch.Tensor:
    """||A^T B|| by dense factorisations that a head's rank allows: A^T = Q_A R_A, B^T = Q_B R_B, SVD of R_A R_B^T."""
    r_q, r_k = (torch.linalg.qr(w.mT, mode="r").R for w in (w_q, w_k))
    return torch.linalg.svdvals(r_q @ r_k.mT.repeat_interleave(len(r_q) // len(r_k), dim=0))[:, 0]


@contextmanager
def megatron_on_one_rank(seed: int = 1234) -> Iterator[None]:
    """megatron-core on this process alone: one group, seeds, quiet. Restores nothing but the process group."""
    from megatron_geoscale import cpu

    cpu.quieten()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve in a container
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            torch.manual_seed(seed)
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            initialize_rerun_state_machine(mode=RerunMode.DISABLED)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
