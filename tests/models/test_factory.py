from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

from jettclip import openclip
from jettclip.models.config import FOLDER
from jettclip.models.factory import create_model, create_model_and_transforms, get_tokenizer, same_tokenizer

CONFIGS = sorted(path.stem for path in FOLDER.glob("*.json"))
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = ["", "a dog !?!?!?!?! by the river", "a red car near a big house. " * 60]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Adds the model "tiny" to OpenCLIP's own; what a test changes in it counts."""
    config = copy.deepcopy(TINY)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, device="meta")
    assert model.context_length == 248
    assert model.ignores_padding
    assert model.logit_scale.shape == (1,)
    size = model.preprocess_cfg["size"]
    assert model.visual.image_size == (size, size)
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))
    assert "text.positional_embedding" in model.no_weight_decay()


@pytest.mark.parametrize("name", ["Nano-248", "MobileCLIP2-S0-248"])
def test_a_model_embeds_what_its_transforms_and_tokenizer_make(name: str) -> None:
    model, train, val = create_model_and_transforms(name)
    model.eval()
    picture = Image.effect_noise((300, 200), 50).convert("RGB")
    images = torch.stack([train(picture), val(picture)])
    ids = get_tokenizer(name)(["a dog", "a red car near a house"])
    assert ids.shape == (2, 248)
    with torch.no_grad():
        features = model(images, ids, ids[:, :20])
    for rows in features[:3]:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(features.short, features.long)
    torch.testing.assert_close(features.logit_scale, torch.tensor([1 / 0.07]))


@pytest.mark.parametrize("custom_text", [True, False])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_same_weights_embed_as_in_openclip(
    tiny: dict[str, Any], tmp_path: Path, custom_text: bool, quick_gelu: bool
) -> None:
    tiny |= {"custom_text": custom_text, "quick_gelu": quick_gelu, "init_logit_scale": 1.5}
    reference = open_clip.create_model("tiny").eval()
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "weights.pt")
    model = create_model("tiny", str(tmp_path / "weights.pt")).eval()
    image, ids = torch.randn(3, 3, 32, 32), open_clip.tokenize(CAPTIONS)
    with torch.no_grad():
        expected_image, expected_text, expected_scale = reference(image, ids)
        features = model(image, None, ids)
    torch.testing.assert_close(features.image, expected_image, rtol=0, atol=1e-6)
    torch.testing.assert_close(features.long, expected_text, rtol=0, atol=1e-6)
    assert features.short is None
    torch.testing.assert_close(features.logit_scale, expected_scale.reshape(1))
    torch.testing.assert_close(create_model("tiny").logit_scale.detach(), torch.tensor([1.5]))


def test_the_context_can_be_forced(tiny: dict[str, Any], tmp_path: Path) -> None:
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "weights.pt")
    model = create_model("tiny", str(tmp_path / "weights.pt"), force_context_length=248)
    assert model.context_length == 248
    assert tiny["text_cfg"]["context_length"] == 77
    assert get_tokenizer("tiny", 248)(CAPTIONS).shape == (3, 248)


@pytest.mark.parametrize("size", [48, [48], [48, 32]])
def test_the_image_size_can_be_forced(tiny: dict[str, Any], tmp_path: Path, size: int | list[int]) -> None:
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "weights.pt")
    model, train, val = create_model_and_transforms("tiny", str(tmp_path / "weights.pt"), force_image_size=size)
    shape = (48, 32) if size == [48, 32] else (48, 48)
    picture = Image.new("RGB", (100, 60))
    assert train(picture).shape == val(picture).shape == (3, *shape)
    assert model.encode_image(val(picture).unsqueeze(0)).shape == (1, 16)
    nano = create_model("Nano-248", force_image_size=size)
    assert nano.visual.image_size == shape
    assert nano.encode_image(torch.zeros(1, 3, *shape)).shape == (1, 192)


def test_further_options_reach_the_towers(tiny: dict[str, Any]) -> None:
    model = create_model("tiny", force_quick_gelu=True, force_patch_dropout=0.5)
    assert isinstance(model.text.transformer.resblocks[0].mlp.gelu, openclip.QuickGELU)
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, openclip.QuickGELU)
    assert model.visual.patch_dropout.prob == 0.5


def test_pixels_can_be_normalised_otherwise(tiny: dict[str, Any]) -> None:
    model, _, val = create_model_and_transforms("tiny", image_mean=(0.1, 0.2, 0.3), image_std=(0.5,) * 3)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    expected = torch.tensor([-0.2, -0.4, -0.6]).view(3, 1, 1).expand(3, 32, 32)
    torch.testing.assert_close(val(Image.new("RGB", (40, 40))), expected)


def test_a_tag_brings_its_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(create_model("Nano-248").state_dict(), tmp_path / "weights.pt")
    published = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    monkeypatch.setattr(openclip, "get_pretrained_cfg", lambda model, tag: published if tag == "mine" else {})
    monkeypatch.setattr(openclip, "download_pretrained", lambda cfg, cache_dir: str(tmp_path / "weights.pt"))
    model = create_model("Nano-248", "mine", image_interpolation="bilinear")
    assert model.preprocess_cfg == {**published, "interpolation": "bilinear", "size": 128}
    assert model.mean.abs().sum() == 0


def test_a_tag_trained_with_the_other_activation_is_warned_of(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(openclip, "get_pretrained_cfg", lambda model, tag: {"quick_gelu": True})
    monkeypatch.setattr(openclip, "download_pretrained", lambda cfg, cache_dir: str(tmp_path / "weights.pt"))
    with caplog.at_level(logging.WARNING):
        create_model("tiny", "openai")
    assert "was trained with quick_gelu=True" in caplog.text


def test_weights_that_are_nowhere_are_answered_with_the_tags() -> None:
    with pytest.raises(ValueError, match="'nowhere' is neither a file or folder nor a tag.*datacompdr, datacompdr_lt"):
        create_model("MobileCLIP-B-248", "nowhere")


@pytest.mark.parametrize("name", ["Nano-248", "MobileCLIP2-S0-248", "MobileCLIP2-S0", "ViT-B-32"])
@pytest.mark.parametrize("length", [None, 77, 248])
def test_token_ids_equal_openclips(name: str, length: int | None) -> None:
    ids = get_tokenizer(name, length)(CAPTIONS)
    own = 248 if name.endswith("248") else 77
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32", context_length=length or own)(CAPTIONS))
    assert ids.dtype == torch.int64


def test_nano_has_no_pretrained_image_tower() -> None:
    with pytest.raises(ValueError, match="no pretrained weights; leave --pretrained-image out"):
        create_model("Nano-248", pretrained_image=True)


def test_only_timms_image_towers_have_weights_of_their_own(tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the image tower of tiny is not timm's.*; leave it out"):
        create_model("tiny", pretrained_image=True)
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "weights.pt")
    create_model("tiny", str(tmp_path / "weights.pt"), pretrained_image=True)  # weights of the whole model go first


@pytest.mark.parametrize("name", ["Nano-248", "ViT-B-32"])
def test_options_reach_the_tokenizer(name: str) -> None:
    texts = ["A  Dog &amp; a CAT"]
    for clean in ("lower", "whitespace", "canonicalize"):
        expected = open_clip.SimpleTokenizer(context_length=20, clean=clean)(texts)
        assert torch.equal(get_tokenizer(name, 20, clean=clean, cache_dir="unused")(texts), expected)


def test_the_cache_folder_reaches_tokenizers_that_are_downloaded(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["text_cfg"]["hf_tokenizer_name"] = "someone/tokenizer"
    given: dict[str, Any] = {}
    monkeypatch.setattr(open_clip.factory, "HFTokenizer", lambda source, **options: given.update(options))
    get_tokenizer("tiny", cache_dir=str(tmp_path))
    assert given["cache_dir"] == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("Nano-248", "ViT-B-32", True),
        ("MobileCLIP2-S0-248", "ViT-L-14-336", True),
        ("ViT-L-14-CLIPA", "ViT-L-14-CLIPA-336", True),
        ("roberta-ViT-B-32", "roberta-ViT-B-32", True),
        ("Nano-248", "roberta-ViT-B-32", False),
        ("xlm-roberta-base-ViT-B-32", "roberta-ViT-B-32", False),
        ("ViT-L-14-worldwide", "ViT-L-14-CLIPA", False),
        ("ViT-B-32", "ViT-L-14-CLIPA", False),
        ("ViT-B-32", "tiny", True),
    ],
)
def test_models_of_one_tokenizer_are_told(name: str, other: str, same: bool, tiny: dict[str, Any]) -> None:
    assert same_tokenizer(name, other) == same_tokenizer(other, name) == same


@pytest.mark.parametrize(
    "changed", [{"vocab_size": 100}, {"tokenizer_kwargs": {"clean": "whitespace"}}, {"tokenizer_mode": "clips"}]
)
def test_a_tokenizer_with_other_options_is_another(changed: dict[str, Any], tiny: dict[str, Any]) -> None:
    tiny["text_cfg"] |= changed
    assert not same_tokenizer("tiny", "ViT-B-32")
