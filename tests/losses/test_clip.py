from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from jettclip.losses.clip import ClipTerm
from jettclip.losses.view import Gathered, View
from jettclip.types import Pair
from support import unit_rows

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def leaves(dtype: torch.dtype, rows: int = 12, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    image, text = (unit_rows(rows, width, dtype).requires_grad_() for _ in range(2))
    return image, text, torch.tensor([20.0], dtype=dtype, requires_grad=True)


def view_of(image: Tensor, text: Tensor, scale: Tensor) -> View:
    return View(Gathered(Pair(image, text), Pair(image, text), scale))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_and_gradient_are_openclips(dtype: torch.dtype) -> None:
    image, text, scale = leaves(dtype)
    ours, theirs = ClipTerm()(view_of(image, text, scale)), ClipLoss()(image, text, scale)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])
    inputs = (image, text, scale)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), rtol=0, atol=TOLERANCE[dtype]
    )


def test_label_smoothing_spreads_the_target_over_all_columns() -> None:
    image, text, scale = leaves(torch.float64)
    rows, smoothing = len(image), 0.1
    target = torch.eye(rows, dtype=torch.float64) * (1 - smoothing) + smoothing / rows
    expected = torch.zeros((), dtype=torch.float64)
    for logits in (scale * image @ text.T, scale * text @ image.T):
        log_probability = logits - logits.exp().sum(dim=1, keepdim=True).log()
        expected = expected - (target * log_probability).sum() / rows / 2
    ours = ClipTerm(smoothing)(view_of(image, text, scale))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert not torch.isclose(ours, ClipTerm()(view_of(image, text, scale)))


def test_a_rank_finds_its_own_rows_among_all() -> None:
    image, text, scale = leaves(torch.float64)
    whole = ClipTerm()(view_of(image, text, scale))
    parts = [
        ClipTerm()(View(Gathered(Pair(image[i : i + 4], text[i : i + 4]), Pair(image, text), scale, offset=i)))
        for i in (0, 4, 8)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=0, atol=1e-12)
