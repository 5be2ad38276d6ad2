"""The terms of a loss as their papers state them: whole matrices, one process, no thought for speed or memory.

Images x and texts y are [B, D] unit-length rows, S = exp(logit_scale); the tests compute in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Returns the logarithm of the softmax over rows."""
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def unit(rows: Tensor) -> Tensor:
    """Returns rows scaled to unit length."""
    return rows / rows.norm(dim=1, keepdim=True)


def clip(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    smoothing: float = 0.0,
    *,
    belongs: Tensor | None = None,
    margin: float = 0.0,
    captions: Tensor | None = None,
) -> Tensor:
    """Returns the mean of the cross-entropies of rows and columns; `belongs` [B, B] tells the positives."""
    belongs = torch.eye(len(x), dtype=torch.bool) if belongs is None else belongs
    cosines = x @ y.T
    if captions is not None:
        cosines = cosines + margin * (captions @ captions.T).detach() * ~belongs
    value = torch.zeros((), dtype=x.dtype)
    for logits, mine in ((scale * cosines, belongs.to(x)), ((scale * cosines).T, belongs.T.to(x))):
        target = (1 - smoothing) * mine / mine.sum(dim=1, keepdim=True) + smoothing / len(x)
        value = value - (target * log_softmax(logits)).sum() / len(x) / 2
    return value


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, belongs: Tensor | None = None) -> Tensor:
    """Returns the sum over columns, and the mean over rows, of the binary cross-entropies."""
    belongs = torch.eye(len(x), dtype=torch.bool) if belongs is None else belongs
    sign = torch.where(belongs, 1.0, -1.0).to(x)
    return (1 + (-sign * (scale * x @ y.T + bias)).exp()).log().sum() / len(x)


def kd(x: Tensor, y: Tensor, scale: Tensor, teachers: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Returns the divergence from the average of the teachers' probabilities; a teacher is (images, texts, scale)."""
    value = torch.zeros((), dtype=x.dtype)
    for one, other in ((0, 1), (1, 0)):
        student = log_softmax(scale * (x, y)[one] @ (x, y)[other].T)
        target = torch.stack([log_softmax(t[2] * t[one] @ t[other].T).exp() for t in teachers]).mean(dim=0)
        value = value + (target * (target.log() - student)).sum() / len(x) / 2
    return value


def crd(x: Tensor, y: Tensor, scale: Tensor, teachers: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Returns the average of the divergences from each teacher's probabilities."""
    return torch.stack([kd(x, y, scale, [teacher]) for teacher in teachers]).mean()


def icl(
    mapped: Sequence[tuple[Tensor, Tensor]], scale: Tensor, teachers: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """Returns the student's cross-entropies against the teachers' columns; `mapped` is the student for each teacher."""
    values = []
    for (x, y), (images, texts, _) in zip(mapped, teachers, strict=True):
        values.append(-log_softmax(scale * x @ texts.T).diagonal().mean())
        values.append(-log_softmax(scale * y @ images.T).diagonal().mean())
    return torch.stack(values).mean()


def squared(mapped: Sequence[tuple[Tensor, Tensor]], teachers: Sequence[tuple[Tensor, Tensor, float]]) -> list[Tensor]:
    """Returns for each teacher and modality the squared differences of unit-length rows, [B, Dt]."""
    return [
        (mine - unit(theirs)).square()
        for pair, teacher in zip(mapped, teachers, strict=True)
        for mine, theirs in zip(pair, teacher[:2], strict=True)
    ]


def gd(
    mapped: Sequence[tuple[Tensor, Tensor]], scale: Tensor, teachers: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """Returns the squared differences of the gradients of CLIP's loss, which are autograd's."""
    values = []
    for pair, (images, texts, teacher_scale) in zip(mapped, teachers, strict=True):
        ours = torch.autograd.grad(clip(*pair, scale), pair, create_graph=True)
        leaves = [rows.detach().requires_grad_() for rows in (images, texts)]
        theirs = torch.autograd.grad(clip(*leaves, teacher_scale), leaves)
        values.append(sum((a - b).square().mean() for a, b in zip(ours, theirs, strict=True)))
    return torch.stack(values).mean()


def coarse(
    rows: Tensor, components: int = 0, chunks: int = 1, variance: float | None = None, *, detach: bool = False
) -> Tensor:
    """Returns rows rebuilt from the principal components of each of `chunks` parts, by SVD; `detach` fixes those."""
    rebuilt = []
    for part in rows.chunk(chunks):
        mean = part.mean(dim=0)
        _, singular, directions = torch.linalg.svd(part - mean, full_matrices=False)
        directions, kept = directions.detach() if detach else directions, components
        if variance is not None:
            share = singular.detach().square().cumsum(0) / singular.detach().square().sum()
            kept = 1 + int((share < variance).sum())
        rebuilt.append((part - mean) @ directions[:kept].T @ directions[:kept] + mean)
    return torch.cat(rebuilt)
