from __future__ import annotations

from typing import Any

import open_clip
import pytest
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import get_pretrained_cfg

from jettclip.models.config import FOLDER, get_model_config, list_models

CONFIGS = sorted(path.stem for path in FOLDER.glob("*.json"))
OF_OPENCLIP = [name for name in CONFIGS if name.endswith("-248") and name[:-4] in open_clip.list_models()]
MOBILECLIP = [name for name in OF_OPENCLIP if name.startswith("MobileCLIP")]


def test_the_promised_models_are_there() -> None:
    promised = {f"MobileCLIP-{size}-248" for size in ("S0", "S1", "S2", "B")}
    promised |= {f"MobileCLIP2-{size}-248" for size in ("S0", "S2", "S3", "S4", "B", "L-14")}
    promised |= {"MobileCLIP-S0", "JettCLIP-S0", "ViT-B-16-248", "ViT-L-14-248"}
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
    assert config.mask_padding == config.text_cfg.get("no_causal_mask", False)


@pytest.mark.parametrize("name", MOBILECLIP)
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


@pytest.mark.parametrize("name", MOBILECLIP)
def test_pixels_are_normalised_as_the_model_was_trained(name: str) -> None:
    openai = name.removesuffix("-248").endswith(("S3", "S4", "L-14"))
    mean, std = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) if openai else ((0.0,) * 3, (1.0,) * 3)
    preprocess = get_model_config(name).preprocess_cfg
    assert (tuple(preprocess["mean"]), tuple(preprocess["std"])) == (mean, std)


def test_the_models_with_mct_differ_in_what_they_are_for() -> None:
    published, long, jettclip = (
        get_model_config(name) for name in ("MobileCLIP-S0", "MobileCLIP-S0-248", "JettCLIP-S0")
    )
    assert published.text_tower == long.text_tower == jettclip.text_tower == "mct"
    assert published.vision_cfg == long.vision_cfg == jettclip.vision_cfg
    assert published.text_cfg == {**long.text_cfg, "context_length": 77}
    assert long.text_cfg == jettclip.text_cfg
    assert [config.mask_padding for config in (published, long, jettclip)] == [False, True, False]
    assert published.preprocess_cfg == long.preprocess_cfg == get_model_config("MobileCLIP-S1-248").preprocess_cfg
    assert tuple(jettclip.preprocess_cfg["mean"]) == OPENAI_DATASET_MEAN
    assert jettclip.preprocess_cfg["interpolation"] == "bicubic"


@pytest.mark.parametrize("name", ["ViT-B-16-248", "ViT-L-14-248"])
def test_the_models_of_longclip_see_images_as_openais_do(name: str) -> None:
    published = get_pretrained_cfg(name[:-4], "openai")
    assert published.items() >= {"quick_gelu": True, "interpolation": "bicubic"}.items()
    preprocess = get_model_config(name).preprocess_cfg
    assert (tuple(preprocess["mean"]), tuple(preprocess["std"])) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    assert preprocess["interpolation"] == "bicubic"


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


def test_a_model_that_cannot_be_trained_here_is_refused() -> None:
    with pytest.raises(ValueError, match="multimodal_cfg.*which jettclip does not train"):
        get_model_config("coca_ViT-B-32")


def test_every_other_model_of_openclips_is_understood() -> None:
    refused = []
    for name in open_clip.list_models():
        try:
            get_model_config(name)
        except ValueError:
            refused.append(name)
    assert all("multimodal_cfg" in open_clip.get_model_config(name) for name in refused)
