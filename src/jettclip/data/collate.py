"""Stacks samples into a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import default_collate

from jettclip.data.counts import DataError
from jettclip.data.sample import Sample
from jettclip.types import VIEWS, Batch, TeacherFeatures, TeacherTokens


def collate(samples: list[Sample], crop_captions: bool = False, crop_teachers: Sequence[bool] = ()) -> Batch:
    """Stacks samples into a batch.

    Args:
        samples: the rows.
        crop_captions: crop token ids to the longest caption.
        crop_teachers: the same for each teacher that is asked in training.

    Raises:
        DataError: if stored embeddings differ in width.
    """
    short, long = (_stack([getattr(s, view) for s in samples], view, crop_captions) for view in VIEWS)
    teacher: TeacherFeatures | TeacherTokens | None = None
    if isinstance(samples[0].teacher, TeacherFeatures):
        columns = zip(*(sample.teacher for sample in samples if sample.teacher), strict=True)
        teacher = TeacherFeatures(*(None if column[0] is None else torch.stack(column) for column in columns))
    elif samples[0].teacher is not None:
        asked = ([getattr(sample.teacher, view) for sample in samples] for view in VIEWS)
        teacher = TeacherTokens(*(_stack_tokens(rows, crop_teachers) for rows in asked))
    images = _stack_images([sample.image for sample in samples])
    return Batch(images, short, long, teacher)


def _stack_images(images: list[Tensor]) -> Tensor:
    """Stacks images into [b, 3, h, w], straight into shared memory in a loader worker.

    The decoders leave the channels of a uint8 pixel side by side. They stay so, since to turn them takes a loader as
    long as all captions do, and the model's device no time at all.
    """
    if images[0].dtype == torch.uint8:
        stacked: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
        return stacked.permute(0, 3, 1, 2)
    return default_collate(images)


def _stack(rows: list[Tensor | None], view: str, crop: bool) -> Tensor | None:
    present = [row for row in rows if row is not None]
    if not present:
        return None
    widths = {row.shape[0] for row in present}
    if len(widths) > 1:
        raise DataError(f"the {view} captions of one batch have embeddings of widths {sorted(widths)}; mend the data")
    return _crop(torch.stack(present), crop)


def _stack_tokens(rows: list[list[Tensor]], crops: Sequence[bool]) -> list[Tensor]:
    """Stacks the token ids of every teacher; there are none of a view that they are not asked of."""
    if not rows[0]:
        return []
    columns = zip(*rows, strict=True)
    return [_crop(torch.stack(column), crop) for column, crop in zip(columns, crops, strict=True)]


def _crop(token_ids: Tensor, crop: bool) -> Tensor:
    return token_ids[:, : longest_caption(token_ids)] if crop else token_ids


def longest_caption(token_ids: Tensor) -> int:
    """Returns the tokens of the longest caption of [b, L], start and end token included.

    The end token has the largest id of CLIP's vocabulary. Zero is no mark of padding: it is also the id of ``!`` inside
    a longer run of punctuation.
    """
    return int(token_ids.argmax(dim=1).max()) + 1
