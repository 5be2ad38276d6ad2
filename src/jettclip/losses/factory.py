"""Builds the loss from its formula, and computes what its terms share: gathering and principal components."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettclip.losses.coarse import Coarsening
from jettclip.losses.distance import DistanceTerm
from jettclip.losses.formula import (
    DISTANCES,
    SOFTMAX_TERMS,
    TEACHER_TERMS,
    describe,
    find_recipe,
    parse_formula,
    teacher_parts_of,
    views_of,
)
from jettclip.losses.gd import GdTerm
from jettclip.losses.icl import IclTerm
from jettclip.losses.matching import STUDENT, TEACHER, Matching
from jettclip.losses.pairwise.block import Margin
from jettclip.losses.pairwise.choice import Pairwise
from jettclip.losses.positives import Identities
from jettclip.losses.presets import Recipe
from jettclip.losses.siglip import SiglipTerm
from jettclip.losses.softmax import SoftmaxTerms
from jettclip.losses.view import Matches, View, whole
from jettclip.settings import LossSettings
from jettclip.types import Features, Identity, LossReport, TeacherFeatures, TeacherInfo, at_least_float32


class Loss(nn.Module):
    """A weighted sum of terms over caption views.

    The long view pairs the image with the long caption; the short view pairs the short caption with the image rebuilt
    from the batch's principal components (Long-CLIP, arXiv 2403.15378), or the image with the long caption rebuilt so
    (HiMo-CLIP, arXiv 2511.06653). Teachers' features are treated alike. What the terms compare with all ranks' rows is
    gathered once. All arithmetic is in float32 at least, outside autocast.

    Attributes:
        views: the student's captions that the formula reads.
        teacher_parts: what it needs of the teachers, of ``image``, ``short``, ``long``; empty without teacher terms.
        recipe: the formula and its constants.
        needs_identity: whether it must be told who is who in a batch.
    """

    def __init__(self, settings: LossSettings, embed_dim: int, teachers: Sequence[TeacherInfo] = ()) -> None:
        super().__init__()
        self.recipe = recipe = find_recipe(settings)
        self.summands = parse_formula(recipe.formula)
        self.contrasted = [summand.view for summand in self.summands if summand.term == "clip"]
        self.views, self.teacher_parts = views_of(recipe), teacher_parts_of(recipe)
        self.needs_identity, self.margin_weight = settings.multi_positive, settings.clip_margin
        if self.teacher_parts and not teachers:
            raise ValueError(
                f"--loss {settings.loss!r} distils from a teacher, but there is none; "
                "name a feature store with --features, or a model with --distill-model"
            )
        self.teachers = list(teachers) if self.teacher_parts else []
        self.teacher_scales = _scales_of(self.teachers, recipe)
        pairwise = Pairwise(settings.loss_tile)
        coarsen = Coarsening(recipe, is_global=settings.pca_scope == "global", detach=settings.pca_detach)
        distilled = [summand for summand in self.summands if summand.term in TEACHER_TERMS]
        dense, captions = pairwise.is_dense, self.margin_weight > 0
        self.match = Matching(self.summands, recipe, coarsen, STUDENT, with_captions=captions, keeps_whole=dense)
        self.match_teacher = Matching(distilled, recipe, coarsen, TEACHER, keeps_whole=dense)
        self.softmax_terms = SoftmaxTerms(pairwise, recipe.label_smoothing)
        self.terms = nn.ModuleDict()
        widths = embed_dim, [teacher.width for teacher in self.teachers], settings.mse_projection
        for name in dict.fromkeys(summand.term for summand in self.summands):
            if name in DISTANCES:
                self.terms[name] = DistanceTerm(name, *widths)
            elif name == "icl":
                self.terms[name] = IclTerm(pairwise, *widths)
            elif name == "gd":
                self.terms[name] = GdTerm(*widths)
            elif name == "siglip":
                self.terms[name] = SiglipTerm(pairwise)

    @property
    def description(self) -> str:
        """The formula that this loss stands for, and its constants, in words."""
        margin = f"; clip margin {self.margin_weight:g}" if self.margin_weight else ""
        positives = "; what shares an image or a caption is positive" if self.needs_identity else ""
        return describe(self.recipe) + margin + positives

    def forward(
        self, features: Features, teacher: TeacherFeatures | None = None, identity: Identity | None = None
    ) -> LossReport:
        """Computes the loss of this rank's rows against all ranks' rows.

        Args:
            features: the student's, b rows on every rank.
            teacher: the teachers' features of the same rows, any float type; the terms without a teacher need none.
            identity: who is who among the rows, on all ranks or none: for more positives, or to report ``floor@VIEW``.

        Returns:
            the weighted sum, in float32 at least, and each term's own value; with identities also ``floor@VIEW``, which
            a clip term that takes equal captions for negatives cannot go below.

        Raises:
            ValueError: if the student or the teacher lacks a view that the formula names, or identities are needed.
        """
        with torch.autocast(features.image.device.type, enabled=False):
            student = self.match(_parts(features, ("image", *self.views), "the student"), features.logit_scale)
            taught = [self.match_teacher(*one) for one in self._split(teacher)]
            identities = self._identities(identity)
            values: dict[str, Tensor] = {}
            for view, matches in student.items():
                caption = self.recipe.caption_of(view)
                positives = identities.positives(caption) if identities and self.needs_identity else None
                margin = self._margin(matches, caption)
                seen = View(matches, [one[view] for one in taught if view in one], positives, margin)
                values |= {f"{term}@{view}": value for term, value in self._values(seen, view).items()}
            total = features.logit_scale.sum() * 0  # DistributedDataParallel wants every parameter in the graph
            for weight, term, view in self.summands:
                total = total + weight * values[f"{term}@{view}"]
            reported = {f"{term}@{view}": values[f"{term}@{view}"].detach() for _, term, view in self.summands}
            if identities and not self.needs_identity:
                reported |= {
                    f"floor@{view}": identities.floor(self.recipe.caption_of(view)) for view in self.contrasted
                }
        return LossReport(total, reported)

    def _values(self, seen: View, view: str) -> dict[str, Tensor]:
        terms = [summand.term for summand in self.summands if summand.view == view]
        together = [term for term in terms if term in SOFTMAX_TERMS]
        values: dict[str, Tensor] = self.softmax_terms(seen, together) if together else {}
        return values | {term: self.terms[term](seen) for term in terms if term not in values}

    def _margin(self, matches: Matches, caption: str) -> Margin | None:
        if not (self.margin_weight and caption in matches.gathered):
            return None
        return Margin(self.margin_weight, whole(matches.own[caption]).detach(), matches.gathered[caption].detach())

    def _identities(self, identity: Identity | None) -> Identities | None:
        if identity is None and self.needs_identity:
            raise ValueError(
                "--multi-positive must be told who is who in a batch, but there is no identity of its rows"
            )
        if identity is None or not (self.needs_identity or self.contrasted):
            return None
        return Identities(identity, self.views)

    def _split(self, teacher: TeacherFeatures | None) -> list[tuple[dict[str, Tensor], float]]:
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
            ({name: F.normalize(columns[index], dim=1) for name, columns in parts.items()}, scale)
            for index, scale in enumerate(self.teacher_scales)
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


def _scales_of(teachers: Sequence[TeacherInfo], recipe: Recipe) -> list[float]:
    """Returns S of each teacher."""
    scales = recipe.teacher_scale
    if len(scales) > 1 and teachers and len(scales) != len(teachers):
        raise ValueError(
            f"--teacher-scale {' '.join(f'{scale:g}' for scale in scales)} must be one for all or one for each of the "
            f"{len(teachers)} teachers, {', '.join(teacher.name for teacher in teachers)}"
        )
    return list(scales) * (len(teachers) // len(scales)) if scales else [teacher.logit_scale for teacher in teachers]


def _parts(features: Features | TeacherFeatures, names: Sequence[str], whose: str) -> dict[str, Tensor]:
    parts = {name: getattr(features, name) for name in names}
    missing = [name for name, rows in parts.items() if rows is None]
    if missing:
        raise ValueError(
            f"--loss needs {', '.join(names)} features of {whose}, but the batch has no {' and '.join(missing)} ones; "
            "name views the data has, clip@long or clip@short"
        )
    return parts
