"""Every preset against its formula, written out with the constants of its paper or code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jettclip.losses.factory import Loss, create_loss
from jettclip.losses.formula import parse_formula, teacher_parts_of
from jettclip.losses.presets import PRESETS
from jettclip.settings import LossSettings
from jettclip.types import Features, TeacherFeatures, TeacherInfo
from loss_formulas import clip, coarse, crd, icl, kd, siglip, squared, unit
from support import unit_rows

ROWS, WIDTH = 48, 40  # more than the 32 components that Long-CLIP keeps
TEACHERS = [TeacherInfo("a", 36, 70.0), TeacherInfo("b", 38, 60.0)]
Taught = list[tuple[Tensor, Tensor, float]]


class Batch:
    """Features of student (x, long, short) and teachers, and the scale that the student has at the moment."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.x, self.short, self.long = (unit_rows(ROWS, WIDTH, torch.float64).requires_grad_() for _ in range(3))
        self.scale = torch.tensor([30.0], dtype=torch.float64, requires_grad=True)
        self.features = Features(self.x, self.short, self.long, self.scale)
        self.parts = [[unit_rows(ROWS, one.width, torch.float64) for one in TEACHERS] for _ in range(3)]
        self.teacher = TeacherFeatures(*(torch.cat(part, dim=1) for part in self.parts))

    def taught(self, caption: str, scale: float | None = None, see: Callable[[Tensor], Tensor] = lambda x: x) -> Taught:
        images, texts = self.parts[0], self.parts[1 if caption == "short" else 2]
        return [
            (see(image), text, scale or one.logit_scale)
            for image, text, one in zip(images, texts, TEACHERS, strict=True)
        ]


def openclip(batch: Batch, _: Loss) -> Tensor:
    return clip(batch.x, batch.long, batch.scale)


def longclip(batch: Batch, _: Loss) -> Tensor:
    coarse_x = coarse(batch.x, 32)
    return clip(batch.x, batch.long, batch.scale, 0.1) + clip(coarse_x, batch.short, batch.scale, 0.1)


def jettclip(batch: Batch, _: Loss) -> Tensor:
    coarse_x = coarse(batch.x, 32)
    return (
        0.8 * clip(batch.x, batch.long, batch.scale, 0.1)
        + 0.4 * clip(coarse_x, batch.short, batch.scale, 0.1)
        + 1.5 * kd(batch.x, batch.long, batch.scale, batch.taught("long", 100))
        + 0.5 * kd(coarse_x, batch.short, batch.scale, batch.taught("short", 100, lambda image: coarse(image, 32)))
    )


def mobileclip(batch: Batch, _: Loss, clip_weight: float = 0.0) -> Tensor:
    contrast = clip(batch.x, batch.long, batch.scale) + clip(batch.x, batch.short, batch.scale)
    distilled = kd(batch.x, batch.long, batch.scale, batch.taught("long")) + kd(
        batch.x, batch.short, batch.scale, batch.taught("short")
    )
    return clip_weight * contrast + (1 - clip_weight) * distilled


def clip_kd(batch: Batch, loss: Loss) -> Tensor:
    parameters, teachers = dict(loss.named_parameters()), batch.taught("long")

    def mapped(term: str) -> list[tuple[Tensor, Tensor]]:
        names = [f"terms.{term}.{{}}_projections.{index}.weight" for index in range(len(teachers))]
        return [
            (
                unit(batch.x @ parameters[name.format("image")].T),
                unit(batch.long @ parameters[name.format("text")].T),
            )
            for name in names
        ]

    per_modality = [difference.mean() for difference in squared(mapped("fd"), teachers)]  # MSE over rows and columns
    return (
        clip(batch.x, batch.long, batch.scale)
        + crd(batch.x, batch.long, batch.scale, teachers)
        + icl(mapped("icl"), parameters["terms.icl.logit_scale"].exp(), teachers)
        + 2000 * torch.stack(per_modality).sum() / len(teachers)
    )


def debias(batch: Batch, _: Loss) -> Tensor:
    coarse_x = coarse(batch.x, 32)
    return 0.9 * clip(batch.x, batch.long, batch.scale, 0.1) + 0.1 * clip(coarse_x, batch.short, batch.scale, 0.1)


def sigmoid(batch: Batch, loss: Loss) -> Tensor:
    return siglip(batch.x, batch.long, batch.scale, loss.terms["siglip"].bias)


def himo(batch: Batch, _: Loss) -> Tensor:
    coarse_long = coarse(batch.long, variance=0.9)
    return clip(batch.x, batch.long, batch.scale, 0.1) + clip(batch.x, coarse_long, batch.scale, 0.1)


FORMULAS: dict[str, Callable[[Batch, Loss], Tensor]] = {
    "openclip": openclip,
    "longclip": longclip,
    "jettclip": jettclip,
    "mobileclip-dr": mobileclip,
    "clip-kd": clip_kd,
    "llm2clip": openclip,
    "debias": debias,
    "siglip": sigmoid,
    "himo-clip": himo,
}


def loss_of(preset: str, **settings: Any) -> Loss:
    torch.manual_seed(4)
    teachers = TEACHERS if teacher_parts_of(PRESETS[preset]) else []
    return create_loss(LossSettings(preset, **settings), WIDTH, teachers).double()


def check(loss: Loss, batch: Batch, expected: Tensor) -> None:
    total = loss(batch.features, batch.teacher).total
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    inputs = [batch.x, batch.scale, *(getattr(batch, caption) for caption in loss.views), *loss.parameters()]
    ours, theirs = (torch.autograd.grad(value, inputs) for value in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_formula(preset: str) -> None:
    loss, batch = loss_of(preset), Batch()
    check(loss, batch, FORMULAS[preset](batch, loss))


@pytest.mark.parametrize(("weights", "clip_weight"), [((0.25, 0.75), 0.25), ((0.0, 1.0), 0.0)])
def test_mobileclips_loss_takes_its_weights(weights: tuple[float, ...], clip_weight: float) -> None:
    loss, batch = loss_of("mobileclip-dr", distill_loss_weights=weights), Batch()
    check(loss, batch, mobileclip(batch, loss, clip_weight))


def test_mobileclips_gradient_is_that_of_its_paper_and_of_its_code() -> None:
    """Which have the mean of the teachers' divergences, and a cross-entropy (arXiv 2311.17049, equations 2 to 4)."""
    loss, batch = loss_of("mobileclip-dr", distill_loss_weights=(0.25, 0.75)), Batch()
    papers = sum(
        0.25 * clip(batch.x, text, batch.scale) + 0.75 * crd(batch.x, text, batch.scale, batch.taught(caption))
        for caption, text in (("long", batch.long), ("short", batch.short))
    )
    total = loss(batch.features, batch.teacher).total
    assert not torch.isclose(total, papers)  # by the teachers' entropies, which are constant
    ours, theirs = (torch.autograd.grad(value, batch.features) for value in (total, papers))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


SCALES = {  # S to start with (None: the model's, which for a new one is 1 / 0.07), and the largest (0: no limit)
    "openclip": (None, 100),
    "longclip": (100, 0),  # its code: ln 100, and no clamp
    "jettclip": (100, 0),
    "mobileclip-dr": (None, 100),
    "clip-kd": (1 / 0.07, 100),
    "llm2clip": (1 / 0.07, 100),
    "debias": (100, 0),
    "siglip": (10, 100),
    "himo-clip": (100, 0),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_its_scale(preset: str) -> None:
    start, limit = SCALES[preset]
    recipe = PRESETS[preset]
    assert recipe.logit_scale_max == limit
    assert recipe.logit_scale_init == start or math.isclose(recipe.logit_scale_init, start)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_what_it_stands_for(preset: str) -> None:
    said = loss_of(preset).description
    assert said.startswith(PRESETS[preset].formula)
    assert {one.term for one in parse_formula(said.split(";")[0])} == {
        one.term for one in parse_formula(PRESETS[preset].formula)
    }
    for part in {
        "jettclip": (
            "label smoothing 0.1",
            "teachers' logit scale 100",
            "from 100, no limit",
            "32 principal components",
        ),
        "mobileclip-dr": ("logit scale their own", "sees whole images", "from the model's, at most 100"),
        "himo-clip": ("long captions through the principal components that hold 0.9 of the variance",),
        "siglip": ("logit scale from 10, at most 100",),
    }.get(preset, ()):
        assert part in said
