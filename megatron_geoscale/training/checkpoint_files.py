"""Where checkpoints lie, which of them are whole, and how one takes its name, so that a kill at any moment loses none.

    DIR/latest_checkpointed_iteration.txt    the iteration of the last complete checkpoint
    DIR/iter_0000010/            a complete checkpoint; megatron-core writes its metadata.json last
    DIR/iter_0000010.partial     one that is being written, or that a kill has left behind
    DIR/iter_0000010.stale       the one that iter_0000010 is about to replace, whole: it stands in where a kill came
                                 between the two renames
    DIR/iter_0000010.deleting    one on its way out

Only rank 0 changes anything here; every rank reads. Nothing here needs megatron-core or a process group.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_geoscale.checkpoints.iterations import (
    STALE,
    TRACKER,
    find_iteration,
    iteration_directory,
    with_suffix,
)
from megatron_geoscale.checkpoints.torch_dist import COMMON
from megatron_geoscale.training.plain_pickles import plain_pickles

COMPLETE = "metadata.json"
"""The file that is written last: a directory without it is no complete checkpoint."""
_NAME = re.compile(r"iter_(\d{7,})(\.stale)?")


class DamagedCheckpointError(ValueError):
    """A checkpoint that is there and cannot be read; an older one may do."""


def complete_iterations(directory: str | Path) -> dict[int, Path]:
    """Every complete checkpoint in `directory` by its iteration, in rising order."""
    if not Path(directory).is_dir():
        return {}
    numbers = {int(match[1]) for path in Path(directory).iterdir() if (match := _NAME.fullmatch(path.name))}
    found = {number: find_iteration(directory, number) for number in sorted(numbers)}
    return {number: path for number, path in found.items() if (path / COMPLETE).is_file()}


def begin(directory: str | Path, iteration: int) -> Path:
    """Clear away what killed saves have left and make the directory to write to; returns it. Rank 0 alone."""
    for left in (*Path(directory).glob("iter_*.partial"), *Path(directory).glob("iter_*.deleting")):
        shutil.rmtree(left, ignore_errors=True)
    for stale in Path(directory).glob("iter_*.stale"):
        final = stale.with_suffix("")
        if final.exists():
            _delete(stale)
        else:
            stale.rename(final)
    partial = partial_directory(directory, iteration)
    partial.mkdir(parents=True)
    return partial


def partial_directory(directory: str | Path, iteration: int) -> Path:
    """Where a checkpoint is written until it is whole."""
    return with_suffix(iteration_directory(directory, iteration), "partial")


def publish(directory: str | Path, iteration: int, *, keep_last: int | None) -> Path:
    """Give a written checkpoint its name, make the tracker name it, and delete all complete older ones but the newest
    `keep_last` - 1 (None keeps all); returns its directory. Rank 0 alone."""
    final = iteration_directory(directory, iteration)
    stale = with_suffix(final, STALE)
    if final.exists():  # the same iteration again: the old one stays whole until the new one has its name
        final.rename(stale)
    partial_directory(directory, iteration).rename(final)
    if stale.exists():
        _delete(stale)
    tracker = Path(directory) / TRACKER
    fresh = tracker.with_suffix(".txt.partial")
    fresh.write_text(str(iteration))
    os.replace(fresh, tracker)
    if keep_last is not None:
        older = [path for number, path in complete_iterations(directory).items() if number < iteration]
        for path in older[: max(0, len(older) - keep_last + 1)]:
            _delete(path)
    return final


def _delete(path: Path) -> None:
    """Remove a checkpoint. What a kill leaves of it does not bear a checkpoint's name."""
    doomed = with_suffix(path, "deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def check_whole(directory: Path, *, trusted: bool = False) -> None:
    """Read what a checkpoint says is in which of its files, and look whether they are as long as that, and whether the
    flags are as they were written.

    Raises DamagedCheckpointError naming the directory. What is wrong inside a tensor shows only when it is loaded.
    """
    with reading(directory, trusted=trusted):
        if not (directory / COMPLETE).is_file():
            raise FileNotFoundError(f"it has no {COMPLETE}, which a complete checkpoint has")
        needed: dict[str, int] = {}
        for stored in FileSystemReader(directory).read_metadata().storage_data.values():
            end = stored.offset + stored.length
            needed[stored.relative_path] = max(end, needed.get(stored.relative_path, 0))
        for name, size in needed.items():
            if os.path.basename(name) != name:
                raise ValueError(f"{name!r} is no file of the directory")
            there = (directory / name).stat().st_size
            if there < size:
                raise ValueError(f"{name} has {there} bytes of {size}")
        with (directory / COMMON).open("rb") as file:
            _check_sums(file, COMMON)


def _check_sums(file: IO[bytes], name: str) -> None:
    """Raise ValueError unless a file of torch.save, a zip archive, is as it was written: torch does not look."""
    if zipfile.is_zipfile(file):  # another cannot be loaded at all
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{name} is not what was written: the check sum of {damaged} in it is another")
    file.seek(0)


@contextlib.contextmanager
def _checked_tensors() -> Iterator[None]:
    """Inside, what torch reads from a checkpoint's tensor files goes through `_check_sums`."""
    plain = FileSystemReader._slice_file

    def slice_file(reader: FileSystemReader, file: IO[bytes], stored: Any) -> IO[bytes]:
        part = io.BytesIO(plain(reader, file, stored).read(-1))  # torch's view of a part does not seek as zipfile does
        _check_sums(part, stored.relative_path)
        return part

    FileSystemReader._slice_file = slice_file  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader._slice_file = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def reading(directory: Path, *, trusted: bool = False) -> Iterator[None]:
    """Read a checkpoint inside: only plain pickles unless it is `trusted`, and DamagedCheckpointError, one sentence
    that names `directory`, for whatever goes wrong, because a damaged file raises anything."""
    try:
        with plain_pickles(trusted=trusted), _checked_tensors():
            yield
    except (Exception, CheckpointException) as error:
        raise DamagedCheckpointError(f"{directory} cannot be read as a checkpoint: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Kind and first line of an error of torch's checkpoint reader or writer; the first rank's, if collective."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    cause = next(iter(failures.values()))[0] if failures else error
    return f"{type(cause).__name__} {(str(cause).strip().splitlines() or [''])[0][:200]}"
