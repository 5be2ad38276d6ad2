from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save

from jettclip import profiling
from jettclip.export import formats
from jettclip.export.formats import Format, export
from jettclip.models.checkpoints import load_weights, read_weights
from jettclip.models.config import get_model_config
from jettclip.models.factory import create_model
from jettclip.models.mct import build_mct
from jettclip.models.reparameterize import reparameterize
from jettclip.models.two_towers import TwoTowers
from support import tiny_towers

CONFIG = get_model_config("MobileCLIP-S0-248")
IDS = torch.tensor([[49406, 320, 49407, 0, 0], [49406, 5, 256, 9, 49407]])


def foldable() -> TwoTowers:
    model = tiny_towers()
    text = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True}
    model.text = build_mct(text, 16, quick_gelu=False, mask_padding=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def unchecked(model: object, config: object) -> None:
    """Takes any model."""


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ROUNDS", 2)


def test_a_folded_checkpoint_is_written_with_its_description_and_loads_again(tmp_path: Path) -> None:
    model = foldable()
    reports = export(model, CONFIG, tmp_path / "out", ["reparameterized"])
    folder = tmp_path / "out/reparameterized"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "report.json"}
    assert read_weights(folder).described.preprocess_cfg == json.loads(json.dumps(model.preprocess_cfg))
    report = reports["reparameterized"]
    assert json.loads((folder / "report.json").read_text()) == report
    assert max(report["largest_difference"].values()) < 1e-5
    assert report["parameters"]["reparameterized"] < report["parameters"]["trained"]
    latency = report["latency_ms"]["cpu"]
    assert {tower: set(forms) for tower, forms in latency.items()} == {
        "image": {"trained"},  # has nothing to fold
        "text": {"trained", "reparameterized"},
    }
    assert all(milliseconds > 0 for forms in latency.values() for milliseconds in forms.values())
    loaded = reparameterize(foldable())
    load_weights(loaded, folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_text(IDS), model.encode_text(IDS), rtol=0, atol=1e-5)


def test_a_model_is_built_folded_for_a_folded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None, "image_size": 64}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-mobile", config)
    model = create_model("tiny-mobile").eval()
    export(model, get_model_config("tiny-mobile"), tmp_path, ["reparameterized"])
    loaded = create_model("tiny-mobile", str(tmp_path / "reparameterized"))
    assert loaded.is_reparameterized
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(image), model.encode_image(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_towers, lambda: reparameterize(foldable())], ids=["plain", "folded"])
def test_a_model_with_nothing_to_fold_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no branches to fold"):
        export(make().eval(), CONFIG, tmp_path, ["reparameterized"])
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setitem(formats.FORMATS, "hf", Format(unchecked, lambda *_: done.append("hf") or {}))
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/precious").write_text("mine")
    with pytest.raises(ValueError, match="onnx is there already; remove it, or choose another --output"):
        export(foldable(), CONFIG, tmp_path, ["hf", "onnx"])
    assert (tmp_path / "onnx/precious").read_text() == "mine"
    assert done == []  # nothing is begun before


def test_an_export_that_fails_leaves_nothing_and_those_before_it_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def good(model: object, config: object, folder: Path) -> dict[str, Any]:
        (folder / "weights").write_text("w")
        return {"found": 1}

    def bad(model: object, config: object, folder: Path) -> dict[str, Any]:
        (folder / "weights").write_text("half")
        raise ValueError("differs")

    monkeypatch.setitem(formats.FORMATS, "hf", Format(unchecked, good))
    monkeypatch.setitem(formats.FORMATS, "onnx", Format(unchecked, bad))
    with pytest.raises(ValueError, match="differs"):
        export(foldable(), CONFIG, tmp_path, ["hf", "hf", "onnx"])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"weights", "report.json"}


def test_a_format_that_cannot_hold_the_model_is_found_before_any_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded by OpenCLIP"):
        export(foldable(), CONFIG, tmp_path / "out", ["reparameterized", "hf"])
    assert not (tmp_path / "out").exists()


def test_what_is_compared_is_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(state: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
        return save({**state, "text.text_projection": state["text.text_projection"] + 1}, metadata)

    monkeypatch.setattr(formats, "save", spoil)
    with pytest.raises(ValueError, match="the exported text tower differs from the model"):
        export(foldable(), CONFIG, tmp_path, ["reparameterized"])
