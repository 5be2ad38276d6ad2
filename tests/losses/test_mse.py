from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jettclip.losses.mse import MseTerm
from jettclip.losses.view import Gathered, View
from jettclip.types import Pair
from support import unit_rows

ROWS, WIDTH = 6, 5


def gathered(width: int) -> Gathered:
    pair = Pair(unit_rows(ROWS, width), unit_rows(ROWS, width))
    return Gathered(pair, pair, 1.0)


def distance(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(one, other, strict=True)]).mean()


def test_each_teacher_and_modality_has_a_projection_of_its_own() -> None:
    term = MseTerm(WIDTH, [3, 7])
    student, teachers = gathered(WIDTH), [gathered(3), gathered(7)]
    weights = [parameter for _, parameter in sorted(term.named_parameters())]
    assert [tuple(weight.shape) for weight in weights] == [(3, WIDTH), (7, WIDTH)] * 2
    expected = [
        distance(student.local[modality] @ weights[2 * modality + index].T, teacher.local[modality])
        for index, teacher in enumerate(teachers)
        for modality in range(2)
    ]
    torch.testing.assert_close(term(View(student, teachers)), torch.stack(expected).mean())


def test_without_projection_it_is_the_plain_distance() -> None:
    term = MseTerm(WIDTH, [WIDTH], "none")
    assert list(term.parameters()) == []
    student, teacher = gathered(WIDTH), gathered(WIDTH)
    expected = 2 - F.cosine_similarity(student.local.image, teacher.local.image).mean()
    expected = expected - F.cosine_similarity(student.local.text, teacher.local.text).mean()
    torch.testing.assert_close(term(View(student, [teacher])), expected)


def test_without_projection_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width 5 with teachers' of \[5, 7\]; .* --mse-projection linear"):
        MseTerm(WIDTH, [WIDTH, 7], "none")
