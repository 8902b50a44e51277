"""Models of transformers in Transformer Engine's own Python, on a CPU."""

import functools
import importlib
import re
import traceback
from pathlib import Path

import pytest

import te_stub

CHECKS = re.findall(r"^def (check_\w+)", Path(__file__).with_name("hugging_face_checks.py").read_text(), re.MULTILINE)
VERSION = "2.16.1"


def _run_all(rank):
    """Tracebacks by check, empty where it passed; one process for all, since most of the time is imports."""
    checks, found = importlib.import_module("contract.hugging_face_checks"), {}
    for name in CHECKS:
        try:
            getattr(checks, name)()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


@functools.cache
def _outcomes():
    return te_stub.run(VERSION, _run_all)


@pytest.mark.parametrize("check", CHECKS)
def test_a_model_of_transformers(check):
    assert not _outcomes()[check], _outcomes()[check]
