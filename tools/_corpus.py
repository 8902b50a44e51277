"""Which files a corpus consists of, and in which order: the same on every machine for the same files."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from _compressed import plain_name, read_content

TEXT_SUFFIXES = (".txt", ".py")
"""What a directory is searched for if the user does not say."""
SKIPPED_DIRECTORIES = frozenset({"__pycache__", "site-packages", "dist-packages"})
"""Never descended into, so that the standard library's directory means the standard library. Hidden ones neither."""


def stdlib_directory() -> Path:
    """The standard library of the running Python: real text that every machine has (10 to 35 MB of .py and .txt)."""
    return Path(sysconfig.get_path("stdlib"))


def collect_files(inputs: Iterable[str | Path], suffixes: Sequence[str] = TEXT_SUFFIXES) -> list[Path]:
    """The files that `inputs` name: a file is taken whatever its suffix, a directory is searched for `suffixes`.

    Files keep the order of `inputs`; those of a directory are sorted by their path below it. A file met twice is taken
    once. Links to directories are not followed. A suffix stands for its compressed files too: .txt finds .txt.gz.

    Raises ValueError for an input that does not exist and for a directory that holds no such file.
    """
    files: dict[Path, Path] = {}
    for item in map(Path, inputs):
        if item.is_dir():
            found = _search(item, tuple(suffixes))
            if not found:
                raise ValueError(f"{item} holds no file that ends in {' or '.join(suffixes)}")
        elif item.exists():
            found = [item]
        else:
            raise ValueError(f"input {item} does not exist")
        for path in found:
            files.setdefault(path.resolve(), path)
    return list(files.values())


def _search(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_reraise):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_DIRECTORIES and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.name.endswith(suffixes) or plain_name(path).endswith(suffixes)]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


def _reraise(error: OSError) -> None:
    raise error


def read_text(path: Path) -> str | None:
    """The file's text without a byte order mark, decompressed, or None if it is not UTF-8.

    Such files are left out whole, and counted: replacement characters would be learnt as if they were text. Raises
    ValueError where compressed data are damaged.
    """
    try:
        return read_content(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def left_out(paths: Sequence[Path]) -> str:
    """The sentence about the files that `read_text` refused; empty if there are none."""
    if not paths:
        return ""
    one = len(paths) == 1
    return f"{len(paths)} file{'' if one else 's'} left out for not being UTF-8, {'' if one else 'first '}{paths[0]}"
