from __future__ import annotations

from typing import Any

import open_clip
import pytest
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import get_pretrained_cfg

from jettclip.models.config import FOLDER, get_model_config, list_models

CONFIGS = sorted(path.stem for path in FOLDER.glob("*.json"))
OF_OPENCLIP = sorted(set(CONFIGS) - {"Nano-248"})


def test_the_promised_models_are_there() -> None:
    promised = {f"MobileCLIP-{size}-248" for size in ("S1", "S2", "B")}
    promised |= {f"MobileCLIP2-{size}-248" for size in ("S0", "S2", "S3", "S4", "B", "L-14")}
    assert set(CONFIGS) >= promised | {"Nano-248"}
    models = list_models()
    assert models[: len(CONFIGS)] == CONFIGS
    assert set(models) >= set(open_clip.list_models())
    assert len(models) == len(set(models))


@pytest.mark.parametrize("name", OF_OPENCLIP)
def test_a_config_is_openclips_but_for_the_context(name: str) -> None:
    config, original = get_model_config(name), open_clip.get_model_config(name.removesuffix("-248"))
    assert original is not None
    assert config.pretrained_as == name.removesuffix("-248")
    assert config.embed_dim == original["embed_dim"]
    assert config.vision_cfg == original["vision_cfg"]
    assert config.text_cfg == {**original["text_cfg"], "context_length": 248}
    assert config.quick_gelu == original.get("quick_gelu", False)
    assert config.mask_padding == config.text_cfg["no_causal_mask"]


@pytest.mark.parametrize("name", OF_OPENCLIP)
def test_images_are_prepared_as_for_the_published_weights(name: str) -> None:
    config = get_model_config(name)
    tags = open_clip.list_pretrained_tags_by_model(config.tags_of)
    assert tags
    for tag in tags:
        published = get_pretrained_cfg(config.tags_of, tag)
        for key in ("mean", "std"):
            assert tuple(config.preprocess_cfg[key]) == tuple(published[key])
        for key in ("interpolation", "resize_mode"):
            assert config.preprocess_cfg[key] == published[key]


@pytest.mark.parametrize("name", OF_OPENCLIP)
def test_pixels_are_normalised_as_the_model_was_trained(name: str) -> None:
    openai = name.removesuffix("-248").endswith(("S3", "S4", "L-14"))
    mean, std = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) if openai else ((0.0,) * 3, (1.0,) * 3)
    preprocess = get_model_config(name).preprocess_cfg
    assert (tuple(preprocess["mean"]), tuple(preprocess["std"])) == (mean, std)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MobileCLIP-S1", {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear"}),
        ("ViT-B-32-quickgelu", {"mean": OPENAI_DATASET_MEAN, "interpolation": "bicubic", "resize_mode": "shortest"}),
    ],
)
def test_an_openclip_model_is_prepared_for_as_all_its_weights_agree(name: str, expected: dict[str, Any]) -> None:
    assert expected.items() <= get_model_config(name).preprocess_cfg.items()


def test_weights_that_disagree_leave_openclips_default() -> None:
    name = "ViT-L-14"
    cfgs = [get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    means = {tuple(cfg.get("mean") or OPENAI_DATASET_MEAN) for cfg in cfgs}
    assert ("mean" in get_model_config(name).preprocess_cfg) == (len(means) == 1)


def test_a_slash_in_a_name_is_a_dash() -> None:
    assert get_model_config("ViT-B/32") == get_model_config("ViT-B-32")


@pytest.mark.parametrize(
    ("name", "near"), [("mobileclip2-s0_248", "MobileCLIP2-S0-248"), ("nano248", "Nano-248"), ("vit-b32", "ViT-B-32")]
)
def test_an_unknown_name_is_answered_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"{name}' is not known; did you mean .*{near}"):
        get_model_config(name)
    with pytest.raises(ValueError, match=r"one of list_models\(\)"):
        get_model_config("@@@")


@pytest.mark.parametrize(("name", "key"), [("ViT-B-16-SigLIP", "init_logit_bias"), ("coca_ViT-B-32", "multimodal_cfg")])
def test_a_model_that_cannot_be_trained_here_is_refused(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}.*which jettclip does not train"):
        get_model_config(name)


def test_every_other_model_of_openclips_is_understood() -> None:
    refused = []
    for name in open_clip.list_models():
        try:
            get_model_config(name)
        except ValueError:
            refused.append(name)
    unusual = {"init_logit_bias", "multimodal_cfg"}
    assert all(unusual & set(open_clip.get_model_config(name)) for name in refused)
