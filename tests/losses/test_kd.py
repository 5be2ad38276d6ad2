from __future__ import annotations

import pytest
import torch
from open_clip.loss import DistillClipLoss
from torch import Tensor

from jettclip.losses.clip import ClipTerm
from jettclip.losses.kd import KdTerm
from jettclip.losses.view import Gathered, View
from jettclip.types import Pair
from support import unit_rows

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
ROWS = 12


def gathered(image: Tensor, text: Tensor, scale: Tensor | float) -> Gathered:
    return Gathered(Pair(image, text), Pair(image, text), scale)


def student_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    image, text = (unit_rows(ROWS, 8, dtype).requires_grad_() for _ in range(2))
    return image, text, torch.tensor([20.0], dtype=dtype, requires_grad=True)


def entropy(logits: Tensor) -> Tensor:
    probability = logits.softmax(dim=1)
    return -(probability * probability.log()).sum(dim=1).mean()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradient_is_openclips_and_value_less_by_the_teachers_entropy(dtype: torch.dtype) -> None:
    teacher_image, teacher_text, teacher_scale = unit_rows(ROWS, 6, dtype), unit_rows(ROWS, 6, dtype), 30.0
    logits = teacher_scale * teacher_image @ teacher_text.T
    expected_difference = (entropy(logits) + entropy(logits.T)) / 2
    assert expected_difference > 0.1
    for _ in range(2):  # two students: the difference depends on the teacher alone
        image, text, scale = inputs = student_of(dtype)
        view = View(gathered(image, text, scale), [gathered(teacher_image, teacher_text, teacher_scale)])
        ours, contrastive = KdTerm()(view), ClipTerm()(view)
        their_contrastive, theirs = DistillClipLoss()(image, text, scale, teacher_image, teacher_text, teacher_scale)
        torch.testing.assert_close(theirs - ours, expected_difference, rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(
            torch.autograd.grad(ours + contrastive, inputs),
            torch.autograd.grad(theirs + their_contrastive, inputs),
            rtol=0,
            atol=TOLERANCE[dtype],
        )


def test_vanishes_for_a_student_like_its_teacher() -> None:
    image, text, scale = student_of(torch.float64)
    value = KdTerm()(View(gathered(image, text, scale), [gathered(image.detach(), text.detach(), 20.0)]))
    assert abs(value.item()) < 1e-12
    gradients = torch.autograd.grad(value, (image, text, scale))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-12


def test_several_teachers_average_probabilities_each_at_its_own_scale() -> None:
    image, text, scale = student_of(torch.float64)
    scales = (10.0, 50.0, 90.0)
    teachers = [
        gathered(unit_rows(ROWS, width, torch.float64), unit_rows(ROWS, width, torch.float64), teacher_scale)
        for width, teacher_scale in zip((4, 6, 8), scales, strict=True)
    ]
    expected = torch.zeros((), dtype=torch.float64)
    for direction in range(2):
        ours = scale * image @ text.T
        theirs = [s * one.local.image @ one.local.text.T for s, one in zip(scales, teachers, strict=True)]
        if direction:
            ours, theirs = ours.T, [logits.T for logits in theirs]
        target = sum(logits.exp() / logits.exp().sum(dim=1, keepdim=True) for logits in theirs) / len(theirs)
        log_student = ours - ours.exp().sum(dim=1, keepdim=True).log()
        expected = expected + (target * (target.log() - log_student)).sum() / ROWS / 2
    value = KdTerm()(View(gathered(image, text, scale), teachers))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
