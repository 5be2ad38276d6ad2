"""The interactive contrastive term."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jettclip.losses.pairwise.block import Block
from jettclip.losses.pairwise.choice import Pairwise
from jettclip.losses.projection import ProjectedTerm
from jettclip.losses.view import View

SCALE_MAX = 100.0
"""Largest c, as CLIP limits the model's own scale (arXiv 2103.00020, section 2.5)."""


class IclTerm(ProjectedTerm):
    """Contrast of the student's images with the teachers' texts, and of its texts with their images.

    ICL of CLIP-KD (arXiv 2307.12732): for each teacher the mean of two cross-entropies, of the student's rows only, at
    a scale c = exp(logit_scale) of their own that is learned. CLIP-KD's code (github.com/winycg/CLIP-KD) forgets the
    exponential, so that its c starts at ln(1/0.07) = 2.7, where similarities hardly tell; here it starts at 1/0.07,
    and is held between 1 and 100, as CLIP holds the model's.

    Args:
        pairwise: how similarities are computed.
        width, teacher_widths, projection: as for `ProjectedTerm`.
    """

    def __init__(
        self, pairwise: Pairwise, width: int, teacher_widths: Sequence[int], projection: str = "linear"
    ) -> None:
        super().__init__(width, teacher_widths, projection)
        self.pairwise = pairwise
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, view: View) -> Tensor:
        """Returns the mean over this rank's rows, both directions and all teachers, a scalar."""
        with torch.no_grad():  # of the parameter, since one beyond a limit of its exponential would have no gradient
            self.logit_scale.clamp_(0, math.log(SCALE_MAX))
        scale, offset = self.logit_scale.exp(), view.student.offset
        values = []
        for student, teacher in self.compared(view):
            values += [
                self.pairwise.one_way(Block(student.image, teacher.everywhere.text, scale, offset)),
                self.pairwise.one_way(Block(student.text, teacher.everywhere.image, scale, offset)),
            ]
        return torch.stack(values).mean()
