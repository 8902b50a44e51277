#!/usr/bin/env python3
"""Train a sentencepiece tokenizer on text or JSON lines. The same text gives the same bytes, on any number of cores.

    python tools/train_tokenizer.py --input DIR_OR_FILE... --vocab-size 8192 --output tokenizer.model

The model loses nothing: spaces, newlines and characters that it has not seen survive encoding and decoding (the last as
bytes); only U+2581, sentencepiece's own sign for a space, comes back as a space. Ids 0, 1, 2 are <unk>, <s>, </s>; the
last is what `preprocess_data.py --append-eod` appends. Input is what preprocess_data.py takes, compressed or not.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from _cli import ArgumentParser, run, write_atomically
from _compressed import content_size
from _corpus import TEXT_SUFFIXES, collect_files, left_out
from _documents import PLAIN_TEXT_KEY, documents, texts_of

MAX_PIECE_OF_LINE = 4096
"""Characters; longer lines are cut, since sentencepiece would drop them."""
MAX_BYTES_OF_CHARACTER = 4
SMALLEST_VOCABULARY = 3 + 256
"""Ids of <unk>, <s>, </s> and of the bytes."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="Train a sentencepiece tokenizer on text or JSON lines.")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, or directories of them")
    parser.add_argument("--json-keys", nargs="+", default=[PLAIN_TEXT_KEY], metavar="KEY",
                        help="keys of the JSON lines to train on (default: text)")
    parser.add_argument("--suffix", nargs="+", default=list(TEXT_SUFFIXES), metavar="SUFFIX",
                        help="which files of a directory to take (default: .txt .py)")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of ids, bytes included")
    parser.add_argument("--output", "--model-prefix", required=True, metavar="FILE",
                        help="the model to write; .model is appended if it is not there")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe",
                        help="unigram takes about ten times as long (default: bpe)")
    parser.add_argument("--sample-megabytes", type=float, default=64, metavar="MB",
                        help="train on about so much of the text, lines taken evenly; 0 takes all (default: 64)")
    args = parser.parse_args(argv)
    if args.vocab_size <= SMALLEST_VOCABULARY:
        parser.error(f"--vocab-size must be above {SMALLEST_VOCABULARY}, for the bytes and <unk>, <s>, </s>,"
                     f" not {args.vocab_size}")
    if args.sample_megabytes < 0:
        parser.error(f"--sample-megabytes must not be negative, not {args.sample_megabytes:g}")
    return args


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts that hold anything, long ones cut."""
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                for start in range(0, len(line), MAX_PIECE_OF_LINE):
                    yield line[start : start + MAX_PIECE_OF_LINE]


def sample(lines: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the text, spread evenly over it, chosen by position alone."""
    seen = kept = 0
    for line in lines:
        seen += len(line)
        if kept <= share * seen - len(line) or share >= 1:
            kept += len(line)
            yield line


def train(lines: Iterable[str], vocab_size: int, model_type: str = "bpe") -> bytes:
    """The serialized model. Raises ValueError if the text has too few or too many different pieces for `vocab_size`."""
    import sentencepiece

    model = io.BytesIO()  # neither this nor the iterator puts a path into the model, which would change its bytes
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=1,  # recorded in the model, and unigram's sums depend on it
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9999,
            max_sentence_length=MAX_PIECE_OF_LINE * MAX_BYTES_OF_CHARACTER,
            minloglevel=2,
        )
    except RuntimeError as error:
        if too_high := re.search(r"too high.* (\d+)\.", str(error)):
            reason = f"it has pieces for at most {too_high[1]} ids"
        elif too_low := re.search(r"\d+ vs (\d+)", str(error)):
            reason = f"its characters alone need {too_low[1]} ids"
        else:
            reason = str(error)
        raise ValueError(f"--vocab-size {vocab_size} does not fit this text: {reason}") from error
    return model.getvalue()


def main() -> None:
    args = parse()
    output = Path(args.output if args.output.endswith(".model") else args.output + ".model")
    if output.is_dir():
        raise ValueError(f"--output {output} is a directory")
    files = collect_files(args.input, args.suffix)
    total = sum(map(content_size, files))
    if total == 0:
        raise ValueError(f"no text in {' '.join(args.input)}")
    refused: list[Path] = []

    def texts() -> Iterator[str]:
        stored = sum(path.stat().st_size for path in files)
        with tqdm(total=stored, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
            for document in documents(files, args.json_keys):
                found = texts_of(document, args.json_keys)
                if found is None:
                    refused.append(document.source)
                else:
                    yield from found.values()
                bar.update(document.stored)

    share = args.sample_megabytes * 1e6 / total if args.sample_megabytes else 1.0
    lines = list(sample(pieces(texts()), share))
    if not lines:
        raise ValueError(f"no text in {' '.join(args.input)}" + (f" ({left_out(refused)})" if refused else ""))
    if refused:
        print(left_out(refused), file=sys.stderr)
    megabytes = sum(len(line.encode()) for line in lines) / 1e6
    print(f"training {args.model_type} on {len(lines)} lines, {megabytes:.1f} MB", file=sys.stderr, flush=True)
    started = time.monotonic()
    write_atomically(output, train(lines, args.vocab_size, args.model_type))
    print(f"{output}: {args.vocab_size} ids from {megabytes:.1f} MB in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    sys.exit(run(main))
