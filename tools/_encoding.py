"""Chunks of documents to token ids, in one process or in many; the result does not depend on how many."""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from _documents import Document, texts_of

CHUNKS_IN_FLIGHT_PER_WORKER = 3


@dataclass
class Encoded:
    """A chunk's tokens, in the order of its documents."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, list[int]]
    documents: int = 0
    stored: int = 0
    empty: int = 0
    refused: list[Path] = field(default_factory=list)


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
            out.stored += document.stored
            texts = texts_of(document, self.keys)
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

    def ids(self, text: str, document: Document) -> list[int]:
        if self.null:
            text = " ".join(text.split())
        try:
            ids: list[int] = self.tokenizer.tokenize(text) if text else []
        except Exception as error:  # of the tokenizers' libraries there is no common class
            raise ValueError(f"{document.where} cannot be tokenized: {error}") from error
        limit = self.vocab_size - self.null  # the last of NullTokenizer's ids is its end-of-document token
        if ids and (min(ids) < 0 or max(ids) >= limit):
            raise ValueError(f"{document.where} has a token id outside the vocabulary of {limit} ids")
        return ids


_encoder: Encoder


def _start_worker(args: argparse.Namespace) -> None:
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


def _encode_in_worker(chunk: list[Document]) -> Encoded:
    return _encoder(chunk)


def encode_all(source: Iterable[list[Document]], encoder: Encoder, args: argparse.Namespace) -> Iterator[Encoded]:
    """The encoded chunks, in order. Only a few chunks a worker are held at once, so memory does not grow with input."""
    if args.workers == 1:
        yield from map(encoder, source)
        return
    # A fork inherits megatron-core, whose import takes seconds; elsewhere than on Linux forks are not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=context, initializer=_start_worker, initargs=(args,))
    try:
        waiting: deque[Any] = deque()
        for chunk in source:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= CHUNKS_IN_FLIGHT_PER_WORKER * args.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process died, most likely for lack of memory: try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
