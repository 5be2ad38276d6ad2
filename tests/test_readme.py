from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from jettclip.losses.formula import PRESETS
from jettclip.models.config import FOLDER, get_model_config
from jettclip.params import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_flags_is_complete_and_true() -> None:
    rows = dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \|([^|]*)\|", README, re.M))
    settings = {f"--{setting.name.replace('_', '-')}": setting for cls in SETTINGS for setting in fields(cls)}
    assert rows.keys() == {*settings, "--config"}
    for flag, setting in settings.items():
        if isinstance(setting.default, str | int | float) and setting.default and flag != "--features-dir":
            assert str(setting.default) == rows[flag].strip().strip("`"), flag


def test_the_table_of_presets_is_true() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \| `([^`]*@[^`]*)` \|", README, re.M)) == {
        name: recipe.formula for name, recipe in PRESETS.items()
    }


def test_files_and_models_that_it_names_are_there() -> None:
    for path in re.findall(r"(?<![\w/])(?:configs|scripts|docs|src)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path
    models = re.search(r"^Models: (.*?), and those", README, re.M | re.S)
    assert models is not None
    prefix, named = "", set()
    for name in re.findall(r"`([^`]+)`", models[1]):
        prefix = name.split("-")[0] if not name.startswith("-") else prefix
        named.add(prefix + name + "248" if name.startswith("-") else name)
    assert named == {path.stem for path in FOLDER.glob("*.json")}
    assert get_model_config("MobileCLIP-S1-248").tags_of == "MobileCLIP-S1"


@pytest.mark.parametrize("package", ["torch", "torchvision", "open_clip_torch", "webdataset", "timm"])
def test_requirements_are_pinned(package: str) -> None:
    assert re.search(rf"^{package}==[\d.]+$", (ROOT / "requirements.txt").read_text(), re.M)
