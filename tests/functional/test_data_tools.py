"""The data tools as a user runs them: the same bytes each time, nothing half-written, one sentence for a mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import sentencepiece

import _corpus
import _documents
import preprocess_data
import train_tokenizer
from _cli import write_atomically
from tests.functional.data_tools import ENVIRONMENT, TEXTS, TOOLS, load, preprocess, run_tool

pytestmark = pytest.mark.usefixtures("megatron")  # which the tool imports when it runs in this process


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1 MB of the standard library, with what a real directory holds besides good text."""
    root = tmp_path_factory.mktemp("corpus")
    for number, path in enumerate(sorted(_corpus.stdlib_directory().glob("*.py"))[:60]):
        target = root / f"part{number % 3}" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (root / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "empty.txt").touch()
    (root / "bom.txt").write_bytes(b"\xef\xbb\xbfafter the mark")
    (root / "notes.rst").write_text("not asked for")
    for hidden in ("__pycache__", "site-packages", ".git"):
        (root / hidden).mkdir()
        (root / hidden / "no.py").write_text("never read")
    return root


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    result = run_tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 600, "--output", path)
    assert result.returncode == 0, result.stderr
    assert "1 file left out for not being UTF-8" in result.stderr
    return path


def flags_for(tokenizer: Path, inputs: list[Path], prefix: Path, *more: object) -> list[str]:
    flags = ["--input", *inputs, "--output-prefix", prefix, "--tokenizer-type", "SentencePieceTokenizer",
             "--tokenizer-model", tokenizer, *more]
    return [str(flag) for flag in flags]


def processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_corpus_is_sorted_and_leaves_out_what_is_not_text(corpus: Path) -> None:
    names = [path.relative_to(corpus).as_posix() for path in _corpus.collect_files([corpus])]
    assert names == sorted(names) and len(names) == 63
    assert {"latin1.txt", "empty.txt", "bom.txt"} < set(names)
    assert not any(name.endswith(".rst") or "no.py" in name for name in names)


def test_corpus_takes_a_named_file_once_and_first(corpus: Path) -> None:
    named = corpus / "notes.rst"
    files = _corpus.collect_files([named, corpus / "bom.txt", corpus])
    assert files[:2] == [named, corpus / "bom.txt"] and len(files) == len(set(files)) == 64


def test_byte_order_mark_is_no_text(corpus: Path) -> None:
    assert _corpus.read_text(corpus / "bom.txt") == "after the mark"
    assert _corpus.read_text(corpus / "latin1.txt") is None


def test_stdlib_is_a_corpus() -> None:
    files = _corpus.collect_files([_corpus.stdlib_directory()])
    assert sum(path.stat().st_size for path in files) > 5e6
    assert not any({"site-packages", "dist-packages"} & set(path.parts) for path in files)


def test_tokenizer_is_the_same_bytes_whatever_its_name(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    result = run_tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 600, "--model-prefix", other)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "other.model").read_bytes() == tokenizer.read_bytes()
    assert os.listdir(tmp_path) == ["other.model"]


def test_tokenizer_loses_nothing(corpus: Path, tokenizer: Path) -> None:
    model = processor(tokenizer)
    assert model.get_piece_size() == 600
    assert (model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2)
    for text in [*TEXTS, *(path.read_text() for path in corpus.glob("part*/*.py"))]:
        assert model.decode(model.encode(text)) == text


def test_tokenizer_uses_the_ends_of_long_lines() -> None:
    line = "x" * 10_000 + " end"
    assert [len(piece) for piece in train_tokenizer.pieces([line])] == [4096, 4096, 1812]


def test_sample_is_even_and_of_the_size_asked_for() -> None:
    lines = [f"{number:09d}" for number in range(10_000)]
    picked = list(train_tokenizer.sample(lines, 0.25))
    assert abs(len(picked) - 2500) <= 1
    assert abs(sum(int(line) < 5000 for line in picked) - 1250) <= 1
    assert list(train_tokenizer.sample(lines, 1.0)) == lines


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--input", "missing", "--vocab-size", "600"], "input missing does not exist"),
        (["--input", "none", "--vocab-size", "600"], "none holds no file that ends in .txt or .py"),
        (["--input", "blank.txt", "--vocab-size", "600"], "no text in blank.txt"),
        (["--input", "latin1.txt", "--vocab-size", "600"], "no text in latin1.txt (1 file left out for not"),
        (["--input", "tiny.txt", "--vocab-size", "600"], "--vocab-size 600 does not fit this text: it has pieces"),
        (["--input", "tiny.txt", "--vocab-size", "261"], "--vocab-size 261 does not fit this text: its characters"),
        (["--input", "tiny.txt", "--vocab-size", "0"], "--vocab-size must be above 259"),
        (["--input", "tiny.txt"], "the following arguments are required: --vocab-size"),
    ],
)
def test_tokenizer_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("none").mkdir()
    Path("blank.txt").write_text(" \n\n")
    Path("latin1.txt").write_bytes(b"caf\xe9")
    Path("tiny.txt").write_text("hello world\n")
    result = run_tool("train_tokenizer.py", *flags, "--output", "out/t.model")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("train_tokenizer.py: error: " + sentence)
    assert "Traceback" not in result.stderr
    assert not Path("out").exists()


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(target, b"new")
    assert caught.value.filename == str(target)
    assert os.listdir(tmp_path) == ["model"] and target.read_bytes() == b"old"


def test_text_round_trip(tokenizer: Path, tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    report = preprocess(*flags_for(tokenizer, [tmp_path], tmp_path / "out", "--append-eod"))
    assert report.startswith(f"{tmp_path}/out_text_document: {len(TEXTS)} documents, ") and "as uint16" in report
    documents = load(tmp_path / "out")
    model = processor(tokenizer)
    assert all(document.dtype == np.uint16 and document[-1] == model.eos_id() for document in documents)
    assert [model.decode(document[:-1].tolist()) for document in documents] == TEXTS


def test_json_lines_with_two_keys(tokenizer: Path, tmp_path: Path) -> None:
    records = [{"title": f"title {number}", "text": text, "other": 1} for number, text in enumerate(TEXTS)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    report = preprocess(*flags_for(tokenizer, [source], tmp_path / "out", "--json-keys", "text", "title"))
    assert len(report.splitlines()) == 2
    model = processor(tokenizer)
    assert [model.decode(document.tolist()) for document in load(tmp_path / "out")] == TEXTS
    assert model.decode(load(tmp_path / "out", "title")[3].tolist()) == "title 3"


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_workers_do_not_change_a_byte(kind: str, corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(_documents, "CHUNK_BYTES", 20_000)  # many chunks, so that workers overtake each other
    source = corpus
    if kind == "jsonl":
        source = tmp_path / "in.jsonl"
        with open(source, "w") as out:
            for path in sorted(corpus.glob("part*/*.py")):
                out.writelines(json.dumps({"text": part}) + "\n" for part in path.read_text().split("\n\n"))
    written = []
    for workers in (1, 3):
        prefix = tmp_path / f"workers{workers}"
        preprocess(*flags_for(tokenizer, [source], prefix, "--append-eod", "--workers", workers))
        written.append([Path(f"{prefix}_text_document.{end}").read_bytes() for end in ("bin", "idx")])
    assert written[0] == written[1]
    assert not list(tmp_path.glob("*.partial"))


def test_null_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("3 1 4\n1 5\n")
    flags = ["--input", tmp_path / "in.txt", "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer"]
    preprocess(*flags, "--vocab-size", 6, "--append-eod")
    assert [document.tolist() for document in load(tmp_path / "out")] == [[3, 1, 4, 1, 5, 6]]
    preprocess(*flags, "--vocab-size", 70_000)
    assert load(tmp_path / "out")[0].dtype == np.int32
    with pytest.raises(ValueError, match=r"in\.txt has a token id outside the vocabulary of 5 ids"):
        preprocess(*flags, "--vocab-size", 5)
    (tmp_path / "in.txt").write_text("three one four")
    with pytest.raises(ValueError, match=r"in\.txt cannot be tokenized: .*'three'"):
        preprocess(*flags, "--vocab-size", 6)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "unclosed', "line 3 is not JSON: Unterminated string starting at (column 10)"),
        (b'{"body": "no text"}', "line 3 has no key 'text' (--json-keys)"),
        (b"[" * 100_000, "line 3 is nested too deeply"),
        (b'"a string"', "line 3 has no key 'text' (--json-keys)"),
        (b'{"text": ["a"]}', "line 3 has no string under 'text' but list"),
        (b'{"text": "caf\xe9"}', "line 3 is not UTF-8"),
    ],
)
def test_bad_line_is_named(tokenizer: Path, tmp_path: Path, workers: int, line: bytes, sentence: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(ValueError) as caught:
        preprocess(*flags_for(tokenizer, [source], tmp_path / "out", "--workers", workers))
    assert str(caught.value).startswith(f"{source} {sentence}")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_mistakes_in_files_and_tokenizers(tokenizer: Path, tmp_path: Path) -> None:
    blank, text, out = tmp_path / "blank.txt", tmp_path / "in.txt", tmp_path / "out"
    blank.touch()
    text.write_text("some text")
    for flags, sentence in [
        (flags_for(tokenizer, [tmp_path / "missing"], out), r"input .*missing does not exist"),
        (flags_for(tokenizer, [blank], out), r"no text under 'text' in .*blank\.txt"),
        (flags_for(tokenizer, [text], out, "--json-keys", "body"), r"--json-keys body needs JSON lines, but .*in\.txt"),
        (flags_for(text, [text], out), r"--tokenizer-model .*in\.txt cannot be read as a SentencePieceTokenizer"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            preprocess(*flags)
    assert sorted(os.listdir(tmp_path)) == ["blank.txt", "in.txt"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tokenizer-type", "GPT2BPETokenizer"], "argument --tokenizer-type: invalid choice: 'GPT2BPETokenizer'"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "--tokenizer-type SentencePieceTokenizer needs"),
        (["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "no.model"],
         "--tokenizer-model no.model does not exist"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/no/model"],
         "--tokenizer-model /no/model does not exist"),
        (["--tokenizer-type", "NullTokenizer"], "--tokenizer-type NullTokenizer needs --vocab-size"),
        (["--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--workers", "0"], "--workers must be 1 or more"),
    ],
)
def test_mistakes_in_flags(capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as caught:
        preprocess_data.parse(["--input", "x", "--output-prefix", "y", *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_one_sentence_and_exit_code(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{")
    result = run_tool("preprocess_data.py", *flags_for(tokenizer, [source], tmp_path / "out", "--workers", 2))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"preprocess_data.py: error: {source} line 1 is not JSON")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_a_killed_run_leaves_nothing_that_loads(tokenizer: Path, tmp_path: Path, signal_name: str) -> None:
    """The input is a pipe that is never closed, so the run is in the middle of its work when the signal comes."""
    record = json.dumps({"text": TEXTS[0] * 50}) + "\n"
    pipe = tmp_path / "in.jsonl"
    os.mkfifo(pipe)
    args = flags_for(tokenizer, [pipe], tmp_path / "out", "--workers", 2)
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), *args]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    partial = tmp_path / "out_text_document.bin.partial"
    with open(pipe, "w") as out:
        deadline = time.monotonic() + 90
        while not (partial.exists() and partial.stat().st_size > 0):
            assert run.poll() is None and time.monotonic() < deadline
            out.write(record * 100)
            out.flush()
        workers = psutil.Process(run.pid).children()
        run.send_signal(getattr(signal, signal_name))
        if signal_name == "SIGTERM":
            out.close()  # a tool that unwinds reads what is left in the pipe's buffer
        run.wait(30)
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.idx"))
    assert partial.exists() == (signal_name == "SIGKILL")

    pipe.unlink()
    pipe.write_text(record * 3)
    preprocess(*args)
    assert len(load(tmp_path / "out")) == 3
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("step", range(1, 5))
def test_replacing_a_dataset_never_mixes_old_and_new(tokenizer: Path, tmp_path: Path, monkeypatch, step: int) -> None:
    """A crash after each of the renaming's steps: what loads is the old dataset or the new one."""
    text = tmp_path / "in.txt"
    text.write_text(TEXTS[0])
    flags = flags_for(tokenizer, [text], tmp_path / "out")
    preprocess(*flags)
    old = [document.tolist() for document in load(tmp_path / "out")]
    text.write_text(TEXTS[1] * 7)

    real, calls = preprocess_data.sync, 0

    def crashing(path: Path) -> None:
        nonlocal calls
        calls += 1
        real(path)
        if calls == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(preprocess_data, "sync", crashing)
    with pytest.raises(KeyboardInterrupt):
        preprocess(*flags)
    monkeypatch.undo()
    if step <= 2:
        assert [document.tolist() for document in load(tmp_path / "out")] == old
    else:
        assert not (tmp_path / "out_text_document.idx").exists()
    preprocess(*flags)
    assert [document.tolist() for document in load(tmp_path / "out")] != old
