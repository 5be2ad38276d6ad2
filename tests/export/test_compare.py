from __future__ import annotations

import pytest
import torch

from jettclip.export.compare import TOLERANCE, compare, encoders_of
from support import tiny_towers


def test_the_largest_difference_of_each_tower_is_found() -> None:
    model = tiny_towers().eval()
    ours = encoders_of(model)
    asked = []

    def text(ids: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(ids.shape))
        features = ours.text(ids)
        features[-1, 3] += TOLERANCE / 2 if len(ids) == 3 else 0
        return features

    found = compare(model, ours._replace(text=text), [1, 9])
    assert found["image"] == 0
    assert found["text"] == pytest.approx(TOLERANCE / 2, rel=1e-2)
    assert asked == [(1, 1), (3, 1), (1, 9), (3, 9)]


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("error", [2 * TOLERANCE, torch.nan, torch.inf])
def test_a_tower_that_differs_is_an_error(tower: str, error: float) -> None:
    model = tiny_towers().eval()
    ours = encoders_of(model)
    encode = getattr(ours, tower)
    with pytest.raises(ValueError, match=f"^the exported {tower} tower differs from the model by .*more than 1e-04"):
        compare(model, ours._replace(**{tower: lambda value: encode(value) + error}), [5])
