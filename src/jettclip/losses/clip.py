"""The contrastive term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettclip.losses.view import View


class ClipTerm(nn.Module):
    """Symmetric cross-entropy over the batch (CLIP, arXiv 2103.00020, figure 3).

    Args:
        label_smoothing: share of the target spread evenly over all columns (Long-CLIP: 0.1).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, view: View) -> Tensor:
        """Returns the mean over this rank's rows and both directions, a scalar."""
        logits = view.student.logits
        rows = len(logits.image)
        labels = torch.arange(rows, device=logits.image.device) + view.student.offset
        return (
            F.cross_entropy(logits.image, labels, label_smoothing=self.label_smoothing)
            + F.cross_entropy(logits.text, labels, label_smoothing=self.label_smoothing)
        ) / 2
