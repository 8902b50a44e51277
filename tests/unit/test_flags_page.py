"""docs/FLAGS.md is what the parser says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_geoscale.training.arguments import build_parser


@pytest.fixture
def flags():
    spec = importlib.util.spec_from_file_location("flags", Path(__file__).parents[2] / "docs" / "flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(flags):
    assert flags.PAGE.read_text() == flags.page(), "run python docs/flags.py"


def test_every_flag_has_one_row(flags):
    text = flags.page()
    for action in build_parser()._actions:
        if action.dest != "help":
            rows = [line for line in text.splitlines() if line.startswith((f"| `{action.option_strings[0]}`",
                                                                         f"| `{action.option_strings[0]} "))]
            assert len(rows) == 1, action.option_strings
            assert rows[0].replace("\\|", "").count("|") == 4
