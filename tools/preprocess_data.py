#!/usr/bin/env python3
"""Tokenize text into Megatron's indexed dataset, PREFIX_text_document.bin and .idx: `--data-path PREFIX_text_document`.

    python tools/preprocess_data.py --input DIR_OR_FILE... --output-prefix PREFIX \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod --workers 4

Input is JSON lines (files named .jsonl or .json, one document a line, the texts under `--json-keys`, one dataset a key)
or plain text (one document a file; directories are searched for `--suffix`). Files that are not UTF-8 are left out and
counted; in JSON lines that is an error, as is a line without the key. Empty texts are left out too.

The output is the same bytes for any number of workers. It is written to *.partial and renamed when it is complete,
.idx last, and an older .idx of that name is removed before its .bin is replaced: whatever is killed when, no .bin meets
an .idx that does not belong to it. Flags have Megatron-LM's names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from _cli import ArgumentParser, naming, partial_path, run, sync
from _corpus import TEXT_SUFFIXES, collect_files, left_out, read_text

TOKENIZER_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer", "NullTokenizer")
"""Those of pretrain.py, named here since its module of arguments imports megatron-core."""
JSON_SUFFIXES = (".jsonl", ".json")
PLAIN_TEXT_KEY = "text"
CHUNK_BYTES = 1 << 20
CHUNK_DOCUMENTS = 256
CHUNKS_IN_FLIGHT_PER_WORKER = 3


class Document(NamedTuple):
    """A line of JSON, or a whole file (line 0, raw None: the worker reads it)."""

    source: Path
    line: int
    raw: bytes | None
    size: int


@dataclass
class Encoded:
    """A chunk's tokens, in the order of its documents."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, list[int]]
    documents: int = 0
    size: int = 0
    empty: int = 0
    refused: list[Path] = field(default_factory=list)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="Tokenize text into Megatron's indexed dataset.")
    group = parser.add_argument_group("input")
    group.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, or directories of text files")
    group.add_argument("--json-keys", nargs="+", default=[PLAIN_TEXT_KEY], metavar="KEY",
                       help="keys of the JSON lines to tokenize, a dataset each (default: text)")
    group.add_argument("--suffix", nargs="+", default=list(TEXT_SUFFIXES), metavar="SUFFIX",
                       help="which files of a directory to take (default: .txt .py)")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    group.add_argument("--tokenizer-model", metavar="PATH",
                       help="the .model file of sentencepiece; a directory, or a name on the Hub, for Hugging Face")
    group.add_argument("--vocab-size", type=int, metavar="N",
                       help="for NullTokenizer, whose text is numbers below N; for another, a check of its size")
    group.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="PREFIX_KEY_document.bin and .idx")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    group.add_argument("--log-interval", type=int, default=1000, metavar="N",
                       help="documents between two lines of progress where stderr is no terminal (default: 1000)")
    args = parser.parse_args(argv)
    for flag in ("workers", "log_interval"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be 1 or more, not {getattr(args, flag)}")
    if args.tokenizer_type == "NullTokenizer":
        if args.vocab_size is None or args.vocab_size < 1:
            parser.error("--tokenizer-type NullTokenizer needs --vocab-size of 1 or more")
    elif args.tokenizer_model is None:
        parser.error(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model")
    elif args.tokenizer_type == "HuggingFaceTokenizer":
        if importlib.util.find_spec("transformers") is None:
            parser.error("HuggingFaceTokenizer needs transformers: pip install 'megatron-geoscale[hf]'")
        if Path(args.tokenizer_model).is_absolute() and not Path(args.tokenizer_model).exists():
            parser.error(f"--tokenizer-model {args.tokenizer_model} does not exist")
    elif not Path(args.tokenizer_model).is_file():
        parser.error(f"--tokenizer-model {args.tokenizer_model} does not exist")
    return args


def import_megatron() -> tuple[Any, Any]:
    """What builds pretrain.py's tokenizer, and megatron-core's indexed datasets; late, as it takes seconds."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is one process a worker already
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # documents longer than the model's context are meant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Transformer Engine and Apex, which have no part in this
        import megatron.core.datasets.indexed_dataset as dataset

        from megatron_geoscale.training.data import build_tokenizer
    return build_tokenizer, dataset


class Encoder:
    """Chunks of documents to token ids; one in each worker."""

    def __init__(self, args: argparse.Namespace) -> None:
        build_tokenizer, _ = import_megatron()
        self.tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
        self.keys: list[str] = list(dict.fromkeys(args.json_keys))
        self.null = args.tokenizer_type == "NullTokenizer"
        self.vocab_size = int(self.tokenizer.vocab_size)
        self.eod: list[int] = []
        if args.append_eod:
            if self.tokenizer.eod is None or self.tokenizer.eod < 0:
                raise ValueError(f"--append-eod: {args.tokenizer_model} has no end-of-document token")
            self.eod = [int(self.tokenizer.eod)]

    def __call__(self, chunk: list[Document]) -> Encoded:
        ids: dict[str, list[int]] = {key: [] for key in self.keys}
        out = Encoded(tokens={}, lengths={key: [] for key in self.keys})
        for document in chunk:
            out.documents += 1
            out.size += document.size
            texts = self.texts(document)
            if texts is None:
                out.refused.append(document.source)
                continue
            for key, text in texts.items():
                found = self.ids(text, document)
                if found:
                    ids[key] += found + self.eod
                    out.lengths[key].append(len(found) + len(self.eod))
                else:
                    out.empty += 1
        out.tokens = {key: np.array(values, dtype=np.int32) for key, values in ids.items()}
        return out

    def texts(self, document: Document) -> dict[str, str] | None:
        """The document's text under each key, or None if it is a file that is not UTF-8."""
        if document.raw is None:
            text = read_text(document.source)
            return None if text is None else {PLAIN_TEXT_KEY: text}
        where = f"{document.source} line {document.line}"
        try:
            record = json.loads(document.raw.strip().decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg} (column {error.colno})") from error
        except RecursionError as error:
            raise ValueError(f"{where} is nested too deeply") from error
        texts = {}
        for key in self.keys:
            if not isinstance(record, dict) or key not in record:
                raise ValueError(f"{where} has no key {key!r} (--json-keys)")
            if not isinstance(record[key], str):
                raise ValueError(f"{where} has no string under {key!r} but {type(record[key]).__name__}")
            texts[key] = record[key]
        return texts

    def ids(self, text: str, document: Document) -> list[int]:
        where = f"{document.source} line {document.line}" if document.line else str(document.source)
        if not text:
            return []
        if self.null:
            text = " ".join(text.split())
        try:
            ids = self.tokenizer.tokenize(text) if text else []
        except ValueError as error:
            raise ValueError(f"{where} cannot be tokenized: {error}") from error
        limit = self.vocab_size - self.null  # the last of NullTokenizer's ids is its end-of-document token
        if ids and (min(ids) < 0 or max(ids) >= limit):
            raise ValueError(f"{where} has a token id outside the vocabulary of {limit} ids")
        return ids


def documents(files: Iterable[Path], keys: list[str]) -> Iterator[Document]:
    """Every document of the files, in order."""
    for path in files:
        if path.suffix in JSON_SUFFIXES:
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield Document(path, number, line, len(line))
        elif keys == [PLAIN_TEXT_KEY]:
            yield Document(path, 0, None, path.stat().st_size)
        else:
            raise ValueError(f"--json-keys {' '.join(keys)} needs JSON lines, but {path} is not named .jsonl or .json")


def chunks(source: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in source:
        chunk.append(document)
        size += document.size
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_encoder: Encoder


def start_worker(args: argparse.Namespace) -> None:
    """In each worker: leave signals to the parent, and go when it goes, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    global _encoder
    _encoder = Encoder(args)


def encode_in_worker(chunk: list[Document]) -> Encoded:
    return _encoder(chunk)


def encode_all(source: Iterable[list[Document]], encoder: Encoder, args: argparse.Namespace) -> Iterator[Encoded]:
    """The encoded chunks, in order. Only a few chunks a worker are held at once, so memory does not grow with input."""
    if args.workers == 1:
        yield from map(encoder, source)
        return
    # A fork inherits megatron-core, whose import takes seconds; elsewhere than on Linux forks are not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=context, initializer=start_worker, initargs=(args,))
    try:
        waiting: deque[Any] = deque()
        for chunk in source:
            waiting.append(pool.submit(encode_in_worker, chunk))
            if len(waiting) >= CHUNKS_IN_FLIGHT_PER_WORKER * args.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process died, most likely for lack of memory: try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def publish(prefixes: Iterable[Path]) -> None:
    """Give complete datasets their names. In between, and after a crash, no .bin stands beside a foreign .idx."""
    for prefix in prefixes:
        binary, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        with naming(binary):
            sync(partial_path(binary))
            sync(partial_path(index))
            index.unlink(missing_ok=True)
            sync(binary.parent)
            os.replace(partial_path(binary), binary)
            sync(binary.parent)
            os.replace(partial_path(index), index)
            sync(binary.parent)


def preprocess(args: argparse.Namespace) -> str:
    """Write the datasets that the parsed flags ask for; returns a line for each that says what it holds."""
    files = collect_files(args.input, args.suffix)
    started = time.monotonic()
    encoder = Encoder(args)
    _, megatron_data = import_megatron()
    dtype = megatron_data.DType.optimal_dtype(encoder.vocab_size)
    prefixes = {key: Path(f"{args.output_prefix}_{key}_document") for key in encoder.keys}
    partials = [partial_path(Path(f"{prefix}{end}")) for prefix in prefixes.values() for end in (".bin", ".idx")]
    total = sum(path.stat().st_size for path in files)
    refused: list[Path] = []
    count = tokens = empty = size = 0
    next_log = args.log_interval
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    tqdm.monitor_interval = 0  # its thread would be running when the workers are forked
    try:
        builders = {
            key: megatron_data.IndexedDatasetBuilder(str(partial_path(Path(f"{prefix}.bin"))), dtype=dtype)
            for key, prefix in prefixes.items()
        }
        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
            for encoded in encode_all(chunks(documents(files, encoder.keys)), encoder, args):
                for key, builder in builders.items():
                    with naming(prefixes[key]):
                        start = 0
                        for length in encoded.lengths[key]:
                            builder.add_document(encoded.tokens[key][start : start + length], [length])
                            start += length
                    tokens += start
                count += encoded.documents
                size += encoded.size
                empty += encoded.empty
                refused += encoded.refused
                bar.update(encoded.size)
                if bar.disable and count >= next_log:
                    speed = size / 1e6 / (time.monotonic() - started)
                    print(f"{count} documents, {size / 1e6:.1f} of {total / 1e6:.1f} MB, {tokens} tokens, "
                          f"{speed:.1f} MB/s", file=sys.stderr, flush=True)
                    next_log = (count // args.log_interval + 1) * args.log_interval
        for key, builder in builders.items():
            if not builder.sequence_lengths:
                why = f" ({left_out(refused)})" if refused else ""
                raise ValueError(f"no text under {key!r} in {' '.join(args.input)}{why}")
            with naming(prefixes[key]):
                builder.finalize(str(partial_path(Path(f"{prefixes[key]}.idx"))))
        publish(prefixes.values())
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    if refused:
        print(left_out(refused), file=sys.stderr)
    if empty:
        print(f"{empty} empty texts left out", file=sys.stderr)
    seconds = time.monotonic() - started
    return "\n".join(
        f"{prefixes[key]}: {len(builder.sequence_lengths)} documents, {sum(builder.sequence_lengths)} tokens as "
        f"{np.dtype(dtype).name}, {seconds:.1f} s"
        for key, builder in builders.items()
    )


def main() -> None:
    print(preprocess(parse()))


if __name__ == "__main__":
    sys.exit(run(main))
