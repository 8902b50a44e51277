"""What the command-line tools share: how a mistake is reported, and how a file appears whole or not at all.

A tool ends with `sys.exit(run(main))`. A user's mistake is a ValueError or OSError; it becomes one sentence on stderr
and exit code 2. With GEOSCALE_TRACEBACK=1 in the environment the traceback comes first.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is answered by one sentence instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def run(main: Callable[[], None]) -> int:
    """Run `main` and return the exit code: 0, or 2 after one sentence about a mistake of the user.

    SIGTERM unwinds like an exception, so that what `main` cleans up is cleaned up.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("GEOSCALE_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).name}: error: {describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def describe(error: Exception) -> str:
    """The error as one line that names the file, if it has one."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())


def partial_path(path: Path) -> Path:
    """Where the content of `path` is written until it is whole."""
    return path.with_name(path.name + ".partial")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError that names no file, as a full disk gives, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Force a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`; whoever reads `path` meanwhile, or after a crash, sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with naming(path):
            partial.write_bytes(data)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
