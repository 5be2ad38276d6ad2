"""Long-CLIP's primary component matching: image features rebuilt from the principal components of their batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jettclip.types import at_least_float32

GAP_FLOOR = 1e-7
"""Smallest gap between a kept and a dropped eigenvalue, as a share of the largest, that the gradient divides by."""

RANK_FLOOR = 10
"""Eigenvalues below so many roundings of the largest are noise; exact zeros came out at up to 4 in float32."""


def principal_components(features: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Rebuilds features from their batch's principal components (arXiv 2403.15378, section 3.3).

    The features are centred, projected on the `components` leading directions of the batch, and the mean is added back;
    the result is not scaled to unit length again. Gradient flows through the directions, too. Computed in float32 at
    least, whatever autocast says.

    It differs from the published SVD only where that fails: the projector is found by an eigendecomposition of the
    smaller of X X^T and X^T X, and its gradient involves only gaps between kept and dropped eigenvalues, so that
    duplicate rows, whose singular values coincide, do no harm.

    Args:
        features: float [n, D].
        components: how many to keep, at least 1; `largest_rank` or more keep everything.

    Returns:
        float [n, D], all NaN if a feature is not finite; and the rank of the centred features, int64 0-D, which
        duplicate rows lower: features of rank `components` or less are kept whole.
    """
    with torch.autocast(features.device.type, enabled=False):
        precise = at_least_float32(features)
        if components >= largest_rank(precise):
            return precise, torch.tensor(largest_rank(precise))
        mean = precise.mean(dim=0)
        centred = precise - mean
        try:
            projected, rank = _ProjectOnComponents.apply(centred, components)
            return projected + mean, rank
        except RuntimeError:
            if bool(centred.isfinite().all()):
                raise
            # eigh refuses NaN, for a wrong reason; passed on, it reaches all ranks, and the trainer names the samples
            return centred * torch.nan, torch.tensor(largest_rank(precise))


def largest_rank(features: Tensor) -> int:
    """Returns how many principal components features [n, D] can have: centring costs the rows one."""
    rows, width = features.shape
    return min(rows - 1, width)


class _ProjectOnComponents(torch.autograd.Function):
    """Y = X V_k V_k^T for centred X, V_k the leading k right singular vectors of X.

    With C = X^T X = V diag(lambda) V^T, the projector's differential has only kept-dropped blocks:

        dP = sum_{p dropped, j kept} v_p^T dC v_j / (lambda_j - lambda_p)  (v_p v_j^T + v_j v_p^T)

    so that, for G = dL/dY and Gamma_pj = lambda_j - lambda_p, with P_perp holding the dropped vectors,

        M = V_perp^T (X^T G + G^T X) V_k,   W = V_perp (M / Gamma),   dL/dX = G P + X (W V_k^T + V_k W^T).

    For n < D the same is done with U, the eigenvectors of X X^T: Y = U_k U_k^T X.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, components: int) -> tuple[Tensor, Tensor]:
        tall = x.shape[0] >= x.shape[1]
        eigenvalues, vectors = torch.linalg.eigh(x.T @ x if tall else x @ x.T)  # ascending
        kept = vectors[:, -components:]
        ctx.save_for_backward(x, eigenvalues, vectors)
        ctx.components, ctx.tall = components, tall
        noise = RANK_FLOOR * torch.finfo(x.dtype).eps * eigenvalues[-1]
        rank = len(eigenvalues) - (eigenvalues <= noise).sum()  # of NaN, all: that is no lack of rank
        ctx.mark_non_differentiable(rank)
        return ((x @ kept) @ kept.T if tall else kept @ (kept.T @ x)), rank

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None]:
        x, eigenvalues, vectors = ctx.saved_tensors
        kept, dropped = vectors[:, -ctx.components :], vectors[:, : -ctx.components]
        floor = torch.finfo(x.dtype).tiny + GAP_FLOOR * eigenvalues[-1].clamp(min=0)
        gaps = (eigenvalues[-ctx.components :] - eigenvalues[: -ctx.components].unsqueeze(1)).clamp(min=floor)
        if ctx.tall:
            grad_kept, z = grad @ kept, x @ kept
            w = dropped @ ((dropped.T @ (x.T @ grad_kept + grad.T @ z)) / gaps)
            return (grad_kept + x @ w) @ kept.T + z @ w.T, None
        kept_x = kept.T @ x
        w = dropped @ ((dropped.T @ (grad @ kept_x.T + x @ (grad.T @ kept))) / gaps)
        return kept @ (kept.T @ grad) + w @ kept_x + kept @ (w.T @ x), None
