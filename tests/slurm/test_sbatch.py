"""examples/slurm: the sbatch files themselves, on a throwaway Slurm of two virtual nodes, training a toy over gloo."""

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import cluster, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ROOT = Path(__file__).parents[2]
STEPS = 60
PATIENCE = 240
"""Seconds for a job: two imports of megatron-core, on cores that other tests use too."""


@pytest.fixture(scope="module")
def slurm():
    with cluster() as made:
        yield made


class Job:
    """One submitted sbatch file."""

    def __init__(self, slurm, folder, file="train.sbatch", *, flags=(), **variables):
        self.slurm, self.folder = slurm, folder
        self.output = folder / "out.txt"
        self.checkpoints, self.logs = folder / "checkpoints", folder / "logs"
        environment = {
            "TRAIN_SCRIPT": "examples/gpt2_xl/train_gpt2_xl.sh", "CHECKPOINT_PATH": self.checkpoints,
            "TENSORBOARD_PATH": self.logs, "TOKENIZER": "MOCK", "DATA": "MOCK", "SMOKE": 1,
            "GPUS_PER_NODE": 1, "MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
            "TORCHRUN": Path(sys.executable).with_name("torchrun"), **variables,
        }
        self.number = slurm.run("sbatch", "--parsable", "--nodes", 2, "--output", self.output,
                                ROOT / "examples/slurm" / file, *flags, cwd=ROOT,
                                environment={name: str(value) for name, value in environment.items()})

    def said(self):
        return self.output.read_text() if self.output.exists() else ""

    def records(self):
        path = self.logs / "geoscale.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, condition):
        """Until it holds, of the job's fields; a job that ends before is an error."""
        def over(fields):
            return condition(fields) or fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        try:
            fields = self.slurm.wait_until(self.number, over, PATIENCE)
        except TimeoutError as error:
            raise AssertionError(f"{error}:\n{self.said()[-4000:]}") from None
        assert condition(fields), f"{fields['JobState']}:\n{self.said()[-4000:]}"
        return fields

    def finish(self):
        return self.wait_for(lambda fields: fields["JobState"] == "COMPLETED")


def assert_resumed(job):
    """It was restarted once, and every step was taken once."""
    assert job.finish()["Restarts"] == "1"
    assert [record["iteration"] for record in job.records()] == list(range(1, STEPS + 1))
    (resumed,) = [line for line in job.said().splitlines() if "loaded checkpoint" in line]
    stopped = int(resumed.split()[-1])
    assert 3 <= stopped < STEPS
    assert f"iter_{stopped:07d}" in resumed
    assert (job.checkpoints / "exit_reason.txt").read_text() == "training is complete\n"


def test_two_nodes_train_as_one_job(slurm, tmp_path):
    job = Job(slurm, tmp_path)
    job.finish()
    assert [record["iteration"] for record in job.records()] == [1, 2]
    assert (job.checkpoints / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert "training ended: training is complete" in job.said()
    assert "back into the queue" not in job.said()


@pytest.mark.slow
def test_usr1_saves_and_puts_the_job_back_into_the_queue(slurm, tmp_path):
    job = Job(slurm, tmp_path, flags=["--train-iters", STEPS])
    job.wait_for(lambda fields: len(job.records()) >= 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)  # what --signal=B:USR1@90 does before the time limit
    assert_resumed(job)
    assert job.said().count("back into the queue") == 1


@pytest.mark.slow
def test_requeue_by_slurm_saves_too(slurm, tmp_path):
    job = Job(slurm, tmp_path, flags=["--train-iters", STEPS])
    job.wait_for(lambda fields: len(job.records()) >= 3)
    slurm.run("scontrol", "requeue", job.number)
    assert_resumed(job)


def test_a_failed_run_is_not_put_back(slurm, tmp_path):
    job = Job(slurm, tmp_path, flags=["--train-iters", -1])
    fields = job.wait_for(lambda fields: fields["JobState"] == "FAILED")
    assert fields["Restarts"] == "0"
    assert "--train-iters must not be negative" in job.said()
    assert "training ended: without a word" in job.said()


def test_pyxis_gets_its_options(slurm, tmp_path):
    """There is no pyxis here: a stand-in for srun takes its options, notes them, and passes on the rest."""
    bin_folder, noted = tmp_path / "bin", tmp_path / "noted"
    bin_folder.mkdir()
    fake = bin_folder / "srun"
    fake.write_text(f"""#!/usr/bin/env bash
rest=()
for word in "$@"; do
    case $word in --container-*|--no-container-*) echo "$word" >> '{noted}' ;; *) rest+=("$word") ;; esac
done
PATH=${{PATH#*:}} exec srun "${{rest[@]}}"
""")
    fake.chmod(0o755)
    image, mounts = tmp_path / "an image.sqsh", f"{tmp_path}:{tmp_path}"
    job = Job(slurm, tmp_path, "train_pyxis.sbatch", CONTAINER_IMAGE=image, CONTAINER_MOUNTS=mounts,
              PATH=f"{bin_folder}:{slurm.environment['PATH']}")
    job.finish()
    assert noted.read_text().splitlines() == [
        f"--container-image={image}", "--container-workdir=/workspace/geoscale", "--no-container-mount-home",
        f"--container-mounts={mounts}",
    ]
