"""The gradient distillation term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jettclip.losses.gather import gather_rows, sum_rows_over_ranks
from jettclip.losses.projection import ProjectedTerm
from jettclip.losses.view import View
from jettclip.types import Pair

TILE_ENTRIES = 2**22
"""Similarities that are computed at a time."""


class GdTerm(ProjectedTerm):
    """Squared difference of the gradients that CLIP's loss has for the student's features and for the teachers'.

    GD of CLIP-KD (arXiv 2307.12732): with L(X, Y, S) the clip term, without smoothing, of all ranks' images X and texts
    Y, it is MSE(dL/dX, dL/dX^t) + MSE(dL/dY, dL/dY^t), mean over rows and columns as in its code. The student's
    features are those projected to the teacher's space, each model has its own scale S, and the mean is taken over
    teachers. It differs from CLIP-KD's code (github.com/winycg/CLIP-KD) in two places: that divides similarities by S
    instead of multiplying them, which its weight of 1e8 makes up for, and it compares the gradients of the two
    directions one by one.

    The term is small, and wants a large weight: between models of unrelated features, both at S = 100, it is about
    5 (S/B)^2 / D, which is 1e-4 for B = 1024 and D = 512, and 6e-6 for B = 4096. With a weight of B^2 D / (5 S^2) it
    starts at about 1.

    Similarities are computed in blocks of rows, and again in the backward, so that memory does not grow with the square
    of the batch; ``--loss-tile`` has no say here.
    """

    def forward(self, view: View) -> Tensor:
        """Returns the mean over this rank's rows and all teachers, a scalar."""
        values = []
        for student, teacher in self.compared(view):
            ours = clip_gradients(student, view.student.scale, view.student.offset)
            with torch.no_grad():
                theirs = clip_gradients(teacher.local, teacher.scale, teacher.offset)
            values.append(F.mse_loss(ours.image, theirs.image) + F.mse_loss(ours.text, theirs.text))
        return torch.stack(values).mean()


def clip_gradients(local: Pair, scale: Tensor | float, offset: int) -> Pair:
    """Returns the gradients of the clip term of all ranks with respect to this rank's features.

    Differentiable once more. With P the softmax of the similarities over rows and Q that over columns, they are
    dL/dX = S / 2B (P + Q - 2) Y and dL/dY = S / 2B (P + Q - 2)^T X.

    Args:
        local: this rank's images and texts [b, D].
        scale: S.
        offset: where this rank's rows begin among all ranks' rows.
    """
    everywhere = gather_rows({"image": local.image, "text": local.text})
    of_images, for_texts = _one_direction(local.image, everywhere["text"], scale, offset)
    of_texts, for_images = _one_direction(local.text, everywhere["image"], scale, offset)
    theirs = sum_rows_over_ranks(torch.cat([for_images, for_texts], dim=1))
    for_images, for_texts = theirs.split(local.image.shape[1], dim=1)
    weight = scale / (2 * len(everywhere["text"]))
    return Pair(weight * (of_images + for_images), weight * (of_texts + for_texts))


def _one_direction(rows: Tensor, columns: Tensor, scale: Tensor | float, offset: int) -> tuple[Tensor, Tensor]:
    """Returns (P - 1) Y for this rank's rows [b, D], and its part of (P - 1)^T X for all columns [B, D]."""
    ours, theirs = [], torch.zeros_like(columns)
    for tile in rows.split(max(1, TILE_ENTRIES // len(columns))):
        tile_ours, tile_theirs = checkpoint(_pulls, tile, columns, scale, use_reentrant=False, preserve_rng_state=False)
        ours.append(tile_ours)
        theirs = theirs + tile_theirs
    own = slice(offset, offset + len(rows))
    before, after = offset, len(columns) - own.stop
    return torch.cat(ours) - columns[own], theirs - F.pad(rows, (0, 0, before, after))


def _pulls(rows: Tensor, columns: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    probabilities = (scale * rows @ columns.T).softmax(dim=1)
    return probabilities @ columns, probabilities.T @ rows
