from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from jettclip import profiling
from jettclip.models.config import FOLDER
from jettclip.profiling import Profile

SCRIPT = str(Path(__file__).resolve().parents[2] / "scripts/profile_model.py")


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> str | int | None:
    monkeypatch.setattr(profiling, "ROUNDS", 1)
    monkeypatch.setattr("sys.argv", ["profile_model.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(SCRIPT, run_name="__main__")
    return stopped.value.code


def test_named_models_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--models", "Nano-248", "LLM2CLIP-Nano", "--device", "cpu", "--json", str(tmp_path / "found.json")]
    assert run(monkeypatch, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| `Nano-248`")
    found = json.loads((tmp_path / "found.json").read_text())["models"]
    assert [model["model"] for model in found] == ["Nano-248", "LLM2CLIP-Nano"]
    assert found[0]["text_macs"]["77"] > 0
    assert found[0]["latency_ms"]["cpu"]["text"]["trained"] > 0


def test_every_model_of_ours_is_profiled_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling, "profile", lambda name, devices: Profile(name, 1, 1, 1, {}, {}))
    assert run(monkeypatch) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == sorted(path.stem for path in FOLDER.glob("*.json"))


def test_an_unknown_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    message = str(run(monkeypatch, "--models", "Nano-249"))
    assert message.startswith("profile_model.py: ")
    assert "'Nano-249' is not known; did you mean Nano-248" in message
    assert "\n" not in message
