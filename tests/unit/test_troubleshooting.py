"""docs/TROUBLESHOOTING.md lists messages by their own words: each must still be what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "TROUBLESHOOTING.md"
GAP = "..."
"""Stands in a heading for what differs from one message to the next."""


def texts(source: str) -> list[str]:
    """Every string of a module, f-strings with `...` for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.fixture(scope="module")
def said() -> str:
    files = [*(ROOT / "megatron_geoscale").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    return "\n".join(" ".join(text.split()) for file in files for text in texts(file.read_text()))


def headings() -> list[str]:
    return re.findall(r"^### `(.+)`$", PAGE.read_text(), flags=re.MULTILINE)


def test_f_strings_are_read_with_gaps():
    assert texts("x = f'a {b} c' 'd'")[0] == "a ... cd"


@pytest.mark.parametrize("heading", headings())
def test_message_is_one_that_the_code_has(heading: str, said: str) -> None:
    assert heading in said


def test_the_page_lists_messages() -> None:
    assert len(headings()) == len(set(headings())) >= 15
