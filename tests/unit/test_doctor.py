"""The doctor on machines that are made up: packages of other people's, broken ones, old ones, none."""

import json
import subprocess
import sys
import types

import pytest
import torch

from megatron_geoscale import doctor
from megatron_geoscale.config import RECIPES

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts modules before all others on sys.path: `install("apex/__init__.py", source)`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(path, source=""):
        top = path.split("/")[0].removesuffix(".py")
        for name in [name for name in sys.modules if name.split(".")[0] == top]:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "transformer_engine")]:
        del sys.modules[name]


@pytest.fixture
def te(install):
    """A Transformer Engine that loads, on a GPU of its telling."""

    def make(version, *, capability=(9, 0), cudnn=(9, 19, 0), source=""):
        install("transformer_engine/__init__.py", f"__version__ = {version!r}")
        install("transformer_engine/pytorch/__init__.py", source)
        install(
            "transformer_engine/pytorch/utils.py",
            f"def get_device_compute_capability(): return {capability}\ndef get_cudnn_version(): return {cudnn}",
        )

    return make


def finding(report, name):
    (found,) = (finding for finding in report.packages if finding.name == name)
    return found


def feature(report, part):
    (found,) = (feature for feature in report.features if part in feature.name)
    return found


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    report = doctor.examine()
    assert report.can_train and not report.te_attention
    assert finding(report, "torch").version == torch.__version__ and finding(report, "megatron-core").ok
    gpu = finding(report, "gpu")
    assert gpu.version is None and not gpu.ok and not gpu.required and gpu.advice
    assert feature(report, "emulated FP8").works and not feature(report, "context parallelism").works
    assert report.recipes == {recipe: ["emulated"] for recipe in RECIPES}
    assert report.active["Adam"] == report.active["RMSNorm, --transformer-impl local"] == "torch"


def test_apex_of_somebody_else_is_told_apart(install):
    install("apex/__init__.py", "raise ImportError('no module named pyramid')")
    report = doctor.examine()
    apex = finding(report, "apex")
    assert not apex.ok and "not NVIDIA's" in apex.detail and "NVIDIA/apex" in apex.advice
    assert report.can_train


@pytest.mark.parametrize("kernels", [(), ("amp_C",), ("amp_C", "fused_layer_norm_cuda")])
def test_apex_of_nvidia(install, kernels):
    install("apex/__init__.py")
    install("apex/normalization/__init__.py")
    for kernel in kernels:
        install(f"{kernel}.py")
    apex = finding(doctor.examine(), "apex")
    assert apex.ok == (len(kernels) == 2)
    assert ("fused_layer_norm_cuda" in apex.detail) == (len(kernels) < 2)


def test_te_that_does_not_load(te):
    te("2.16.1", source="raise OSError('libcudart.so.13: cannot open shared object file\\nand more')")
    report = doctor.examine()
    found = finding(report, "transformer-engine")
    assert not found.ok and "OSError: libcudart.so.13" in found.detail and "and more" not in found.detail
    assert "libcudart" in feature(report, "Transformer Engine's kernels").why
    assert report.can_train and not report.te_attention


@pytest.mark.parametrize(("version", "named"), [("2.8.0", "too old"), ("2.21.0", "too new")])
def test_te_of_an_unknown_version(te, version, named):
    te(version)
    report = doctor.examine()
    assert finding(report, "transformer-engine").version == version
    assert not finding(report, "transformer-engine").ok and not report.te_attention
    assert named in feature(report, "Transformer Engine's kernels").why


def test_cudnn_that_computes_wrongly(te):
    te("2.16.1", cudnn=(9, 10, 0))
    report = doctor.examine()
    cudnn = finding(report, "cudnn")
    assert cudnn.version == "9.10.0" and not cudnn.ok and "9.10.0" in cudnn.advice
    assert "cuDNN 9.10.0" in feature(report, "Transformer Engine's kernels").why


def test_a_machine_that_has_all(te, capsys, monkeypatch):
    from megatron.core import optimizer

    te("2.16.1")
    fused = type("FusedAdam", (), {"__module__": "transformer_engine.pytorch.optimizers.fused_adam"})
    monkeypatch.setattr(optimizer, "Adam", fused)
    report = doctor.examine()
    assert report.te_attention and feature(report, "context parallelism").works
    assert report.recipes["certified"] == ["emulated", "te"] and report.recipes["current"] == ["emulated"]
    assert report.active["Adam"] == "Transformer Engine, fused"
    assert doctor.main(["--gpu"]) == 0
    assert "ok transformer-engine  2.16.1" in capsys.readouterr().out
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert not doctor.examine().te_attention


def test_missing_megatron_core_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "!! megatron-core" in said and "pip install 'megatron-core>=0.16.1'" in said and "cannot train" in said


def test_one_broken_import_stops_no_other(monkeypatch):
    broken = types.ModuleType("safetensors")
    broken.__spec__ = None  # find_spec raises ValueError
    monkeypatch.setitem(sys.modules, "safetensors", broken)
    report = doctor.examine()
    assert "ValueError" in finding(report, "safetensors").detail
    assert finding(report, "sentencepiece").ok and report.can_train


def test_without_torch_it_still_answers():
    code = "import sys; sys.modules['torch'] = None; from megatron_geoscale import doctor; sys.exit(doctor.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == ""
    assert "!! torch" in done.stdout and "pip install 'torch>=2.12'" in done.stdout


TYPES = {"version": str, "can_train": bool, "te_attention": bool, "packages": list, "features": list, "recipes": dict,
         "active": dict}
PACKAGES = ["python", "torch", "megatron-core", "gpu", "cudnn", "transformer-engine", "apex", "transformers",
            "safetensors", "sentencepiece", "deepspeed", "megatron-bridge"]


def test_json_of_the_command():
    done = subprocess.run([sys.executable, "-m", "megatron_geoscale.doctor", "--json", "--gpu"], capture_output=True,
                          text=True, timeout=120)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["te_attention"] else 1)
    assert {name: type(value) for name, value in report.items()} == TYPES
    assert [package["name"] for package in report["packages"]] == PACKAGES
    for package in report["packages"]:
        assert set(package) == {"name", "version", "ok", "required", "detail", "advice"}
        assert package["ok"] != bool(package["advice"]), "one line of advice for each missing piece"
    assert all(set(entry) == {"name", "works", "why"} for entry in report["features"])
    assert all(entry["works"] != bool(entry["why"]) for entry in report["features"])
    assert set(report["recipes"]) == set(RECIPES)
