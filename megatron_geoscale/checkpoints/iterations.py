"""Where Megatron's checkpoints lie in a directory of --save: the tracker, and the directories of iterations."""

from __future__ import annotations

from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
STALE = "stale"
"""Suffix of a whole checkpoint that was being replaced by one of the same iteration."""


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    """DIR/iter_0000010 for iteration 10."""
    return Path(directory) / f"iter_{iteration:07d}"


def latest_iteration(directory: str | Path) -> int | None:
    """Iteration of the last complete checkpoint in `directory`, None where there is none.

    Raises ValueError naming the file where the tracker is not a number.
    """
    tracker = Path(directory) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace").strip()
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{tracker} must hold an iteration number, not {text[:40]!r}")
    return int(text)


def find_iteration(directory: str | Path, iteration: int) -> Path:
    """Directory of a checkpoint: the one of its name, or the one that a killed save was about to replace."""
    final = iteration_directory(directory, iteration)
    stale = with_suffix(final, STALE)
    return stale if stale.is_dir() and not final.exists() else final


def with_suffix(directory: Path, suffix: str) -> Path:
    """DIR/iter_0000010.SUFFIX"""
    return directory.with_name(f"{directory.name}.{suffix}")
