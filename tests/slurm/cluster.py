"""A throwaway Slurm of virtual nodes on this machine: real slurmctld, slurmd and munged, children in the foreground.

Needs root and Debian's packages slurm-wlm and munge; nothing of the system's own configuration is read or changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_CONFIGURATION = """
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=10
JobRequeue=1
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: a requeued job waits until its old credential has expired, 120 s by default.


def missing() -> str | None:
    """Why no cluster can be had here; None if one can."""
    if os.geteuid() != 0:
        return "a throwaway Slurm needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)" if absent else None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """A running one. `folder` holds its logs."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder, self.nodes = folder, list(nodes)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None,
            timeout: float = 60) -> str:
        """Output of a Slurm command; RuntimeError with what it said if it fails."""
        done = subprocess.run(list(map(str, command)), env={**self.environment, **(environment or {})}, cwd=cwd,
                              text=True, capture_output=True, timeout=timeout)
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, number: str, condition: Callable[[dict[str, str]], bool], timeout: float) -> dict[str, str]:
        """The job's fields as soon as `condition` holds of them; TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition(fields := self.job(number)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {fields['JobState']} ({fields['Reason']}) after {timeout} s")
            time.sleep(0.2)
        return fields


@contextlib.contextmanager
def cluster(nodes: int = 2) -> Iterator[Cluster]:
    """A cluster of `nodes` virtual nodes with two CPUs each, gone with all its jobs afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)  # munged refuses a socket that others cannot reach
    names = [f"n{index + 1}" for index in range(nodes)]
    host = socket.gethostname().split(".")[0]
    port, *ports = _free_ports(nodes + 1)
    for name in ("munge", "state", "log", *(f"spool.{name}" for name in names)):
        (folder / name).mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(_CONFIGURATION.format(folder=folder, host=host, port=port, nodes="\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={number} CPUs=2 State=UNKNOWN"
        for name, number in zip(names, ports, strict=True))))
    made = Cluster(folder, names)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: str) -> None:
        with (folder / "log" / name).open("w") as log:
            daemons.append(subprocess.Popen(command, env=made.environment, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True))

    try:
        munge = [f"--{what}-file={folder}/munge/{what}" for what in ("pid", "log", "seed")]
        start("munged", "munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge/socket", *munge)
        _wait(lambda: (folder / "munge" / "socket").exists(), daemons, folder)
        start("slurmctld", "slurmctld", "-D", "-c")
        for name in names:
            start(name, "slurmd", "-D", "-N", name)
        _wait(lambda: _idle(made) == names, daemons, folder)
        yield made
    finally:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            made.run("scancel", "--full", "--signal=KILL", "--user=root", timeout=10)
            made.run("scancel", "--user=root", timeout=10)
            time.sleep(0.5)
        for process in reversed(daemons):
            process.send_signal(signal.SIGTERM)
        for process in reversed(daemons):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _idle(made: Cluster) -> list[str]:
    try:
        return made.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split()
    except RuntimeError:  # slurmctld does not answer yet
        return []


def _wait(ready: Callable[[], bool], daemons: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        if time.monotonic() > deadline or any(process.poll() is not None for process in daemons):
            logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in (folder / "log").iterdir())
            raise RuntimeError(f"Slurm did not come up:\n{logs}")
        time.sleep(0.1)
