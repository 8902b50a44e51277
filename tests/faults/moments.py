"""Where in a run something is to happen to a rank: a `prepare` for `launch` that does it there."""

import os
import signal
from collections.abc import Callable

PLACES = ("start-up", "step", "refresh", "save", "files", "name")
"""Before the model is built; in the middle of a step and of a refresh; before a save, while its files are written, and
before it gets its name."""


def at(place: str, iteration: int, action: Callable[[], object], rank: int = 0) -> Callable[[], None]:
    """A `prepare` under which `rank` does `action` at `place` of `iteration`, once."""

    def prepare() -> None:
        from megatron_geoscale.scaling.engine import GeoScaleEngine
        from megatron_geoscale.training import loop, main, saving

        if int(os.environ["RANK"]) != rank:
            return
        now = {"iteration": 0}

        def before(owner, name, known=lambda *_: now["iteration"]):
            plain = getattr(owner, name)

            def act_and_call(*args, **options):
                if known(*args) == iteration:
                    action()
                return plain(*args, **options)

            setattr(owner, name, act_and_call)

        step = loop.Trainer._step

        def count(trainer):
            now["iteration"] = trainer.state.iteration + 1
            return step(trainer)

        loop.Trainer._step = count
        if place == "start-up":
            before(main, "_initialize", lambda *_: iteration)
        elif place == "step":
            before(loop, "_run_schedule")
        elif place == "refresh":
            before(GeoScaleEngine, "_swap")
        elif place == "save":
            before(saving, "sharded_state")
        elif place == "files":
            before(saving.filesystem_async.FileSystemWriterAsync, "get_save_function_and_args")
        elif place == "name":
            before(saving.CheckpointWriter, "_publish", lambda _, number: number)

    return prepare


def terminate() -> None:
    """SIGTERM to the rank and its children, twice: as Slurm and torchrun send it."""
    for _ in range(2):
        os.killpg(os.getpgrp(), signal.SIGTERM)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
