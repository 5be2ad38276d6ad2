from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from jettclip.models.checkpoints import load_image_tower, load_weights, read_weights
from jettclip.models.mct import build_mct
from jettclip.models.reparameterize import is_reparameterized_state, reparameterize
from jettclip.models.two_towers import TwoTowers
from jettclip.types import Features
from support import tiny_towers

IDS = torch.tensor([[49406, 320, 1929, 7, 8, 49407, 0, 0, 0], [49406, 5, 256, 9, 10, 11, 12, 13, 49407]])
TEXT = {"context_length": 9, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True}


def mobile_image_tower() -> nn.Module:
    """A MobileCLIP image tower of one narrow block a stage."""
    return FastVit(
        layers=(1, 1, 1, 1),
        embed_dims=(16, 16, 16, 32),
        mlp_ratios=(2, 2, 2, 2),
        se_downsamples=(False, False, True, True),
        downsamples=(False, True, True, True),
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
        pos_embs=(None, None, None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))),
        num_classes=16,
    )


def stem_image_tower() -> nn.Module:
    """The stem of MobileCLIP-B, whose BatchNorms have activations."""
    stem = ConvStem(channels=(8, 8, 16), stride=(4, 2, 2), kernel_size=(4, 2, 2), act_layer=nn.GELU)
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def towers(visual: nn.Module, mask_padding: bool = True) -> TwoTowers:
    """A model in float64, as if training had moved all its statistics and scales."""
    text = build_mct(TEXT, 16, quick_gelu=False, mask_padding=mask_padding)
    model = TwoTowers(visual, text, embed_dim=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.3, 2)
        for parameter in model.parameters():  # scales start at 1e-5, behind which any mistake hides
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double()


@torch.no_grad()
def embed(model: TwoTowers) -> Features:
    pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model(pixels, IDS[:, :7], IDS)


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("image_tower", [mobile_image_tower, stem_image_tower])
def test_a_folded_copy_computes_the_same_with_fewer_parameters(image_tower: type, mask_padding: bool) -> None:
    model = towers(image_tower(), mask_padding)
    folded = reparameterize(model)
    assert not any(module.training for module in folded.modules())
    torch.testing.assert_close(embed(folded), embed(model.eval()), rtol=0, atol=1e-10)
    for tower in ("visual", "text"):
        counts = [sum(p.numel() for p in getattr(m, tower).parameters()) for m in (folded, model)]
        assert counts[0] < counts[1]


def test_only_a_norm_that_follows_no_convolution_is_left() -> None:
    folded = reparameterize(towers(mobile_image_tower()))
    left = [name for name, module in folded.named_modules() if isinstance(module, _BatchNorm)]
    assert left == ["visual.stages.3.blocks.0.norm"]  # before attention


def test_the_model_itself_stays_as_it_is() -> None:
    model = towers(mobile_image_tower()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = reparameterize(model)
    for parameter in folded.parameters():
        parameter.zero_()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.is_reparameterized


def test_a_folded_model_refuses_training() -> None:
    folded = reparameterize(towers(stem_image_tower()))
    assert folded.eval() is folded
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    with pytest.raises(ValueError, match="a reparameterised model cannot be trained"):
        folded.train()
    assert not folded.training


def test_a_folded_model_is_copied_as_it_is() -> None:
    folded = reparameterize(towers(mobile_image_tower()))
    again = reparameterize(folded)
    assert again is not folded
    torch.testing.assert_close(embed(again), embed(folded), rtol=0, atol=0)


def test_a_model_with_nothing_to_fold_is_copied_and_can_be_trained() -> None:
    model = tiny_towers()
    copied = reparameterize(model)
    assert copied is not model
    assert not copied.training
    assert not copied.is_reparameterized
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert not is_reparameterized_state(copied.state_dict())
    assert copied.train().training


@pytest.mark.parametrize("image_tower", [mobile_image_tower, stem_image_tower])
def test_weights_of_a_folded_model_fit_another_and_no_unfolded_one(image_tower: type, tmp_path: Path) -> None:
    folded = reparameterize(towers(image_tower())).float()
    save_file(folded.state_dict(), tmp_path / "folded.safetensors")
    weights = read_weights(tmp_path / "folded.safetensors")
    assert is_reparameterized_state(weights.state)
    other = towers(image_tower()).float()
    for load in (load_weights, load_image_tower):
        with pytest.raises(ValueError, match="folded.safetensors is reparameterised, for inference only; give the"):
            load(other, weights)
    other = reparameterize(other)
    load_weights(other, weights)
    torch.testing.assert_close(embed(other.double()), embed(folded.double()), rtol=0, atol=0)
