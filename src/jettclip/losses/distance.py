"""The feature distillation terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jettclip.losses.projection import ProjectedTerm
from jettclip.losses.view import View


class DistanceTerm(ProjectedTerm):
    """The distance between the student's unit-length features, projected, and the teachers'.

    All are multiples of the squared distance, as they were published:

    - ``mse``: the squared distance, its mean over both modalities.
    - ``fd``: the mean of the squared differences over rows and columns, its sum over both modalities (FD of CLIP-KD's
      code, github.com/winycg/CLIP-KD, for which its weight of 2000 is meant; arXiv 2307.12732).
    - ``cosine``: 1 - cosine, its mean over both modalities.

    Args:
        measure: ``mse``, ``fd`` or ``cosine``.
        width, teacher_widths, projection: as for `ProjectedTerm`.
    """

    def __init__(self, measure: str, width: int, teacher_widths: Sequence[int], projection: str = "linear") -> None:
        super().__init__(width, teacher_widths, projection)
        self.weights = [{"mse": 1 / 2, "fd": 1 / teacher, "cosine": 1 / 4}[measure] for teacher in teacher_widths]

    def forward(self, view: View) -> Tensor:
        """Returns the mean over this rank's rows and all teachers, a scalar."""
        distances = []
        for weight, (student, teacher) in zip(self.weights, self.compared(view), strict=True):
            image, text = (squared_distance(*pair) for pair in zip(student, teacher.local, strict=True))
            distances.append(weight * (image + text))
        return torch.stack(distances).mean()


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean over rows of the squared distance to the teacher's rows, which are scaled to unit length."""
    return (student - F.normalize(teacher, dim=1)).square().sum(dim=1).mean()
