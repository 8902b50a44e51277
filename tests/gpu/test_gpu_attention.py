"""FP8 attention on real kernels: `python -m pytest tests/gpu`, on an H100 or H200 with Transformer Engine 2.9 to 2.20.

What is timed is in benchmarks/gpu_attention.py, which also runs these checks where there is no pytest.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_geoscale.attention.obstacles import gpu_capability, installed_te
from megatron_geoscale.scaling import slot_scales

ROOT = Path(__file__).resolve().parents[2]


def _missing() -> str:
    """Why nothing here can run; empty where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    version, problem = installed_te()
    if version is None:
        return f"Transformer Engine cannot be used: {problem}"
    capability = gpu_capability()
    return "" if capability is not None and capability >= (9, 0) else f"FP8 attention needs sm90, not sm{capability}"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_missing()), reason=_missing() or "all is there")]
CHECKS = re.findall(r"^def (check_\w+)", (ROOT / "tests/contract/attention_checks.py").read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """benchmarks/_gpu.py, with megatron-core set up on this process alone."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from _measure import megatron_on_one_rank

    with megatron_on_one_rank():
        import _gpu

        yield _gpu


@pytest.mark.parametrize("check", CHECKS)
def test_contract_on_real_kernels(gpu: Any, check: str) -> None:
    from contract import attention_checks

    getattr(attention_checks, check)()


@pytest.mark.parametrize("scenario", ["pretrained_load", "resume", "lr_spike", "weight_spike"])
def test_no_transient_saturates(gpu: Any, scenario: str) -> None:
    """At the attention shape of Llama-2-7B; delayed scaling saturates in each, so the test can fail."""
    model = gpu.Model(gpu.LLAMA_2_7B, "geoscale")
    ours = gpu.SCENARIOS[scenario](model)
    assert ours.saturated == 0 and ours.overrange <= 1.0 and ours.finite
    assert int(model.engine.gauge.saturated.sum()) == 0
    delayed = gpu.SCENARIOS[scenario](gpu.Model(gpu.LLAMA_2_7B, "delayed"))
    assert delayed.saturated > 0 and ours.sqnr_db > delayed.sqnr_db


def test_the_kernels_keep_the_largest_amax(gpu: Any) -> None:
    """A cast of smaller values leaves the amax of a larger one: what the gauge and the backward scales build on."""
    from contract import attention_checks as checks

    attention, _, slots, _ = checks.ours()
    large = [2.0 * x.detach() for x in checks.inputs()]
    checks.run(attention, large)
    after_large = slots.amax[checks.LAYER - 1].clone()
    checks.run(attention, [0.25 * x.detach() for x in checks.inputs()])
    assert float(after_large[0]) == max(float(x.abs().amax()) for x in large)
    assert float(slots.amax[checks.LAYER - 1, 0]) == float(after_large[0])


def test_a_captured_graph_follows_a_refresh(gpu: Any) -> None:
    found = gpu.graph_of_attention(gpu.LLAMA_2_7B)
    assert found["follows"] and found["scale_moved"] == pytest.approx(8.0, rel=1e-2)


def test_the_backward_pass_does_not_wait_for_the_device(gpu: Any) -> None:
    model = gpu.Model(gpu.LLAMA_2_7B, "geoscale")
    gpu.observe(model, 0)  # compiles, allocates, and looks once whether the kernels ran
    loss = model.forward(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
        model.engine.refresh(check=False)
        model.engine.end_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_backward_scales_are_those_of_the_cpu(gpu: Any) -> None:
    model = gpu.Model(gpu.LLAMA_2_7B, "geoscale")
    scaler, table = model.core_attention.scaler, model.engine.table
    torch.manual_seed(0)
    for exponent in (-20, 0, 12):
        do = torch.randn(256, 1, 32, 128).mul_(2.0**exponent).bfloat16()
        made = scaler.backward_scales(do.cuda(), num_keys=256, amax_qkv=torch.tensor(4.0, device="cuda"))
        on_cpu = slot_scales._backward_scales(do, table.bounds[0].cpu(), table.scales[0].cpu(), torch.tensor(4.0),
                                              scaler._geometry, 256)
        assert torch.equal(made.cpu(), on_cpu)
        assert torch.equal(torch.log2(on_cpu), torch.log2(on_cpu).round())
