"""`python -m megatron_geoscale.doctor [--json] [--gpu]`: what is installed here, what works, and what to do.

Exit status 0: this machine can train, on a GPU or without. 1: something that training needs is missing or broken; with
`--gpu` also where Transformer Engine's FP8 attention would not run.

Each probe stands alone: a package that is absent, or whose import fails, is a finding and stops no other. DeepSpeed is
not imported, which would take seconds and may compile kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_geoscale import __version__
from megatron_geoscale.config import RECIPES

OLDEST_PYTHON, OLDEST_TORCH, OLDEST_MEGATRON_CORE = (3, 10), (2, 12), (0, 16, 1)


@dataclass(frozen=True)
class Finding:
    """One package or device. `ok`: it is there and works; `version` is None where it is not there at all."""

    name: str
    version: str | None
    ok: bool
    required: bool
    detail: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Feature:
    """One thing that a run can ask for, and why it does not work here."""

    name: str
    works: bool
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `examine` found. Recipes by name: under which --geoscale-attention they work."""

    version: str
    can_train: bool
    te_attention: bool
    packages: list[Finding]
    features: list[Feature]
    recipes: dict[str, list[str]]
    active: dict[str, str]
    """Which implementation runs of the parts that have a fused one."""


def examine() -> Report:
    """Look at this machine. Imports torch, megatron-core and Transformer Engine, quietly."""
    with _silence():
        packages = [_python(), *(_probe(*probe) for probe in PROBES)]
        found = {finding.name: finding for finding in packages}
        can_train = all(finding.ok for finding in packages if finding.required)
        obstacles = _attempt(_te_obstacles, otherwise=["torch cannot be imported"])
        te = can_train and not obstacles
        features = _features(found, can_train, obstacles)
        active = _attempt(_active, otherwise={}) if can_train else {}
    recipes = {recipe: _attentions(recipe, can_train, te) for recipe in RECIPES}
    return Report(__version__, can_train, te, packages, features, recipes, active)


def _attentions(recipe: str, can_train: bool, te: bool) -> list[str]:
    # TE's own current scaling of attention needs sm100; `none` casts nothing and needs no attention of ours.
    return ["emulated"] * can_train + ["te"] * (te and recipe != "current")


def _attempt(probe: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return probe()
    except Exception:
        return otherwise


@contextlib.contextmanager
def _silence() -> Any:
    """Without what packages say while they are imported, on stdout least of all, which may be JSON."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _python() -> Finding:
    ok = sys.version_info >= OLDEST_PYTHON
    advice = "" if ok else f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    return Finding("python", platform.python_version(), ok, True, advice=advice)


def _probe(name: str, required: bool, look: Callable[[], tuple[str | None, str, str]], advice: str) -> Finding:
    """Run one probe; whatever it raises is a finding."""
    try:
        version, detail, problem = look()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        version, detail, problem = _distribution(name), "", f"its import fails with {type(error).__name__}: {first}"
    ok = version is not None and not problem
    return Finding(name, version, ok, required, problem or detail, "" if ok else advice)


def _distribution(name: str) -> str | None:
    """Version of an installed distribution, from its metadata alone."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _imported(module: str, distribution: str | None = None) -> Callable[[], tuple[str | None, str, str]]:
    """A probe that imports `module`."""

    def look() -> tuple[str | None, str, str]:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return None, "not installed", ""
        loaded = importlib.import_module(module)
        return _distribution(distribution or module) or getattr(loaded, "__version__", "unknown"), "", ""

    return look


def _torch() -> tuple[str | None, str, str]:
    import torch

    from megatron_geoscale.attention.obstacles import parse_version

    old = parse_version(torch.__version__) < OLDEST_TORCH
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return torch.__version__, build, f"{build}; too old" if old else ""


def _megatron_core() -> tuple[str | None, str, str]:
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        return None, "not installed", ""
    import megatron.core

    from megatron_geoscale.attention.obstacles import parse_version

    version = megatron.core.__version__
    return version, "", "too old" if parse_version(version) < OLDEST_MEGATRON_CORE else ""


def _transformer_engine() -> tuple[str | None, str, str]:
    from megatron_geoscale.attention import obstacles

    version, problem = obstacles.installed_te()
    if version is None:
        return _distribution("transformer-engine"), problem, problem
    import transformer_engine

    span = ".".join(map(str, obstacles.OLDEST_TE)) + " to " + ".".join(map(str, obstacles.NEWEST_TE))
    known = obstacles.OLDEST_TE <= version[:2] <= obstacles.NEWEST_TE
    return transformer_engine.__version__, "its compiled module loads", "" if known else f"not one of {span}"


def _apex() -> tuple[str | None, str, str]:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None, "not installed", ""
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    version = _distribution("apex") or "unknown"
    if not any((folder / "normalization").is_dir() for folder in folders):
        return version, "", "this is not NVIDIA's Apex but another package of that name"
    kernels = [name for name in ("amp_C", "fused_layer_norm_cuda") if importlib.util.find_spec(name) is None]
    return version, "NVIDIA's", f"NVIDIA's, built without its kernels {', '.join(kernels)}" if kernels else ""


def _cudnn() -> tuple[str | None, str, str]:
    from megatron_geoscale.attention import obstacles

    version = obstacles.cudnn_version()
    if not any(version):
        return None, "none in this torch", ""
    problem = "computes FP8 attention wrongly" if version == obstacles.BROKEN_CUDNN else ""
    return ".".join(map(str, version)), "", problem


def _gpu() -> tuple[str | None, str, str]:
    import torch

    if not torch.cuda.is_available():
        hidden = Path("/dev/nvidiactl").exists()  # the driver's
        why = "there is one, but this torch cannot use it" if hidden else "none"
        return None, f"{why}: megatron-core runs on the CPU, over gloo", ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}", ""


def _deepspeed() -> tuple[str | None, str, str]:
    there = importlib.util.find_spec("deepspeed") is not None
    return (_distribution("deepspeed") or "unknown", "", "") if there else (None, "not installed", "")


def _megatron_bridge() -> tuple[str | None, str, str]:
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.bridge") is None:
        return None, "not installed", ""
    importlib.import_module("megatron.bridge.training.callbacks")
    return _distribution("megatron-bridge") or "unknown", "", ""


PROBES: tuple[tuple[str, bool, Callable[[], tuple[str | None, str, str]], str], ...] = (
    ("torch", True, _torch, "pip install 'torch>=2.12', for the CUDA of your driver"),
    ("megatron-core", True, _megatron_core, "pip install 'megatron-core>=0.16.1'"),
    ("gpu", False, _gpu, "runs here emulate FP8 attention; its kernels need an NVIDIA GPU of sm90 or newer"),
    ("cudnn", False, _cudnn, "FP8 attention in Transformer Engine's kernels needs cuDNN 9.7 or newer, not 9.10.0"),
    (
        "transformer-engine",
        False,
        _transformer_engine,
        "pip install 'megatron-geoscale[gpu]' (on a machine with CUDA) for FP8 attention and fused norms and Adam",
    ),
    (
        "apex",
        False,
        _apex,
        "not needed beside Transformer Engine; for its fused LayerNorm and Adam build github.com/NVIDIA/apex from "
        "source, `pip install apex` is another package",
    ),
    ("transformers", False, _imported("transformers"), "pip install 'megatron-geoscale[hf]' for HuggingFaceTokenizer"),
    ("safetensors", False, _imported("safetensors"), "pip install 'megatron-geoscale[hf]' for Hugging Face weights"),
    ("sentencepiece", False, _imported("sentencepiece"), "pip install sentencepiece for SentencePieceTokenizer"),
    ("deepspeed", False, _deepspeed, "pip install 'megatron-geoscale[deepspeed]' for the DeepSpeed adapter"),
    (
        "megatron-bridge",
        False,
        _megatron_bridge,
        "for its callback install Megatron-Bridge with Transformer Engine, on a machine with CUDA",
    ),
)


def _te_obstacles() -> list[str]:
    """What keeps a layer that is made for it, 128 channels a head, from Transformer Engine's FP8 attention here."""
    from megatron_geoscale.attention import obstacles

    version, problem = obstacles.installed_te()
    environment = {name: value for name, value in os.environ.items() if name.startswith("NVTE_")}
    facts = obstacles.AttentionFacts(
        te_version=version,
        te_problem=problem,
        capability=obstacles.gpu_capability(),
        cudnn_version=obstacles.cudnn_version(),
        environment=environment,
    )
    return obstacles.fp8_attention_obstacles(facts)


def _features(found: dict[str, Finding], can_train: bool, obstacles: Sequence[str]) -> list[Feature]:
    te = "; ".join(obstacles)
    broken = "; ".join(f"{finding.name}: {finding.detail}" for finding in found.values()
                       if finding.required and not finding.ok)
    rows = [
        ("emulated FP8 attention (--geoscale-attention emulated)", can_train, broken),
        ("FP8 attention in Transformer Engine's kernels (--geoscale-attention te)", can_train and not te, broken or te),
        ("logits in FP8 (--geoscale-logits-dtype fp8), emulated only", can_train, broken),
        ("context parallelism (--context-parallel-size)", can_train and not te, broken or te),
    ]
    rows += [
        (what, found[name].ok, f"{name}: {found[name].detail}")
        for what, name in (
            ("Transformer Engine's layers (--transformer-impl transformer_engine)", "transformer-engine"),
            ("Hugging Face weights (tools/convert_hf.py)", "safetensors"),
            ("HuggingFaceTokenizer", "transformers"),
            ("SentencePieceTokenizer", "sentencepiece"),
            ("FSDP2 adapter", "transformers"),
            ("DeepSpeed adapter", "deepspeed"),
            ("Megatron-Bridge callback", "megatron-bridge"),
        )
    ]
    return [Feature(name, works, "" if works else why) for name, works, why in rows]


def _active() -> dict[str, str]:
    """Whose Adam, gradient norm and norms a run here gets, by asking what makes them."""
    from megatron_geoscale import cpu

    cpu.install()
    from megatron.core.optimizer import Adam, clip_grads

    from megatron_geoscale.attention.obstacles import installed_te
    from megatron_geoscale.training.norm import local_norm

    te = "Transformer Engine, fused with the linear layer" if installed_te()[0] else "not available"
    return {
        "Adam": _owner(Adam.__module__),
        "gradient norm and clipping": _owner(getattr(clip_grads.l2_norm_impl, "__module__", None) or "amp_C"),
        "LayerNorm, --transformer-impl local": _owner(_norm_module(local_norm("LayerNorm"))),
        "RMSNorm, --transformer-impl local": _owner(_norm_module(local_norm("RMSNorm"))),
        "norms, --transformer-impl transformer_engine": te,
    }


def _norm_module(norm: type) -> str:
    return "apex" if norm.__name__ == "FusedLayerNorm" else "torch"  # megatron-core's class is Apex's kernel


def _owner(module: str) -> str:
    known = {"transformer_engine": "Transformer Engine, fused", "transformer_engine_torch": "Transformer Engine, fused",
             "apex": "NVIDIA Apex, fused", "amp_C": "NVIDIA Apex, fused"}
    return known.get(module.split(".")[0], "torch")


def describe(report: Report) -> str:
    """The report for people."""
    lines = [f"megatron-geoscale {report.version}", ""]
    for finding in report.packages:
        mark = "ok" if finding.ok else "--" if finding.version is None and not finding.required else "!!"
        version = finding.version or ""
        lines.append(f"{mark:<3}{finding.name:<20}{version:<16} {finding.detail}".rstrip())
        if finding.advice:
            lines.append(f"   {'':<20}-> {finding.advice}")
    lines += ["", "Features"]
    for feature in report.features:
        why = f": {feature.why}" if feature.why else ""
        lines.append(f"{'ok' if feature.works else '--':<3}{feature.name}{why}")
    lines += ["", "Recipes, by --geoscale-attention"]
    lines += [f"   {recipe:<12}{', '.join(where) or 'nowhere'}" for recipe, where in report.recipes.items()]
    if report.active:
        lines += ["", "In use"]
        lines += [f"   {part:<46}{owner}" for part, owner in report.active.items()]
    lines += ["", "This machine can train." if report.can_train else "This machine cannot train: see !! above."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_geoscale.doctor", description="What works here.")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    parser.add_argument("--gpu", action="store_true", help="fail also where Transformer Engine's FP8 attention would "
                        "not run")
    args = parser.parse_args(argv)
    report = examine()
    print(json.dumps(asdict(report), indent=2) if args.json else describe(report))
    return 0 if report.can_train and (report.te_attention or not args.gpu) else 1


if __name__ == "__main__":
    sys.exit(main())
