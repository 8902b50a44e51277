"""Content of files that may be compressed: gzip and Zstandard, known by their first bytes or by their name."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import zstandard

from _cli import naming

FORMATS = {".gz": "gzip", ".zst": "Zstandard"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard"}
"""Neither can begin UTF-8."""
_BLOCK_BYTES = 1 << 16
_LARGEST_WINDOW = 1 << 31  # what zstd --long=31 writes, above the library's default


def plain_name(path: Path) -> str:
    """The file's name without .gz or .zst."""
    return path.stem if path.suffix in FORMATS else path.name


def read_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines of the content with their ends, each with the number of the file's own bytes that were read for it.

    Raises ValueError, naming the file, where compressed data are damaged or end too early.
    """
    with naming(path), open(path, "rb") as file:
        form = _format(path, file)
        if form is None:
            for line in file:
                yield line, len(line)
            return
        before = 0
        with closing(_decompress(path, file, form)) as blocks:
            for line in io.BufferedReader(_Stream(blocks)):
                position = file.tell() if file.seekable() else 0
                yield line, position - before
                before = position


def read_content(path: Path) -> bytes:
    """The whole content. Raises ValueError as `read_lines`."""
    with naming(path), open(path, "rb") as file:
        form = _format(path, file)
        return file.read() if form is None else b"".join(_decompress(path, file, form))


def content_size(path: Path) -> int:
    """Bytes of the content; a compressed file is read for it. Raises ValueError as `read_lines`."""
    with naming(path), open(path, "rb") as file:
        form = _format(path, file)
        return path.stat().st_size if form is None else sum(map(len, _decompress(path, file, form)))


def _format(path: Path, file: io.BufferedReader) -> str | None:
    start = file.peek(4)
    return next((form for magic, form in _MAGIC.items() if start.startswith(magic)), FORMATS.get(path.suffix))


def _decompress(path: Path, file: io.BufferedReader, form: str) -> Iterator[bytes]:
    try:
        if not file.peek(1):
            raise EOFError
        yield from _gzip(file) if form == "gzip" else _zstandard(file)
    except EOFError as error:
        raise ValueError(f"{path} is truncated: its {form} data end too early") from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path} holds no {form} data, or damaged ones: {error}") from error


def _gzip(file: io.BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as content:
        while block := content.read(_BLOCK_BYTES):
            yield block


def _zstandard(file: io.BufferedReader) -> Iterator[bytes]:
    """Frame after frame: the library's stream_reader takes a truncated frame for the end of the file."""
    context = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame = context.decompressobj()
    while data := file.read(_BLOCK_BYTES):
        while data:
            if frame.eof:
                frame = context.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
    if not frame.eof:
        raise EOFError


class _Stream(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
