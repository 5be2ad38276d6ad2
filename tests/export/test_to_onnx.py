from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from jettclip.export import to_onnx
from jettclip.export.to_onnx import check_onnx, export_onnx
from jettclip.models.adapter import build_adapter
from jettclip.models.config import get_model_config
from jettclip.models.mct import MCt, build_mct
from jettclip.models.two_towers import TwoTowers
from support import tiny_towers

CONFIG = get_model_config("Nano-248")
MCT = {"context_length": 248, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True}


class Exported(NamedTuple):
    model: TwoTowers
    folder: Path
    report: dict[str, Any]

    def run(self, name: str, value: Tensor) -> Tensor:
        session = onnxruntime.InferenceSession(self.folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["features"], {name: value.numpy()})[0])


def model_with(text: str) -> TwoTowers:
    torch.manual_seed(0)
    model = tiny_towers(context_length=248, causal=True)
    if text == "mct":
        model.text = build_mct(MCT, 16, quick_gelu=False, mask_padding=True)
    if text == "adapter":
        model.text = build_adapter({"width": 24, "depth": 1}, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=["mct", "causal", "adapter"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model, folder = model_with(request.param), tmp_path_factory.mktemp(request.param)
    return Exported(model, folder, export_onnx(model, CONFIG, folder))


@torch.no_grad()
def test_onnxruntime_embeds_captions_of_any_number_and_length_as_pytorch_does(exported: Exported) -> None:
    assert exported.report["largest_difference"]["text"] < 1e-5
    width = exported.model.embedding_width
    assert exported.report["text_input"] == (f"float32 [batch, {width}]" if width else "int64 [batch, length]")
    for rows in (1, 2, 5):
        for length in (1, 2, 20, 77, 248):
            ids = torch.randint(1, 49406, (rows, length))
            ids[:, length // 2] = 49407
            text = torch.randn(rows, width) if width else ids
            expected = torch.nn.functional.normalize(exported.model.text(text), dim=1)
            torch.testing.assert_close(exported.run("text", text), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_are_normalised_inside(exported: Exported) -> None:
    assert exported.report["largest_difference"]["image"] < 1e-5
    assert exported.report["image_input"] == "float32 [batch, 3, 16, 16], RGB in 0..1"
    assert exported.report["logit_scale"] == pytest.approx(float(exported.model.logit_scale.exp()))
    for rows in (1, 3):
        pixels = torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8)
        expected = torch.nn.functional.normalize(exported.model.visual((pixels / 255 - 0.5) / 0.25), dim=1)
        torch.testing.assert_close(exported.run("image", pixels / 255), expected, rtol=0, atol=1e-5)


def test_branches_are_folded_and_the_weights_stand_in_the_file(exported: Exported) -> None:
    assert sorted(path.name for path in exported.folder.iterdir()) == ["image.onnx", "text.onnx"]
    operations = {node.op_type for node in onnx.load(exported.folder / "text.onnx").graph.node}
    assert "BatchNormalization" not in operations
    assert ("Conv" in operations) == isinstance(exported.model.text, MCt)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_file_that_says_something_else_is_an_error(
    tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(encoder: Any, name: str, *_: object) -> Any:
        return lambda value: encoder(value) + (0.001 if name == tower else 0)

    monkeypatch.setattr(to_onnx, "_write", write)
    with pytest.raises(ValueError, match=f"the exported {tower} tower differs from the model"):
        export_onnx(model_with("mct"), CONFIG, tmp_path)


def test_captions_of_all_lengths_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def write(encoder: Any, name: str, *_: object) -> Any:
        def run(value: Tensor) -> Tensor:
            asked.append((name, *value.shape[:2]))
            return encoder(value)

        return run

    monkeypatch.setattr(to_onnx, "_write", write)
    export_onnx(model_with("mct"), CONFIG, tmp_path)
    texts = {("text", rows, length) for rows in (1, 3) for length in (1, 20, 77, 248)}
    assert set(asked) == {("image", 1, 3), ("image", 3, 3), *texts}


def test_scale_and_bias_of_the_logits_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "_write", lambda encoder, *_: encoder)
    model = model_with("causal")
    assert "logit_bias" not in export_onnx(model, CONFIG, tmp_path)
    model.start_logit_scale(111)
    model.start_logit_bias(-12.5)
    report = export_onnx(model, CONFIG, tmp_path)
    assert (report["logit_scale"], report["logit_bias"]) == (pytest.approx(111), -12.5)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        return None if name.startswith("onnx") and name != "onnx" else importlib.util.find_spec(name)

    monkeypatch.setattr(to_onnx, "find_spec", find)
    with pytest.raises(ValueError, match="needs onnxscript, onnxruntime; run: pip install onnxscript onnxruntime$"):
        check_onnx(model_with("causal"), CONFIG)
