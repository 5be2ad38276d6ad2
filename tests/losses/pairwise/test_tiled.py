from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loss_formulas as formulas
from jettclip.losses.gather import gather_ids, gather_rows, row_offset
from jettclip.losses.pairwise import tiled, tiles
from jettclip.losses.pairwise.block import Block, Margin, Positives
from support import run_ranks, unit_rows

WIDTH = 10
TEACHERS = ((6, 60.0), (12, 100.0))  # width and scale
WEIGHTS = {"clip": 0.4, "kd": 1.5, "crd": 0.3}
VALUE, GRADIENT = 1e-6, 1e-5  # tolerances of float32, relative


class Case:
    """Features and options of a global batch, in float64."""

    def __init__(
        self,
        rows: int,
        *,
        wanted: tuple[str, ...] = ("clip",),
        smoothing: float = 0.0,
        teachers: int = 0,
        has_positives: bool = False,
        margin: float = 0.0,
        scale: float = 30.0,
    ) -> None:
        self.wanted, self.smoothing, self.margin = wanted, smoothing, margin
        self.rows, self.columns, self.captions = (unit_rows(rows, WIDTH, torch.float64) for _ in range(3))
        self.scale = torch.tensor([scale], dtype=torch.float64)
        self.teachers = [
            (unit_rows(rows, width, torch.float64), unit_rows(rows, width, torch.float64), teacher_scale)
            for width, teacher_scale in TEACHERS[:teachers]
        ]
        # a third of the images, and of the captions, are not unique
        self.ids = torch.randint(rows * 2 // 3 + 1, (rows, 2)) if has_positives else None
        belongs = torch.eye(rows, dtype=torch.bool)
        self.belongs = belongs if self.ids is None else (self.ids[:, None, :] == self.ids[None, :, :]).any(dim=2)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        return [part.to(dtype).clone().requires_grad_() for part in (self.rows, self.columns, self.scale)]

    def expected(self) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Returns the values, and the gradient of their weighted sum, by the formulas."""
        leaves = self.leaves(torch.float64)
        options = {"belongs": self.belongs, "margin": self.margin, "captions": self.captions}
        formula = {
            "clip": lambda: formulas.clip(*leaves, self.smoothing, **options),
            "kd": lambda: formulas.kd(*leaves, self.teachers),
            "crd": lambda: formulas.crd(*leaves, self.teachers),
        }
        values = {name: formula[name]() for name in self.wanted}
        return values, torch.autograd.grad(weighted(values), leaves)

    def got(self, dtype: torch.dtype, tile: int) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Returns the same of the tiled terms, of this rank's rows, with the columns gathered from all."""
        leaves = self.leaves(dtype)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        count = len(self.rows) // world_size
        offset, own = rank * count, slice(rank * count, (rank + 1) * count)
        assert offset == row_offset(count)

        def block(rows: Tensor, columns: Tensor, scale: Tensor | float) -> Block:
            return Block(rows[own], gather_rows({"columns": columns[own]})["columns"], scale, offset)

        result = tiled.softmax_terms(
            block(*leaves),
            [block(u.to(dtype), w.to(dtype), scale) for u, w, scale in self.teachers],
            wanted=self.wanted,
            label_smoothing=self.smoothing,
            positives=None if self.ids is None else Positives(self.ids[own], gather_ids(self.ids[own])),
            margin=Margin(self.margin, self.captions[own], self.captions) if self.margin else None,
            tile=tile,
        )
        values = {name: getattr(result, name) for name in self.wanted}
        assert all(not getattr(result, name).any() for name in set(WEIGHTS) - set(self.wanted))
        return values, torch.autograd.grad(weighted(values), leaves)

    def check(self, values: dict[str, Tensor], gradients: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        expected_values, expected_gradients = self.expected()
        exact = dtype == torch.float64
        for name, expected in expected_values.items():
            assert values[name].shape == ()
            assert values[name].dtype == dtype
            assert distance(values[name], expected) < (1e-12 if exact else VALUE), name
        for which, got, expected in zip(("rows", "columns", "scale"), gradients, expected_gradients, strict=True):
            assert got.dtype == dtype
            assert distance(got, expected) < (1e-11 if exact else GRADIENT), which


def weighted(values: dict[str, Tensor]) -> Tensor:
    return sum((WEIGHTS[name] * value for name, value in values.items()), torch.zeros(()))


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).detach().norm() / expected.detach().norm())


CASES: dict[str, dict[str, Any]] = {
    "clip": {},
    "label smoothing": {"smoothing": 0.1},
    "kd": {"wanted": ("kd",), "teachers": 1},
    "kd of two": {"wanted": ("kd",), "teachers": 2},
    "crd of two": {"wanted": ("crd",), "teachers": 2},
    "all": {"wanted": ("clip", "kd", "crd"), "teachers": 2, "smoothing": 0.1},
    "positives": {"has_positives": True},
    "smoothed positives beside kd": {
        "has_positives": True, "smoothing": 0.1, "wanted": ("clip", "kd"), "teachers": 1,
    },
    "margin": {"margin": 0.3},
    "margin, positives and smoothing beside kd and crd": {
        "margin": 0.3, "has_positives": True, "smoothing": 0.1, "wanted": ("clip", "kd", "crd"), "teachers": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [0, 1, 8, 100])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_formulas(name: str, tile: int, dtype: torch.dtype) -> None:
    case = Case(36 + 1, **CASES[name])
    case.check(*case.got(dtype, tile), dtype)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_ranks_share_one_batch(name: str, world_size: int) -> None:
    case = Case(30, **CASES[name])
    results = run_ranks(world_size, lambda: case.got(torch.float64, 4))
    values = {key: torch.stack([value[key].detach() for value, _ in results]).mean() for key in case.wanted}
    # what DistributedDataParallel makes of parameters' gradients: each rank has its own rows' and columns'
    gradients = [torch.stack(parts).mean(dim=0) for parts in zip(*(parts for _, parts in results), strict=True)]
    case.check(values, tuple(gradients), torch.float64)


@pytest.mark.parametrize("name", ["clip", "all", "margin"])
def test_one_row_has_nothing_to_tell_apart(name: str) -> None:
    case = Case(1, **CASES[name])
    values, gradients = case.got(torch.float32, 0)
    assert all(abs(float(value.detach())) < 1e-6 for value in values.values())
    assert all(float(gradient.abs().max()) < 1e-4 for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [3, 0])
def test_opposed_features_at_a_large_scale_do_not_underflow(name: str, tile: int) -> None:
    case = Case(12, scale=100.0, **CASES[name])
    case.columns[::2] = -case.rows[::2]
    case.columns[1::3] = case.rows[1::3]
    for rows, columns, _ in case.teachers:
        columns[1::2] = -rows[1::2]
    similar = 100.0 * (case.rows @ case.columns.T).float()
    assert float((similar.amin(dim=1) - similar.amax(dim=1)).exp().amin()) == 0
    assert not bool((similar.amax() + similar.T.sub(similar.amax()).exp().sum(dim=1).log()).isfinite().all())
    case.check(*case.got(torch.float32, tile), torch.float32)


def test_low_rank_similarities_may_be_of_rows_that_are_not_of_unit_length() -> None:
    case = Case(20, **CASES["all"])
    case.rows = torch.cat([0.3 * torch.randn(20, 4, dtype=torch.float64), torch.ones(20, 1, dtype=torch.float64)], 1)
    case.columns = torch.randn(20, 5, dtype=torch.float64) / 3
    case.check(*case.got(torch.float32, 6), torch.float32)


def test_half_precision_is_raised_and_autocast_has_no_effect() -> None:
    case = Case(20, **CASES["all"])
    case.rows, case.columns = (part.bfloat16().double() for part in (case.rows, case.columns))
    rows, columns, _ = leaves = [part.bfloat16().requires_grad_() for part in (case.rows, case.columns, case.scale)]
    scale = case.scale.float().requires_grad_()
    teachers = [Block(u.float(), w.float(), teacher_scale) for u, w, teacher_scale in case.teachers]
    with torch.autocast("cpu", torch.bfloat16):
        result = tiled.softmax_terms(
            Block(rows, columns, scale), teachers, wanted=case.wanted, label_smoothing=0.1, tile=6
        )
        values = result._asdict()
        gradients = torch.autograd.grad(weighted(values), [*leaves[:2], scale])
    expected_values, expected_gradients = case.expected()
    for name, expected in expected_values.items():
        assert distance(values[name], expected) < VALUE
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert distance(gradients[2], expected_gradients[2]) < GRADIENT
    for got, expected in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert distance(got, expected) < 4e-3  # they end in bfloat16


def test_a_scale_may_be_a_number_and_features_constant() -> None:
    case = Case(12)
    rows, columns, scale = case.leaves(torch.float64)
    fixed = tiled.softmax_terms(Block(rows, columns.detach(), scale.item()), wanted=["clip"], tile=5).clip
    learned = tiled.softmax_terms(Block(rows, columns, scale), wanted=["clip"], tile=5).clip
    assert torch.equal(fixed, learned)
    assert torch.equal(*(torch.autograd.grad(value, rows)[0] for value in (fixed, learned)))
    with torch.no_grad():
        assert torch.equal(tiled.softmax_terms(Block(rows, columns, scale), wanted=["clip"], tile=5).clip, fixed)


def test_nan_reaches_the_value_and_raises_nothing() -> None:
    rows, columns, scale = Case(9).leaves(torch.float32)
    rows = rows.detach()
    rows[4, 2] = math.nan
    assert bool(tiled.softmax_terms(Block(rows, columns, scale), wanted=["clip"], tile=2).clip.isnan())


def test_the_sum_of_all_similarities_is_as_precise_as_float64() -> None:
    rows = torch.zeros(37, 4)
    rows[:, 0] = 1
    value = tiled.softmax_terms(Block(rows, rows, 1e4 / 3), wanted=["clip"], label_smoothing=0.5).clip
    torch.testing.assert_close(value.item(), math.log(37), rtol=1e-6, atol=0)  # the difference of numbers of 1e3


def numbers_sent_on_a_rank(case: Case) -> list[tuple[int, ...]]:
    sent, reduce = [], dist.all_reduce

    def counted(numbers: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        sent.append(tuple(numbers.shape))
        reduce(numbers, operation)

    dist.all_reduce = counted
    case.got(torch.float64, 4)
    return sent


@pytest.mark.parametrize(
    ("name", "maxima", "sums"),
    [
        ("clip", 1, 3),  # of exponentials, of targets, and of how many those are
        ("kd", 2, 3),  # of exponentials of both, and of those by the difference
        ("all", 3, 3 + 2 + 2),
        ("margin, positives and smoothing beside kd and crd", 4, 4 + 2 + 2),
    ],
)
def test_ranks_exchange_no_more_than_is_used(name: str, maxima: int, sums: int) -> None:
    case = Case(30, **CASES[name])
    assert run_ranks(2, numbers_sent_on_a_rank, case) == [[(maxima, 30), (sums, 30)]] * 2


class Largest(TorchDispatchMode):
    """Watches for the most elements of any tensor that is made or kept."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.untyped_storage().nbytes() // part.element_size())
        return result


@pytest.mark.parametrize("function", ["softmax_terms", "one_way", "sigmoid_term"])
@pytest.mark.parametrize("is_auto", [False, True])
def test_no_tensor_grows_with_the_square_of_the_batch(
    is_auto: bool, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, tile = 256, 8
    if is_auto:
        monkeypatch.setitem(tiles.TILE_BYTES, "cpu", tile * batch * 4)
        monkeypatch.setattr(tiles, "FEWEST_ROWS", 1)
    asked = 0 if is_auto else tile
    case = Case(batch, **CASES["margin, positives and smoothing beside kd and crd"])
    case.teachers = [(u.float(), w.float(), scale) for u, w, scale in case.teachers]
    block, positives = Block(*case.leaves(torch.float32)), Positives(case.ids, case.ids)
    with Largest() as largest:
        if function == "softmax_terms":
            case.got(torch.float32, asked)
        elif function == "one_way":
            tiled.one_way(block, tile=asked).backward()
        else:
            tiled.sigmoid_term(block, torch.tensor([-10.0]), positives=positives, tile=asked).backward()
    assert largest.elements == (5 if function == "softmax_terms" else 2) * tile * batch  # the buffers


def one_way_formula(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    return -formulas.log_softmax(scale * rows @ columns.T).diagonal().mean()


def row_terms(case: Case, dtype: torch.dtype, tile: int) -> dict[str, tuple[Tensor, tuple[Tensor, ...]]]:
    """Returns the terms of this rank's rows, and their gradients."""
    rows, columns, scale = leaves = case.leaves(dtype)
    bias = torch.tensor([-10.0], dtype=dtype, requires_grad=True)
    count = len(rows) // (dist.get_world_size() if dist.is_initialized() else 1)
    own = slice(row_offset(count), row_offset(count) + count)
    positives = None if case.ids is None else Positives(case.ids[own], case.ids)
    block = Block(rows[own], gather_rows({"columns": columns[own]})["columns"], scale, own.start)
    one_way, sigmoid = tiled.one_way(block, tile=tile), tiled.sigmoid_term(block, bias, positives=positives, tile=tile)
    return {
        "one way": (one_way.detach(), torch.autograd.grad(one_way, leaves)),
        "sigmoid": (sigmoid.detach(), torch.autograd.grad(sigmoid, [*leaves, bias])),
    }


def check_row_terms(case: Case, got: dict[str, tuple[Tensor, tuple[Tensor, ...]]], dtype: torch.dtype) -> None:
    leaves = case.leaves(torch.float64)
    bias = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
    exact = dtype == torch.float64
    for name, expected, inputs in (
        ("one way", one_way_formula(*leaves), leaves),
        ("sigmoid", formulas.siglip(*leaves, bias, case.belongs), [*leaves, bias]),
    ):
        value, gradients = got[name]
        assert value.dtype == dtype
        assert distance(value, expected) < (1e-12 if exact else VALUE), name
        for one, other in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
            assert one.dtype == dtype
            assert distance(one, other) < (1e-11 if exact else GRADIENT), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [0, 1, 8, 100])
@pytest.mark.parametrize("has_positives", [False, True])
def test_terms_of_rows_are_the_formulas(has_positives: bool, tile: int, dtype: torch.dtype) -> None:
    case = Case(37, has_positives=has_positives)
    check_row_terms(case, row_terms(case, dtype, tile), dtype)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("has_positives", [False, True])
def test_ranks_share_one_batch_of_rows(has_positives: bool, world_size: int) -> None:
    case = Case(30, has_positives=has_positives)
    results = run_ranks(world_size, lambda: row_terms(case, torch.float64, 4))
    means = {
        name: (
            torch.stack([result[name][0] for result in results]).mean(),
            tuple(torch.stack(parts).mean(dim=0) for parts in zip(*(one[name][1] for one in results), strict=True)),
        )
        for name in results[0]
    }
    check_row_terms(case, means, torch.float64)


def test_terms_of_rows_without_gradient_are_the_same() -> None:
    rows, columns, scale = Case(12).leaves(torch.float32)
    bias = torch.tensor([-10.0])
    with_gradient = tiled.one_way(Block(rows, columns, scale)), tiled.sigmoid_term(Block(rows, columns, scale), bias)
    with torch.no_grad():
        without = tiled.one_way(Block(rows, columns, scale)), tiled.sigmoid_term(Block(rows, columns, scale), bias)
    assert with_gradient == without
