from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

from jettclip import openclip
from jettclip.models import factory
from jettclip.models.config import FOLDER
from jettclip.models.factory import create_model, create_model_and_transforms, get_tokenizer

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
    assert model.logit_scale.shape == (1,)
    size = model.preprocess_cfg["size"]
    assert model.visual.image_size == (size, size)
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))
    if name.startswith("LLM2CLIP"):
        assert model.embedding_width in (384, 2048, 4096)
    else:
        assert "text.positional_embedding" in model.no_weight_decay()
        assert model.context_length == (77 if name == "MobileCLIP-S0" else 248)
        assert model.ignores_padding == (name not in ("MobileCLIP-S0", "JettCLIP-S0"))


def test_an_adapters_model_has_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="'LLM2CLIP-Nano' reads stored embeddings, not text, and has no tokenizer"):
        get_tokenizer("LLM2CLIP-Nano")


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


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_model_has_the_activation_that_its_tag_was_trained_with(
    quick_gelu: bool, says: bool, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["quick_gelu"] = quick_gelu != says  # a tag that says nothing leaves it to the config
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(openclip, "get_pretrained_cfg", lambda *_: {"quick_gelu": quick_gelu} if says else {"url": "x"})
    monkeypatch.setattr(openclip, "download_pretrained", lambda cfg, cache_dir: str(tmp_path / "weights.pt"))
    model = create_model("tiny", "openai")
    assert model.quick_gelu == quick_gelu
    for tower in (model.visual, model.text):
        activation = tower.transformer.resblocks[0].mlp.gelu
        assert isinstance(activation, openclip.QuickGELU) == quick_gelu
    assert create_model("tiny", "openai", force_quick_gelu=True).quick_gelu


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
    monkeypatch.setattr(factory, "find_spec", lambda name: name)
    get_tokenizer("tiny", cache_dir=str(tmp_path))
    assert given["cache_dir"] == str(tmp_path)


@pytest.mark.parametrize("ask", [get_tokenizer, create_model])
def test_a_model_of_transformers_asks_for_them(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="model 'roberta-ViT-B-32' needs the package transformers; run: pip install"):
        ask("roberta-ViT-B-32")


def test_an_adapter_has_no_context_to_force() -> None:
    with pytest.raises(ValueError, match="--force-context-length 77: LLM2CLIP-Nano reads stored embeddings"):
        create_model("LLM2CLIP-Nano", force_context_length=77)
    with torch.device("meta"), pytest.raises(ValueError, match="LLM2CLIP-Nano reads stored embeddings"):
        assert create_model("LLM2CLIP-Nano", device="meta").context_length
