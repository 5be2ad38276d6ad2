from __future__ import annotations

import math

import torch
from open_clip.loss import ClipLoss

import loss_formulas as formulas
from jettclip.losses.icl import IclTerm
from jettclip.losses.pairwise.choice import Pairwise
from jettclip.losses.view import Matches, Parts, View
from support import unit_rows

ROWS, WIDTH = 12, 5


def matches(width: int) -> Matches:
    both = {"image": unit_rows(ROWS, width, torch.float64), "long": unit_rows(ROWS, width, torch.float64)}
    return Matches(Parts("image", "long"), both, both, 50.0)


def test_the_student_is_told_apart_by_the_teachers_columns() -> None:
    term = IclTerm(Pairwise(), WIDTH, [3, 7]).double()
    student, teachers = matches(WIDTH), [matches(3), matches(7)]
    view = View(student, teachers)
    scale = term.logit_scale.exp()
    torch.testing.assert_close(scale.item(), 1 / 0.07, rtol=1e-6, atol=0)
    mapped = [
        (formulas.unit(student.local.image @ a.weight.T), formulas.unit(student.local.text @ b.weight.T))
        for a, b in zip(term.image_projections, term.text_projections, strict=True)
    ]
    taught = [(*teacher.local, 0.0) for teacher in teachers]
    value, expected = term(view), formulas.icl(mapped, scale, taught)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    parameters = list(term.parameters())
    assert len(parameters) == 5
    ours, theirs = (torch.autograd.grad(one, parameters) for one in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_scale_is_held_between_1_and_100_and_can_come_back() -> None:
    student, teacher = matches(WIDTH), matches(WIDTH)
    for asked, held in ((1000.0, 100.0), (0.1, 1.0), (20.0, 20.0)):
        term, expected = (IclTerm(Pairwise(), WIDTH, [WIDTH], "none").double() for _ in range(2))
        for one, scale in ((term, asked), (expected, held)):
            torch.nn.init.constant_(one.logit_scale, math.log(scale))
        value = term(View(student, [teacher]))
        torch.testing.assert_close(value, expected(View(student, [teacher])), rtol=1e-12, atol=0)
        torch.testing.assert_close(term.logit_scale.exp().item(), held, rtol=1e-12, atol=0)
        assert torch.autograd.grad(value, term.logit_scale)[0].abs() > 1e-3


def test_a_student_that_is_its_teacher_has_clips_loss_at_the_scale_of_the_term() -> None:
    term = IclTerm(Pairwise(), WIDTH, [WIDTH], "none").double()
    model = matches(WIDTH)
    torch.testing.assert_close(term(View(model, [model])), ClipLoss()(*model.local, term.logit_scale.exp()))
