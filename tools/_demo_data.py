"""Real text that every machine has, tokenized for the demo and the replays."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _children import run_tool
from _cli import write_atomically
from _corpus import collect_files

VOCAB_SIZE = 4096
SAMPLE_MEGABYTES = 8
"""Of text, from which the tokenizer learns."""


def prepare_data(data: Path, inputs: Sequence[str | Path]) -> None:
    """Tokenizer and tokenized text under `data`, made unless they are there, whole and of these settings and files."""
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in collect_files(inputs)]
    settings = {
        "vocab_size": VOCAB_SIZE,
        "sample_megabytes": SAMPLE_MEGABYTES,
        "input": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
    }
    stamp, model, prefix = data / "settings.json", data / "tokenizer.model", data / "corpus"
    products = [model, *(Path(f"{prefix}_text_document{end}") for end in (".bin", ".idx"))]
    if stamp.is_file() and stamp.read_bytes() == _stamp(settings, products):
        print(f"reusing tokenizer and data of {data}", file=sys.stderr)
        return
    if data.exists():
        shutil.rmtree(data)  # with the cache, which megatron-core keys by path and not by content
    run_tool("train_tokenizer.py", "--input", *inputs, "--vocab-size", VOCAB_SIZE, "--sample-megabytes",
             SAMPLE_MEGABYTES, "--output", model)
    run_tool("preprocess_data.py", "--input", *inputs, "--tokenizer-type", "SentencePieceTokenizer",
             "--tokenizer-model", model, "--append-eod", "--workers", 2, "--output-prefix", prefix)
    write_atomically(stamp, _stamp(settings, products))


def _stamp(settings: dict[str, Any], products: Sequence[Path]) -> bytes:
    """What is true of products, whole or not, that were made with these settings."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in products]
    return json.dumps({**settings, "sha256": digests}, indent=2).encode()
