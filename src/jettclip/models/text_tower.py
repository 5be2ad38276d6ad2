"""The text transformer of OpenCLIP, for captions of any length up to its context."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from jettclip.openclip import CLIPTextCfg, LayerNorm, QuickGELU, ResidualAttentionBlock, TextTransformer

BLOCK_OPTIONS = ("mlp_ratio", "ls_init_value", "act_layer", "norm_layer")


class PaddingMaskedBlock(ResidualAttentionBlock):
    """A transformer block in which no token attends to padding.

    OpenCLIP's own mask is a float matrix for every head and row, [b heads, L, L]; this one is bool [b, L].
    """

    def attention(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Attends within each row of [b, L, width]; `attn_mask` is True at padding, bool [b, L]."""
        return self.attn(q_x, q_x, q_x, key_padding_mask=attn_mask, need_weights=False)[0]


class TextTower(TextTransformer):
    """OpenCLIP's text transformer, with the same parameters under the same names.

    MobileCLIP's bidirectional text towers attend to padding as published, so that a caption's embedding changes with
    the length it is padded to (arXiv 2311.17049). With `mask_padding` it does not. Whatever follows the end token is
    padding; token id 0 is no mark of it, since it is also a punctuation token.

    Args:
        mask_padding: mask padding in a bidirectional tower; a causal one never sees it.
        arguments: those of OpenCLIP's ``TextTransformer``.
    """

    def __init__(self, *, mask_padding: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.causal = self.attn_mask is not None
        self.mask_padding = mask_padding and not self.causal
        self.frozen_positions = 0
        if self.mask_padding:
            if not self.end_token_is_largest or self.cls_emb is not None:
                raise ValueError(
                    f"mask_padding needs pool_type 'argmax', the end token's place, not {self.pool_type!r}"
                )
            if type(self.transformer.resblocks[0]) is not ResidualAttentionBlock:
                raise ValueError("mask_padding knows OpenCLIP's default blocks only; leave the block options out")
            options = {name: arguments[name] for name in BLOCK_OPTIONS if name in arguments}
            self.transformer.resblocks = nn.ModuleList(
                PaddingMaskedBlock(self.width, self.heads, **options) for _ in self.transformer.resblocks
            )
            self.init_parameters()

    @property
    def end_token_is_largest(self) -> bool:
        """Whether the end token is the one of the largest id, as in CLIP's own vocabulary."""
        return bool(self.pool_type == "argmax")

    @property
    def ignores_padding(self) -> bool:
        """Whether a caption's embedding is the same however far it is padded, so that batches may be cropped."""
        return (self.causal or self.mask_padding) and self.end_token_is_largest and self.cls_emb is None

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Stops training the tower, but for its last layers.

        Layer norms are locked like other weights, whatever `freeze_layer_norm` says; the base class refuses False, the
        default of OpenCLIP's own flag.
        """
        super().lock(unlocked_layers)

    def freeze_position_prefix(self, rows: int) -> None:
        """Stops training the first rows of the position table, as Long-CLIP does with 20 (arXiv 2403.15378).

        Raises:
            ValueError: if there are not so many.
        """
        if not 0 <= rows <= self.context_length:
            raise ValueError(
                f"--freeze-position-prefix {rows} must be a number of the tower's {self.context_length} positions"
            )
        if self.cls_emb is not None:
            raise ValueError(f"--freeze-position-prefix {rows}: a tower with a class embedding cannot do that")
        self.frozen_positions = rows

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the embedded tokens [b, L, width] and the mask for their length; the base class knows one length."""
        length = text.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"captions of {length} tokens are longer than the tower's context of {self.context_length}; "
                "tokenize with the model's own tokenizer"
            )
        if self.cls_emb is not None:
            return super()._embeds(text)
        positions = self.positional_embedding
        if self.frozen_positions:  # cut from the graph here, which every engine and optimizer respects
            fixed, free = positions.tensor_split([self.frozen_positions])
            positions = torch.cat([fixed.detach(), free])
        embedded = self.token_embedding(text) + positions[:length]
        if self.causal:
            return embedded, self.attn_mask[:length, :length]
        if self.mask_padding:
            return embedded, torch.arange(length, device=text.device) > text.argmax(dim=1, keepdim=True)
        return embedded, None


def build_text_tower(config: dict[str, Any], embed_dim: int, quick_gelu: bool, mask_padding: bool) -> TextTower:
    """Builds a text tower from the ``text_cfg`` of an OpenCLIP model config."""
    return TextTower(mask_padding=mask_padding, **tower_arguments(config, embed_dim, quick_gelu))


def tower_arguments(config: dict[str, Any], embed_dim: int, quick_gelu: bool) -> dict[str, Any]:
    """Returns the arguments of OpenCLIP's ``TextTransformer`` that the ``text_cfg`` of a model config means."""
    options = asdict(CLIPTextCfg(**config))
    taken = signature(TextTransformer.__init__).parameters
    return {
        **{name: value for name, value in options.items() if name in taken},
        "output_dim": embed_dim,
        "norm_layer": partial(LayerNorm, **(options["norm_kwargs"] or {})),
        "act_layer": partial(QuickGELU if quick_gelu else nn.GELU, **(options["act_kwargs"] or {})),
    }


def truncate_captions(token_ids: Tensor, length: int) -> Tensor:
    """Cuts captions [b, L] to [b, length], the end token last, as the tokenizer would have done.

    The end token is told by its id, the largest; see ``TwoTowers.end_token_is_largest``.
    """
    if token_ids.shape[1] <= length:
        return token_ids
    cut = token_ids[:, :length].clone()
    too_long = token_ids.argmax(dim=1) >= length
    cut[too_long, -1] = token_ids.amax(dim=1)[too_long]
    return cut
