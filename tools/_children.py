"""Child processes of the tools: none outlives its parent, whatever ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

TOOLS = Path(__file__).resolve().parent
PATIENCE = 10
"""Seconds that a stopped child has to go by itself."""


def environment() -> dict[str, str]:
    """Of every child: two processes on two cores, that find each other without the host's name."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    defaults = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | ({"GLOO_SOCKET_IFNAME": loopback} if loopback else {})
    return {**defaults, **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def child(command: Sequence[str | Path], log: IO[str] | int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that neither outlives the block nor leaves its own children behind, whatever ends the block."""
    # In a session of its own, so that Ctrl-C reaches it once, from here, and its ranks are stopped in order.
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=environment(), start_new_session=True, close_fds=False
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # nothing interrupts this; the program is about to end
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            _, left = psutil.wait_procs([psutil.Process(process.pid), *family], timeout=PATIENCE)
            for survivor in left:
                survivor.kill()
            psutil.wait_procs(left, timeout=PATIENCE)


def run_tool(name: str, *flags: object) -> None:
    """Run a tool of this directory, which reports its progress and its mistakes itself, on stderr."""
    with child([sys.executable, TOOLS / name, *map(str, flags)], log=2) as process:
        if process.wait() != 0:
            raise SystemExit(f"{Path(sys.argv[0]).name}: {name} failed with exit code {process.returncode}")
