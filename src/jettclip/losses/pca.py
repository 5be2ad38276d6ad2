"""Long-CLIP's primary component matching: features as the principal components of their batch see them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jettclip.losses.gather import is_distributed, is_first_rank, sum_over_ranks
from jettclip.ranks import rank_and_world_size
from jettclip.types import at_least_float32

GAP_FLOOR = 1e-7
"""Smallest gap between a kept and a dropped eigenvalue, as a share of the largest, that the gradient divides by."""

RANK_FLOOR = 10
"""Eigenvalues below so many roundings of the largest are noise; exact zeros came out at up to 4 in float32."""


class Components(NamedTuple):
    """Features of a batch in the coordinates of its principal components: Z V^T + 1 mu^T, of low rank.

    Products with other rows T need no more than that: (Z V^T + 1 mu^T) T^T = [Z, 1] [T V, T mu]^T, which is k + 1 wide.

    Where a component would be no more than rounding noise, its column is zero in both. Features that are kept whole
    are their own coordinates, with the identity as directions and no mean.
    """

    coordinates: Tensor  # Z [n, k], of this rank's rows
    directions: Tensor  # V [D, k], orthonormal columns, the strongest last
    mean: Tensor  # mu [D]
    rank: Tensor  # of the centred features, int64 0-D: duplicate rows lower it

    @property
    def is_whole(self) -> bool:
        """Tells whether nothing was left out, because so many components hold whatever the batch may be."""
        return self.directions.shape[0] == self.directions.shape[1]

    def rebuilt(self) -> Tensor:
        """Returns the features [n, D] rebuilt from their components, not scaled to unit length again."""
        with torch.autocast(self.mean.device.type, enabled=False):
            return self.coordinates if self.is_whole else torch.addmm(self.mean, self.coordinates, self.directions.T)


def principal_components(
    features: Tensor, components: int, *, variance: float | None = None, detach: bool = False, is_global: bool = False
) -> Components:
    """Finds the principal components of a batch of features, and their coordinates (arXiv 2403.15378, section 3.3).

    What depends on Z V^T and the mean gets its exact gradient, that of Long-CLIP's SVD. It differs from that only where
    that fails: an eigendecomposition of the smaller of X X^T and X^T X finds the projector, and its gradient involves
    only gaps between kept and dropped eigenvalues, so that duplicate rows, whose singular values coincide, do no harm.
    The single columns of Z and V, which are free in sign and in rotation, have no gradient of their own.

    Args:
        features: float [n, D]; computed in float32 at least, whatever autocast says.
        components: how many to keep, at least 1. If a batch cannot have more, the features are kept whole.
        variance: keep instead the fewest components that hold this share of the variance, above 0 and at most 1
            (HiMo-CLIP, arXiv 2511.06653); their number is read from the device.
        detach: take the directions for a constant; coordinates and mean have a gradient all the same.
        is_global: find the components of all ranks' rows, of which each rank has as many, with the gradient of the
            sum of all ranks' losses, as `gather_rows` has it.

    Returns:
        Coordinates of this rank's rows, with directions and mean. All are NaN if a feature is not finite, in global
        scope on every rank; of features that are kept whole, only those of that row.
    """
    with torch.autocast(features.device.type, enabled=False):
        precise = at_least_float32(features)
        is_global = is_global and is_distributed()
        spectrum = _decompose(precise.detach(), is_global)
        if variance is not None:
            components = spectrum.holding(variance)
        width = precise.shape[1]
        if components >= min(spectrum.rows - 1, width):
            whole = torch.eye(width, dtype=precise.dtype, device=precise.device), torch.zeros_like(spectrum.mean)
            return Components(precise, *whole, spectrum.rank)
        coordinates, directions, mean = _Project.apply(precise, spectrum, components, detach)
        return Components(coordinates, directions, mean, spectrum.rank)


class _Spectrum(NamedTuple):
    """The eigenvectors of the smaller of X X^T and X^T X for centred X; a batch of several ranks is always tall."""

    mean: Tensor  # [D]
    centred: Tensor  # X [n, D], this rank's rows
    eigenvalues: Tensor  # [m], ascending, m = D if tall, else n
    vectors: Tensor  # [m, m], in columns
    tall: bool
    rows: int  # of all ranks where the scope is global
    is_global: bool

    @property
    def is_signal(self) -> Tensor:
        """Which eigenvalues are more than rounding noise, bool [m]; of NaN all, which is no lack of rank."""
        return ~(self.eigenvalues <= RANK_FLOOR * torch.finfo(self.mean.dtype).eps * self.eigenvalues[-1])

    @property
    def rank(self) -> Tensor:
        return self.is_signal.sum()

    def holding(self, variance: float) -> int:
        """Returns the fewest components that hold this share of the variance, at least 1."""
        held = self.eigenvalues.flip(0).clamp(min=0).double().cumsum(0)
        return 1 + int((held[:-1] < variance * held[-1]).sum())

    def turn(self, pull: Tensor) -> Tensor:
        """Returns V_perp (V_perp^T pull / Gamma) [m, k], of which a component that is noise counts as dropped."""
        components, scale = pull.shape[1], self.eigenvalues[-1].clamp(min=0)
        gaps = self.eigenvalues[-components:] - self.eigenvalues.unsqueeze(1)
        is_kept = self.is_signal
        is_kept[:-components] = False
        is_felt = is_kept[-components:] & ~is_kept.unsqueeze(1)
        floor = torch.finfo(scale.dtype).tiny + GAP_FLOOR * scale
        return self.vectors @ (self.vectors.T @ pull / gaps.clamp(min=floor)).where(is_felt, 0)


def _decompose(features: Tensor, is_global: bool) -> _Spectrum:
    rows = len(features) * (rank_and_world_size()[1] if is_global else 1)
    mean = _total(features.sum(dim=0), is_global) / rows
    centred = features - mean
    tall = is_global or rows >= features.shape[1]
    gram = _total(centred.T @ centred, is_global) if tall else centred @ centred.T
    is_finite = gram.trace().isfinite()
    # eigh refuses NaN; passed on, it reaches all ranks, and the trainer names the samples
    eigenvalues, vectors = (found.where(is_finite, torch.nan) for found in torch.linalg.eigh(gram.where(is_finite, 0)))
    if is_global:
        # ranks pair each other's coordinates, so they must agree on signs and ties whatever processors they run on
        both = sum_over_ranks(torch.vstack([eigenvalues, vectors]) * is_first_rank())
        eigenvalues, vectors = both[0], both[1:]
    return _Spectrum(mean, centred, eigenvalues, vectors, tall, rows, is_global)


def _total(numbers: Tensor, is_global: bool) -> Tensor:
    return sum_over_ranks(numbers) if is_global else numbers


class _Project(torch.autograd.Function):
    """Z = X V and V, the leading k right singular vectors of centred X, with the mean that was taken off.

    With C = X^T X = V diag(lambda) V^T, what depends on Z V^T feels only kept-dropped blocks of a turn of V:

        dV_j = sum_{p dropped} v_p (v_p^T dC v_j) / (lambda_j - lambda_p)

    so that, for a = dL/dZ, g = dL/dV and Gamma_pj = lambda_j - lambda_p, with V_perp holding the dropped vectors,

        W = V_perp (V_perp^T (X^T a + g) / Gamma),   dL/dX = (a + X W) V^T + Z W^T.

    For n < D the same is done with U, the eigenvectors of X X^T: Z = U sigma and V = X^T U / sigma, which gives

        W = U_perp (U_perp^T (a sigma + X g / sigma) / Gamma),   dL/dX = U (g / sigma + X^T W)^T + W (V sigma)^T.

    The mean takes dL/dmu - V sum_i a_i on every row, over their number. Over ranks, X^T a + g and that are sums.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, spectrum: _Spectrum, components: int, detach: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, centred, eigenvalues, vectors, tall, *_ = spectrum
        is_signal, sigma = spectrum.is_signal[-components:], eigenvalues[-components:].clamp(min=0).sqrt()
        inverse = torch.where(is_signal, 1 / sigma, 0)
        kept = vectors[:, -components:] * is_signal
        directions = kept if tall else centred.T @ kept * inverse
        coordinates = centred @ kept if tall else kept * sigma
        ctx.save_for_backward(*spectrum[:4], coordinates, directions, kept, sigma, inverse)
        ctx.scope, ctx.detach = spectrum[4:], detach
        if detach:
            ctx.mark_non_differentiable(directions)
        return coordinates, directions, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, g: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        *found, z, v, kept, sigma, inverse = ctx.saved_tensors
        spectrum = _Spectrum(*found, *ctx.scope)
        centred, on_mean = spectrum.centred, (grad_mean - v @ a.sum(dim=0)).unsqueeze(1)
        if ctx.detach:
            left, right, on_mean = a, v, _total(on_mean, spectrum.is_global)
        elif spectrum.tall:
            sums = _total(torch.hstack([centred.T @ a + g, on_mean]), spectrum.is_global)
            w, on_mean = spectrum.turn(sums[:, :-1]), sums[:, -1:]
            left, right = torch.hstack([a + centred @ w, z]), torch.hstack([v, w])
        else:
            w = spectrum.turn(a * sigma + centred @ (g * inverse))
            left, right = torch.hstack([kept, w]), torch.hstack([g * inverse + centred.T @ w, v * sigma])
        return torch.addmm(on_mean.T / spectrum.rows, left, right.T), None, None, None
