from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import loss_formulas as formulas
from jettclip.losses import gd
from jettclip.losses.gd import GdTerm, clip_gradients
from jettclip.losses.view import Matches, Parts, View
from jettclip.types import Pair
from support import run_ranks, unit_rows

ROWS, WIDTH = 12, 5
SCALE = torch.tensor([20.0], dtype=torch.float64)


def pair_of(width: int = WIDTH) -> Pair:
    torch.manual_seed(width)
    return Pair(*(unit_rows(ROWS, width, torch.float64).requires_grad_() for _ in range(2)))


def exact_gradients(pair: Pair) -> tuple[Tensor, ...]:
    return torch.autograd.grad(formulas.clip(*pair, SCALE), pair)


@pytest.mark.parametrize("entries", [2**22, 3 * ROWS, 1])
def test_the_gradients_are_those_of_autograd_in_tiles_of_any_size(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gd, "TILE_ENTRIES", entries)
    pair = pair_of()
    torch.testing.assert_close(tuple(clip_gradients(pair, SCALE, 0)), exact_gradients(pair), rtol=1e-10, atol=1e-14)


def on_a_rank() -> list[Tensor]:
    size = ROWS // dist.get_world_size()
    first = dist.get_rank() * size
    return list(clip_gradients(Pair(*(part[first : first + size] for part in pair_of())), SCALE, first))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_has_the_gradients_of_its_own_rows(world_size: int) -> None:
    found = zip(*run_ranks(world_size, on_a_rank), strict=True)
    torch.testing.assert_close(
        tuple(torch.cat(parts).detach() for parts in found), exact_gradients(pair_of()), rtol=1e-10, atol=1e-14
    )


def matches(width: int, scale: float) -> Matches:
    pair = pair_of(width)
    return Matches(Parts("image", "long"), {"image": pair.image, "long": pair.text}, {}, scale)


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    term = GdTerm(WIDTH, [WIDTH], "none")
    assert term(View(matches(WIDTH, 30.0), [matches(WIDTH, 30.0)])).item() < 1e-30
    # similarities are multiplied by the scale: a cool student differs from its teacher
    assert term(View(matches(WIDTH, 10.0), [matches(WIDTH, 30.0)])).item() > 1e-5


def test_the_term_is_as_large_as_its_documentation_says() -> None:
    torch.manual_seed(0)
    rows, width, scale = 256, 128, 100.0
    models = [
        Matches(
            Parts("image", "long"),
            {name: formulas.unit(torch.randn(rows, width)) for name in ("image", "long")},
            {},
            scale,
        )
        for _ in range(2)
    ]
    value = GdTerm(width, [width], "none")(View(models[0], models[1:]))
    assert 0.2 < value.item() * rows**2 * width / (5 * scale**2) < 5


def test_a_tile_holds_no_more_similarities_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gd, "TILE_ENTRIES", 5 * ROWS)
    heights, pulls = [], gd._pulls

    def watched(rows: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        heights.append(len(rows))
        return pulls(rows, *others)

    monkeypatch.setattr(gd, "_pulls", watched)
    clip_gradients(pair_of(), SCALE, 0)
    assert heights == 2 * [5, 5, 2]  # of 12 rows, in either direction


def test_similarities_do_not_outlive_their_tile() -> None:
    kept = []
    pair = pair_of()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.shape) or saved, lambda saved: saved):
        clip_gradients(pair, SCALE, 0)
    assert kept
    assert (ROWS, ROWS) not in kept
