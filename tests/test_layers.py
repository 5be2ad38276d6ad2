from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jettclip

SOURCE = Path(jettclip.__file__).parent

# A component, which is a module or a package of jettclip, imports from the rows below its own only, and from itself.
# The empty name is jettclip/__init__.py, the public interface.
LAYERS = (
    ("", "main"),
    ("build",),
    ("train", "evaluate", "extract", "export", "prepare"),
    ("progress", "accumulation"),
    ("checkpoint", "report", "figures", "profiling", "detectors"),
    ("engine",),
    ("models", "data", "losses", "params"),
    ("rules",),
    ("openclip", "settings", "seeding", "ranks", "interrupt", "files", "identity"),
    ("types",),
)
OPENCLIP = {"open_clip", "open_clip_train"}


def layer_of(component: str) -> int:
    rows = [row for row, components in enumerate(LAYERS) if component in components]
    assert len(rows) == 1, f"jettclip.{component} must stand in one row of LAYERS; it stands in {len(rows)}"
    return rows[0]


def imports_of(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute in this project"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def components_in(imports: set[str]) -> set[str]:
    """Returns what they take from jettclip; a name of its __init__ counts as the empty component."""
    parts = [name.split(".") for name in imports if name.split(".")[0] == "jettclip"]
    known = {path.stem for path in SOURCE.iterdir()}
    return {part[1] if len(part) > 1 and part[1] in known else "" for part in parts}


def upward_imports(component: str, source: str) -> list[str]:
    return sorted(
        other for other in components_in(imports_of(source)) - {component} if layer_of(other) <= layer_of(component)
    )


def component_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


MODULES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in MODULES]


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_module_imports_from_lower_layers_only(path: Path) -> None:
    component = component_of(path)
    upward = upward_imports(component, path.read_text())
    assert not upward, f"jettclip.{component} must not import {upward}, which do not stand below it in LAYERS"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_only_the_seam_names_openclip(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports_of(path.read_text())}
    assert not packages & OPENCLIP or path == SOURCE / "openclip.py"


def test_every_name_in_the_table_is_there() -> None:
    assert {component for row in LAYERS for component in row} == {component_of(path) for path in MODULES}


@pytest.mark.parametrize(
    ("component", "source", "found"),
    [
        ("models", "from jettclip.losses.pca import x", ["losses"]),
        ("losses", "def f():\n    import jettclip.engine.base", ["engine"]),
        ("data", "from jettclip import create_loss, types", [""]),
        ("types", "from jettclip import openclip", ["openclip"]),
        ("models", "from jettclip.models.config import x\nfrom jettclip import openclip\nimport torch", []),
    ],
)
def test_the_check_finds_imports_wherever_they_hide(component: str, source: str, found: list[str]) -> None:
    assert upward_imports(component, source) == found


def test_a_module_in_no_layer_is_found() -> None:
    with pytest.raises(AssertionError, match="must stand in one row"):
        layer_of("nowhere")
