"""The relational distillation term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettclip.losses.view import View


class KdTerm(nn.Module):
    """KL divergence from the student's to the teachers' similarities within the batch.

    Each teacher's rows are turned into probabilities at its own scale, and several teachers' probabilities averaged
    (MobileCLIP, arXiv 2311.17049, equation 1; CRD of CLIP-KD, arXiv 2307.12732). OpenCLIP's and MobileCLIP's code has
    the cross-entropy, which is larger by the teachers' entropy and has the same gradient.
    """

    def forward(self, view: View) -> Tensor:
        """Returns the mean over this rank's rows and both directions, a scalar."""
        divergence = view.student.logits.image.new_zeros(())
        for direction in ("image", "text"):
            targets = [getattr(teacher.logits, direction).softmax(dim=1) for teacher in view.teachers]
            student = getattr(view.student.logits, direction).log_softmax(dim=1)
            divergence = divergence + F.kl_div(student, torch.stack(targets).mean(dim=0), reduction="batchmean")
        return divergence / 2
