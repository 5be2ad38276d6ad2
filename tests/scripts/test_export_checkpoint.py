from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from safetensors.torch import save_file

from jettclip.export import formats
from jettclip.models.factory import create_model

SCRIPT = str(Path(__file__).resolve().parents[2] / "scripts/export_checkpoint.py")


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> str | int | None:
    monkeypatch.setattr("sys.argv", ["export_checkpoint.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(SCRIPT, run_name="__main__")
    return stopped.value.code


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "nano.safetensors"
    save_file(create_model("Nano-248").state_dict(), path)
    return str(path)


def test_a_checkpoint_is_exported_and_the_report_printed(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "exported"
    flags = ["--model", "Nano-248", "--pretrained", checkpoint, "--output", str(output), "--format", "onnx"]
    assert run(monkeypatch, *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert max(report["onnx"]["largest_difference"].values()) < 1e-5
    assert {path.name for path in (output / "onnx").iterdir()} == {"image.onnx", "text.onnx", "report.json"}


@pytest.mark.parametrize("mistake", ["format", "model", "checkpoint"])
def test_a_mistake_is_one_line(mistake: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {
        "--model": "Nano-249" if mistake == "model" else "Nano-248",
        "--pretrained": "missing.pt" if mistake == "checkpoint" else checkpoint,
        "--output": str(tmp_path / "exported"),
        "--format": "hf" if mistake == "format" else "onnx",
    }
    message = run(monkeypatch, *[word for flag in flags.items() for word in flag])
    assert str(message).startswith("export_checkpoint.py: ")
    assert "\n" not in str(message)
    expected = {"format": "cannot be loaded by OpenCLIP", "model": "did you mean Nano-248", "checkpoint": "missing.pt"}
    assert expected[mistake] in str(message)


def test_every_format_can_be_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    help_text = capsys.readouterr().out
    assert set(formats.FORMATS) == {"openclip", "hf", "onnx", "reparameterized"}
    assert all(f"\n{name} " in help_text for name in formats.FORMATS)
