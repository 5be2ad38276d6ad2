from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import Tensor

import loss_formulas as formulas
from jettclip.losses.pairwise.choice import Pairwise
from jettclip.losses.softmax import SoftmaxTerms
from jettclip.losses.view import Matches, Parts, View
from support import unit_rows

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
TILES = ("auto", "off")
ROWS = 12
LONG = Parts("image", "long")


def matches(image: Tensor, text: Tensor, scale: Tensor | float) -> Matches:
    both = {"image": image, "long": text}
    return Matches(LONG, both, both, scale)


def student_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    image, text = (unit_rows(ROWS, 8, dtype).requires_grad_() for _ in range(2))
    return image, text, torch.tensor([20.0], dtype=dtype, requires_grad=True)


def values_of(
    student: tuple[Tensor, Tensor, Tensor],
    wanted: Sequence[str],
    *,
    tile: str = "auto",
    teachers: Sequence[tuple[Tensor, Tensor, float]] = (),
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    terms = SoftmaxTerms(Pairwise(tile), smoothing)
    return terms(View(matches(*student), [matches(*teacher) for teacher in teachers]), wanted)


def entropy(logits: Tensor) -> Tensor:
    probability = logits.softmax(dim=1)
    return -(probability * probability.log()).sum(dim=1).mean()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_clips_value_and_gradient_are_openclips(dtype: torch.dtype, tile: str) -> None:
    student = student_of(dtype)
    ours, theirs = values_of(student, ["clip"], tile=tile)["clip"], ClipLoss()(*student)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(
        torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student), rtol=0, atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("tile", TILES)
def test_label_smoothing_spreads_the_target_over_all_columns(tile: str) -> None:
    student = student_of(torch.float64)
    ours = values_of(student, ["clip"], tile=tile, smoothing=0.1)["clip"]
    torch.testing.assert_close(ours, formulas.clip(*student, 0.1), rtol=0, atol=1e-12)
    assert not torch.isclose(ours, formulas.clip(*student))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kds_gradient_is_openclips_and_its_value_less_by_the_teachers_entropy(dtype: torch.dtype, tile: str) -> None:
    teacher = unit_rows(ROWS, 6, dtype), unit_rows(ROWS, 6, dtype), 30.0
    logits = teacher[2] * teacher[0] @ teacher[1].T
    expected_difference = (entropy(logits) + entropy(logits.T)) / 2
    assert expected_difference > 0.1
    for _ in range(2):  # two students: the difference depends on the teacher alone
        student = student_of(dtype)
        ours = values_of(student, ["clip", "kd"], tile=tile, teachers=[teacher])
        their_contrastive, theirs = DistillClipLoss()(*student, *teacher)
        torch.testing.assert_close(theirs - ours["kd"], expected_difference, rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(
            torch.autograd.grad(ours["kd"] + ours["clip"], student),
            torch.autograd.grad(theirs + their_contrastive, student),
            rtol=0,
            atol=TOLERANCE[dtype],
        )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("term", ["kd", "crd"])
def test_distillation_vanishes_for_a_student_like_its_teacher(term: str, tile: str) -> None:
    student = student_of(torch.float64)
    teacher = student[0].detach(), student[1].detach(), 20.0
    value = values_of(student, [term], tile=tile, teachers=[teacher])[term]
    assert abs(value.item()) < 1e-12
    assert max(float(gradient.abs().max()) for gradient in torch.autograd.grad(value, student)) < 1e-12


@pytest.mark.parametrize("tile", TILES)
def test_kd_averages_probabilities_and_crd_divergences_of_several_teachers(tile: str) -> None:
    student = student_of(torch.float64)
    teachers = [
        (unit_rows(ROWS, width, torch.float64), unit_rows(ROWS, width, torch.float64), scale)
        for width, scale in ((4, 10.0), (6, 50.0), (8, 90.0))
    ]
    values = values_of(student, ["kd", "crd"], tile=tile, teachers=teachers)
    torch.testing.assert_close(values["kd"], formulas.kd(*student, teachers), rtol=0, atol=1e-12)
    torch.testing.assert_close(values["crd"], formulas.crd(*student, teachers), rtol=0, atol=1e-12)
    assert values["crd"] > values["kd"] + 0.01  # by how much the teachers differ among themselves
    torch.testing.assert_close(
        *(torch.autograd.grad(value, student, retain_graph=True) for value in values.values()), rtol=0, atol=1e-12
    )
