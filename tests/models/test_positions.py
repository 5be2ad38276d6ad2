from __future__ import annotations

import math

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
