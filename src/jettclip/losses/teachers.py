"""What a loss is told by its teachers, whose features stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from jettclip.losses.formula import check_teacher_scales, teacher_parts_of
from jettclip.losses.presets import Recipe
from jettclip.types import Features, TeacherFeatures, TeacherInfo, at_least_float32


class Teachers:
    """The teachers that a recipe distils from; none, if it has no term with a teacher.

    Args:
        recipe: what it needs of them, and at which scale.
        teachers: in the order of their columns.

    Attributes:
        widths: of their features.

    Raises:
        ValueError: if the recipe needs teachers and there are none, or scales for another number of them.
    """

    def __init__(self, recipe: Recipe, teachers: Sequence[TeacherInfo]) -> None:
        self.formula, self.parts = recipe.formula, teacher_parts_of(recipe)
        if self.parts and not teachers:
            raise ValueError(
                f"--loss {self.formula!r} distils from a teacher, but there is none; "
                "name a feature store with --features, or a model with --distill-model"
            )
        used = list(teachers) if self.parts else []
        self.widths = [teacher.width for teacher in used]
        self.scales = [teacher.logit_scale for teacher in used]
        if used and recipe.teacher_scale:
            check_teacher_scales(recipe.teacher_scale, [teacher.name for teacher in used])
            self.scales = list(recipe.teacher_scale) * (len(used) // len(recipe.teacher_scale))

    def split(self, features: TeacherFeatures | None) -> list[tuple[dict[str, Tensor], float]]:
        """Returns each teacher's features by part, its rows, perhaps stored in bfloat16, at unit length, and its scale.

        Raises:
            ValueError: if there are teachers, and the batch lacks their features, or a part of them.
        """
        if not self.widths:
            return []
        if features is None:
            raise ValueError(f"--loss {self.formula!r} distils, but the batch has no teacher features")
        columns = {
            part: at_least_float32(rows.detach()).split(self.widths, dim=1)
            for part, rows in parts_of_model(features, self.parts, "the teacher").items()
        }
        return [
            ({part: F.normalize(each[index], dim=1) for part, each in columns.items()}, scale)
            for index, scale in enumerate(self.scales)
        ]


def parts_of_model(features: Features | TeacherFeatures, names: Sequence[str], whose: str) -> dict[str, Tensor]:
    """Returns features by part, of ``image``, ``short`` and ``long``.

    Raises:
        ValueError: if one of them is not there.
    """
    parts = {name: getattr(features, name) for name in names}
    missing = [name for name, rows in parts.items() if rows is None]
    if missing:
        raise ValueError(
            f"--loss needs {', '.join(names)} features of {whose}, but the batch has no {' and '.join(missing)} ones; "
            "name views the data has, clip@long or clip@short"
        )
    return parts
