"""What benchmarks/loss.py compares: our loss, OpenCLIP's classes, and one laid out as Long-CLIP's code is.

All compute the same function, of a long view and a short one, whose images are rebuilt from their principal components;
label smoothing is left out, since OpenCLIP has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import Tensor

from jettclip.losses.factory import create_loss
from jettclip.settings import LossSettings
from jettclip.types import Features, Pair, TeacherFeatures, TeacherInfo

COMPONENTS = 32
TEACHER_WIDTH, TEACHER_SCALE, SCALE = 768, 100.0, 50.0
TILED, DENSE, OPENCLIP, LONGCLIP = "ours, tiled", "ours, dense", "OpenCLIP", "Long-CLIP's layout"


class Case(NamedTuple):
    """What a loss is computed of."""

    rows: int
    width: int
    teachers: int = 0

    @property
    def clip(self) -> dict[str, float]:
        """The weights of the contrastive terms: Long-CLIP's, or with teachers JettCLIP's."""
        return {"long": 0.8, "short": 0.4} if self.teachers else {"long": 1.0, "short": 1.0}

    @property
    def kd(self) -> dict[str, float]:
        """The weights of the distillation terms, JettCLIP's."""
        return {"long": 1.5, "short": 0.5} if self.teachers else {}


class Inputs(NamedTuple):
    """Unit-length features, and S = exp(logit_scale)."""

    image: Tensor  # [B, D]
    short: Tensor  # [B, D]
    long: Tensor  # [B, D]
    scale: Tensor  # [1]
    teacher: TeacherFeatures | None  # [B, 768 times the teachers]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the gradient is taken of."""
        return self[:4]

    def pairs(self) -> dict[str, Pair]:
        """Returns the student's features by view."""
        return {"long": Pair(self.image, self.long), "short": Pair(rebuilt_by_svd(self.image), self.short)}

    @torch.no_grad()
    def taught(self) -> list[dict[str, Pair]]:
        """Returns each teacher's features by view."""
        if self.teacher is None:
            return []
        parts = ([F.normalize(rows, dim=1) for rows in part.split(TEACHER_WIDTH, dim=1)] for part in self.teacher)
        return [
            {"long": Pair(image, long), "short": Pair(rebuilt_by_svd(image), short)}
            for image, short, long in zip(*parts, strict=True)
        ]


Side = Callable[[Inputs], Tensor]


def draw(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Draws features that lie as those of trained models do: around a mean, with a falling spectrum, pairs alike."""
    chance = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance)

    meaning = normal(case.rows, case.width) * torch.arange(1, case.width + 1) ** -0.5

    def embedded(width: int) -> list[Tensor]:
        common = meaning @ normal(case.width, width) / width**0.5 + 0.1 * normal(width)
        noisy = (common + 4 / width**0.5 * normal(case.rows, width) for _ in range(3))
        return [F.normalize(rows, dim=1).to(device, dtype) for rows in noisy]

    image, short, long = (rows.requires_grad_() for rows in embedded(case.width))
    scale = torch.full((1,), SCALE, device=device, dtype=dtype, requires_grad=True)
    if not case.teachers:
        return Inputs(image, short, long, scale, None)
    parts = zip(*(embedded(TEACHER_WIDTH) for _ in range(case.teachers)), strict=True)
    return Inputs(image, short, long, scale, TeacherFeatures(*(torch.cat(part, dim=1) for part in parts)))


def rebuilt_by_svd(image: Tensor) -> Tensor:
    """Rebuilds features from their principal components, as Long-CLIP's code does (arXiv 2403.15378)."""
    mean = image.mean(dim=0)
    centred = image - mean
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:COMPONENTS]
    return centred @ directions.T @ directions + mean


def ours(case: Case, tile: str) -> Side:
    """Returns our loss, with ``--loss-tile`` as given."""
    weights = {"clip": case.clip, "kd": case.kd}
    formula = " + ".join(f"{weight}*{term}@{view}" for term, of in weights.items() for view, weight in of.items())
    settings = LossSettings(loss=formula, label_smoothing=0.0, pca_components=COMPONENTS, loss_tile=tile)
    teachers = [TeacherInfo(f"teacher {n}", TEACHER_WIDTH, TEACHER_SCALE) for n in range(case.teachers)]
    loss = create_loss(settings, case.width, teachers)

    def total(inputs: Inputs) -> Tensor:
        features = Features(inputs.image, inputs.short, inputs.long, inputs.scale)
        return loss(features, inputs.teacher).total

    return total


def openclip(case: Case) -> Side:
    """Returns OpenCLIP's loss, called for each view; it knows one teacher, so that it is to be given no more."""
    contrastive, distilling = ClipLoss(), DistillClipLoss()

    def total(inputs: Inputs) -> Tensor:
        taught = inputs.taught()
        value = inputs.scale.new_zeros(())
        for view, pair in inputs.pairs().items():
            if taught:
                clip, kd = distilling(*pair, inputs.scale, *taught[0][view], TEACHER_SCALE)
                value = value + case.clip[view] * clip + case.kd[view] * kd
            else:
                value = value + case.clip[view] * contrastive(*pair, inputs.scale)
        return value

    return total


def longclip(case: Case) -> Side:
    """Returns the loss as Long-CLIP's code lays it out, with distillation: every direction of every view a matrix."""

    def total(inputs: Inputs) -> Tensor:
        taught = inputs.taught()
        labels = torch.arange(case.rows, device=inputs.image.device)
        value = inputs.scale.new_zeros(())
        for view, pair in inputs.pairs().items():
            for direction in (0, 1):
                logits = inputs.scale * (pair[direction] @ pair[1 - direction].T)
                value = value + case.clip[view] / 2 * F.cross_entropy(logits, labels)
                if taught:
                    targets = [
                        (TEACHER_SCALE * (one[view][direction] @ one[view][1 - direction].T)).softmax(dim=1)
                        for one in taught
                    ]
                    divergence = F.kl_div(logits.log_softmax(1), torch.stack(targets).mean(0), reduction="batchmean")
                    value = value + case.kd[view] / 2 * divergence
        return value

    return total


SIDES: dict[str, Callable[[Case], Side]] = {
    TILED: lambda case: ours(case, "auto"),
    DENSE: lambda case: ours(case, "off"),
    OPENCLIP: openclip,
    LONGCLIP: longclip,
}
