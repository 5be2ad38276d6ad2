from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jettclip.losses.gather import gather_rows, row_offset
from jettclip.losses.pca import Components, principal_components
from support import run_ranks, unit_rows

SHAPES = [(96, 24), (24, 96), (40, 40)]  # tall, wide, square
Logits = Callable[[Tensor, Tensor, int], Tensor]


def generic(rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows around a mean, with a power law of singular values."""
    left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    rank = min(rows, width)
    singular = torch.arange(1, rank + 1, dtype=torch.float64) ** -0.5
    return (left[:, :rank] * singular @ right[:rank] + 0.1 * torch.randn(width, dtype=torch.float64)).to(dtype)


def by_svd(features: Tensor, components: int) -> Tensor:
    mean = features.mean(dim=0)
    directions = torch.linalg.svd(features - mean, full_matrices=False).Vh[:components]
    return (features - mean) @ directions.T @ directions + mean


def svd_logits(features: Tensor, texts: Tensor, components: int) -> Tensor:
    return by_svd(features, components) @ texts.T


def rebuilt_logits(features: Tensor, texts: Tensor, components: int) -> Tensor:
    return principal_components(features, components).rebuilt() @ texts.T


def low_rank(found: Components, texts: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.cat([found.coordinates, torch.ones_like(found.coordinates[:, :1])], dim=1)
    return rows, torch.cat([texts @ found.directions, (texts @ found.mean).unsqueeze(1)], dim=1)


def low_rank_logits(features: Tensor, texts: Tensor, components: int) -> Tensor:
    rows, columns = low_rank(principal_components(features, components), texts)
    return rows @ columns.T


def slopes(logits: Logits, features: Tensor, texts: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Returns the gradients of a cross-entropy of rows with respect to features and texts."""
    leaves = [rows.detach().clone().requires_grad_() for rows in (features, texts)]
    torch.logsumexp(5 * logits(leaves[0], leaves[1], components), dim=1).mean().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    return leaves[0].grad, leaves[1].grad


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm())


FORMS = pytest.mark.parametrize("logits", [rebuilt_logits, low_rank_logits])
SIDES = pytest.mark.parametrize(("rows", "width"), [(64, 16), (32, 64)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@FORMS
@pytest.mark.parametrize("components", [1, 8, 22])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_value_and_gradient_are_the_svds(
    dtype: torch.dtype, tolerance: float, rows: int, width: int, components: int, logits: Logits
) -> None:
    features, texts = generic(rows, width), unit_rows(rows + 7, width, torch.float64)
    ours = logits(features.to(dtype), texts.to(dtype), components)
    assert ours.dtype == dtype
    assert error(ours, svd_logits(features, texts, components)) < tolerance
    expected = slopes(svd_logits, features, texts, components)
    for mine, wanted in zip(slopes(logits, features.to(dtype), texts.to(dtype), components), expected, strict=True):
        assert error(mine, wanted) < tolerance


@pytest.mark.parametrize(("rows", "width"), [(9, 5), (5, 9)])
def test_gradient_is_the_finite_difference(rows: int, width: int) -> None:
    features = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(4, width, dtype=torch.float64, requires_grad=True)
    for logits in (rebuilt_logits, low_rank_logits):
        assert torch.autograd.gradcheck(lambda x, t, logits=logits: logits(x, t, 3), (features, texts))


@SIDES
def test_coordinates_are_those_of_orthonormal_directions(rows: int, width: int) -> None:
    features = generic(rows, width)
    found = principal_components(features, 5)
    torch.testing.assert_close(found.directions.T @ found.directions, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(found.coordinates, (features - features.mean(dim=0)) @ found.directions)
    torch.testing.assert_close(found.mean, features.mean(dim=0))


@FORMS
@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (64, 16), (32, 64)])
def test_gradient_is_right_with_duplicate_rows(rows: int, width: int, dtype: torch.dtype, logits: Logits) -> None:
    components = 4
    features = generic(8, width).repeat(rows // 8, 1)  # rank 7, so that many singular values coincide at 0
    texts, step = unit_rows(5, width, torch.float64), torch.randn(rows, width, dtype=torch.float64)
    ours, _ = slopes(logits, features.to(dtype), texts.to(dtype), components)
    assert bool(ours.isfinite().all())
    h = 1e-5
    there, here = (svd_logits(features + side * h * step, texts, components) for side in (1, -1))
    difference = (torch.logsumexp(5 * there, dim=1) - torch.logsumexp(5 * here, dim=1)).mean() / (2 * h)
    slope = (ours.double() * step).sum()
    assert float((slope - difference).abs() / (ours.double().norm() * step.norm())) < (
        1e-7 if dtype == torch.float64 else 1e-4
    )


HARD: dict[str, Callable[[], Tensor]] = {
    "duplicates": lambda: generic(8, 64).repeat(8, 1),
    "all equal": lambda: generic(1, 16).repeat(32, 1),
    "all equal, wide": lambda: generic(1, 48).repeat(32, 1),
    "one row": lambda: generic(1, 16),
    "zeros": lambda: torch.zeros(32, 16),
    "zeros, wide": lambda: torch.zeros(12, 16),
    "rank below k": lambda: generic(3, 16).repeat(16, 1),
    "rank below k, wide": lambda: generic(3, 48).repeat(8, 1),
}


@pytest.mark.parametrize("case", HARD)
@DTYPES
def test_gradient_is_finite_where_the_svds_is_not(dtype: torch.dtype, case: str) -> None:
    features = HARD[case]().to(dtype)
    texts = unit_rows(9, features.shape[1], dtype)
    plain, _ = slopes(lambda x, t, _: x @ t.T, features, texts, 0)
    for logits in (rebuilt_logits, low_rank_logits):
        ours = logits(features, texts, 4)
        torch.testing.assert_close(ours, svd_logits(features, texts, 4), rtol=0, atol=1e-5)
        for gradient in slopes(logits, features, texts, 4):
            assert bool(gradient.isfinite().all())
        assert slopes(logits, features, texts, 4)[0].norm() < 2 * plain.norm()
    if not case.startswith("rank below k"):  # there the SVD's is finite if rounding makes zeros differ, and wrong
        # why there is an analytic gradient at all; if this fails, torch has mended it
        assert not bool(slopes(svd_logits, features, texts, 4)[0].isfinite().all())


@SIDES
def test_components_that_are_noise_are_zero(rows: int, width: int) -> None:
    features = generic(3, width).float().repeat(rows // 3, 1)
    found = principal_components(features, 8)
    assert int(found.rank) == 2
    for part in (found.coordinates, found.directions):
        assert torch.equal(part[:, :-2], torch.zeros_like(part[:, :-2]))
        assert bool((part[:, -2:].norm(dim=0) > 0.1).all())


@pytest.mark.parametrize("components", [3, 6])  # the third and fourth cannot be told apart; the sixth and seventh can
def test_gradient_is_finite_when_directions_are_equally_strong(components: int) -> None:
    corners = torch.cat([torch.eye(6), -torch.eye(6)]).double()  # six equal singular values
    features = torch.cat([corners, torch.zeros(12, 3)], dim=1)
    for x in (features, features.repeat(1, 4)):
        grads = slopes(low_rank_logits, x, unit_rows(5, x.shape[1], torch.float64), components)
        assert all(bool(grad.isfinite().all()) for grad in grads)


@FORMS
@pytest.mark.parametrize(("rows", "width", "largest"), [(9, 20, 8), (20, 8, 8), (1, 4, 0)])
def test_a_batch_without_more_components_is_kept_as_it_is(rows: int, width: int, largest: int, logits: Logits) -> None:
    features, texts = torch.randn(rows, width), torch.randn(3, width)
    for components in (largest, largest + 1, 32):
        found = principal_components(features, max(components, 1))
        assert found.is_whole
        assert found.rebuilt() is found.coordinates
        assert torch.equal(found.coordinates, features)
        assert int(found.rank) == largest
        assert torch.equal(logits(features, texts, max(components, 1)), features @ texts.T)
        assert torch.equal(
            slopes(logits, features, texts, 32)[0], slopes(lambda x, t, _: x @ t.T, features, texts, 0)[0]
        )
    if largest:
        assert not principal_components(features, largest - 1).is_whole


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(64, 16), (32, 64), (640, 320)])
def test_the_rank_is_that_of_the_distinct_rows(rows: int, width: int, dtype: torch.dtype) -> None:
    features, largest = torch.randn(rows, width, dtype=dtype), min(rows - 1, width)
    assert int(principal_components(features, 4).rank) == largest
    for distinct in (2, 3, 8):
        repeated = features[torch.arange(rows) % distinct]
        assert int(principal_components(repeated, 4).rank) == distinct - 1
    uneven = features * torch.logspace(0, -1.5, width, dtype=dtype)  # as of a network that has just been started
    assert int(principal_components(uneven, 4).rank) == largest


@SIDES
@pytest.mark.parametrize("variance", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_variance_keeps_the_fewest_components_that_hold_it(rows: int, width: int, variance: float) -> None:
    features = generic(rows, width)
    held = torch.linalg.svdvals(features - features.mean(dim=0)).square()
    found = principal_components(features, 1, variance=variance)
    kept = found.coordinates.shape[1]
    if variance < 1:
        assert held[: kept - 1].sum() < variance * held.sum() <= held[:kept].sum()
        assert torch.equal(found.coordinates, principal_components(features, kept).coordinates)
    torch.testing.assert_close(found.rebuilt(), by_svd(features, kept))


def test_variance_of_nothing_keeps_one_component() -> None:
    features = HARD["zeros"]().double()
    found = principal_components(features, 4, variance=0.9)
    assert found.coordinates.shape == (32, 1)
    torch.testing.assert_close(found.rebuilt(), features)


@SIDES
def test_detached_directions_are_a_constant(rows: int, width: int) -> None:
    features, texts = generic(rows, width), unit_rows(5, width, torch.float64)
    constant = principal_components(features, 4).directions

    def detached(x: Tensor, t: Tensor, k: int) -> Tensor:
        found = principal_components(x, k, detach=True)
        assert not found.directions.requires_grad
        left, right = low_rank(found, t)
        return left @ right.T

    def plain(x: Tensor, t: Tensor, _: int) -> Tensor:
        return ((x - x.mean(dim=0)) @ constant @ constant.T + x.mean(dim=0)) @ t.T

    torch.testing.assert_close(slopes(detached, features, texts, 4), slopes(plain, features, texts, 4))
    assert error(slopes(detached, features, texts, 4)[0], slopes(svd_logits, features, texts, 4)[0]) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("components", [4, 32])
def test_half_precision_is_raised_to_float32(dtype: torch.dtype, components: int) -> None:
    features = generic(32, 16).to(dtype)
    rebuilt = principal_components(features, components).rebuilt()
    assert rebuilt.dtype == torch.float32
    assert torch.equal(rebuilt, principal_components(features.float(), components).rebuilt())


def test_autocast_changes_nothing() -> None:
    features = generic(32, 16).float()
    with torch.autocast("cpu", torch.bfloat16):
        rebuilt = principal_components(features, 4).rebuilt()
        assert (features @ features.T).dtype == torch.bfloat16
    assert torch.equal(rebuilt, principal_components(features, 4).rebuilt())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("variance", [None, 0.9])
@SIDES
def test_features_that_are_not_finite_give_nan_instead_of_an_error(
    rows: int, width: int, variance: float | None, bad: float
) -> None:
    features = generic(rows, width).float()
    features[3, 2] = bad
    found = principal_components(features.requires_grad_(), 4, variance=variance)
    assert bool(found.rebuilt().isnan().all())
    assert bool(found.coordinates.isnan().all())
    found.rebuilt().sum().backward()  # as the trainer does before it looks at the loss


ROWS, WIDTH, KEPT = 12, 20, 4  # one process then takes the side of the rows, several that of the width


def everywhere(case: str) -> tuple[Tensor, Tensor]:
    """Returns 12 features, which divide among 1, 2 and 3 ranks, and as many texts."""
    generator = torch.Generator().manual_seed(3)
    features, texts = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return features[torch.arange(ROWS) % {"generic": ROWS, "duplicates": 6, "rank below k": 3}[case]], texts


def contrast(rows: Tensor, columns: Tensor, offset: int = 0) -> Tensor:
    labels = torch.arange(len(rows)) + offset
    return torch.nn.functional.cross_entropy(2 * rows @ columns.T, labels)


def on_a_rank(world_size: int, case: str, detach: bool) -> list[dict[str, Any]]:
    n = ROWS // world_size
    offset = row_offset(n)
    if offset:  # another processor may find other signs
        found_here = torch.linalg.eigh
        torch.linalg.eigh = lambda gram: (found_here(gram)[0], -found_here(gram)[1])
    results = []
    for is_low_rank in (False, True):
        features, texts = (rows[offset : offset + n].clone().requires_grad_() for rows in everywhere(case))
        found = principal_components(features, KEPT, is_global=True, detach=detach)
        rows, columns = low_rank(found, texts) if is_low_rank else (found.rebuilt(), texts)
        gathered = gather_rows({"rows": rows, "columns": columns})
        loss = (contrast(rows, gathered["columns"], offset) + contrast(columns, gathered["rows"], offset)) / 2
        loss.backward()
        results.append({
            "loss": loss.detach(), "features": features.grad / world_size, "texts": texts.grad / world_size,
            "rebuilt": found.rebuilt().detach(), "directions": found.directions.detach(), "rank": found.rank,
        })  # fmt: skip
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("case", "detach"), [("generic", False), ("generic", True), ("duplicates", False), ("rank below k", False)]
)
def test_global_components_are_those_of_all_ranks_rows(case: str, detach: bool, world_size: int) -> None:
    features, texts = (rows.requires_grad_() for rows in everywhere(case))
    whole = principal_components(features, KEPT, detach=detach).rebuilt()
    loss = (contrast(whole, texts) + contrast(texts, whole)) / 2
    loss.backward()
    for results in zip(*run_ranks(world_size, on_a_rank, world_size, case, detach), strict=True):
        together = {name: torch.cat([result[name] for result in results]) for name in ("rebuilt", "features", "texts")}
        torch.testing.assert_close(together["rebuilt"], by_svd(features, KEPT).detach())
        torch.testing.assert_close(together["features"], features.grad)
        torch.testing.assert_close(together["texts"], texts.grad)
        torch.testing.assert_close(sum(result["loss"] for result in results) / world_size, loss.detach())
        for result in results:
            assert torch.equal(result["directions"], results[0]["directions"])
            assert int(result["rank"]) == {"generic": ROWS - 1, "duplicates": 5, "rank below k": 2}[case]


def strange_on_a_rank(bad: float, variance: float | None) -> list[Tensor]:
    features = everywhere("generic")[0].chunk(2)[row_offset(1)].clone()
    features[0, 0] += bad * row_offset(1)  # on the second rank alone
    found = principal_components(features.requires_grad_(), KEPT, is_global=True, variance=variance)
    found.rebuilt().sum().backward()
    return [found.rebuilt().detach(), features.grad]


@pytest.mark.parametrize("variance", [None, 0.5])
def test_what_is_not_finite_on_one_rank_is_nan_on_all(variance: float | None) -> None:
    for rebuilt, gradient in run_ranks(2, strange_on_a_rank, float("inf"), variance):
        assert bool(rebuilt.isnan().all())
        assert bool(gradient.isnan().all())
    kept = {len(rebuilt) for rebuilt, _ in run_ranks(2, strange_on_a_rank, 1.0, variance)}
    assert kept == {ROWS // 2}
