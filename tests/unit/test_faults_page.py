"""docs/FAULTS.md names a test for every line, and the tests are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_fault_names_tests_that_exist():
    page = (ROOT / "docs" / "FAULTS.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    known = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)",
             path.read_text(), re.MULTILINE)}
    assert len(named) > 30 and named <= known, named - known
    lines = [line for part in page.split("\n## ") if "| Test |" in part for line in part.splitlines()]
    rows = [line for line in lines if line.startswith("| ") and "| Test |" not in line]
    assert len(rows) > 25 and all("`test_" in row for row in rows)
