"""MCt, the text tower of MobileCLIP-S0: convolutions over the tokens around a few attention layers (arXiv 2311.17049).

Blocks of a depthwise convolution that mixes neighbouring tokens, and a convolutional feed-forward network, stand before
and after the attention layers. The mixer is RepMixer of FastViT (arXiv 2303.14189), over tokens instead of pixels: it
has several branches in training, and one convolution after `reparameterize`. timm's own knows square kernels only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from jettclip.models.text_tower import TextTower, tower_arguments

KERNEL = 11
"""Tokens a convolution sees, as published."""

LAYER_SCALE = 1e-5
"""Where the scales of the residual branches start."""


class TokenMixer(nn.Module):
    """Mixes neighbouring tokens, channel by channel: x + scale * (mix(x) - norm(x)) (arXiv 2303.14189, equation 2).

    mix is the sum of a normalised depthwise convolution and a normalised identity.

    Args:
        width: channels C.
        kernel: tokens the convolution sees, odd.
    """

    def __init__(self, width: int, kernel: int = KERNEL) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.identity = nn.BatchNorm1d(width)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.conv_norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.full([width], LAYER_SCALE))

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Mixes [b, C, L]; where `padding`, bool [b, L], is True, nothing is read and the output has no meaning."""
        x = without(x, padding)
        if not hasattr(self, "norm"):
            return self.conv(x)
        tokens = places_of_tokens(padding) if self.training else None
        mixed = normalise(self.conv_norm, self.conv(x), tokens) + normalise(self.identity, x, tokens)
        return x + self.scale.unsqueeze(1) * (mixed - normalise(self.norm, x, tokens))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Folds all branches into the convolution, for inference; timm's ``reparameterize_model`` calls it."""
        if not hasattr(self, "norm"):
            return
        center = torch.zeros_like(self.conv.weight)
        center[:, :, center.shape[2] // 2] = 1
        mix, mix_bias = fold(self.conv.weight, self.conv_norm)
        for norm, sign in ((self.identity, 1), (self.norm, -1)):
            weight, bias = fold(center, norm)
            mix, mix_bias = mix + sign * weight, mix_bias + sign * bias
        self.conv.weight = nn.Parameter(center + self.scale.view(-1, 1, 1) * mix)
        self.conv.bias = nn.Parameter(self.scale * mix_bias)
        del self.norm, self.identity, self.conv_norm, self.scale


class ConvFeedForward(nn.Module):
    """A normalised depthwise convolution, then the two layers of a feed-forward network.

    Args:
        width: channels C.
        hidden: channels between the layers.
        kernel: tokens the convolution sees, odd.
    """

    def __init__(self, width: int, hidden: int, kernel: int = KERNEL) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.norm: nn.Module = nn.BatchNorm1d(width)
        self.fc1 = nn.Conv1d(width, hidden, 1)
        self.fc2 = nn.Conv1d(hidden, width, 1)
        for layer in (self.conv, self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Transforms [b, C, L]; where `padding`, bool [b, L], is True, nothing is read."""
        tokens = places_of_tokens(padding) if self.training else None
        x = normalise(self.norm, self.conv(without(x, padding)), tokens)
        return self.fc2(F.gelu(self.fc1(x)))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Folds the normalisation into the convolution, for inference."""
        if not isinstance(self.norm, nn.Identity):
            weight, bias = fold(self.conv.weight, self.norm)
            self.conv.weight, self.conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.norm = nn.Identity()


class ConvBlock(nn.Module):
    """A token mixer and a convolutional feed-forward network, in the place of a transformer block.

    Args:
        width: channels C.
        mlp_ratio: hidden channels of the network for each of its C.
    """

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(width)
        self.mlp = ConvFeedForward(width, int(width * mlp_ratio))
        self.scale = nn.Parameter(torch.full([width], LAYER_SCALE))

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Transforms [b, L, C]; `attn_mask` is True at padding, bool [b, L]. It is called as OpenCLIP's blocks are."""
        x = self.token_mixer(x.transpose(1, 2), attn_mask)
        x = x + self.scale.unsqueeze(1) * self.mlp(x, attn_mask)
        return x.transpose(1, 2)

    def train(self, mode: bool = True) -> ConvBlock:
        """Switches to training, unless the block is locked: its running statistics are then locked as well."""
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    def get_weight_dtype(self) -> torch.dtype:
        """Returns the dtype of the weights, as OpenCLIP's transformer asks of its first block."""
        return self.mlp.fc1.weight.dtype


class MCt(TextTower):
    """MobileCLIP-S0's text tower: a `ConvBlock`, OpenCLIP's attention blocks, and another `ConvBlock`.

    Args:
        mask_padding: hide padding from attention and from every convolution; statistics are then of real tokens only.
            Without it, the tower is the published one, whose embeddings depend on the padded length.
        arguments: those of OpenCLIP's ``TextTransformer``; `layers` counts the attention blocks.
    """

    def __init__(self, *, mask_padding: bool, **arguments: Any) -> None:
        super().__init__(mask_padding=mask_padding, **arguments)
        if self.causal:
            raise ValueError("text_tower 'mct' reads in both directions; its text_cfg must set no_causal_mask to true")
        mlp_ratio = arguments.get("mlp_ratio", 4.0)
        self.transformer.resblocks = nn.ModuleList(
            [ConvBlock(self.width, mlp_ratio), *self.transformer.resblocks, ConvBlock(self.width, mlp_ratio)]
        )


def build_mct(config: dict[str, Any], embed_dim: int, quick_gelu: bool, mask_padding: bool) -> MCt:
    """Builds the tower from the ``text_cfg`` of a model config, in OpenCLIP's format."""
    return MCt(mask_padding=mask_padding, **tower_arguments(config, embed_dim, quick_gelu))


def without(x: Tensor, padding: Tensor | None) -> Tensor:
    """Returns [b, C, L] with zeros where `padding`, bool [b, L], is True: what a convolution reads past the end."""
    return x if padding is None else x.masked_fill(padding.unsqueeze(1), 0)


def places_of_tokens(padding: Tensor | None) -> Tensor | None:
    """Returns where among all b L places the real tokens are, int64; to count them costs one wait for the device."""
    return None if padding is None else (~padding).flatten().nonzero().squeeze(1)


def normalise(norm: nn.Module, x: Tensor, tokens: Tensor | None) -> Tensor:
    """Normalises [b, C, L]; by the statistics of the places `tokens` only, so that padding does not dilute them."""
    if tokens is None:
        return norm(x)
    places = x.transpose(1, 2)
    rows = places.flatten(0, 1)
    normal = norm(rows[tokens])
    return torch.zeros_like(rows, dtype=normal.dtype).index_copy(0, tokens, normal).view_as(places).transpose(1, 2)


def fold(weight: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of the convolution that equals `weight`'s followed by `norm` in evaluation."""
    folded: tuple[Tensor, Tensor] = fuse_conv_bn_weights(
        weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return folded
