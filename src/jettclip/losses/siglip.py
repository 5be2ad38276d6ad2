"""The sigmoid term."""

from __future__ import annotations

from torch import Tensor, nn

from jettclip.losses.pairwise.choice import Pairwise
from jettclip.losses.view import View


class SiglipTerm(nn.Module):
    """Binary cross-entropy of every pair of the batch (SigLIP, arXiv 2303.15343, section 3.2).

    The bias of the logits is the model's, beside its scale: trained, saved, and exported with it.

    Args:
        pairwise: how similarities are computed.
    """

    def __init__(self, pairwise: Pairwise) -> None:
        super().__init__()
        self.pairwise = pairwise

    def forward(self, view: View) -> Tensor:
        """Returns the sum over all columns, and the mean over this rank's rows, a scalar.

        Raises:
            ValueError: if the model has no bias.
        """
        if view.bias is None:
            raise ValueError("the siglip term needs a model with a bias of the logits; call its start_logit_bias(-10)")
        return self.pairwise.sigmoid_term(view.student.block, view.bias, positives=view.positives)
