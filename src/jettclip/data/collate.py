"""Stacks samples into a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from jettclip.data.counts import DataError
from jettclip.data.sample import Sample
from jettclip.types import Batch, TeacherFeatures


def collate(samples: list[Sample], crop_captions: bool = False) -> Batch:
    """Stacks samples into a batch.

    Raises:
        DataError: if stored embeddings differ in width.
    """
    short, long = (_stack([getattr(s, view) for s in samples], view, crop_captions) for view in ("short", "long"))
    teacher = None
    if samples[0].teacher is not None:
        columns = zip(*(sample.teacher for sample in samples if sample.teacher), strict=True)
        teacher = TeacherFeatures(*(None if column[0] is None else torch.stack(column) for column in columns))
    # contiguous: torchvision's PILToTensor transposes by strides only, and CPU convolutions crawl on that layout
    return Batch(torch.stack([sample.image.contiguous() for sample in samples]), short, long, teacher)


def _stack(rows: list[Tensor | None], view: str, crop: bool) -> Tensor | None:
    present = [row for row in rows if row is not None]
    if not present:
        return None
    widths = {row.shape[0] for row in present}
    if len(widths) > 1:
        raise DataError(f"the {view} captions of one batch have embeddings of widths {sorted(widths)}; mend the data")
    stacked = torch.stack(present)
    return stacked[:, : longest_caption(stacked)] if crop else stacked


def longest_caption(token_ids: Tensor) -> int:
    """Returns the tokens of the longest caption of [b, L], start and end token included.

    The end token has the largest id of CLIP's vocabulary. Zero is no mark of padding: it is also the id of ``!`` inside
    a longer run of punctuation.
    """
    return int(token_ids.argmax(dim=1).max()) + 1
