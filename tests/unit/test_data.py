"""Checks of data files before megatron-core maps them, the order of samples, tokenizers and vocabulary padding."""

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.functional.common import write_corpus

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
HEADER = 9 + 8 + 1 + 8 + 8


@pytest.fixture
def data(megatron):
    from megatron_geoscale.training import data

    return data


@pytest.fixture
def prefix(data, tmp_path):
    return str(write_corpus(tmp_path / "corpus", DOCUMENTS))


def overwrite(path, at, form, value):
    content = bytearray(Path(path).read_bytes())
    struct.pack_into(form, content, at, value)
    Path(path).write_bytes(content)


def refused(data, prefix, *words):
    """`check_indexed_dataset` names the file and says these words, in one sentence."""
    with pytest.raises(ValueError) as refusal:
        data.check_indexed_dataset(prefix)
    sentence = str(refusal.value)
    assert prefix in sentence and all(word in sentence for word in words) and "\n" not in sentence, sentence


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_whole_datasets_of_each_type_pass(data, tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(np.array(document, dtype=dtype), [len(document)])
    builder.finalize(str(tmp_path / "x.idx"))
    data.check_indexed_dataset(str(tmp_path / "x"))
    assert [list(document) for document in IndexedDataset(str(tmp_path / "x"))] == DOCUMENTS
    with open(tmp_path / "x.bin", "rb+") as file:
        file.truncate(9 * np.dtype(dtype).itemsize - 1)
    refused(data, str(tmp_path / "x"), "x.bin is truncated")


def test_every_truncation_of_the_index_is_refused(data, prefix):
    content = Path(prefix + ".idx").read_bytes()
    assert len(content) == HEADER + 3 * 4 + 3 * 8 + 4 * 8
    for size in range(len(content)):
        Path(prefix + ".idx").write_bytes(content[:size])
        refused(data, prefix, ".idx", "truncated")


@pytest.mark.parametrize("missing", [".idx", ".bin"])
def test_missing_file_is_named(data, prefix, missing, tmp_path):
    (tmp_path / f"corpus{missing}").unlink()
    refused(data, prefix, f"{prefix}{missing} does not exist")
    (tmp_path / f"corpus{missing}").mkdir()
    refused(data, prefix, missing)


def test_foreign_and_damaged_indexes_are_refused(data, prefix):
    overwrite(prefix + ".idx", 9, "<Q", 2)
    refused(data, prefix, ".idx", "version")
    overwrite(prefix + ".idx", 9, "<Q", 1)
    overwrite(prefix + ".idx", 17, "<B", 99)
    refused(data, prefix, ".idx", "99")
    overwrite(prefix + ".idx", 17, "<B", 4)
    data.check_indexed_dataset(prefix)
    overwrite(prefix + ".idx", 18, "<Q", 2**60)
    refused(data, prefix, ".idx", "truncated")
    Path(prefix + ".idx").write_bytes(b"PK\x03\x04" + bytes(200))
    refused(data, prefix, "not a Megatron index file")


def test_pointer_past_the_data_is_a_truncated_file(data, prefix):
    overwrite(prefix + ".idx", HEADER + 3 * 4 + 2 * 8, "<q", 1 << 40)
    refused(data, prefix, ".bin is truncated")


def test_empty_corpus_says_so(data, tmp_path):
    refused(data, str(write_corpus(tmp_path / "empty", [])), "the corpus is empty")


def test_corpus_of_empty_documents_says_so(data, tmp_path):
    refused(data, str(write_corpus(tmp_path / "empty", [[], []])), "the corpus is empty")


@pytest.mark.parametrize(
    ("tokens", "divisible_by", "tensor_parallel", "padded"),
    [(50257, 128, 1, 50304), (50257, 128, 2, 50432), (32000, 128, 8, 32768), (128, 128, 1, 128), (1, 1, 1, 1)],
)
def test_vocabulary_is_padded_as_megatron_pads(data, tokens, divisible_by, tensor_parallel, padded):
    assert data.padded_vocab_size(tokens, divisible_by, tensor_parallel) == padded


def test_sampler_deals_out_micro_batches_in_order(data):
    one = list(data.BatchSampler(total=13, consumed=0, micro_batch_size=2, rank=0, size=1))
    assert one == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    two = [list(data.BatchSampler(13, 0, 2, rank, 2)) for rank in range(2)]
    assert two == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sampler_goes_on_where_any_layout_stopped(data, size):
    rest = [list(data.BatchSampler(64, 16, 2, rank, size)) for rank in range(size)]
    dealt = [sample for turn in zip(*rest, strict=True) for batch in turn for sample in batch]
    assert dealt == list(range(16, 64))


def test_null_tokenizer_has_one_token_more(data):
    tokenizer = data.build_tokenizer("NullTokenizer", None, 60)
    assert tokenizer.vocab_size == 61 and tokenizer.eod == 60
    assert tokenizer.tokenize("3 5") == [3, 5]


def test_byte_tokenizer_is_megatron_cores(data):
    tokenizer = data.build_tokenizer("ByteLevelTokenizer", None, None)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (512, 0, 1)
    assert tokenizer.tokenize("aé\n") == list("aé\n".encode())
    assert data.build_tokenizer("ByteLevelTokenizer", None, 256).vocab_size == 256
    with pytest.raises(ValueError, match="--vocab-size 255 is too small for ByteLevelTokenizer: there are 256"):
        data.build_tokenizer("ByteLevelTokenizer", None, 255)


@pytest.fixture
def sentencepiece_model(tmp_path):
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "small"), vocab_size=40, model_type="bpe", minloglevel=2
    )
    return str(tmp_path / "small.model")


def test_sentencepiece_vocabulary_is_checked(data, sentencepiece_model):
    for kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        tokenizer = data.build_tokenizer(kind, sentencepiece_model, None)
        assert tokenizer.vocab_size == 40
        assert tokenizer.detokenize(tokenizer.tokenize("the lazy fox")).strip() == "the lazy fox"
        assert data.build_tokenizer(kind, sentencepiece_model, 40).vocab_size == 40
        with pytest.raises(ValueError, match=r"--vocab-size 41 .* has 40 tokens$"):
            data.build_tokenizer(kind, sentencepiece_model, 41)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer"])
def test_unreadable_tokenizers_are_named(data, tmp_path, kind):
    missing, garbage = tmp_path / "missing", tmp_path / "garbage"
    if kind == "HuggingFaceTokenizer":
        garbage.mkdir()
        (garbage / "tokenizer.json").write_text("{")
    else:
        garbage.write_bytes(b"not a model")
    for path in (missing, garbage):
        with pytest.raises(ValueError) as refusal:
            data.build_tokenizer(kind, str(path), None)
        sentence = str(refusal.value)
        assert sentence.startswith(f"--tokenizer-model {path} ") and "\n" not in sentence
