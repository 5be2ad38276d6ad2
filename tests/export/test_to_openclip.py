from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file

from jettclip.export.to_openclip import check_hf, check_openclip, export_hf, export_openclip
from jettclip.models.config import ModelConfig, get_model_config
from jettclip.models.factory import create_model, create_model_and_transforms, get_tokenizer
from jettclip.models.reparameterize import reparameterize
from jettclip.models.two_towers import TwoTowers
from support import tiny_towers

CAPTIONS = ["a red car", "wow !?!?! near a big house by the river. " * 12]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives OpenCLIP two tiny models, one of each of its classes."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    bidirectional = {**config, "text_cfg": {**text, "no_causal_mask": True}, "custom_text": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-custom", bidirectional)


def trained(name: str, **options: Any) -> TwoTowers:
    """A model whose parameters all lie far from where they start."""
    options = {
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.9, 0.8, 0.7),
        "image_interpolation": "bilinear",
        **options,
    }
    model = create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def check_equal(theirs: Any, ours: TwoTowers, transform: Any, tokenizer: Any) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    pixels = transform(picture)
    expected = image_transform_v2(PreprocessCfg(**ours.preprocess_cfg), is_train=False)(picture)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
    ids = tokenizer(CAPTIONS)
    assert ids.shape == (2, ours.context_length)
    torch.testing.assert_close(
        theirs.eval().encode_image(pixels[None]), ours.encode_image(pixels[None]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(theirs.encode_text(ids), ours.encode_text(ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.logit_scale, ours.logit_scale[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny", {}),
        ("tiny-custom", {}),
        ("tiny", {"force_context_length": 248}),
        ("tiny", {"force_quick_gelu": True}),
        ("tiny-custom", {"force_context_length": 248, "force_quick_gelu": True}),
    ],
)
def test_the_call_that_is_reported_loads_an_equal_model(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(name, **options)
    report = export_openclip(model, get_model_config(name), tmp_path)
    assert max(report["largest_difference"].values()) < 1e-5
    monkeypatch.chdir(tmp_path)
    theirs, _, transform = eval(report["load"], {"open_clip": open_clip})
    check_equal(theirs, model, transform, open_clip.get_tokenizer(name, context_length=model.context_length))


def test_plain_openclip_needs_no_option_for_its_own_77_token_model(tmp_path: Path) -> None:
    model = trained("tiny")
    export_openclip(model, get_model_config("tiny"), tmp_path)
    assert load_file(tmp_path / "open_clip_model.safetensors")["logit_scale"].shape == ()
    theirs = open_clip.create_model("tiny", pretrained=str(tmp_path / "open_clip_model.safetensors"))
    assert type(theirs) is open_clip.CLIP
    ids = open_clip.get_tokenizer("tiny")(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_text(ids), model.encode_text(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "tiny-custom"])
@pytest.mark.parametrize("options", [{}, {"force_context_length": 248, "force_quick_gelu": True}])
def test_openclip_loads_the_folder_with_its_tokenizer_and_transform(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(name, **options)
    export_hf(model, get_model_config(name), tmp_path)
    place = f"local-dir:{tmp_path}"
    theirs, _, transform = open_clip.create_model_and_transforms(place)
    check_equal(theirs, model, transform, open_clip.get_tokenizer(place))


@pytest.mark.parametrize("has_a_bias_there", [False, True])
def test_a_logit_bias_goes_along(has_a_bias_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_a_bias_there:
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS["tiny"], "init_logit_bias", -10)
    model = trained("tiny")
    model.start_logit_bias(-7.5)
    monkeypatch.chdir(tmp_path)
    report = export_openclip(model, get_model_config("tiny"), tmp_path)
    theirs, _, _ = eval(report["load"], {"open_clip": open_clip})
    assert float(theirs.logit_bias.detach()) == -7.5
    (tmp_path / "hf").mkdir()
    export_hf(model, get_model_config("tiny"), tmp_path / "hf")
    assert float(open_clip.create_model("local-dir:hf").logit_bias.detach()) == -7.5
    files = [tmp_path / "open_clip_model.safetensors", tmp_path / "hf/open_clip_model.safetensors"]
    assert [load_file(path)["logit_bias"].tolist() for path in files] == [-7.5, -7.5]


def test_a_248_token_model_of_ours_is_loaded_under_openclips_name(tmp_path: Path) -> None:
    ours = json.loads(json.dumps(open_clip.get_model_config("tiny")))
    ours["text_cfg"]["context_length"] = 248
    config = ModelConfig(name="tiny-248", pretrained_as="tiny", **ours)
    report = export_openclip(trained("tiny", force_context_length=248), config, tmp_path)
    assert report["load"].startswith("open_clip.create_model_and_transforms('tiny', ")
    assert "force_context_length=248" in report["load"]


@pytest.mark.parametrize("check", [check_openclip, check_hf])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Nano-248", "its bidirectional text tower hides padding"),
        ("MobileCLIP-S0", "OpenCLIP has no text tower MCt"),
        ("LLM2CLIP-Nano", "OpenCLIP has no text tower EmbeddingAdapter"),
        ("own-image-tower", "OpenCLIP has no image tower convmixer_nano"),
        ("folded", "its branches are folded"),
    ],
)
def test_a_model_that_openclip_cannot_build_is_refused(check: Any, name: str, reason: str) -> None:
    config = get_model_config("Nano-248" if name in ("own-image-tower", "folded") else name)
    if name == "own-image-tower":
        model = tiny_towers(causal=True)
        model.visual = create_model_and_transforms("Nano-248")[0].visual
    else:
        with torch.device("meta"):
            model = create_model("MobileCLIP-S0" if name == "folded" else config.name, device="meta")
    model = reparameterize(model) if name == "folded" else model
    with pytest.raises(ValueError, match=f"cannot be loaded by OpenCLIP: {reason}.*; --format onnx") as error:
        check(model, config)
    assert "\n" not in str(error.value)


def test_a_model_without_a_name_in_openclip_needs_the_folder(tmp_path: Path) -> None:
    config = ModelConfig(name="mine", **open_clip.get_model_config("tiny"))
    with pytest.raises(ValueError, match="OpenCLIP has no model 'mine' to load it into; choose --format hf"):
        check_openclip(trained("tiny"), config)
    check_hf(trained("tiny"), config)
    export_hf(trained("tiny"), config, tmp_path)


def test_a_gelu_model_does_not_go_where_openclip_has_quickgelu() -> None:
    with torch.device("meta"):
        model = create_model("ViT-B-32", device="meta")
    with pytest.raises(ValueError, match="ViT-B-32-quickgelu has QuickGELU, and this model GELU; choose --format hf"):
        check_openclip(model, get_model_config("ViT-B-32-quickgelu"))


@pytest.mark.parametrize("export", [export_openclip, export_hf])
def test_an_image_size_of_its_own_is_exported(export: Any, tmp_path: Path) -> None:
    model = trained("tiny", force_image_size=64)
    report = export(model, get_model_config("tiny"), tmp_path)
    assert max(report["largest_difference"].values()) < 1e-6
    if export is export_openclip:
        assert "force_image_size=64" in report["load"]
        assert report["tokenizer"] == f"open_clip.get_tokenizer('tiny', context_length={model.context_length})"
    else:
        assert open_clip.create_model(f"local-dir:{tmp_path}").visual.image_size == (64, 64)


def test_the_tokenizers_of_both_agree(tmp_path: Path) -> None:
    export_hf(trained("tiny"), get_model_config("tiny"), tmp_path)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    torch.testing.assert_close(theirs(CAPTIONS), get_tokenizer("tiny")(CAPTIONS))
