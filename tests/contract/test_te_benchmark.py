"""The code of the GPU benchmark runs, over the stand-in for TE's kernels; only its times mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import te_stub

ROOT = Path(__file__).resolve().parents[2]


def _small(rank: int) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from dataclasses import asdict, replace

    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    import _gpu

    shape = _gpu.Shape(hidden_size=256, heads=2, groups=1, length=16)
    outcomes = {
        (name, kind): asdict(run(_gpu.Model(shape, kind)))
        for name, run in _gpu.SCENARIOS.items() for kind in ("delayed", "geoscale")
    }
    times = _gpu.step_times(shape, rounds=1, inner=1, warm_up=1)
    return outcomes, times, _gpu.refresh_times(replace(shape, layers=2), rounds=1), _gpu.machine()


def test_transients_times_and_refresh(megatron: Any) -> None:
    outcomes, times, refresh, machine = te_stub.run("2.16.1", _small)
    for (scenario, kind), outcome in outcomes.items():
        assert outcome["finite"]
        assert (outcome["saturated"] == 0) == (kind == "geoscale"), (scenario, kind, outcome)
    assert {kind: len(samples) for kind, samples in times.items()} == {"bf16": 1, "delayed": 1, "geoscale": 1}
    assert refresh["refresh"] > 0 and refresh["gigabytes"] == 2 * 4 * 128 * 256 * 2 / 1e9
    assert "Transformer Engine 2.16.1" in machine


def test_without_a_gpu_it_says_so() -> None:
    ran = subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu_attention.py")], capture_output=True, text=True,
                         timeout=120)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("gpu_attention.py: error: ") and ran.stderr.count("\n") == 1
