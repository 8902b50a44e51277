"""tools/demo.py as a user runs it, at a tiny size: what it measures, writes, reuses, refuses and stops."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import _corpus
import _demo_data
import _demo_report
import demo

ROOT = Path(__file__).resolve().parents[2]
STEPS, SPIKE, STOP = 6, 3, 4
KEYS = ["recipe", "steps", "final_loss", "saturated_values", "worst_overrange", "first_saturated_step",
        "spike_sqnr_db", "refresh_share"]


def command(output: Path, *flags: object) -> list[str]:
    text = _corpus.stdlib_directory() / "asyncio"
    return [str(part) for part in (sys.executable, ROOT / "tools" / "demo.py", "--output", output, "--steps", STEPS,
                                   "--input", text, *flags)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    output = tmp_path_factory.mktemp("demo") / "run"
    result = subprocess.run(command(output), capture_output=True, text=True, timeout=600, env=environment())
    assert result.returncode == 0, result.stdout + result.stderr
    return output, result


@pytest.mark.slow
def test_certified_never_saturates_where_delayed_does(finished):
    summaries = json.loads((finished[0] / "summary.json").read_text())
    assert [list(summary) for summary in summaries] == [KEYS, KEYS]
    certified, delayed = summaries
    assert (certified["recipe"], delayed["recipe"]) == ("certified", "delayed")
    assert certified["steps"] == delayed["steps"] == STEPS
    assert certified["saturated_values"] == 0 and certified["first_saturated_step"] is None
    assert certified["worst_overrange"] <= 1 < delayed["worst_overrange"]
    assert delayed["saturated_values"] > 0 and 1 <= delayed["first_saturated_step"] <= SPIKE
    assert certified["spike_sqnr_db"] > 20 > delayed["spike_sqnr_db"]
    assert 0 < certified["refresh_share"] < 0.5 and delayed["refresh_share"] == 0
    assert all(math.isfinite(summary["final_loss"]) for summary in summaries)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["certified", "delayed"])
def test_the_run_was_stopped_and_resumed(finished, recipe):
    folder = finished[0] / recipe
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.5
    assert f"exiting at iteration {STOP}: --exit-interval" in (folder / "first.log").read_text()
    assert f"at iteration {STOP}" in (folder / "resumed.log").read_text()
    assert [("attention_sqnr_db" in record["geoscale"]) for record in records].index(True) == SPIKE - 1


@pytest.mark.slow
def test_what_the_user_sees(finished):
    output, result = finished
    assert (output / "table.md").read_text() in result.stdout
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "\r" not in result.stderr  # no bar where there is no terminal
    for recipe in ("certified", "delayed"):
        assert f"{recipe}: step {STEPS} of {STEPS}, loss " in result.stderr


@pytest.mark.slow
def test_data_is_reused_only_if_it_is_the_same(finished, tmp_path, monkeypatch, capsys):
    tools = []

    def run_tool(name, *flags):
        tools.append(name)
        Path(flags[-1]).parent.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(_demo_data, "run_tool", run_tool)
    data, text = tmp_path / "data", _corpus.stdlib_directory() / "asyncio"
    shutil.copytree(finished[0] / "data", data)
    demo.prepare_data(data, [text])
    assert not tools and "reusing" in capsys.readouterr().err

    with (data / "corpus_text_document.bin").open("r+b") as file:
        file.write(b"\xff")
    demo.prepare_data(data, [text])
    assert tools == ["train_tokenizer.py", "preprocess_data.py"]
    assert not (data / "cache").exists()

    shutil.rmtree(data)
    shutil.copytree(finished[0] / "data", data)
    demo.prepare_data(data, [_corpus.stdlib_directory() / "json"])
    assert len(tools) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_children_too(finished, tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this process ignores the signal, as a shell's background job does, and so would the demo")
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command(output), stderr=err, env=environment(), start_new_session=True)
    try:
        family: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        while sum("pretrain.py" in " ".join(child.cmdline()) for child in family) < 3:  # torchrun and two ranks
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.1)
            family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        for left in [process, *family]:
            try:
                left.kill()
            except psutil.NoSuchProcess:
                pass
    assert "reusing" in (tmp_path / "err").read_text()
    assert not (output / "summary.json").exists()  # not that of the run before


def test_a_failed_launch_shows_its_last_words(tmp_path, monkeypatch, capsys):
    script = tmp_path / "broken.py"
    script.write_text("import sys; print('the reason', file=sys.stderr); sys.exit(3)")
    monkeypatch.setattr(demo, "PRETRAIN", script)
    progress = demo.Progress("certified", STEPS, _demo_report.LogReader(tmp_path / "none.jsonl"))
    with pytest.raises(SystemExit, match=r"^demo.py: the launch failed with exit code 1, .*first.log") as failure:
        demo.launch([], tmp_path / "first.log", progress)
    assert isinstance(failure.value.code, str)  # which Python prints before it exits with 1
    shown = capsys.readouterr().err
    assert "the reason" in shown and "failed (exitcode: 3)" in shown and "Traceback" not in shown


def records_of(*saturated: int) -> list[dict]:
    scales = {"refresh_ms": 10.0, "overrange_max": 0.5, "utilization_max": 0.1}
    records: list[dict] = []
    for step, count in enumerate(saturated, start=1):
        geoscale = {**scales, "saturated": count}
        records.append({"iteration": step, "lm_loss": 9.0 - step, "tokens_per_second": 1000.0, "geoscale": geoscale})
    records[1]["geoscale"]["attention_sqnr_db"] = 12.5
    return records


def test_the_summary_adds_up(tmp_path):
    records = records_of(0, 0, 1200, 34)
    records[2]["geoscale"]["overrange_max"] = 3.5
    summary = _demo_report.summarize("delayed", records, spike=2, tokens_per_step=200)
    assert summary == {"recipe": "delayed", "steps": 4, "final_loss": 5.0, "saturated_values": 1234,
                       "worst_overrange": 3.5, "first_saturated_step": 3, "spike_sqnr_db": 12.5, "refresh_share": 0.05}
    records[1]["geoscale"]["overrange_max"] = records[3]["lm_loss"] = "nan"
    ruined = _demo_report.summarize("current", records, spike=2, tokens_per_step=200)
    assert ruined["worst_overrange"] == ruined["final_loss"] == "nan"
    text = _demo_report.table([summary, ruined])
    assert len(set(map(len, text.splitlines()))) == 1 and "1,234" in text and "5.0%" in text and "nan" in text
    _demo_report.plot({"delayed": records}, tmp_path / "plot.png", spike=2, resumed=3, factor=4)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_log_is_read_as_it_grows(tmp_path):
    path = tmp_path / "log.jsonl"
    reader = _demo_report.LogReader(path)
    assert not reader.update()
    path.write_text('{"iteration": 1}\n{"iterat')
    assert reader.update() and not reader.update() and reader.records == [{"iteration": 1}]
    with path.open("a") as file:
        file.write('ion": 2}\n')
    assert reader.update() and reader.records == [{"iteration": 1}, {"iteration": 2}]


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """Runs main() with made-up records in place of training."""

    def run_main(*saturated: int) -> Path:
        output = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(output), "--recipes", "certified", "--steps", "4"])
        monkeypatch.setattr(demo, "prepare_data", lambda data, inputs: None)
        monkeypatch.setattr(demo, "pretrain", lambda recipe, args: records_of(*saturated))
        demo.main()
        return output

    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield run_main
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_saturation_under_certified_is_a_failure(reported, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^demo.py: certified saturated 7 values, first in step 3"):
        reported(0, 0, 7, 0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())[0]["saturated_values"] == 7
    assert "| certified |" in capsys.readouterr().out


def test_without_matplotlib_one_line_says_so(reported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = reported(0, 0, 0, 0)
    assert (output / "summary.json").exists() and not (output / "demo.png").exists()
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1


def test_a_directory_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").touch()
    result = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=60, env=environment())
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert str(tmp_path) in result.stderr and (tmp_path / "data" / "thesis.txt").exists()


def test_two_demos_do_not_share_a_directory(tmp_path):
    with demo.claim(tmp_path), pytest.raises(ValueError, match="in use by another demo"), demo.claim(tmp_path):
        pass
    with demo.claim(tmp_path):  # free again
        pass


@pytest.mark.parametrize("flags", [["--steps", "3"], ["--recipes", "none"], ["--recipes"], ["--ouput", "x"]])
def test_a_wrong_flag_is_one_sentence(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.parse(flags)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
