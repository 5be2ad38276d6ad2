from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import loss_formulas as formulas
from jettclip.losses.distance import DistanceTerm
from jettclip.losses.view import Matches, Parts, View
from support import unit_rows

ROWS, WIDTH = 6, 5


def matches(width: int) -> Matches:
    return Matches(Parts("image", "long"), {"image": unit_rows(ROWS, width), "long": unit_rows(ROWS, width)}, {}, 1.0)


def distance(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(one, other, strict=True)]).mean()


def test_each_teacher_and_modality_has_a_projection_of_its_own() -> None:
    term = DistanceTerm("mse", WIDTH, [3, 7])
    student, teachers = matches(WIDTH), [matches(3), matches(7)]
    weights = [parameter for _, parameter in sorted(term.named_parameters())]
    assert [tuple(weight.shape) for weight in weights] == [(3, WIDTH), (7, WIDTH)] * 2
    expected = [
        distance(student.local[modality] @ weights[2 * modality + index].T, teacher.local[modality])
        for index, teacher in enumerate(teachers)
        for modality in range(2)
    ]
    torch.testing.assert_close(term(View(student, teachers)), torch.stack(expected).mean())


def test_without_projection_it_is_the_plain_distance() -> None:
    student, teacher = matches(WIDTH), matches(WIDTH)
    view = View(student, [teacher])
    (u, v), (a, b) = student.local, teacher.local
    terms = {measure: DistanceTerm(measure, WIDTH, [WIDTH], "none") for measure in ("mse", "fd", "cosine")}
    assert not any(list(term.parameters()) for term in terms.values())
    cosines = F.cosine_similarity(u, a).mean(), F.cosine_similarity(v, b).mean()
    torch.testing.assert_close(terms["mse"](view), 2 - cosines[0] - cosines[1])
    torch.testing.assert_close(terms["cosine"](view), (1 - cosines[0] + 1 - cosines[1]) / 2)
    torch.testing.assert_close(terms["fd"](view), F.mse_loss(u, a) + F.mse_loss(v, b))  # CLIP-KD's code


def test_several_teachers_are_averaged_each_with_its_width() -> None:
    student, teachers = matches(WIDTH), [matches(3), matches(7)]
    term = DistanceTerm("fd", WIDTH, [3, 7])
    mapped = [
        (formulas.unit(student.local.image @ a.weight.T), formulas.unit(student.local.text @ b.weight.T))
        for a, b in zip(term.image_projections, term.text_projections, strict=True)
    ]
    squares = formulas.squared(mapped, [(*teacher.local, 0.0) for teacher in teachers])
    images, texts, others, other_texts = (square.mean() for square in squares)
    torch.testing.assert_close(term(View(student, teachers)), (images + texts + others + other_texts) / 2)


def test_without_projection_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width 5 with teachers' of \[5, 7\]; .* --mse-projection linear or auto"):
        DistanceTerm("mse", WIDTH, [WIDTH, 7], "none")


def test_where_widths_differ_alone_there_may_be_a_projection() -> None:
    term = DistanceTerm("mse", WIDTH, [WIDTH, 7], "auto")
    assert {name for name, _ in term.named_parameters()} == {
        f"{modality}_projections.1.weight" for modality in ("image", "text")
    }
