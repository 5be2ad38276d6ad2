"""What a loss term sees: one caption view of the batch, with the rows of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jettclip.losses.pairwise.block import Block, Margin, Positives
from jettclip.losses.pca import Components
from jettclip.types import Pair

COARSE = "coarse"


class Parts(NamedTuple):
    """What a view pairs, by name: ``image``, ``short``, ``long``, or `COARSE` for what principal components hold."""

    image: str
    text: str

    @property
    def row(self) -> str:
        """Which one makes the rows of similarities: what is coarse, since only this rank's is known as coordinates."""
        return self.text if self.text == COARSE else self.image

    @property
    def column(self) -> str:
        """Which one makes the columns."""
        return self.image if self.text == COARSE else self.text


@dataclass(frozen=True)
class Matches:
    """One model's images and texts in a view: row i of the one belongs to row i of the other.

    Of what `gathered` has, row `offset` + i is row i of this rank; it has no more than the loss's terms compare with.
    """

    parts: Parts
    own: Mapping[str, Tensor | Components]  # [b, D] this rank's, of unit length unless coarse
    gathered: Mapping[str, Tensor]  # [B, D] all ranks'
    scale: Tensor | float  # S = exp(logit_scale)
    offset: int = 0

    @cached_property
    def local(self) -> Pair:
        """This rank's features, [b, D] each."""
        return Pair(*(whole(self.own[part]) for part in self.parts))

    @property
    def everywhere(self) -> Pair:
        """All ranks' features, [B, D] each."""
        return Pair(*(self.gathered[part] for part in self.parts))

    @cached_property
    def block(self) -> Block:
        """The similarities of this rank's rows and all ranks' columns, of low rank where the rows are coarse."""
        rows, columns = self.own[self.parts.row], self.gathered[self.parts.column]
        if isinstance(rows, Components):
            basis = torch.cat([rows.directions, rows.mean.unsqueeze(1)], dim=1)
            rows, columns = F.pad(rows.coordinates, (0, 1), value=1.0), columns @ basis
        return Block(rows, columns, self.scale, self.offset)


@dataclass(frozen=True)
class View:
    """What the terms over a caption view are computed from."""

    student: Matches
    teachers: Sequence[Matches] = ()
    positives: Positives | None = None
    margin: Margin | None = None
    bias: Tensor | None = None  # [1], of the student's logits


def whole(features: Tensor | Components) -> Tensor:
    """Returns features [b, D] that may be in the coordinates of principal components."""
    return features.rebuilt() if isinstance(features, Components) else features
