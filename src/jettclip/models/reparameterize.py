"""Folds the branches that only training needs into single convolutions, for inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from jettclip.models.two_towers import REPARAMETERIZED, TwoTowers


def reparameterize(model: TwoTowers) -> TwoTowers:
    """Returns a folded copy in evaluation mode, which computes the same with fewer operations; the model stays.

    Parallel branches of convolutions become one convolution (MobileOne, arXiv 2206.04040; RepMixer, 2303.14189), and a
    BatchNorm that follows a convolution disappears in it. The copy cannot be trained. It has other keys, among them a
    mark by which `is_reparameterized_state` knows its checkpoints. A model with nothing to fold is copied as it is.
    """
    folded = copy.deepcopy(model).eval()
    if model.is_reparameterized:
        return folded
    with torch.no_grad(), folded.logit_scale.device:  # timm makes the new convolutions on the default device
        reparameterize_model(folded, inplace=True)
        for module in folded.modules():
            if isinstance(module, ConvNormAct):
                _fold_norm(module)
    if folded.state_dict().keys() != model.state_dict().keys():
        folded.register_buffer(REPARAMETERIZED, torch.tensor(True, device=folded.logit_scale.device))
        folded.requires_grad_(False)
    return folded.eval()  # the modules that are new as well


def is_reparameterized_state(state: Mapping[str, Tensor]) -> bool:
    """Tells whether these are the weights of a folded model: build one by `reparameterize` before loading them."""
    return REPARAMETERIZED in state


def _fold_norm(block: ConvNormAct) -> None:
    """Folds the BatchNorm of a convolution that timm's reparameterisation leaves; an activation after it stays."""
    if type(block.conv) is nn.Conv2d and isinstance(block.bn, BatchNormAct2d):
        block.conv = fuse_conv_bn_eval(block.conv, block.bn)
        block.bn = block.bn.act
