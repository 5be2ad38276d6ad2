"""What the pairwise functions take and return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """The similarities that a pairwise term is made of, S times the rows by the columns.

    Their width is that of the embeddings, or less: features rebuilt from principal components come as coordinates.
    """

    rows: Tensor  # [b, d] this rank's features of one modality
    columns: Tensor  # [B, d] all ranks' features of the other; column `offset` + i belongs to row i
    scale: Tensor | float  # S = exp(logit_scale), [1]
    offset: int = 0


class Positives(NamedTuple):
    """Who is who: a row and a column belong together if any of their numbers is the same."""

    rows: Tensor  # int64 [b, n]
    columns: Tensor  # int64 [B, n]


class Margin(NamedTuple):
    """What is added to the cosines of negatives: `weight` times the similarity of their captions."""

    weight: float
    rows: Tensor  # [b, D] the captions of the rows, unit length, without gradient
    columns: Tensor  # [B, D]


class SoftmaxValues(NamedTuple):
    """The terms that compare the rows of a similarity matrix and its columns, 0-D each; zero where not wanted."""

    clip: Tensor  # cross-entropy with who belongs to whom
    kd: Tensor  # KL divergence from the teachers' averaged probabilities
    crd: Tensor  # mean of the KL divergences from each teacher's
