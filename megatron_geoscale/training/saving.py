"""Writes checkpoints: in step with training, or, with --async-save, in a process beside it.

A checkpoint is written beside its final name and gets the name when it is whole; only then does the tracker name it,
and only then do older ones go (--keep-last). `checkpoint_files` says what a kill can leave behind.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_geoscale.checkpoints.iterations import iteration_directory
from megatron_geoscale.training import checkpoint_files as files
from megatron_geoscale.training.checkpointing import CONTENT_METADATA, Run, sharded_state
from megatron_geoscale.training.failures import is_lost_peer


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


class CheckpointWriter:
    """Saves a run to --save. Every method is a collective over the whole job."""

    def __init__(self, run: Run) -> None:
        self._args = run.args
        self._queue = AsyncCallsQueue()
        self._pending: int | None = None
        filesystem_async._results_queue = _Results()

    def save(self, run: Run) -> list[Path]:
        """Write a checkpoint of the run's state, or begin to; returns the directories that are complete since the last
        call. One that is still being written is waited for first. Raises CheckpointWriteError."""
        done = self.finish(wait=True)
        directory, iteration = Path(self._args.save), run.state.iteration
        with self._writing(iteration):
            if dist.get_rank() == 0:
                files.begin(directory, iteration)
            dist.barrier()
            partial = files.partial_directory(directory, iteration)
            request = dist_checkpointing.save(
                sharded_state(run), str(partial), async_sharded_save=True, content_metadata=dict(CONTENT_METADATA)
            )
            if self._args.async_save:
                self._queue.schedule_async_request(request)
                self._pending = iteration
                return done
            request.execute_sync()
        return [*done, self._publish(iteration)]

    def finish(self, *, wait: bool) -> list[Path]:
        """Give the checkpoint that is being written its name, if every rank has written its part; returns its
        directory. wait: until it is. Raises CheckpointWriteError."""
        iteration = self._pending
        if iteration is None:
            return []
        with self._writing(iteration):
            if not self._queue.maybe_finalize_async_calls(blocking=wait):
                return []
        self._pending = None
        return [self._publish(iteration)]

    def _publish(self, iteration: int) -> Path:
        dist.barrier()
        with self._writing(iteration):
            if dist.get_rank() == 0:
                files.publish(self._args.save, iteration, keep_last=self._args.keep_last)
        dist.barrier()
        return iteration_directory(self._args.save, iteration)

    @contextlib.contextmanager
    def _writing(self, iteration: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            if is_lost_peer(error):
                raise
            final = iteration_directory(self._args.save, iteration)
            if dist.get_rank() == 0:  # a full disk need not stay full
                shutil.rmtree(files.partial_directory(self._args.save, iteration), ignore_errors=True)
            reason = _reason(error, final.parent)
            raise CheckpointWriteError(f"checkpoint {final} cannot be written: {reason}") from error


def _reason(error: BaseException, directory: Path) -> str:
    """What has failed, and how much room there is: torch's writer says little of a full disk."""
    if isinstance(error, CheckpointException) and not error.failures:
        return "another rank cannot write its part"
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    found = next((link for link in chain if isinstance(link, OSError)), error)
    free = shutil.disk_usage(directory).free >> 20
    what = files.describe(found)
    return f"{what} ({free} MiB are free there)" if free else f"the disk is full, {what}"


class _Results:
    """Brings what a save has written, or its error, from the process that writes to the rank: a file without a name.

    In place of megatron-core's queue, whose manager process imports torch for seconds, dies of a SIGTERM that a
    launcher sends to the whole process group, and outlives a killed rank. One save at a time is on its way.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process

    def put(self, result: Any) -> None:
        """Called where the writing is done, which may be a fork."""
        with self._open("wb") as file:
            pickle.dump(result, file)

    def get_nowait(self) -> Any:
        """The result, once. Raises queue.Empty where there is none: the process that writes was killed."""
        with self._open("rb") as file:
            try:
                return pickle.load(file)
            except EOFError:
                raise queue.Empty from None
            finally:
                os.ftruncate(file.fileno(), 0)

    def _open(self, mode: str) -> IO[bytes]:
        """The file from its beginning, with a buffer of its own."""
        file = os.fdopen(os.dup(self._file.fileno()), mode)
        file.seek(0)
        return file
