"""What crosses the borders between the components.

Axis letters, used in docstrings and as suffixes where the mathematics is dense:

    b   rows (image-caption pairs) of this rank    B    rows of all ranks
    D   embedding width of the student             Dt   of the teachers, concatenated
    L   tokens of a caption                        K, A stored captions, augmentations of an image
    H, W  pixels

Everything here is a NamedTuple: ``DistributedDataParallel(static_graph=True)`` looks inside tuples and dicts for the
tensors to attach its hooks to, but takes a dataclass for one opaque leaf and then skips gradient synchronisation
without an error (seen with torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

VIEWS = ("short", "long")
"""The caption views a loss formula may name: ``clip@short``, ``kd@long``."""


class TeacherFeatures(NamedTuple):
    """What the teachers say of a batch; several teachers stand side by side on the last axis."""

    image: Tensor | None  # [b, Dt]
    short: Tensor | None  # [b, Dt]
    long: Tensor | None  # [b, Dt]


class TeacherTokens(NamedTuple):
    """The captions of a batch for teachers that are asked in training, each through its own tokenizer."""

    short: list[Tensor]  # token ids int64 [b, L] for every teacher; empty for a view that they are not asked of
    long: list[Tensor]  # the same


class Batch(NamedTuple):
    """One step's input, in the order in which ``get_wds_dataset`` yields it."""

    # [b, 3, H, W]: uint8 with the channels of a pixel side by side in memory, as torch.channels_last, for the model to
    # normalise on its device; or float
    image: Tensor
    short_caption: Tensor | None  # token ids int64 [b, L], or float embeddings [b, D] for an adapter
    long_caption: Tensor | None  # the same
    teacher: TeacherFeatures | TeacherTokens | None  # the answers of teachers, or what to ask them, beside the image


class BatchInfo(NamedTuple):
    """What travels beside a batch: who is in it, and what was counted on the way since the batch before."""

    keys: list[str]
    dropped: dict[str, int]  # samples lost, by reason
    damaged: dict[str, int]  # irregularities of shards, by kind; how many samples each cost may be unknown
    noted: dict[str, int]  # events that lose nothing, such as short captions made by a policy
    images: Sequence[int] = ()  # for each key a signed 64-bit number, a function of the encoded image's bytes


class Identity(NamedTuple):
    """Who is who in a batch: rows with equal numbers show the same image, or have the same caption."""

    image: Tensor  # int64 [b]
    short: Tensor | None  # int64 [b]
    long: Tensor | None  # int64 [b]


class Features(NamedTuple):
    """The student's answer to a batch: unit-length rows, and S = exp(logit_scale), already exponentiated."""

    image: Tensor  # [b, D]
    short: Tensor | None  # [b, D]
    long: Tensor | None  # [b, D]
    logit_scale: Tensor  # [1]
    logit_bias: Tensor | None = None  # [1], of a model trained by a sigmoid loss

    @property
    def of_rows(self) -> list[Tensor]:
        """What has a row for each of the batch."""
        return [part for part in (self.image, self.short, self.long) if part is not None]

    @property
    def of_model(self) -> list[Tensor]:
        """What all rows share: the scale, and the bias if there is one."""
        return [part for part in (self.logit_scale, self.logit_bias) if part is not None]


class Pair(NamedTuple):
    """Matching image and text features: row i of one belongs to row i of the other."""

    image: Tensor
    text: Tensor


class TeacherInfo(NamedTuple):
    """A teacher as the loss must know it: where its columns lie in `TeacherFeatures`, and its temperature."""

    name: str
    width: int  # columns it occupies
    logit_scale: float  # S = exp(logit_scale) it was trained with


class AdapterInfo(NamedTuple):
    """A model that reads stored text embeddings instead of text, as the data must know it."""

    model: str
    width: int  # of the embeddings


class LossReport(NamedTuple):
    """What is optimised, apart from what is only reported."""

    total: Tensor  # scalar, the only thing that is differentiated
    terms: dict[str, Tensor]  # detached scalars by name, unweighted: {"clip@long": ...}, and others to be watched


def at_least_float32(features: Tensor) -> Tensor:
    """Raises half precision to float32, and leaves float32 and float64 as they are."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves a batch to a device, without waiting for the copy where the memory is pinned."""

    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device, non_blocking=True)

    teacher = batch.teacher
    if isinstance(teacher, TeacherFeatures):
        teacher = TeacherFeatures(*map(move, teacher))
    elif teacher is not None:
        teacher = TeacherTokens(*([ids.to(device, non_blocking=True) for ids in view] for view in teacher))
    return Batch(
        batch.image.to(device, non_blocking=True), move(batch.short_caption), move(batch.long_caption), teacher
    )
