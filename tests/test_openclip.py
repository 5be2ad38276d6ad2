from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from jettclip import openclip
from support import tiny_towers

SOURCE = Path(openclip.__file__).parent
USED = [  # what this project calls of OpenCLIP, with the arguments that it passes
    (openclip.build_vision_tower, ["embed_dim", "vision_cfg", "quick_gelu"]),
    (openclip.build_zero_shot_classifier, ["model", "tokenizer", "classnames", "templates", "num_classes_per_batch"]),
    (openclip.const_lr, ["optimizer", "base_lr", "warmup_length", "steps"]),
    (openclip.const_lr_cooldown, ["optimizer", "base_lr", "warmup_length", "steps", "cooldown_steps"]),
    (openclip.convert_to_custom_text_state_dict, ["state_dict"]),
    (openclip.cosine_lr, ["optimizer", "base_lr", "warmup_length", "steps"]),
    (openclip.create_model, ["model_name", "pretrained", "force_context_length", "force_quick_gelu"]),
    (openclip.download_pretrained, ["cfg", "cache_dir"]),
    (openclip.get_autocast, ["precision", "device_type"]),
    (openclip.get_model_config, ["model_name"]),
    (openclip.get_pretrained_cfg, ["model", "tag"]),
    (openclip.get_tokenizer, ["model_name", "context_length", "cache_dir"]),
    (openclip.image_transform_v2, ["cfg", "is_train", "aug_cfg"]),
    (openclip.init_distributed_device_so, ["device", "dist_backend", "dist_url", "no_set_device_rank"]),
    (openclip.list_pretrained_tags_by_model, ["model"]),
    (openclip.convert_state_dict, ["model", "state_dict"]),
    (openclip.resize_pos_embed, ["state_dict", "model"]),
    (openclip.ResidualAttentionBlock, ["d_model", "n_head", "mlp_ratio", "ls_init_value", "act_layer", "norm_layer"]),
    (openclip.ResidualAttentionBlock.attention, ["self", "q_x", "k_x", "v_x", "attn_mask"]),
    (openclip.SimpleTokenizer, ["context_length", "clean"]),
    (openclip.TextTransformer, ["context_length", "no_causal_mask", "pool_type", "output_dim", "norm_layer"]),
    (openclip.TextTransformer.lock, ["self", "unlocked_layers", "freeze_layer_norm"]),
    (openclip.TextTransformer._embeds, ["self", "text"]),
]


@pytest.mark.parametrize(("function", "arguments"), USED, ids=lambda value: getattr(value, "__qualname__", ""))
def test_openclip_takes_the_arguments_that_are_passed(function: Callable[..., Any], arguments: list[str]) -> None:
    assert set(arguments) <= set(inspect.signature(function).parameters)


def test_overridden_methods_keep_their_signatures() -> None:
    assert list(inspect.signature(openclip.TextTransformer._embeds).parameters) == ["self", "text"]
    attention = inspect.signature(openclip.ResidualAttentionBlock.attention).parameters
    assert list(attention) == ["self", "q_x", "k_x", "v_x", "attn_mask"]
    assert "_embeds" in inspect.getsource(openclip.TextTransformer.forward)
    assert "attn_mask=attn_mask" in inspect.getsource(openclip.ResidualAttentionBlock.forward)


def test_a_text_transformer_has_the_attributes_that_are_read() -> None:
    tower = openclip.TextTransformer(context_length=8, vocab_size=10, width=8, heads=2, layers=1, output_dim=4)
    assert tower.attn_mask.shape == (8, 8)
    assert (tower.pool_type, tower.cls_emb, tower.context_length, tower.width, tower.heads) == ("argmax", None, 8, 8, 2)
    assert type(tower.transformer.resblocks[0]) is openclip.ResidualAttentionBlock
    assert tower.positional_embedding.shape == (8, 8)


def test_a_tokenizer_has_the_attributes_that_are_read() -> None:
    tokenizer = openclip.SimpleTokenizer()
    assert tokenizer.clean_fn is openclip.get_clean_fn("lower")
    assert tokenizer.reduction_fn is None
    assert (tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.context_length) == (49406, 49407, 77)
    assert set(tokenizer.cache) == {"<start_of_text>", "<end_of_text>"}
    assert tokenizer.pat.findall("it's 12") == ["it", "'s", "1", "2"]
    assert [tokenizer.encoder[part] for part in tokenizer.bpe("dog").split(" ")] == [1929]
    assert len(tokenizer.byte_encoder) == 256


def test_every_name_of_the_seam_is_there_and_used() -> None:
    assert all(hasattr(openclip, name) for name in openclip.__all__)
    used = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "openclip":
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module == "jettclip.openclip":
                used |= {alias.name for alias in node.names}
    assert used == set(openclip.__all__)


def test_openclips_parser_has_every_flag_that_is_read() -> None:
    named = {
        node.attr
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert {"train_data", "val_data", "batch_size", "model"} <= named
    assert named - {"rank", "world_size"} <= set(vars(openclip.trainer_arguments([])))


def test_an_unknown_flag_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        openclip.trainer_arguments(["--no-such-flag"])
    assert "--no-such-flag" in capsys.readouterr().err


def test_the_help_text_is_returned_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--train-data" in openclip.trainer_help()
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Unused augmentation cfg items")  # OpenCLIP says so of colour jitter, and uses it
@pytest.mark.parametrize(
    ("is_train", "options", "mode"),
    [
        (True, {}, "RGB"),
        (True, {}, "RGBA"),
        (True, {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2}, "RGB"),
        (True, {"use_timm": True}, "RGB"),
        (False, {"resize_mode": "shortest"}, "L"),
        (False, {"resize_mode": "longest"}, "RGB"),
        (False, {"resize_mode": "squash", "interpolation": "bilinear"}, "RGB"),
    ],
)
def test_uint8_pixels_become_openclips_own(is_train: bool, options: dict[str, Any], mode: str) -> None:
    model = tiny_towers()
    cfg = PreprocessCfg(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), **({} if is_train else options))
    transform = image_transform_v2(cfg, is_train, aug_cfg=options if is_train else None)
    kept = openclip.keep_uint8(transform)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).convert(mode)
    pixels = []
    for prepare in (transform, kept):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        pixels.append(prepare(image))
    assert pixels[1].dtype == torch.uint8
    assert pixels[1].shape == (3, 16, 16)
    normalised = (pixels[1].float() / 255 - model.mean) / model.std
    torch.testing.assert_close(normalised, pixels[0], rtol=0, atol=1e-6)
    features = [model.encode_image(image.unsqueeze(0)) for image in pixels]
    torch.testing.assert_close(features[1], features[0])


def test_a_transform_that_goes_on_after_normalising_stays_as_it_is() -> None:
    erasing = image_transform_v2(PreprocessCfg(size=16), True, aug_cfg={"use_timm": True, "re_prob": 0.5})
    assert openclip.keep_uint8(erasing) is erasing
    assert openclip.keep_uint8(torch.from_numpy) is torch.from_numpy
