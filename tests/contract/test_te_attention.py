"""Our attention inside Transformer Engine's own Python, of every version that we support, on a CPU."""

from __future__ import annotations

import functools
import importlib
import re
import traceback
from pathlib import Path
from typing import Any

import pytest

import te_stub


def _checks(module: str) -> list[str]:
    """`module.check_*` of the checks, found without importing them: this process has no Transformer Engine."""
    source = Path(__file__).with_name(f"{module}.py").read_text()
    return [f"{module}.{name}" for name in re.findall(r"^def (check_\w+)", source, flags=re.MULTILINE)]


CHECKS = [*_checks("attention_checks"), *_checks("model_checks")]
ON_TWO_RANKS = "model_checks.check_ranks_of_a_context_parallel_group_share_the_backward_scales"


def _run_all(rank: int) -> dict[str, str]:
    """Tracebacks by check, empty where it passed; one process for all checks, since most of the time is imports."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = {}
    for name in CHECKS:
        module, _, check = name.partition(".")
        try:
            getattr(importlib.import_module(f"contract.{module}"), check)()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


@functools.cache
def _outcomes(version: str) -> Any:
    return te_stub.run(version, _run_all)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("version", te_stub.VERSIONS)
def test_transformer_engine(megatron: Any, version: str, check: str) -> None:
    if failure := _outcomes(version)[check]:
        pytest.fail(failure, pytrace=False)


def _on_two_ranks(rank: int) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    module, _, check = ON_TWO_RANKS.partition(".")
    getattr(importlib.import_module(f"contract.{module}"), check)(rank)


def test_context_parallel_ranks_share_the_backward_scales(megatron: Any) -> None:
    te_stub.run("2.16.1", _on_two_ranks, ranks=2)
