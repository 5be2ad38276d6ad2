from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jettclip.models.positions import stretch_positions


def stretched_by_hand(table: list[list[float]], length: int, keep: int, ratio: float) -> list[list[float]]:
    rows = []
    for j in range(length):
        s = float(j) if j < keep else keep + (j - keep) / ratio
        low = min(math.floor(s), len(table) - 2)
        rows.append([a + (s - low) * (b - a) for a, b in zip(table[low], table[low + 1], strict=True)])
    return rows


def table_of(rows: int, width: int = 3) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rows", "length", "keep", "ratio"), [(77, 248, 20, 4.0), (64, 196, 20, 4.0), (77, 154, 1, 153 / 76)]
)
def test_equals_the_closed_form(rows: int, length: int, keep: int, ratio: float) -> None:
    table = table_of(rows)
    expected = torch.tensor(stretched_by_hand(table.tolist(), length, keep, ratio), dtype=torch.float64)
    torch.testing.assert_close(stretch_positions(table, length, keep), expected, rtol=0, atol=1e-12)


def test_what_is_kept_is_kept_to_the_bit() -> None:
    table = table_of(77).float()
    stretched = stretch_positions(table, 248)
    assert torch.equal(stretched[:21], table[:21])
    assert torch.equal(stretched[20::4][:57], table[20:])  # every old row is still there


def test_the_tail_goes_on_with_the_last_slope() -> None:
    table = table_of(77)
    slope = table[76] - table[75]
    for row, quarters in zip(stretch_positions(table, 248)[244:], (0, 1, 2, 3), strict=True):
        torch.testing.assert_close(row, table[76] + quarters / 4 * slope)


def test_differs_from_plain_interpolation() -> None:
    table = table_of(77)
    plain = F.interpolate(table.T[None], 248, mode="linear")[0].T
    assert (stretch_positions(table, 248) - plain).abs().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    table = table_of(77).to(dtype)
    stretched = stretch_positions(table, 248)
    assert stretched.dtype == dtype
    assert torch.equal(stretched, stretch_positions(table.double(), 248).to(dtype))


def test_the_same_length_is_a_copy() -> None:
    table = table_of(77)
    same = stretch_positions(table, 77)
    assert torch.equal(same, table)
    assert same.data_ptr() != table.data_ptr()


def test_jettclips_variant_ends_with_the_last_row() -> None:
    table = table_of(77).float()
    stretched = stretch_positions(table, 248, keep=19, tail="interpolate")
    assert torch.equal(stretched[:20], table[:20])
    assert torch.equal(stretched[19::4], table[19:])  # every old row is still there, the last one as row 247
    assert len(stretched[19::4]) == 58
    between = (table[19:-1] + table[20:]) / 2
    torch.testing.assert_close(stretched[21::4], between)
    assert bool((stretched.amin(dim=0) >= table.amin(dim=0)).all())
    assert bool((stretched.amax(dim=0) <= table.amax(dim=0)).all())


@pytest.mark.parametrize("rows", [77, 64])
def test_both_tails_fill_any_length(rows: int) -> None:
    table = table_of(rows)
    for length in (rows + 1, 100, 248, 1000):
        for keep in (1, 20, rows - 2):
            steps = length - keep
            long = stretch_positions(table, length, keep)
            expected = stretched_by_hand(table.tolist(), length, keep, steps / (rows - keep))
            torch.testing.assert_close(long, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)
            short = stretch_positions(table, length, keep, tail="interpolate")
            expected = stretched_by_hand(table.tolist(), length, keep, (steps - 1) / (rows - keep - 1))
            torch.testing.assert_close(short, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)
            torch.testing.assert_close(short[-1], table[-1])


@pytest.mark.parametrize("tail", ["extrapolate", "interpolate"])
@pytest.mark.parametrize("ratio", [4.0, 5.0, 10.0])
def test_a_given_ratio_spreads_the_rows_by_as_much(ratio: float, tail: str) -> None:
    table = table_of(77)
    if tail == "interpolate" and ratio == 4:
        ratio = 227 / 56  # the least that does not run past the last row
    expected = torch.tensor(stretched_by_hand(table.tolist(), 248, 20, ratio), dtype=torch.float64)
    torch.testing.assert_close(stretch_positions(table, 248, 20, ratio, tail), expected, rtol=0, atol=1e-12)


def test_a_small_ratio_goes_far_past_the_last_row() -> None:
    table = table_of(77)
    stretched = stretch_positions(table, 248, keep=20, ratio=1.0)
    assert torch.equal(stretched[:77], table)
    torch.testing.assert_close(stretched[247], table[76] + 171 * (table[76] - table[75]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "--position-ratio 0 must be positive, such as 4"),
        ({"ratio": -4.0}, "--position-ratio -4 must be positive"),
        (
            {"ratio": 4.0, "tail": "interpolate"},
            "runs past the last of 77 positions at 248 tokens.*give 4.0536 or more",
        ),
        ({"tail": "linear"}, "--position-tail 'linear' must be extrapolate or interpolate"),
    ],
)
def test_refuses_a_ratio_or_tail_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stretch_positions(table_of(77), 248, **options)


@pytest.mark.parametrize("keep", [20, 23, 24])
def test_the_ratio_that_an_error_offers_is_enough(keep: int) -> None:
    table = table_of(77)
    with pytest.raises(ValueError, match="give [0-9.]+ or more") as error:
        stretch_positions(table, 248, keep, ratio=1.0, tail="interpolate")
    offered = float(str(error.value).split("give ")[1].split()[0])
    stretch_positions(table, 248, keep, ratio=offered, tail="interpolate")


@pytest.mark.parametrize(
    ("rows", "length", "keep", "message"),
    [
        (248, 77, 20, "context length of 248 or more"),
        (77, 248, 0, "must be 1 to 75"),
        (77, 248, 76, "must be 1 to 75"),
        (16, 32, 20, "nothing to stretch of 16"),
    ],
)
def test_refuses_what_does_not_fit(rows: int, length: int, keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stretch_positions(table_of(rows), length, keep)


@pytest.mark.parametrize("ratio", [0.0, -4.0, math.nan, math.inf])
def test_a_ratio_is_a_positive_number(ratio: float) -> None:
    with pytest.raises(ValueError, match="--position-ratio .* must be positive, such as 4"):
        stretch_positions(table_of(77), 248, ratio=ratio)
