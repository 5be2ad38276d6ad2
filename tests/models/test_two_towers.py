from __future__ import annotations

import pytest
import torch
from torch import nn

from jettclip.models.factory import create_model
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


def test_statistics_travel_with_the_model_but_not_with_its_weights() -> None:
    model = tiny_towers()
    assert not {"mean", "std"} & set(model.state_dict())
    assert model.to("meta").mean.device.type == "meta"


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers")  # OpenCLIP's lock does
def test_locked_towers_are_not_trained() -> None:
    model = create_model("Nano-248")
    model.lock_image_tower(freeze_bn_stats=True)
    assert trained_parts(model) == {"text", "logit_scale"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.visual.modules())
    model.lock_text_tower(freeze_layer_norm=False)
    assert trained_parts(model) == {"logit_scale"}

    model = create_model("Nano-248")
    model.lock_image_tower(unlocked_groups=1)
    trained = {name for name, parameter in model.visual.named_parameters() if parameter.requires_grad}
    assert trained
    assert "trunk.stem.0.weight" not in trained


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = create_model("Nano-248").train()
        model.set_grad_checkpointing(checkpointed)
        features = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), IDS)
        (features.image * features.short).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


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
