"""Builds the loss from its formula, and computes what its terms share: gathering and principal components."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    views_of,
)
from jettclip.losses.gd import GdTerm
from jettclip.losses.icl import IclTerm
from jettclip.losses.matching import STUDENT, TEACHER, Matching
from jettclip.losses.pairwise.block import Margin
from jettclip.losses.pairwise.choice import Pairwise
from jettclip.losses.positives import Identities
from jettclip.losses.siglip import SiglipTerm
from jettclip.losses.softmax import SoftmaxTerms
from jettclip.losses.teachers import Teachers, parts_of_model
from jettclip.losses.view import COARSE, Matches, View, whole
from jettclip.settings import LossSettings
from jettclip.types import Features, Identity, LossReport, TeacherFeatures, TeacherInfo


class Loss(nn.Module):
    """A weighted sum of terms over caption views.

    The long view pairs the image with the long caption; the short view pairs the short caption with the image rebuilt
    from the batch's principal components (Long-CLIP, arXiv 2403.15378), or the image with the long caption rebuilt so
    (HiMo-CLIP, arXiv 2511.06653). Teachers' features are treated alike. What the terms compare with all ranks' rows is
    gathered once. All arithmetic is in float32 at least, outside autocast.

    Attributes:
        views: the student's captions that the formula reads.
        recipe: the formula and its constants.
    """

    def __init__(self, settings: LossSettings, embed_dim: int, teachers: Sequence[TeacherInfo] = ()) -> None:
        super().__init__()
        self.recipe = recipe = find_recipe(settings)
        self.summands = parse_formula(recipe.formula)
        self.contrasted = [summand.view for summand in self.summands if summand.term == "clip"]
        self.views = views_of(recipe)
        self.teachers = Teachers(recipe, teachers)
        pairwise = Pairwise(settings.loss_tile)
        coarsen = Coarsening(recipe)
        distilled = [summand for summand in self.summands if summand.term in TEACHER_TERMS]
        dense, captions = pairwise.is_dense, recipe.clip_margin > 0
        self.match = Matching(self.summands, recipe, coarsen, STUDENT, with_captions=captions, keeps_whole=dense)
        self.match_teacher = Matching(distilled, recipe, coarsen, TEACHER, keeps_whole=dense)
        self.softmax_terms = SoftmaxTerms(pairwise, recipe.label_smoothing)
        self.terms = nn.ModuleDict()
        widths = embed_dim, self.teachers.widths, recipe.mse_projection
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
        return describe(self.recipe)

    @property
    def needs_identity(self) -> bool:
        """Tells whether `forward` must be told who is who in a batch."""
        return self.recipe.multi_positive

    @property
    def reads_identity(self) -> bool:
        """Tells whether `forward` makes anything of who is who: of positives, or of the floor of a clip term."""
        return self.needs_identity or bool(self.contrasted)

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
            a clip term that takes equal captions for negatives cannot go below, and which captions rebuilt from each
            rank's own principal components do not have, since equal ones then differ from rank to rank; and what terms
            learn beside the logit scale, ``bias@siglip`` and ``scale@icl``.

        Raises:
            ValueError: if the student or the teacher lacks a view that the formula names, or identities are needed.
        """
        with torch.autocast(features.image.device.type, enabled=False):
            student = self.match(parts_of_model(features, ("image", *self.views), "the student"), features.logit_scale)
            taught = [self.match_teacher(*one) for one in self.teachers.split(teacher)]
            identities = self._identities(identity)
            values: dict[str, Tensor] = {}
            for view, matches in student.items():
                caption = self.recipe.caption_of(view)
                positives = identities.positives(caption) if identities and self.needs_identity else None
                margin = self._margin(matches, caption)
                teachers = [one[view] for one in taught if view in one]
                seen = View(matches, teachers, positives, margin, features.logit_bias)
                values |= {f"{term}@{view}": value for term, value in self._values(seen, view).items()}
            total = features.logit_scale.sum() * 0  # DistributedDataParallel wants every parameter in the graph
            for weight, term, view in self.summands:
                total = total + weight * values[f"{term}@{view}"]
            reported = {f"{term}@{view}": values[f"{term}@{view}"].detach() for _, term, view in self.summands}
            if identities and not self.needs_identity:
                reported |= {
                    f"floor@{view}": identities.floor(self.recipe.caption_of(view))
                    for view in self.contrasted
                    if student[view].parts.text != COARSE or self.match.coarsen.is_shared
                }
        return LossReport(total, reported | self._learned(features))

    def _learned(self, features: Features) -> dict[str, Tensor]:
        """Returns the numbers that terms learn beside the logit scale, to be watched."""
        learned = {}
        if "siglip" in self.terms and features.logit_bias is not None:
            learned["bias@siglip"] = features.logit_bias.detach().squeeze()
        for term in self.terms.values():
            if isinstance(term, IclTerm):
                learned["scale@icl"] = term.logit_scale.detach().exp().squeeze()
        return learned

    def _values(self, seen: View, view: str) -> dict[str, Tensor]:
        terms = [summand.term for summand in self.summands if summand.view == view]
        together = [term for term in terms if term in SOFTMAX_TERMS]
        values: dict[str, Tensor] = self.softmax_terms(seen, together) if together else {}
        return values | {term: self.terms[term](seen) for term in terms if term not in values}

    def _margin(self, matches: Matches, caption: str) -> Margin | None:
        weight = self.recipe.clip_margin
        if not (weight and caption in matches.gathered):
            return None
        return Margin(weight, whole(matches.own[caption]).detach(), matches.gathered[caption].detach())

    def _identities(self, identity: Identity | None) -> Identities | None:
        if identity is None and self.needs_identity:
            raise ValueError(
                "--multi-positive must be told who is who in a batch, but there is no identity of its rows"
            )
        if identity is None or not self.reads_identity:
            return None
        return Identities(identity, self.views)


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
