"""The terms over the softmax of similarities: contrast, and relational distillation."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from jettclip.losses.pairwise.choice import Pairwise
from jettclip.losses.view import View


class SoftmaxTerms(nn.Module):
    """The terms clip, kd and crd of a view, all over the same similarities, which are therefore computed once.

    - ``clip``: symmetric cross-entropy over the batch (CLIP, arXiv 2103.00020, figure 3).
    - ``kd``: KL divergence from the student's to the teachers' similarities within the batch. Each teacher's rows are
      turned into probabilities at its own scale, and several teachers' probabilities averaged (MobileCLIP, arXiv
      2311.17049, equation 1). OpenCLIP's and MobileCLIP's code has the cross-entropy, which is larger by the teachers'
      entropy and has the same gradient.
    - ``crd``: the mean of the teachers' KL divergences instead (CLIP-KD, arXiv 2307.12732); with one teacher the same,
      with several of the same gradient.

    Positives and margin of the view are for ``clip`` alone.

    Args:
        pairwise: how similarities are computed.
        label_smoothing: share of the clip target spread evenly over all columns (Long-CLIP: 0.1).
    """

    def __init__(self, pairwise: Pairwise, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.pairwise, self.label_smoothing = pairwise, label_smoothing

    def forward(self, view: View, wanted: Collection[str]) -> dict[str, Tensor]:
        """Returns the wanted terms by name: the mean over this rank's rows and both directions, a scalar each."""
        values = self.pairwise.softmax_terms(
            view.student.block,
            [teacher.block for teacher in view.teachers] if set(wanted) & {"kd", "crd"} else [],
            wanted=wanted,
            label_smoothing=self.label_smoothing,
            positives=view.positives,
            margin=view.margin,
        )
        return {name: getattr(values, name) for name in wanted}
