from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jettclip.losses.pca import largest_rank, principal_components

SHAPES = [(96, 24), (24, 96), (40, 40)]  # tall, wide, square


def generic(rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows around a mean, with a power law of singular values."""
    left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    rank = min(rows, width)
    singular = torch.arange(1, rank + 1, dtype=torch.float64) ** -0.5
    return (left[:, :rank] * singular @ right[:rank] + 0.1 * torch.randn(width, dtype=torch.float64)).to(dtype)


def rebuilt_from(features: Tensor, components: int) -> Tensor:
    return principal_components(features, components)[0]


def by_svd(features: Tensor, components: int) -> Tensor:
    mean = features.mean(dim=0)
    directions = torch.linalg.svd(features - mean, full_matrices=False).Vh[:components]
    return (features - mean) @ directions.T @ directions + mean


def gradient(function: Callable[[Tensor, int], Tensor], features: Tensor, components: int, direction: Tensor) -> Tensor:
    leaf = features.detach().clone().requires_grad_()
    (function(leaf, components) * direction).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("components", [1, 8, 22])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_value_is_the_svds(dtype: torch.dtype, tolerance: float, rows: int, width: int, components: int) -> None:
    features = generic(rows, width)
    rebuilt = rebuilt_from(features.to(dtype), components)
    assert rebuilt.dtype == dtype
    torch.testing.assert_close(rebuilt.double(), by_svd(features, components), rtol=0, atol=tolerance)


@pytest.mark.parametrize("components", [1, 8, 22])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-4)])
def test_gradient_is_the_svds(dtype: torch.dtype, tolerance: float, rows: int, width: int, components: int) -> None:
    features, direction = generic(rows, width), torch.randn(rows, width, dtype=torch.float64)
    expected = gradient(by_svd, features, components, direction)
    ours = gradient(rebuilt_from, features.to(dtype), components, direction.to(dtype))
    assert float((ours.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(("rows", "width"), [(9, 5), (5, 9)])
def test_gradient_is_the_finite_difference(rows: int, width: int) -> None:
    features = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rebuilt_from(x, 3), (features,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (64, 16), (32, 64)])
def test_gradient_is_right_with_duplicate_rows(rows: int, width: int, dtype: torch.dtype) -> None:
    components = 4
    features = generic(8, width).repeat(rows // 8, 1)  # rank 7, so that many singular values coincide at 0
    direction, step = torch.randn(2, rows, width, dtype=torch.float64)
    ours = gradient(rebuilt_from, features.to(dtype), components, direction.to(dtype))
    assert bool(ours.isfinite().all())
    h = 1e-5
    there, here = (by_svd(features + side * h * step, components) for side in (1, -1))
    difference = ((there - here) * direction).sum() / (2 * h)
    slope = (ours.double() * step).sum()
    scale = ours.double().norm() * step.norm()
    assert float((slope - difference).abs() / scale) < (1e-7 if dtype == torch.float64 else 1e-4)


def test_svds_own_gradient_is_not_finite_with_duplicate_rows() -> None:
    # why there is an analytic gradient at all; if this fails, torch has mended it
    features = generic(8, 64).repeat(8, 1)
    assert not bool(gradient(by_svd, features, 4, torch.randn_like(features)).isfinite().all())


def test_gradient_is_finite_when_kept_directions_are_equally_strong() -> None:
    corners = torch.cat([torch.eye(6), -torch.eye(6)]).double()  # six equal singular values
    features = torch.cat([corners, 0.01 * torch.randn(12, 3, dtype=torch.float64)], dim=1)
    for x in (features, features.repeat(1, 4)):
        assert bool(gradient(rebuilt_from, x, 6, torch.randn_like(x)).isfinite().all())


@pytest.mark.parametrize("distinct", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_is_finite_when_the_batch_has_fewer_components(dtype: torch.dtype, distinct: int) -> None:
    for rows, width in ((48, 16), (24, 48)):
        features = torch.randn(distinct, width, dtype=dtype).repeat(rows // distinct, 1)
        assert bool(gradient(rebuilt_from, features, 8, torch.randn_like(features)).isfinite().all())
        torch.testing.assert_close(rebuilt_from(features, 8), features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "width", "rank"), [(9, 20, 8), (20, 8, 8), (1, 4, 0)])
def test_a_batch_without_more_components_is_kept_as_it_is(rows: int, width: int, rank: int) -> None:
    features = torch.randn(rows, width)
    assert largest_rank(features) == rank
    for components in (rank, rank + 1, 32):
        assert torch.equal(rebuilt_from(features, components), features)
    if rank:
        assert not torch.equal(rebuilt_from(features, rank - 1 or 1), features)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(64, 16), (32, 64), (640, 320)])
def test_the_rank_is_that_of_the_distinct_rows(rows: int, width: int, dtype: torch.dtype) -> None:
    features = torch.randn(rows, width, dtype=dtype)
    assert int(principal_components(features, 4)[1]) == largest_rank(features)
    for distinct in (2, 3, 8):
        repeated = features[torch.arange(rows) % distinct]
        assert int(principal_components(repeated, 4)[1]) == distinct - 1
    uneven = features * torch.logspace(0, -1.5, width, dtype=dtype)  # as of a network that has just been started
    assert int(principal_components(uneven, 4)[1]) == largest_rank(features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("components", [4, 32])
def test_half_precision_is_raised_to_float32(dtype: torch.dtype, components: int) -> None:
    features = generic(32, 16).to(dtype)
    rebuilt = rebuilt_from(features, components)
    assert rebuilt.dtype == torch.float32
    assert torch.equal(rebuilt, rebuilt_from(features.float(), components))


def test_autocast_changes_nothing() -> None:
    features = generic(32, 16).float()
    with torch.autocast("cpu", torch.bfloat16):
        rebuilt = rebuilt_from(features, 4)
        assert (features @ features.T).dtype == torch.bfloat16
    assert torch.equal(rebuilt, rebuilt_from(features, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rows", "width"), [(32, 16), (16, 32)])
def test_features_that_are_not_finite_give_nan_instead_of_an_error(rows: int, width: int, bad: float) -> None:
    features = generic(rows, width).float()
    features[3, 2] = bad
    rebuilt = rebuilt_from(features.requires_grad_(), 4)
    assert bool(rebuilt.isnan().all())
    rebuilt.sum().backward()  # as the trainer does before it looks at the loss
