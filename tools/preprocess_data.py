#!/usr/bin/env python3
"""Tokenize text into Megatron's indexed dataset, PREFIX_text_document.bin and .idx: `--data-path PREFIX_text_document`.

    python tools/preprocess_data.py --input DIR_OR_FILE... --output-prefix PREFIX \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod --workers 4

Input is JSON lines (files named .jsonl or .json, one document a line, the texts under `--json-keys`, one dataset a key)
or plain text (one document a file; directories are searched for `--suffix`), each of them compressed with gzip or
Zstandard or not. Files that are not UTF-8 are left out and counted; in JSON lines that is an error, as is a line
without the key. Empty texts are left out too.

The output is the same bytes for any number of workers. It is written to *.partial and renamed when it is complete,
.idx last, and an older .idx of that name is removed before its .bin is replaced: whatever is killed when, no .bin meets
an .idx that does not belong to it. Flags have Megatron-LM's names.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from _cli import ArgumentParser, naming, partial_path, run, sync
from _corpus import TEXT_SUFFIXES, collect_files, left_out
from _documents import PLAIN_TEXT_KEY, chunks, documents
from _encoding import Encoder, encode_all, import_megatron

TOKENIZER_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer", "ByteLevelTokenizer",
                   "NullTokenizer")
"""Those of pretrain.py, named here since its module of arguments imports megatron-core."""
WITHOUT_MODEL = ("ByteLevelTokenizer", "NullTokenizer")


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
                       help="sentencepiece's .model file; Hugging Face's directory, or the tokenizer.json in it")
    group.add_argument("--vocab-size", type=int, metavar="N",
                       help="of NullTokenizer, whose text is numbers below N; of ByteLevelTokenizer, 256 or more "
                       "(default: 512); for another, a check of its size")
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
    for key in args.json_keys:
        if "/" in key or "\0" in key:
            parser.error(f"--json-keys {key!r} cannot be part of a file's name")
    if args.tokenizer_type in WITHOUT_MODEL:
        if args.tokenizer_type == "NullTokenizer" and (args.vocab_size is None or args.vocab_size < 1):
            parser.error("--tokenizer-type NullTokenizer needs --vocab-size of 1 or more")
    elif args.tokenizer_model is None:
        parser.error(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model")
    elif not Path(args.tokenizer_model).exists():
        parser.error(f"--tokenizer-model {args.tokenizer_model} does not exist")
    return args


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
    count = tokens = empty = stored = 0
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
                stored += encoded.stored
                empty += encoded.empty
                refused += encoded.refused
                bar.update(encoded.stored)
                if bar.disable and count >= next_log:
                    speed = stored / 1e6 / (time.monotonic() - started)
                    print(f"{count} documents, {stored / 1e6:.1f} of {total / 1e6:.1f} MB, {tokens} tokens, "
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
