from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from jettclip.figures import Found, mean_recall, plot_found, plot_runs


def test_curves_are_drawn_for_every_run(tmp_path: Path) -> None:
    recall = {"long/image_to_text_R@1": 0.2, "long/text_to_image_R@1": 0.4}
    lines = [{"kind": "train", "step": 0, "clip@long": 3.0}, {"kind": "val", "step": 1, **recall}]
    plot_runs({"a": lines, "b": lines}, "clip@long", "long/R@1", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500


def test_the_mean_of_both_directions_is_taken() -> None:
    line = {"long@77/image_to_text_R@5": 0.2, "long@77/text_to_image_R@5": 0.4}
    assert mean_recall(line, "long@77/R@5") == pytest.approx(0.3)


def test_the_right_picture_has_a_green_frame(tmp_path: Path) -> None:
    def green(right: int | None) -> int:
        grey = Image.new("RGB", (32, 32), (90, 90, 90))
        plot_found([Found("a caption " * 30, [grey] * 5, right), Found("b", [grey] * 3, None)], tmp_path / "found.png")
        with Image.open(tmp_path / "found.png") as picture:
            pixels = picture.convert("RGB").getcolors(10**6)
        assert pixels is not None
        return sum(count for count, (red, green, blue) in pixels if green > red + 60 and green > blue + 60)

    assert green(None) == 0
    assert green(2) > 100
