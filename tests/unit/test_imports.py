"""DESIGN's one direction of imports, read from the source files, so that it holds for lazy imports too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_geoscale"
LAYERS = ("spectral", "bounds", "scaling", "checkpoints", "attention", "integrations", "training")
PURE = ("spectral", "bounds")
FOUNDATION = ("config", "cpu")
"""Modules of no layer, which layers may use and which use none."""
FRAMEWORKS = ("megatron", "transformer_engine", "apex", "deepspeed", "transformers")


def modules_imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """The absolute names that `module` imports anywhere: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the rules forbid among the imports of a module of the package, as sentences."""
    own = module.split(".")[1] if "." in module else ""
    found = []
    for name in sorted(modules_imported(source, module, is_package)):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if own in PURE and top in FRAMEWORKS:
            found.append(f"{module} is pure tensor code but imports {name}")
        if top != "megatron_geoscale":
            continue
        if own in PURE and target not in PURE:
            found.append(f"{module} is pure tensor code but imports {name}")
        elif own in LAYERS and target in LAYERS and LAYERS.index(target) > LAYERS.index(own):
            found.append(f"{module} imports {name}, which stands above it")
        elif own in FOUNDATION and target in LAYERS:
            found.append(f"{module} belongs to no layer but imports {name}")
        elif own == "" and target in LAYERS:
            found.append(f"the package itself must import nothing, but imports {name}")
    return found


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_downward(path: Path) -> None:
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(path.read_text(), module, is_package) == []


def test_every_directory_is_a_known_layer() -> None:
    found = {path.parent.relative_to(PACKAGE).parts[0] for path in source_files() if path.parent != PACKAGE}
    assert found <= set(LAYERS), "a new package needs its place in LAYERS, and in DESIGN's order"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_geoscale.spectral.gram", "import megatron.core"),
        ("megatron_geoscale.spectral.gram", "def f():\n    from megatron.core import parallel_state"),
        ("megatron_geoscale.spectral.gram", "from ..bounds import logits"),
        ("megatron_geoscale.spectral.gram", "from megatron_geoscale import bounds"),
        ("megatron_geoscale.bounds.logits", "from .. import scaling"),
        ("megatron_geoscale.bounds.logits", "from megatron_geoscale.config import GeoScaleConfig"),
        ("megatron_geoscale.scaling.engine", "import megatron_geoscale.training.loop"),
        ("megatron_geoscale.config", "from .scaling import slots"),
        ("megatron_geoscale", "from megatron_geoscale.spectral import gram"),
    ],
)
def test_the_check_sees(module: str, source: str) -> None:
    assert len(violations(source, module, is_package=module == "megatron_geoscale")) == 1


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("megatron_geoscale.spectral.gram", False, "import math\nimport torch\nfrom . import projections"),
        ("megatron_geoscale.spectral", True, "from .gram import gram_norm"),
        ("megatron_geoscale.bounds.logits", False, "from ..spectral.gram import gram_norm"),
        ("megatron_geoscale.scaling.engine", False, "from ..config import GeoScaleConfig\nimport megatron.core"),
        ("megatron_geoscale.training.loop", False, "from megatron_geoscale.attention import spec"),
        ("megatron_geoscale.doctor", False, "from .training import loop"),
    ],
)
def test_the_check_allows(module: str, is_package: bool, source: str) -> None:
    assert violations(source, module, is_package) == []
