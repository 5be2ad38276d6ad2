from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from jettclip.models.factory import create_model
from jettclip.models.mct import build_mct
from jettclip.models.two_towers import TwoTowers, unit_rows
from support import tiny_towers

IDS = torch.tensor([[49406, 320, 1929, 49407, 0, 0], [49406, 256, 49407, 0, 0, 0]])


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)


def trained_parts(model: TwoTowers) -> set[str]:
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_uint8_images_are_normalised_by_the_model() -> None:
    model, image = tiny_towers(), pixels()
    normalised = (image.float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(model.encode_image(image), model.encode_image(normalised))


def test_towers_get_images_by_channel_however_the_loader_left_them() -> None:
    model, image = tiny_towers(), pixels()
    seen: list[torch.Tensor] = []
    model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for layout in (torch.contiguous_format, torch.channels_last):
        model.encode_image(image.contiguous(memory_format=layout))
    assert all(one.is_contiguous() for one in seen)
    assert torch.equal(*seen)


def test_features_are_unit_rows_and_the_scale_is_exponentiated() -> None:
    model = tiny_towers()
    features = model(pixels(), IDS, IDS[:, :4])
    for rows in features[:3]:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(features.logit_scale, torch.tensor([1 / 0.07]))
    assert features.logit_scale.requires_grad
    torch.testing.assert_close(features.short, unit_rows(model.encode_text(IDS)))
    torch.testing.assert_close(features.image.norm(dim=1), model.encode_image(pixels(), normalize=True).norm(dim=1))


def test_a_view_without_captions_has_no_features() -> None:
    features = tiny_towers()(pixels(), None, IDS)
    assert features.short is None
    assert features.long is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_rows_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    rows = unit_rows(torch.randn(5, 64).to(dtype))
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5, dtype=rows.dtype))


def test_a_zero_feature_has_a_finite_gradient() -> None:
    features = torch.zeros(2, 4, requires_grad=True)
    unit_rows(features).sum().backward()
    assert features.grad is not None
    assert bool(torch.isfinite(features.grad).all())


def test_the_scale_starts_where_it_is_told() -> None:
    model = tiny_towers()
    model.start_logit_scale(None)
    torch.testing.assert_close(model.logit_scale.exp().detach(), torch.tensor([1 / 0.07]))
    model.start_logit_scale(100)
    torch.testing.assert_close(model.logit_scale.exp().detach(), torch.tensor([100.0]))


def test_a_bias_of_the_logits_is_there_and_trained_for_a_loss_that_needs_one() -> None:
    model = tiny_towers()
    model.start_logit_bias(None)
    assert model(pixels(), IDS).logit_bias is None
    assert "logit_bias" not in model.state_dict()
    model.start_logit_bias(-10, keep=True)  # there is nothing to keep
    features = model(pixels(), IDS)
    assert features.logit_bias.tolist() == [-10]
    assert torch.autograd.grad(features.logit_bias.sum(), model.logit_bias)[0].tolist() == [1]
    model.start_logit_bias(-5)
    assert features.logit_bias.tolist() == [-10]  # what it was then
    model.logit_bias.requires_grad_(False)
    model.start_logit_bias(-10, keep=True)
    assert model.logit_bias.tolist() == [-5]
    assert model.logit_bias.requires_grad
    assert "logit_bias" in model.no_weight_decay()


def test_statistics_travel_with_the_model_but_not_with_its_weights() -> None:
    model = tiny_towers()
    assert not {"mean", "std"} & set(model.state_dict())
    assert model.to("meta").mean.device.type == "meta"


def trained_modules(tower: nn.Module, depth: int) -> set[str]:
    return {".".join(n.split(".")[:depth]) for n, parameter in tower.named_parameters() if parameter.requires_grad}


def meta_model(name: str, **options: Any) -> TwoTowers:
    with torch.device("meta"):
        return create_model(name, device="meta", **options)


def test_locked_towers_are_not_trained() -> None:
    model = create_model("Nano-248")
    model.lock_image_tower(freeze_bn_stats=True)
    assert trained_parts(model) == {"text", "logit_scale"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.visual.modules())
    model.lock_text_tower(freeze_layer_norm=False)
    assert trained_parts(model) == {"logit_scale"}


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers")  # OpenCLIP's lock does
@pytest.mark.parametrize(
    ("name", "groups", "trained"),
    [
        ("Nano-248", 1, {"trunk.head"}),
        ("Nano-248", 2, {"trunk.head", "trunk.blocks.3"}),
        ("MobileCLIP-S0-248", 1, {"trunk.head.fc", "trunk.final_conv.conv_kxk", "trunk.final_conv.conv_scale",
                                  "trunk.final_conv.se"}),
        ("MobileCLIP-B-248", 2, {"trunk.head.weight", "trunk.head.bias", "trunk.norm.weight", "trunk.norm.bias",
                                 "trunk.blocks.11"}),
        ("ViT-B-16-248", 1, {"proj"}),
        ("ViT-B-16-248", 2, {"proj", "ln_post.weight", "ln_post.bias", "transformer.resblocks.11"}),
    ],
)  # fmt: skip
def test_the_last_groups_of_a_locked_image_tower_are_trained(name: str, groups: int, trained: set[str]) -> None:
    model = meta_model(name)
    model.lock_image_tower(unlocked_groups=groups)
    named = trained_modules(model.visual, 3)
    assert all(any(module.startswith(one) for one in trained) for module in named)
    assert all(any(module.startswith(one) for module in named) for one in trained)
    assert trained_parts(model) == {"visual", "text", "logit_scale"}


@pytest.mark.parametrize("name", ["MobileCLIP-S0-248", "ViT-B-16-248", "MobileCLIP2-S0-248"])
def test_the_last_layers_of_a_locked_text_tower_are_trained(name: str) -> None:
    last = len(meta_model(name).text.transformer.resblocks) - 1
    expected: set[str] = set()
    more: list[set[str]] = [
        set(), {"text_projection"}, {"ln_final", f"transformer.resblocks.{last}"}, {f"transformer.resblocks.{last - 1}"}
    ]  # fmt: skip
    for layers, trained in enumerate(more):
        expected |= trained
        model = meta_model(name)
        model.lock_text_tower(unlocked_layers=layers)
        named = {n.removesuffix(".weight").removesuffix(".bias") for n in trained_modules(model.text, 3)}
        assert named == expected
    model = meta_model(name)
    model.lock_text_tower(unlocked_layers=last + 3)  # all of them, and the embeddings
    assert all(parameter.requires_grad for parameter in model.text.parameters())


@pytest.mark.parametrize("name", ["Nano-248", "MobileCLIP-S0-248", "ViT-B-16-248"])
def test_gradient_checkpointing_reaches_both_towers_and_changes_no_gradient(name: str) -> None:
    size = 64 if name != "ViT-B-16-248" else 32
    gradients, calls = [], []
    model = create_model(name, force_image_size=size).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 0.0  # the blocks are run twice
    image = torch.randn(2, 3, size, size)
    blocks = [next(m for n, m in tower.named_modules() if n.endswith(("blocks.0", "blocks.3"))) for tower in (
        model.visual, model.text)]  # fmt: skip
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        calls.clear()
        features = model(image, IDS)
        (features.image * features.short).sum().backward()
        assert sorted(calls) == [0, 0, 1, 1][:: 1 if checkpointed else 2]
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["ViT-B-16-248", "MobileCLIP-B-248"])
def test_patch_dropout_hides_patches_in_training_only(name: str) -> None:
    model = create_model(name, force_patch_dropout=0.5, force_image_size=32 if name == "ViT-B-16-248" else None)
    blocks = model.visual.transformer.resblocks if name == "ViT-B-16-248" else model.visual.trunk.blocks
    patches = []
    blocks[0].register_forward_pre_hook(lambda _, inputs: patches.append(inputs[0].shape[1] - 1))
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode).encode_image(torch.randn(1, 3, *([model.visual.image_size[0]] * 2)))
    assert patches[0] * 2 == patches[1]


@pytest.mark.parametrize("name", ["Nano-248", "MobileCLIP-S0"])
def test_a_tower_without_patches_refuses_to_drop_them(name: str) -> None:
    with pytest.raises(ValueError, match=f"the image tower of {name} has no patches to drop; leave it out"):
        create_model(name, force_patch_dropout=0.5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # while it traces
@pytest.mark.parametrize("text_tower", ["transformer", "mct"])
def test_a_compiled_model_is_the_model(text_tower: str) -> None:
    model = create_model("Nano-248")
    if text_tower == "mct":
        config = {"context_length": 32, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True}
        model.text = build_mct(config, model.embed_dim, quick_gelu=False, mask_padding=True)
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 0.0
    image = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="eager")  # what is traced; the code generator takes half a minute
    for length in (6, 4):
        expected, features = model(image, IDS[:, :length]), compiled(image, IDS[:, :length])
        torch.testing.assert_close(features, expected)
    features.short.square().sum().backward()
    assert model.text.token_embedding.weight.grad is not None


def test_siglips_bias_is_kept_and_not_trained_before_a_loss_needs_it() -> None:
    model = meta_model("ViT-B-16-SigLIP")
    reference = open_clip.get_model_config("ViT-B-16-SigLIP")
    assert model.logit_bias.shape == (1,)
    assert model.logit_bias.dtype == torch.float32  # its config says -10, an integer
    assert not model.logit_bias.requires_grad
    assert not model.ignores_padding
    assert model.context_length == 64
    with torch.device("meta"):
        published = open_clip.CustomTextCLIP(**{k: v for k, v in reference.items() if k != "custom_text"})
    shapes = {name: value.shape for name, value in published.state_dict().items() if not name.startswith("logit_")}
    ours = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("logit_")}
    assert ours == shapes


@pytest.mark.parametrize("name", ["Nano-248", "MobileCLIP-B-248", "ViT-B-32"])
def test_parameters_spared_from_weight_decay_exist(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, device="meta")
    spared = model.no_weight_decay()
    assert spared <= set(dict(model.named_parameters()))
    expected = {
        "Nano-248": set(),
        "MobileCLIP-B-248": {"visual.trunk.pos_embed", "visual.trunk.cls_token"},
        "ViT-B-32": {"visual.positional_embedding", "visual.class_embedding"},
    }[name]
    assert spared == expected | {"logit_scale", "text.positional_embedding"}


@pytest.mark.parametrize(("mask_padding", "causal"), [(True, False), (False, True), (False, False)])
def test_captions_may_be_cropped_where_the_text_tower_allows_it(mask_padding: bool, causal: bool) -> None:
    model = tiny_towers(mask_padding=mask_padding, causal=causal)
    assert model.ignores_padding == (mask_padding or causal)
    assert model.context_length == 32
    model.text = nn.Identity()
    assert not model.ignores_padding


@pytest.mark.parametrize(
    ("name", "told"), [("Nano-248", True), ("ViT-B-32", True), ("ViT-L-14-CLIPA", False), ("ViT-L-14-worldwide", False)]
)
def test_it_is_known_whether_the_end_token_is_the_largest(name: str, told: bool) -> None:
    with torch.device("meta"):
        model = create_model(name, device="meta")
    assert model.end_token_is_largest == told
    model.text = nn.Identity()  # of a kind that says nothing about it, as transformers' towers
    assert not model.end_token_is_largest
