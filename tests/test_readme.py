from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from jettclip.losses.formula import PRESETS
from jettclip.models.config import FOLDER, get_model_config
from jettclip.models.factory import create_model
from jettclip.params import SETTINGS
from jettclip.profiling import count_parameters, profile, table

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
    assert dict(re.findall(r"^\| `([\w-]+)` \| `([^`]*@[^`]*)` \|", README, re.M)) == {
        name: recipe.formula for name, recipe in PRESETS.items()
    }


def rows_of_models() -> dict[str, list[str]]:
    rows = re.findall(r"^\| `([^`]+)` +\|((?:[^|]+\|){7})$", README, re.M)
    return {name: [cell.strip() for cell in cells.split("|")[:-1]] for name, cells in rows}


@pytest.mark.parametrize("name", sorted(rows_of_models()))
def test_the_table_of_models_has_their_parameters(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, device="meta")
    counted = [count_parameters(tower) / 1e6 for tower in (model.visual, model.text)]
    assert rows_of_models()[name][:2] == [f"{count:.2f}" for count in counted]


@pytest.mark.parametrize("name", ["MobileCLIP-S0-248", "LLM2CLIP-Nano"])
def test_the_table_of_models_has_their_operations(name: str) -> None:
    cells = table([profile(name, [])]).splitlines()[-1].split("|")
    assert rows_of_models()[name][2:5] == [cell.strip() for cell in cells[4:7]]


def test_files_and_models_that_it_names_are_there() -> None:
    for path in re.findall(r"(?<![\w/])(?:configs|scripts|docs|src|benchmarks)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path
    assert rows_of_models().keys() == {path.stem for path in FOLDER.glob("*.json")}
    assert get_model_config("MobileCLIP-S1-248").tags_of == "MobileCLIP-S1"


@pytest.mark.parametrize("package", ["torch", "torchvision", "open_clip_torch", "webdataset", "timm"])
def test_requirements_are_pinned(package: str) -> None:
    assert re.search(rf"^{package}==[\d.]+$", (ROOT / "requirements.txt").read_text(), re.M)
