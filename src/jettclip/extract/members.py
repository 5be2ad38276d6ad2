"""The models that can be asked: teachers of images and captions, and language models of captions only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from jettclip.data.collate import longest_caption
from jettclip.data.features import StoreInfo
from jettclip.data.images import ImageReader
from jettclip.data.sample import Tokenizer
from jettclip.models.factory import Transform, create_model_and_transforms, get_tokenizer
from jettclip.models.teacher import Teacher
from jettclip.models.text_encoder import TextEncoder
from jettclip.openclip import keep_uint8
from jettclip.settings import SampleSettings


class Preparation(NamedTuple):
    """What loader workers need to prepare samples for a model, without the model."""

    tokenizer: Tokenizer
    images: ImageReader | None = None  # None for a model that reads captions only
    crop_captions: bool = False  # to the longest of a batch; exact for a model that ignores padding

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        """Stacks tokenized captions [L, ...] to [n, L, ...], padded with zeros on the right."""
        tokens = pad_sequence(list(rows), batch_first=True)
        return tokens[:, : longest_caption(tokens)] if self.crop_captions else tokens


class Member(Protocol):
    """A model that answers, alone or beside others whose answers go into the same store."""

    @property
    def info(self) -> StoreInfo:
        """What its store says of it."""

    def preparation(self, settings: SampleSettings) -> Preparation:
        """Returns how samples are prepared for it."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeds images, uint8 [n, 3, h, w] as its transform makes them, as [n, D]."""

    def embed_captions(self, tokens: Tensor) -> Tensor:
        """Embeds captions, stacked by its `Preparation`, as [n, D]."""


class ClipMember:
    """A teacher of images and captions, whose rows are of unit length.

    Args:
        teacher: the model, on the device where it is to be asked.
        transform: its own for evaluation, PIL image to tensor.
        tokenizer: its own.
    """

    def __init__(self, teacher: Teacher, transform: Transform, tokenizer: Tokenizer) -> None:
        self.teacher, self.transform, self.tokenizer = teacher, keep_uint8(transform), tokenizer

    @property
    def info(self) -> StoreInfo:
        """What its store says of it."""
        teacher = self.teacher
        name, width, scale = teacher.info
        return StoreInfo(name, teacher.weights_digest(), scale, True, teacher.preprocess, width)

    def preparation(self, settings: SampleSettings) -> Preparation:
        """Returns its transform, behind the decoder that `settings` name, and its tokenizer."""
        images = ImageReader(self.transform, decoder=settings.image_decoder, max_pixels=settings.max_image_pixels)
        return Preparation(self.tokenizer, images, self.teacher.model.ignores_padding)

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeds images, uint8 or already normalised float [n, 3, h, w], as [n, D]."""
        return self.teacher.model.encode_image(images, normalize=True)

    def embed_captions(self, tokens: Tensor) -> Tensor:
        """Embeds captions, token ids int64 [n, L], as [n, D]."""
        return self.teacher.model.encode_text(tokens, normalize=True)


class TextMember:
    """A language model, which is asked about captions only."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    @property
    def info(self) -> StoreInfo:
        """What its store says of it."""
        encoder = self.encoder
        how = json.dumps(encoder.preparation, sort_keys=True)
        return StoreInfo(encoder.name, encoder.weights_digest(), 1.0, encoder.options.normalize, how, encoder.width)

    def preparation(self, settings: SampleSettings) -> Preparation:
        """Returns its tokenizer."""
        return Preparation(self.encoder.tokenizer)

    def embed_images(self, images: Tensor) -> Tensor:
        """Raises TypeError: a language model sees no images."""
        raise TypeError(f"{self.encoder.name} sees no images")

    def embed_captions(self, tokens: Tensor) -> Tensor:
        """Embeds captions, ids and roles int64 [n, L, 2], as [n, D]."""
        return self.encoder(tokens)


def load_clip_members(models: Sequence[str], weights: Sequence[str], device: torch.device | str) -> list[ClipMember]:
    """Loads teachers by name.

    Args:
        models: names of ours or OpenCLIP's.
        weights: for each, a tag, or a checkpoint file or folder.
        device: where to put them.

    Raises:
        ValueError: for a name or weights that do not fit, or not as many of them.
    """
    if len(models) != len(weights):
        raise ValueError(
            f"--model names {len(models)} models and --pretrained {len(weights)} weights; give one for each, in order"
        )
    tokenizers = [get_tokenizer(model) for model in models]  # first, since an adapter has none
    members = []
    for model, source, tokenizer in zip(models, weights, tokenizers, strict=True):
        name = model if Counter(models)[model] == 1 else f"{model}:{Path(source).name}"
        towers, _, transform = create_model_and_transforms(model, source, device=device)
        members.append(ClipMember(Teacher(towers, name), transform, tokenizer))
    return members


def describe_members(
    members: Sequence[Member], settings: SampleSettings, *, precision: str = "fp32", augmentation: str = ""
) -> StoreInfo:
    """Returns what the store of some models says of them and of what they were asked; they stand side by side.

    Args:
        members: the models.
        settings: where captions stand, what is done without them, and how images are decoded.
        precision: that the models compute in.
        augmentation: how the augmentations were drawn.
    """
    infos = [member.info for member in members]
    preprocess = {
        "models": [json.loads(info.preprocess) for info in infos],
        "precision": precision,
        "short_caption_field": settings.short_caption_field,
        "long_caption_field": settings.long_caption_field,
        "short_caption_policy": settings.short_caption_way,
        "image_decoder": settings.image_decoder,
    }
    return StoreInfo(
        model=",".join(info.model for info in infos),
        weights_digest=",".join(info.weights_digest for info in infos),
        logit_scale=infos[0].logit_scale,  # `members` has those of all
        normalized=all(info.normalized for info in infos),  # each on its own
        preprocess=json.dumps(preprocess),
        width=sum(info.width for info in infos),
        augmentation=augmentation,
        members=json.dumps([[info.model, info.width, info.logit_scale] for info in infos]) if len(infos) > 1 else "",
    )
