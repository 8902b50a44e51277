"""Documents of a corpus: lines of JSON, or whole files of text, compressed or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from _compressed import plain_name, read_lines
from _corpus import read_text

JSON_SUFFIXES = (".jsonl", ".json")
PLAIN_TEXT_KEY = "text"
CHUNK_BYTES = 1 << 20
CHUNK_DOCUMENTS = 256


class Document(NamedTuple):
    """A line of JSON, or a whole file (line 0, raw None: whoever needs the text reads it).

    `size`: bytes that it takes in memory, unless it is a compressed file; `stored`: bytes that it takes in its file.
    """

    source: Path
    line: int
    raw: bytes | None
    size: int
    stored: int

    @property
    def where(self) -> str:
        """The file, and the line where there is one."""
        return f"{self.source} line {self.line}" if self.line else str(self.source)


def documents(files: Iterable[Path], keys: Sequence[str]) -> Iterator[Document]:
    """Every document of the files, in order: a line of a .jsonl or .json file each, otherwise a file each.

    Raises ValueError for compressed data that are damaged, and for keys other than "text" of a file without keys.
    """
    for path in files:
        if plain_name(path).endswith(JSON_SUFFIXES):
            unread = 0  # of blank lines before
            for number, (line, stored) in enumerate(read_lines(path), start=1):
                unread += stored
                if line.strip():
                    yield Document(path, number, line, len(line), unread)
                    unread = 0
        elif list(keys) == [PLAIN_TEXT_KEY]:
            size = path.stat().st_size
            yield Document(path, 0, None, size, size)
        else:
            raise ValueError(f"--json-keys {' '.join(keys)} needs JSON lines, but {path} is not named .jsonl or .json")


def texts_of(document: Document, keys: Sequence[str]) -> dict[str, str] | None:
    """The document's text under each key, or None if it is a file that is not UTF-8.

    Raises ValueError, naming file and line, for a line that is not JSON in UTF-8, or lacks a text under a key.
    """
    if document.raw is None:
        text = read_text(document.source)
        return None if text is None else {PLAIN_TEXT_KEY: text}
    where = document.where
    try:
        record = json.loads(document.raw.strip().decode("utf-8-sig" if document.line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"{where} cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    texts = {}
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"{where} has no key {key!r} (--json-keys)")
        if not isinstance(record[key], str):
            raise ValueError(f"{where} has no string under {key!r} but {type(record[key]).__name__}")
        texts[key] = record[key]
        try:
            texts[key].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has half a surrogate pair under {key!r}, which is no text") from error
    return texts


def chunks(source: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in groups of about `CHUNK_BYTES`."""
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
