"""Every preset against its formula, written out with the constants of its paper or code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jettclip.losses.factory import Loss, create_loss
from jettclip.losses.formula import teacher_parts_of
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
        self.bias = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
        self.features = Features(self.x, self.short, self.long, self.scale, self.bias)
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


def sigmoid(batch: Batch, _: Loss) -> Tensor:
    return siglip(batch.x, batch.long, batch.scale, batch.bias)


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


def test_clip_kds_loss_has_no_projection_between_equal_widths() -> None:
    batch = Batch()
    batch.parts = [[unit_rows(ROWS, WIDTH, torch.float64) for _ in TEACHERS] for _ in range(3)]
    batch.teacher = TeacherFeatures(*(torch.cat(part, dim=1) for part in batch.parts))
    loss = create_loss(LossSettings("clip-kd"), WIDTH, [one._replace(width=WIDTH) for one in TEACHERS]).double()
    assert [name for name, _ in loss.named_parameters()] == ["terms.icl.logit_scale"]
    images, _, longs = batch.parts
    x, y = unit(batch.x), unit(batch.long)
    interactive, distances = [], []
    for image, text in zip(images, longs, strict=True):
        for rows, columns in ((x, text), (y, image)):
            logits = rows @ columns.T / 0.07
            interactive.append(torch.nn.functional.cross_entropy(logits, torch.arange(ROWS)))
        distances.append((x - image).square().mean() + (y - text).square().mean())
    expected = (
        clip(batch.x, batch.long, batch.scale)
        + crd(batch.x, batch.long, batch.scale, batch.taught("long"))
        + torch.stack(interactive).mean()
        + 2000 * torch.stack(distances).mean()
    )
    total = loss(batch.features, batch.teacher).total
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)  # at a scale that began in float32
    inputs = [batch.x, batch.long, batch.scale]
    ours, theirs = (torch.autograd.grad(value, inputs) for value in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


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
    ours, theirs = (torch.autograd.grad(value, [*batch.features.of_rows, batch.scale]) for value in (total, papers))
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


DESCRIPTIONS = {
    "openclip": "1*clip@long; label smoothing 0; logit scale from the model's, at most 100",
    "longclip": "1*clip@long + 1*clip@short; label smoothing 0.1; logit scale from 100, no limit; "
    "the short view sees images through 32 principal components",
    "jettclip": "0.8*clip@long + 0.4*clip@short + 1.5*kd@long + 0.5*kd@short; label smoothing 0.1; "
    "teachers' logit scale 100; logit scale from 100, no limit; "
    "the short view sees images through 32 principal components",
    "mobileclip-dr": "1*kd@long + 1*kd@short; teachers' logit scale their own; logit scale from the model's, "
    "at most 100; the short view sees whole images",
    "clip-kd": "1*clip@long + 1*crd@long + 1*icl@long + 2000*fd@long; label smoothing 0; teachers' logit scale "
    "their own; logit scale from 14.29 or the checkpoint's, at most 100; a projection to a teacher's space only where "
    "widths differ",
    "llm2clip": "1*clip@long; label smoothing 0; logit scale from 14.29, at most 100",
    "debias": "0.9*clip@long + 0.1*clip@short; label smoothing 0.1; logit scale from 100, no limit; "
    "the short view sees images through 32 principal components",
    "siglip": "1*siglip@long; logit scale from 10 or the checkpoint's, at most 100; bias from -10 or the checkpoint's",
    "himo-clip": "1*clip@long + 1*clip@short; label smoothing 0.1; logit scale from 100, no limit; the short view sees "
    "long captions through the principal components that hold 0.9 of the variance",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_what_it_stands_for(preset: str) -> None:
    assert loss_of(preset).description == DESCRIPTIONS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_keeps_its_scale_where_the_published_code_loads_it_last(preset: str) -> None:
    assert PRESETS[preset].keeps_checkpoint_scale == (preset in ("siglip", "clip-kd"))
    assert PRESETS[preset].logit_bias_init == (-10 if preset == "siglip" else None)
