"""What a loss term sees: one caption view of the batch, with the rows of all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from jettclip.types import Pair


@dataclass(frozen=True)
class Gathered:
    """Unit-length image and text features of one model, this rank's rows and all ranks' rows.

    Row i of `local` is row `offset` + i of `everywhere`.
    """

    local: Pair  # [b, D]
    everywhere: Pair  # [B, D]
    scale: Tensor | float  # S = exp(logit_scale)
    offset: int = 0

    @cached_property
    def logits(self) -> Pair:
        """Scaled similarities of this rank's images to all texts, and of its texts to all images, each [b, B].

        Kept, since several terms use them.
        """
        return Pair(
            self.scale * self.local.image @ self.everywhere.text.T,
            self.scale * self.local.text @ self.everywhere.image.T,
        )


@dataclass(frozen=True)
class View:
    """The student's features for a caption view, and the teachers'."""

    student: Gathered
    teachers: list[Gathered] = field(default_factory=list)
