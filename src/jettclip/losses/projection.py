"""What brings the student's features to the teachers' spaces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import nn

from jettclip.losses.view import Matches, View
from jettclip.types import Pair


class ProjectedTerm(nn.Module):
    """A term that compares features of student and teachers themselves, and not their similarities within a model.

    The student's features go through a learned linear map first, one for images and one for texts, since its embedding
    space is not the teacher's: without it JettCLIP measured the mse term to do harm. The maps are parameters of the
    loss, trained and saved with the model.

    Args:
        width: of the student's features.
        teacher_widths: of each teacher's.
        projection: ``linear``, ``auto`` for a map only where widths differ (as CLIP-KD's code has it), or ``none`` to
            compare the spaces as they are.

    Raises:
        ValueError: if there is no projection between widths that differ.
    """

    def __init__(self, width: int, teacher_widths: Sequence[int], projection: str = "linear") -> None:
        super().__init__()
        self.image_projections, self.text_projections = (
            nn.ModuleList(
                nn.Linear(width, teacher_width, bias=False)
                if projection == "linear" or (projection == "auto" and teacher_width != width)
                else nn.Identity()
                for teacher_width in teacher_widths
            )
            for _ in range(2)
        )
        if projection == "none" and any(teacher_width != width for teacher_width in teacher_widths):
            raise ValueError(
                f"--mse-projection none compares student features of width {width} with teachers' of "
                f"{list(teacher_widths)}; widths that differ need --mse-projection linear or auto"
            )

    def compared(self, view: View) -> Iterator[tuple[Pair, Matches]]:
        """Yields for each teacher the student's rows [b, Dt] in its space, of unit length, and the teacher."""
        student = view.student.local
        maps = zip(self.image_projections, self.text_projections, strict=True)
        for teacher, (to_image, to_text) in zip(view.teachers, maps, strict=True):
            yield Pair(F.normalize(to_image(student.image), dim=1), F.normalize(to_text(student.text), dim=1)), teacher
