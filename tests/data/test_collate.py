from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jettclip.data.collate import collate, longest_caption
from jettclip.data.counts import DataError
from jettclip.data.sample import Sample
from jettclip.types import TeacherFeatures, TeacherTokens


def make(number: int, image: Tensor | None = None, width: int = 6, teacher: bool = True) -> Sample:
    ids = torch.tensor([49406, *range(1, number + 2), 49407, *[0] * 9])[:width]
    row = torch.full([3], float(number))
    features = TeacherFeatures(row, None, row) if teacher else None
    return Sample(str(number), torch.zeros(3, 4, 5) if image is None else image, None, ids, features, {})


def test_samples_are_stacked_and_absent_parts_stay_absent() -> None:
    batch = collate([make(0), make(1)])
    assert batch.image.shape == (2, 3, 4, 5)
    assert batch.short_caption is None
    assert batch.long_caption is not None
    assert batch.long_caption.tolist() == [[49406, 1, 49407, 0, 0, 0], [49406, 1, 2, 49407, 0, 0]]
    assert batch.teacher is not None
    assert batch.teacher.short is None
    assert batch.teacher.long is not None
    assert batch.teacher.long.tolist() == [[0.0] * 3, [1.0] * 3]
    assert collate([make(0, teacher=False)]).teacher is None


def test_captions_are_cropped_to_the_longest() -> None:
    cropped = collate([make(0), make(1)], crop_captions=True).long_caption
    assert cropped is not None
    assert cropped.tolist() == [[49406, 1, 49407, 0], [49406, 1, 2, 49407]]


@pytest.mark.parametrize("crop", [(False, True), (True, False)])
def test_captions_are_cropped_for_the_teachers_that_ignore_padding(crop: tuple[bool, bool]) -> None:
    samples = [make(number) for number in (0, 1)]
    samples = [one._replace(teacher=TeacherTokens([], [one.long, one.long + 1])) for one in samples]  # type: ignore[arg-type, operator]
    batch = collate(samples, False, crop)
    assert isinstance(batch.teacher, TeacherTokens)
    assert batch.teacher.short == []
    assert [ids.shape for ids in batch.teacher.long] == [(2, 4 if cropped else 6) for cropped in crop]
    assert batch.teacher.long[0][1, :4].tolist() == [49406, 1, 2, 49407]
    assert batch.teacher.long[1][1, :4].tolist() == [49407, 2, 3, 49408]
    assert batch.long_caption is not None
    assert batch.long_caption.shape == (2, 6)


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.uint8, torch.channels_last), (torch.float32, torch.contiguous_format)]
)
def test_images_are_laid_out_by_pixel_or_as_floats_by_channel(dtype: torch.dtype, layout: torch.memory_format) -> None:
    image = torch.zeros(4, 5, 3, dtype=dtype).permute(2, 0, 1)  # as torchvision's PILToTensor leaves it
    for other in (image, torch.ones(3, 4, 5, dtype=dtype)):
        batch = collate([make(0, image), make(1, other)]).image
        assert batch.is_contiguous(memory_format=layout)
        assert torch.equal(batch, torch.stack([image.contiguous(), other.contiguous()]))


def test_embeddings_of_several_widths_are_an_error() -> None:
    with pytest.raises(DataError, match=r"the long captions of one batch have embeddings of widths \[4, 5\]"):
        collate([make(0, width=4), make(0, width=5)])


def test_the_longest_caption_ends_with_the_end_token_and_not_before_a_zero() -> None:
    ids = torch.tensor([[49406, 5, 49407, 0, 0, 0], [49406, 0, 0, 7, 49407, 0]])  # zero is also the id of "!"
    assert longest_caption(ids) == 5
    assert longest_caption(ids[:1]) == 3
