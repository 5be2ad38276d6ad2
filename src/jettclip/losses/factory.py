"""Builds the loss from its formula, and computes what its terms share: gathering and principal components."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettclip.losses.clip import ClipTerm
from jettclip.losses.formula import TEACHER_TERMS, find_recipe, parse_formula
from jettclip.losses.gather import gather_rows, is_distributed, is_first_rank, row_offset
from jettclip.losses.kd import KdTerm
from jettclip.losses.mse import MseTerm
from jettclip.losses.pca import principal_components
from jettclip.losses.view import Gathered, View
from jettclip.settings import LossSettings
from jettclip.types import VIEWS, Features, LossReport, Pair, TeacherFeatures, TeacherInfo, at_least_float32


class Loss(nn.Module):
    """A weighted sum of terms over caption views.

    The long view pairs the image with the long caption; the short view pairs the short caption with the image rebuilt
    from the batch's principal components (Long-CLIP, arXiv 2403.15378). Teachers' features are treated alike. Every
    feature is gathered from the other ranks once. All arithmetic is in float32 at least, outside autocast.

    Attributes:
        views: the caption views the formula names.
        teacher_parts: what it needs of the teachers, of ``image``, ``short``, ``long``; empty without teacher terms.
        recipe: the formula and its constants.
    """

    def __init__(self, settings: LossSettings, embed_dim: int, teachers: Sequence[TeacherInfo] = ()) -> None:
        super().__init__()
        self.recipe = find_recipe(settings)
        self.summands = parse_formula(self.recipe.formula)
        self.views = views_of(self.recipe.formula)
        self.teacher_parts = teacher_parts_of(self.recipe.formula)
        self.pca_components, self.pca_is_global = self.recipe.pca_components, settings.pca_scope == "global"
        self.teachers = list(teachers) if self.teacher_parts else []
        if self.teacher_parts and not teachers:
            raise ValueError(
                f"--loss {settings.loss!r} distils from a teacher, but there is none; "
                "name a feature store with --features, or a model with --distill-model"
            )
        names = {summand.term for summand in self.summands}
        self.terms = nn.ModuleDict()
        if "clip" in names:
            self.terms["clip"] = ClipTerm(self.recipe.label_smoothing)
        if "kd" in names:
            self.terms["kd"] = KdTerm()
        if "mse" in names:
            self.terms["mse"] = MseTerm(embed_dim, [t.width for t in self.teachers], settings.mse_projection)
        self._checks_rank = is_first_rank()

    def forward(self, features: Features, teacher: TeacherFeatures | None = None) -> LossReport:
        """Computes the loss of this rank's rows against all ranks' rows.

        Args:
            features: the student's, b rows on every rank.
            teacher: the teachers' features of the same rows, any float type; the terms without a teacher need none.

        Returns:
            the weighted sum, in float32 at least, and each term's own value.

        Raises:
            ValueError: if the student or the teacher lacks a view that the formula names.
        """
        with torch.autocast(features.image.device.type, enabled=False):
            student = self._gather(_parts(features, ("image", *self.views), "the student"), features.logit_scale)
            taught = [self._gather(part, scale) for part, scale in self._split(teacher)]
            terms: dict[str, Tensor] = {}
            total = features.logit_scale.sum() * 0  # DistributedDataParallel wants every parameter in the graph
            views = {view: View(student[view], [one[view] for one in taught if view in one]) for view in self.views}
            for weight, term, view in self.summands:
                value = self.terms[term](views[view])
                terms[f"{term}@{view}"] = value.detach()
                total = total + weight * value
        return LossReport(total, terms)

    def _gather(self, features: dict[str, Tensor], scale: Tensor | float) -> dict[str, Gathered]:
        """Gathers one model's features, and pairs each view's text with the image feature that belongs to it."""
        local = {name: at_least_float32(rows) for name, rows in features.items()}
        rows = len(local["image"])
        offset = row_offset(rows)
        has_coarse = "short" in local and self.pca_components > 0
        if has_coarse and not self.pca_is_global:
            local["coarse"] = self._coarse(local["image"])
        everywhere = gather_rows(local)
        if has_coarse and self.pca_is_global:
            everywhere["coarse"] = self._coarse(everywhere["image"])
            local["coarse"] = everywhere["coarse"][offset : offset + rows]
        image_of = {"short": "coarse" if has_coarse else "image", "long": "image"}
        return {
            view: Gathered(
                Pair(local[image_of[view]], local[view]),
                Pair(everywhere[image_of[view]], everywhere[view]),
                scale,
                offset,
            )
            for view in self.views
            if view in local
        }

    def _coarse(self, image: Tensor) -> Tensor:
        rebuilt, rank = principal_components(image, self.pca_components)
        # to read the rank costs no wait for a GPU beyond the one that the eigendecomposition has just ended with
        if self._checks_rank and int(rank) <= self.pca_components:
            self._checks_rank = False
            logging.warning(
                f"--pca-components {self.pca_components} keeps everything of {len(image)} image features of width "
                f"{image.shape[1]}, whose rank is {int(rank)}, so the short view sees whole image features; "
                "give fewer, or a larger --batch-size of different images"
                + (", or --pca-scope global" if is_distributed() and not self.pca_is_global else "")
            )
        return rebuilt

    def _split(self, teacher: TeacherFeatures | None) -> list[tuple[dict[str, Tensor], Tensor | float]]:
        """Separates the teachers' columns, and scales the rows, perhaps stored in bfloat16, to unit length."""
        if not self.teachers:
            return []
        if teacher is None:
            raise ValueError(f"--loss {self.recipe.formula!r} distils, but the batch has no teacher features")
        widths = [one.width for one in self.teachers]
        parts = {
            name: at_least_float32(rows.detach()).split(widths, dim=1)
            for name, rows in _parts(teacher, self.teacher_parts, "the teacher").items()
        }
        return [
            (
                {name: F.normalize(columns[index], dim=1) for name, columns in parts.items()},
                self.recipe.teacher_scale or one.logit_scale,
            )
            for index, one in enumerate(self.teachers)
        ]


def create_loss(settings: LossSettings, embed_dim: int, teachers: Sequence[TeacherInfo] = ()) -> Loss:
    """Builds the loss that ``--loss`` names, a preset or a formula.

    Args:
        settings: the formula and its options.
        embed_dim: width of the student's features.
        teachers: width and scale of each teacher whose features the batches carry.

    Raises:
        ValueError: if the formula is wrong, or needs a teacher and there is none.
    """
    return Loss(settings, embed_dim, teachers)


def _parts(features: Features | TeacherFeatures, names: Sequence[str], whose: str) -> dict[str, Tensor]:
    parts = {name: getattr(features, name) for name in names}
    missing = [name for name, rows in parts.items() if rows is None]
    if missing:
        raise ValueError(
            f"--loss needs {', '.join(names)} features of {whose}, but the batch has no {' and '.join(missing)} ones; "
            "name views the data has, clip@long or clip@short"
        )
    return parts


def views_of(formula: str) -> tuple[str, ...]:
    """Returns the caption views that a formula names."""
    named = {summand.view for summand in parse_formula(formula)}
    return tuple(view for view in VIEWS if view in named)


def teacher_parts_of(formula: str) -> tuple[str, ...]:
    """Returns what a formula needs of the teachers, of ``image``, ``short`` and ``long``."""
    named = {summand.view for summand in parse_formula(formula) if summand.term in TEACHER_TERMS}
    return ("image", *(view for view in VIEWS if view in named)) if named else ()
