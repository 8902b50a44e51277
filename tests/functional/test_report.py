"""tools/report.py: logs of every kind, and what the page must and must not hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from _report_page import MAX_EVENTS, MAX_POINTS, page
from _report_records import read_run

ROOT = Path(__file__).parents[2]


def record(iteration: int, *, saturated: tuple[int, ...] = (0, 0), loss: object = 2.5, utilization: object = 0.5):
    layers = [
        {"layer": row + 1, "saturated": count, "utilization": {"qkv": utilization, "o": 0.1}}
        for row, count in enumerate(saturated)
    ]
    geoscale = {"digest": f"{iteration:016x}", "saturated": sum(saturated), "refresh_ms": 2.0, "layers": layers,
                "saturated_by_slot": {"qkv": sum(saturated), "o": 0}}
    return {"iteration": iteration, "lm_loss": loss, "grad_norm": 1.0, "tokens_per_second": 1e3, "step_ms": 100.0,
            "geoscale": geoscale}


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


def report(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


class Page(HTMLParser):
    """Tags that are open at the end, ids, and everything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self._look(tag, attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._look(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _look(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object"):
            self.fetched.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:image/png")):
                self.fetched.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.fetched.append(f"{tag} {name}")


def test_page_of_a_run_holds_its_numbers_and_loads_nothing(tmp_path: Path) -> None:
    log = write(tmp_path / "run.jsonl", record(1), record(2, saturated=(7, 0)), record(3, saturated=(5, 1200)))
    done = report(log)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'run.html'}\n"
    text = (tmp_path / "run.html").read_text()
    parsed = Page(text)
    assert parsed.open == [] and parsed.fetched == []
    assert len(parsed.ids) == len(set(parsed.ids)) > 0
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(parsed.ids)
    for fact in ("<dd>1 to 3</dd>", "<dd>1,212</dd>", "<dd>2.00 ms</dd>", "<dd>2.00 %</dd>", "<dd>2.5000</dd>",
                 "<td>3</td><td>1,205</td><td>1, 2</td>", "<td>2</td><td>0.5000</td><td>1,200</td>",
                 "<dd>0000000000000003</dd>", "qkv 1,212, o 0."):
        assert fact in text, fact
    assert text.count("<svg ") == 4
    before = text
    assert report(log).returncode == 0 and (tmp_path / "run.html").read_text() == before


def test_later_iterations_replace_those_before_a_resume_and_a_half_line_is_left_out(tmp_path: Path) -> None:
    log = write(tmp_path / "run.jsonl", record(1), record(2, saturated=(9, 9)), record(2), record(3))
    with log.open("a") as file:
        file.write('{"iteration": 4, "lm_lo')
    run = read_run(log)
    assert run.iteration.tolist() == [1, 2, 3]
    assert (run.num_repeated, run.truncated, run.saturated.sum()) == (1, True, 0)
    assert run.saturated_by_slot == {"qkv": 0, "o": 0}
    text = page(run, "x")
    assert "1 iterations were logged again" in text and "half written" in text


def test_numbers_that_json_has_no_word_for(tmp_path: Path) -> None:
    log = write(tmp_path / "run.jsonl", record(1, loss="nan", utilization="inf"), record(2, loss=None), record(3))
    run = read_run(log)
    assert np.isnan(run.loss[:2]).all() and np.isinf(run.utilization[0]).all()
    text = page(run, "x")
    assert "2 iterations have no finite loss" in text and Page(text).open == []


def test_a_run_without_fp8_has_its_loss_alone(tmp_path: Path) -> None:
    log = write(tmp_path / "run.jsonl", *({**record(step), "geoscale": None} for step in (1, 2)))
    text = page(read_run(log), "x")
    assert text.count("<svg ") == 1 and "<dd>not counted</dd>" in text


def test_long_runs_are_drawn_in_bins_that_keep_the_worst_step(tmp_path: Path) -> None:
    steps = 2 * MAX_POINTS + 7
    records = [record(step, saturated=(int(step % 11 == 0), 0)) for step in range(1, steps)]
    records[1234]["geoscale"]["layers"][1]["utilization"]["o"] = 1.75
    run = read_run(write(tmp_path / "run.jsonl", *records))
    text = page(run, "x")
    assert f"The first {MAX_EVENTS} of {steps // 11:,} steps" in text and "1.7500" in text
    assert len(text) < 1_000_000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "no iteration is in it"),
        ("{}\n", ":1: not a line of --geoscale-log-jsonl"),
        (json.dumps(record(1)) + "\nnonsense\n", ":2: not a line of --geoscale-log-jsonl"),
        (json.dumps(record(1)) + "\n" + json.dumps(record(2, saturated=(0,))) + "\n", "more than one model"),
        (b"\xff\xfe\n", ":1: not a line of --geoscale-log-jsonl"),
    ],
)
def test_what_is_no_log_is_one_sentence(tmp_path: Path, content: str | bytes, sentence: str) -> None:
    log = tmp_path / "run.jsonl"
    log.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_run(log)


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    missing = report(tmp_path / "none.jsonl")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "none.jsonl" in missing.stderr
    log = write(tmp_path / "run.jsonl", record(1))
    itself = report(log, "-o", log)
    assert itself.returncode == 2 and "is the run itself" in itself.stderr
    assert log.read_text() == json.dumps(record(1)) + "\n"


def test_a_title_is_text_not_markup(tmp_path: Path) -> None:
    hostile = record(1)
    hostile["geoscale"]["digest"] = "<script>alert(1)</script>"
    hostile["geoscale"]["saturated_by_slot"] = {"<img src=x>": 1}
    text = page(read_run(write(tmp_path / "run.jsonl", hostile)), '"><script>alert(2)</script>')
    assert "<script" not in text and "<img" not in text
