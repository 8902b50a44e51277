"""Hugging Face and byte tokenizers: from local files alone, the same ids in preprocess_data.py and in pretrain.py."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

import _models
import preprocess_data
from tests.functional.common import BATCH, LLAMA, MODEL, NO_DROPOUT, flags_of, train
from tests.functional.data_tools import TEXTS, files, load, preprocess, save_hf_tokenizer

pytestmark = pytest.mark.usefixtures("megatron")

HUGGING_FACE = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model")
BYTES = ("--tokenizer-type", "ByteLevelTokenizer")


@pytest.fixture(scope="module")
def with_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return save_hf_tokenizer(tmp_path_factory.mktemp("hf") / "with end", TEXTS * 20, 300, eos_token="<end>")


@pytest.fixture
def flags(tmp_path: Path) -> list[object]:
    """Of a run over `TEXTS`, the tokenizer excepted."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--append-eod"]


def no_network(*args: object, **options: object) -> None:
    raise AssertionError("the network was asked")


@pytest.mark.parametrize("workers", [1, 2])
def test_hugging_face_tokenizer(tmp_path: Path, with_end: Path, flags, monkeypatch, workers: int) -> None:
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, no_network)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(with_end, local_files_only=True)
    preprocess(*flags, *HUGGING_FACE, with_end, "--workers", workers)
    documents = [document.tolist() for document in load(tmp_path / "out")]
    assert documents == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    assert [tokenizer.decode(document[:-1]) for document in documents] == TEXTS
    expected = files(tmp_path / "out")
    monkeypatch.chdir(with_end)
    preprocess(*flags, *HUGGING_FACE, "tokenizer.json", "--workers", workers)
    assert files(tmp_path / "out") == expected


def test_mistakes_in_a_hugging_face_tokenizer(tmp_path: Path, with_end: Path, flags, monkeypatch, capsys) -> None:
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, no_network)
    without_end = save_hf_tokenizer(tmp_path / "none", TEXTS, 300)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(with_end / "tokenizer.json", alone / "tokenizer.json")
    words = tmp_path / "words"
    shutil.copytree(with_end, words)
    model = json.loads((words / "tokenizer.json").read_text())
    few = {"x": 0, "y": 1, "Ġy": 2}  # on which megatron-core tries it
    model |= {"model": {"type": "WordLevel", "vocab": few, "unk_token": "?"}, "added_tokens": []}
    (words / "tokenizer.json").write_text(json.dumps(model))
    (words / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    for path, sentence in [
        (without_end, r"--append-eod: .*none has no end-of-document token"),
        (alone / "tokenizer.json", r"--append-eod: .*alone/tokenizer\.json has no end-of-document token"),
        (with_end / "tokenizer_config.json", r"tokenizer_config\.json is neither a directory nor a tokenizer\.json"),
        (tmp_path, r"--tokenizer-model \S+ cannot be read as a HuggingFaceTokenizer: \S+"),
    ]:
        with pytest.raises(ValueError, match=sentence) as caught:
            preprocess(*flags, *HUGGING_FACE, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"in\.jsonl line 1 cannot be tokenized: WordLevel error"):
        preprocess(*flags[:-1], *HUGGING_FACE, words)
    with pytest.raises(SystemExit):
        preprocess(*flags, *HUGGING_FACE, "gpt2")  # is on the Hub
    assert "--tokenizer-model gpt2 does not exist\n" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("class_name", ["code.Evil", "someone/model--code.Evil"])
def test_no_code_of_a_tokenizer_runs(tmp_path: Path, with_end: Path, flags, class_name: str) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(with_end, hostile)
    config = json.loads((hostile / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [class_name, class_name]}
    (hostile / "tokenizer_config.json").write_text(json.dumps(config))
    (hostile / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    preprocess(*flags, *HUGGING_FACE, with_end)
    expected = files(tmp_path / "out")
    try:
        preprocess(*flags, *HUGGING_FACE, hostile)
    except ValueError as error:
        assert "cannot be read as a HuggingFaceTokenizer" in str(error)
    assert files(tmp_path / "out") == expected and not (tmp_path / "ran").exists()


def test_takes_the_tokenizers_that_pretraining_takes() -> None:
    from megatron_geoscale.training import arguments

    assert preprocess_data.TOKENIZER_TYPES == arguments.TOKENIZER_TYPES
    assert preprocess_data.WITHOUT_MODEL == arguments.TOKENIZERS_WITHOUT_MODEL


def test_byte_tokenizer(tmp_path: Path, flags) -> None:
    preprocess(*flags, *BYTES)
    documents = load(tmp_path / "out")
    assert [bytes(document.tolist()) for document in documents] == [text.encode() + b"\0" for text in TEXTS]
    assert documents[0].dtype == np.uint16
    with pytest.raises(ValueError, match="--vocab-size 255 is too small for ByteLevelTokenizer"):
        preprocess(*flags, *BYTES, "--vocab-size", 255)


@pytest.mark.parametrize("kind", ["bytes", "bytes-256", "hugging-face"])
def test_what_is_written_is_trained_on(tmp_path: Path, with_end: Path, flags, kind: str) -> None:
    tokenizer = [*HUGGING_FACE, with_end] if kind == "hugging-face" else [*BYTES]
    if kind == "bytes-256":
        tokenizer += ["--vocab-size", 256]
    preprocess(*flags, *tokenizer)
    data = ["--data-path", tmp_path / "out_text_document", "--split", "1,0,0"]
    save = ["--save", tmp_path / "saved"]
    (record,) = train(flags_of(MODEL, LLAMA, BATCH, NO_DROPOUT, data, tokenizer, save, "--train-iters 1"))
    size = {"bytes": 512, "bytes-256": 256, "hugging-face": 300}[kind]
    assert abs(record["lm_loss"] - np.log(size)) < 0.2
    again = _models._tokenizer_for(_models._args_of(tmp_path / "saved", None, "none"), None, None)
    assert again.vocab_size == size  # evaluate.py's
