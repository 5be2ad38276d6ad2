"""Frozen models that say what they make of a batch: to a feature store, or to the loss while the student trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from jettclip.models.two_towers import TwoTowers
from jettclip.types import TeacherFeatures, TeacherInfo, TeacherTokens


class Frozen(nn.Module):
    """A module that is always in evaluation mode."""

    def train(self, mode: bool = True) -> Frozen:
        """Stays in evaluation mode, whatever a parent module switches to."""
        return super().train(False)


class Teacher(Frozen):
    """A frozen model with its own image size, pixel statistics and scale.

    Args:
        model: the model.
        name: what to call it in stores and logs.
    """

    def __init__(self, model: TwoTowers, name: str) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.name = name
        self.eval()

    @property
    def info(self) -> TeacherInfo:
        """What the loss must know of it."""
        return TeacherInfo(self.name, self.model.embed_dim, float(self.model.logit_scale.exp()))

    @property
    def image_size(self) -> list[int]:
        """The height and width of the images it takes."""
        size = self.model.preprocess_cfg["size"]
        return [size, size] if isinstance(size, int) else list(size)

    @property
    def preprocess(self) -> str:
        """How its images must be prepared, as JSON."""
        return json.dumps(self.model.preprocess_cfg, sort_keys=True)

    def weights_digest(self) -> str:
        """Returns a digest of all weights, to tell stores of one teacher from another's."""
        return weights_digest(self.model)

    @torch.no_grad()
    def forward(self, image: Tensor, short: Tensor | None, long: Tensor | None) -> TeacherFeatures:
        """Embeds a batch with unit-length rows.

        Args:
            image: uint8 [b, 3, H, W] of any size, stretched to its size by its own interpolation, and normalised by its
                mean and std.
            short, long: ids int64 [b, L] of its own tokenizer; a view without captions has no features.
        """
        if list(image.shape[-2:]) != self.image_size:
            is_bilinear = self.model.preprocess_cfg.get("interpolation") == "bilinear"  # bicubic is OpenCLIP's default
            interpolation = InterpolationMode.BILINEAR if is_bilinear else InterpolationMode.BICUBIC
            image = resize(image, self.image_size, interpolation, antialias=True)
        features = self.model(image, short, long)
        return TeacherFeatures(features.image, features.short, features.long)


def weights_digest(model: nn.Module) -> str:
    """Returns a digest of all weights of a model, and of their names."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Ensemble(Frozen):
    """Teachers that are asked together while the student trains.

    Each sees the student's own augmented view of an image, at its own size and by its own pixel statistics, and reads
    the whole caption through its own tokenizer (MobileCLIP, arXiv 2311.17049, whose teachers answer ahead of time).

    Args:
        teachers: one or more.
        mean, std: those by which the student's images are normalised where they come as floats, [3, 1, 1].
    """

    def __init__(self, teachers: Sequence[Teacher], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.teachers: Any = nn.ModuleList(teachers)  # Any: its type forgets that they are teachers
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("std", std.clone(), persistent=False)
        self.eval()

    @property
    def infos(self) -> list[TeacherInfo]:
        """What the loss must know of the teachers, in the order of their columns."""
        return [teacher.info for teacher in self.teachers]

    def forward(self, image: Tensor, tokens: TeacherTokens) -> TeacherFeatures:
        """Embeds a batch, the teachers side by side.

        Args:
            image: the student's, uint8 or normalised float [b, 3, H, W].
            tokens: the captions; a view without them has no features.
        """
        if image.dtype != torch.uint8:
            image = ((image * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)
        nothing = [None] * len(self.teachers)
        answers = [
            teacher(image, *captions)
            for teacher, *captions in zip(self.teachers, tokens.short or nothing, tokens.long or nothing, strict=True)
        ]
        return TeacherFeatures(
            *(None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*answers, strict=True))
        )
