"""A Transformer Engine that changes what our attention relies on is refused when scales are attached, in one sentence.

Without it such a release would leave FP8 attention on scales that nobody sets, in silence.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest

import te_stub


def _refusals(rank: int) -> dict[str, tuple[str, str]]:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    checks = importlib.import_module("contract.mutation_checks")
    return {change: (checks.refusal(change), expected) for change, (_, expected) in checks.CHANGES.items()}


@functools.cache
def _outcomes(version: str) -> Any:
    return te_stub.run(version, _refusals)


@pytest.mark.parametrize("version", te_stub.VERSIONS)
def test_every_change_is_refused_by_name(megatron: Any, version: str) -> None:
    outcomes = _outcomes(version)
    assert len(outcomes) > 20
    for change, (said, expected) in outcomes.items():
        assert expected in said, f"{change}: {said or 'nothing was said'}"
        assert said.startswith(f"Transformer Engine {version} is not built as --geoscale-attention te needs it: ")
        assert "\n" not in said
