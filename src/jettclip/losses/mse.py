"""The feature distillation term."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from jettclip.losses.view import View


class MseTerm(nn.Module):
    """Squared distance between the student's and the teachers' unit-length features (FD of CLIP-KD, arXiv 2307.12732).

    The student's features go through a learned linear map first, one for images and one for texts, since its embedding
    space is not the teacher's: without it JettCLIP measured the term to do harm. The maps are parameters of the loss,
    trained and saved with the model.

    Args:
        width: of the student's features.
        teacher_widths: of each teacher's.
        projection: ``linear``, or ``none`` to compare the spaces as they are.
    """

    def __init__(self, width: int, teacher_widths: Sequence[int], projection: str = "linear") -> None:
        super().__init__()
        self.image_projections, self.text_projections = (
            nn.ModuleList(
                nn.Linear(width, teacher_width, bias=False) if projection == "linear" else nn.Identity()
                for teacher_width in teacher_widths
            )
            for _ in range(2)
        )
        if projection == "none" and any(teacher_width != width for teacher_width in teacher_widths):
            raise ValueError(
                f"--mse-projection none compares student features of width {width} with teachers' of "
                f"{list(teacher_widths)}; widths that differ need --mse-projection linear"
            )

    def forward(self, view: View) -> Tensor:
        """Returns the mean over this rank's rows, both modalities and all teachers, a scalar."""
        distances = []
        student = view.student.local
        for teacher, to_image, to_text in zip(
            view.teachers, self.image_projections, self.text_projections, strict=True
        ):
            distances += [
                squared_distance(to_image(student.image), teacher.local.image),
                squared_distance(to_text(student.text), teacher.local.text),
            ]
        return sum(distances[1:], distances[0]) / len(distances)


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean over rows of the squared distance between unit-length rows."""
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum(dim=1).mean()
