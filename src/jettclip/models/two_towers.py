"""The student: an image tower and a text tower that is asked once for every caption view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettclip.types import Features, at_least_float32

REPARAMETERIZED = "reparameterized"
"""The buffer that marks a model, and its checkpoints, as folded for inference; see ``reparameterize``."""


class TwoTowers(nn.Module):
    """An image tower and a text tower with one embedding space, trained on up to two captions an image.

    Its parameters carry the names of OpenCLIP's ``CustomTextCLIP``: ``visual.*``, ``text.*``, ``logit_scale``, and
    ``logit_bias`` if it has one.

    Args:
        visual: image tower, float [b, 3, H, W] to [b, D].
        text: text tower, token ids int64 [b, L], or embeddings float [b, width] for an adapter, to [b, D].
        embed_dim: D.
        mean, std: of the pixels the image tower expects, a number a channel, for images in 0..1.
        logit_scale: S = exp(logit_scale) to start from.
        logit_bias: SigLIP's, to start from; it is trained from `start_logit_bias` on. None if the model has none.
        preprocess_cfg: how OpenCLIP's transforms must prepare images, for whoever uses or exports the model.
        name: of its config, and
        quick_gelu: whether its towers were built with QuickGELU instead of GELU, for whoever saves the weights.
    """

    def __init__(
        self,
        visual: nn.Module,
        text: nn.Module,
        *,
        embed_dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        logit_scale: float = 1 / 0.07,
        logit_bias: float | None = None,
        preprocess_cfg: dict[str, Any] | None = None,
        name: str = "",
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.visual: Any = visual  # Any: a tower is whatever OpenCLIP or timm builds, with methods of its own
        self.text: Any = text
        self.embed_dim = embed_dim
        self.preprocess_cfg = preprocess_cfg or {}
        self.name, self.quick_gelu = name, quick_gelu
        # [1], not 0-D: DeepSpeed and FSDP2 refuse 0-D parameters
        self.logit_scale = nn.Parameter(torch.full([1], math.log(logit_scale)))
        self.logit_bias: nn.Parameter | None
        self.register_parameter("logit_bias", None)
        if logit_bias is not None:  # frozen: it shifts all logits alike, which a softmax does not see
            self.logit_bias = nn.Parameter(torch.full([1], float(logit_bias)), requires_grad=False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def ignores_padding(self) -> bool:
        """Whether captions may be cropped to the longest of their batch without changing any embedding."""
        return getattr(self.text, "ignores_padding", False)

    @property
    def end_token_is_largest(self) -> bool:
        """Whether a caption's end token has its largest id, so that `truncate_captions` finds it."""
        return getattr(self.text, "end_token_is_largest", False)

    @property
    def embedding_width(self) -> int | None:
        """The width of the stored text embeddings that an adapter reads; None for a text tower, which reads tokens."""
        return getattr(self.text, "embedding_width", None)

    @property
    def context_length(self) -> int:
        """The longest caption, in tokens.

        Raises:
            ValueError: for an adapter, which has none.
        """
        if self.embedding_width is not None:
            raise ValueError(f"{self.name} reads stored embeddings, which have no length in tokens")
        return int(self.text.context_length)

    @property
    def is_reparameterized(self) -> bool:
        """Whether its branches were folded for inference."""
        return hasattr(self, REPARAMETERIZED)

    def train(self, mode: bool = True) -> TwoTowers:
        """Switches between training and evaluation.

        Raises:
            ValueError: if a reparameterised model shall be trained.
        """
        if mode and self.is_reparameterized:
            raise ValueError(
                "a reparameterised model cannot be trained, its branches are folded; train the checkpoint it came from"
            )
        return super().train(mode)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeds images, uint8 or already normalised float [b, 3, H, W], as [b, D]."""
        if image.dtype == torch.uint8:
            # by channel, since loaders leave the channels of a pixel side by side, on which CPU convolutions crawl
            image = (image.contiguous().float() / 255 - self.mean) / self.std
        features: Tensor = self.visual(image)
        return unit_rows(features) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeds captions, token ids int64 [b, L] or stored embeddings float [b, width], as [b, D]."""
        features: Tensor = self.text(text)
        return unit_rows(features) if normalize else features

    def forward(self, image: Tensor, short: Tensor | None = None, long: Tensor | None = None) -> Features:
        """Embeds a batch; a view without captions has no features."""
        return Features(
            self.encode_image(image, normalize=True),
            None if short is None else self.encode_text(short, normalize=True),
            None if long is None else self.encode_text(long, normalize=True),
            self.logit_scale.exp(),
            None if self.logit_bias is None else self.logit_bias.clone(),  # as of now, whatever steps follow
        )

    def start_logit_scale(self, scale: float | None) -> None:
        """Sets S = exp(logit_scale); None leaves it."""
        if scale is not None:
            nn.init.constant_(self.logit_scale, math.log(scale))

    def start_logit_bias(self, bias: float | None, *, keep: bool = False) -> None:
        """Has the bias of the logits trained, as a sigmoid loss needs; None leaves it as it is, or none.

        Args:
            bias: where it starts.
            keep: start from the bias that the model has, if it has one.
        """
        if bias is None:
            return
        if self.logit_bias is None or not keep:
            self.logit_bias = nn.Parameter(torch.full_like(self.logit_scale, bias))
        self.logit_bias.requires_grad_()

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Stops training the image tower, but for its last groups (LiT, arXiv 2111.07991)."""
        self.visual.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Stops training the text tower, but for its last layers."""
        self.text.lock(unlocked_layers, freeze_layer_norm)

    def freeze_position_prefix(self, rows: int) -> None:
        """Stops training the first text positions, as Long-CLIP does with 20 (arXiv 2403.15378).

        Raises:
            ValueError: if the text tower has no such positions.
        """
        if not hasattr(self.text, "freeze_position_prefix"):
            raise ValueError(
                f"--freeze-position-prefix {rows}: the text tower of this model has no table of positions; leave it out"
            )
        self.text.freeze_position_prefix(rows)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades memory for a second forward pass in both towers."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay must spare whatever their shape."""
        names = {"logit_scale", "logit_bias"}
        trunk = getattr(self.visual, "trunk", None)  # of a timm tower
        towers: dict[str, Any] = {"visual": self.visual, "visual.trunk": trunk, "text": self.text}
        for prefix, tower in towers.items():
            if hasattr(tower, "no_weight_decay"):
                names |= {f"{prefix}.{name}" for name in tower.no_weight_decay()}
        return names & {name for name, _ in self.named_parameters()}  # timm names some that a tower does not have


def unit_rows(features: Tensor) -> Tensor:
    """Scales rows to unit length, in float32 at least, so that mixed precision does not blur the similarities."""
    return F.normalize(at_least_float32(features), dim=-1)
