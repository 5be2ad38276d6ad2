"""The sigmoid term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jettclip.losses.pairwise.choice import Pairwise
from jettclip.losses.view import View

BIAS = -10.0
"""To start with: nearly all pairs are negative, and the first steps need not learn that."""


class SiglipTerm(nn.Module):
    """Binary cross-entropy of every pair of the batch (SigLIP, arXiv 2303.15343, section 3.2).

    The bias of the logits is a parameter of the loss, trained and saved with the model.

    Args:
        pairwise: how similarities are computed.
    """

    def __init__(self, pairwise: Pairwise) -> None:
        super().__init__()
        self.pairwise = pairwise
        self.bias = nn.Parameter(torch.tensor([BIAS]))

    def forward(self, view: View) -> Tensor:
        """Returns the sum over all columns, and the mean over this rank's rows, a scalar."""
        return self.pairwise.sigmoid_term(view.student.block, self.bias, positives=view.positives)
