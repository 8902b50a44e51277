"""What the data tools read: compressed or not, the same bytes come out; what is damaged is named and leaves nothing."""

import gzip
import json
import os
import re
import resource
import sys
from pathlib import Path

import pytest
import zstandard

import _compressed
import _corpus
import _documents
import train_tokenizer
from _cli import run
from tests.functional.data_tools import TEXTS, files, load, preprocess

pytestmark = pytest.mark.usefixtures("megatron")

BYTES = ("--tokenizer-type", "ByteLevelTokenizer", "--append-eod")
zstd = zstandard.ZstdCompressor(write_checksum=True).compress
COMPRESS = {"gz": lambda data: gzip.compress(data, mtime=0), "zst": zstd}
LINES = "".join(json.dumps({"text": text * 9, "n": n}) + "\n" for n, text in enumerate(TEXTS * 40)).encode()


def halves(data: bytes, form: str) -> bytes:
    """Two members or frames, one after the other."""
    return COMPRESS[form](data[: len(data) // 2]) + COMPRESS[form](data[len(data) // 2 :])


def flags(inputs: list[Path], prefix: Path, *more: object) -> list[object]:
    return ["--input", *inputs, "--output-prefix", prefix, *BYTES, *more]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compression_and_workers_do_not_change_a_byte(tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(_documents, "CHUNK_BYTES", 5000)  # many chunks
    data = LINES if kind == "jsonl" else "\n".join(TEXTS).encode()
    (tmp_path / f"in.{kind}").write_bytes(data)
    preprocess(*flags([tmp_path / f"in.{kind}"], tmp_path / "plain"))
    expected = files(tmp_path / "plain")
    assert [document.tolist()[-1] for document in load(tmp_path / "plain")] == [0] * (160 if kind == "jsonl" else 1)
    named = {f"{kind}.{form}": compress(data) for form, compress in COMPRESS.items()}
    unnamed = {kind: zstd(data)}  # known by its first bytes alone
    mistaken = {f"{kind}.gz": zstd(data)}
    several = {f"{kind}.{form}": halves(data, form) for form in COMPRESS}
    for workers, group in ((1, named), (3, named), (2, unnamed), (1, mistaken), (2, several)):
        for name, content in group.items():
            (tmp_path / f"x.{name}").write_bytes(content)
            preprocess(*flags([tmp_path / f"x.{name}"], tmp_path / "out", "--workers", workers))
            assert files(tmp_path / "out") == expected, (workers, name)


def test_inputs_of_all_kinds_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "same.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}')
    (tmp_path / "b" / "same.jsonl").write_bytes(COMPRESS["gz"](b'{"text": "three"}\r\n'))
    (tmp_path / "b" / "x.txt.zst").write_bytes(zstd("\ufefffour\n".encode()))
    (tmp_path / "b" / "empty.txt.gz").write_bytes(COMPRESS["gz"](b""))
    (tmp_path / "b" / "no.txt.bz2").write_bytes(b"not asked for")
    inputs = [tmp_path / "b" / "same.jsonl", tmp_path / "a" / "same.jsonl", tmp_path / "b"]
    preprocess(*flags(inputs, tmp_path / "out"))
    assert [bytes(document.tolist()) for document in load(tmp_path / "out")] == [
        b"three\0", b"one\0", b"two\0", b"four\n\0"
    ]


@pytest.mark.parametrize("form", COMPRESS)
def test_every_truncation_and_damage_is_noticed(tmp_path: Path, form: str) -> None:
    data = LINES[:3000]
    whole = halves(data, form)
    path = tmp_path / f"in.{form}"
    boundary = len(COMPRESS[form](data[: len(data) // 2]))  # where a file may end
    readers = (_compressed.read_content, _compressed.content_size, lambda path: list(_compressed.read_lines(path)))
    for size in set(range(len(whole))) - {boundary}:
        path.write_bytes(whole[:size])
        for read in readers:
            with pytest.raises(ValueError, match=rf"{path} (is truncated|holds no)"):
                read(path)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            assert _compressed.read_content(path) == data  # a byte of a header that says nothing of the content
        except ValueError as error:
            assert str(error).startswith(str(path))


def test_lines_are_those_of_the_content(tmp_path: Path) -> None:
    data = b"\n".join([b"", b"short", b"y" * 200_000, b"", b"x" * _compressed._BLOCK_BYTES, b"last"])
    for form, compress in COMPRESS.items():
        path = tmp_path / f"in.{form}"
        path.write_bytes(compress(data))
        lines = list(_compressed.read_lines(path))
        assert [line for line, _ in lines] == data.splitlines(keepends=True)
        assert sum(stored for _, stored in lines) == path.stat().st_size
        assert _compressed.content_size(path) == len(data)


def test_zstandard_of_a_large_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=29)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # no size: the window counts
    (tmp_path / "in.txt.zst").write_bytes(compressor.compress(b"long") + compressor.flush())
    assert _corpus.read_text(tmp_path / "in.txt.zst") == "long"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("in.jsonl.gz", COMPRESS["gz"](LINES)[:-9], "is truncated: its gzip data end too early"),
    ("in.jsonl.zst", zstd(LINES)[:-1], "is truncated: its Zstandard data end too early"),
    ("in.txt.zst", zstd(LINES)[:-1], "is truncated: its Zstandard data end too early"),
    ("in.txt.gz", b"", "is truncated: its gzip data end too early"),
    ("in.txt.gz", b"plain text", "holds no gzip data, or damaged ones: Not a gzipped file"),
    ("in.jsonl.zst", b"{}", "holds no Zstandard data, or damaged ones: "),
    ("in.jsonl.gz", COMPRESS["gz"](LINES + b"{"), "line 161 is not JSON: Expecting property name"),
    ("in.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 cannot be read as JSON: Exceeds the limit"),
    ("in.jsonl", b'{"text": "\\ud83d"}', "line 1 has half a surrogate pair under 'text', which is no text"),
    ("in.jsonl", LINES + b'\xef\xbb\xbf{"text": "x"}', "line 161 is not JSON"),
    ("in.jsonl", '{"text": "x"}'.encode("utf-16"), "line 1 is not UTF-8"),
    ("in.json", b'[{"text": "x"}]', "line 1 has no key 'text' (--json-keys)"),
])
def test_a_damaged_input_is_named_and_leaves_nothing(
    tmp_path: Path, workers: int, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / "good.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        preprocess(*flags([tmp_path / "good.jsonl", tmp_path / name], tmp_path / "out", "--workers", workers))
    assert str(caught.value).startswith(f"{tmp_path / name} {sentence}") and "\n" not in str(caught.value)
    assert set(os.listdir(tmp_path)) == {"good.jsonl", name}


@pytest.mark.parametrize("text", ["a long text " * 9, "x"])
def test_a_full_disk_is_one_sentence_and_keeps_the_old_dataset(tmp_path: Path, text: str) -> None:
    """.bin is the larger file for long texts, .idx for short ones."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text('{"text": "old"}\n')
    preprocess(*flags([source], out))
    before = files(out)
    source.write_text((json.dumps({"text": text}) + "\n") * 500)
    process = os.fork()
    if process == 0:
        os.dup2(os.open(tmp_path / "err", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        code = run(lambda: print(preprocess(*flags([source], out, "--workers", 2))))
        sys.stderr.flush()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 2
    assert re.fullmatch(r"\S+: error: \S+out_text_document: File too large\n", (tmp_path / "err").read_text())
    assert files(out) == before and not list(tmp_path.glob("*.partial"))


def test_a_key_must_make_a_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preprocess(*flags([Path("x")], Path("y"), "--json-keys", "meta/text"))
    assert "--json-keys 'meta/text' cannot be part of a file's name\n" in capsys.readouterr().err


def test_tokenizer_training_reads_the_same(tmp_path: Path, monkeypatch, capsys) -> None:
    texts = [path.read_text() for path in sorted(_corpus.stdlib_directory().glob("a*.py"))[:6]]
    (tmp_path / "plain").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "plain" / f"{number}.txt").write_text(text)
    lines = "".join(json.dumps({"title": "", "body": text}) + "\n" for text in texts).encode()
    models = []
    for form, data in {"txt": b"", "jsonl": lines, "jsonl.gz": COMPRESS["gz"](lines), "jsonl.zst": zstd(lines)}.items():
        source = tmp_path / f"in.{form}" if data else tmp_path / "plain"
        if data:
            source.write_bytes(data)
        keys = ["--json-keys", "title", "body"] if data else []
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", "--input", str(source), *keys, "--vocab-size", "400",
                                          "--output", str(tmp_path / "t.model")])
        train_tokenizer.main()
        models.append((tmp_path / "t.model").read_bytes())
    assert len(set(models)) == 1
    (tmp_path / "in.jsonl.gz").write_bytes(COMPRESS["gz"](lines)[:-1])
    monkeypatch.setattr(sys, "argv", [*sys.argv[:2], str(tmp_path / "in.jsonl.gz"), *sys.argv[3:]])
    with pytest.raises(ValueError, match=r"in\.jsonl\.gz is truncated"):
        train_tokenizer.main()
