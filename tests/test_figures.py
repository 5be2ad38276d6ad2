from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from jettclip.data.counts import DataError
from jettclip.data.decode import decode_image
from jettclip.data.sample import SampleReader
from jettclip.figures import Found, find_pictures, mean_recall, plot_found, plot_runs, recall_table
from jettclip.models.factory import get_tokenizer
from jettclip.openclip import PreprocessCfg, image_transform_v2, keep_uint8
from jettclip.settings import SampleSettings
from support import caption, picture, sample, tiny_towers, write_shard


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


def test_the_table_has_a_row_a_run_and_a_column_a_metric() -> None:
    recall = {"long/image_to_text_R@1": 0.2, "long/text_to_image_R@1": 0.4}
    table = recall_table({"teacher": recall, "student": recall}, {"long/R@1": "long captions"})
    assert [line.split() for line in table.splitlines()] == [
        ["long", "captions"],
        ["teacher", "0.300"],
        ["student", "0.300"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def reader(**settings: float) -> SampleReader:
    transform = keep_uint8(image_transform_v2(PreprocessCfg(size=16), is_train=False))
    tokenizer = get_tokenizer("Nano-248", 32)
    return SampleReader(SampleSettings(**settings), transform, tokenizer, ("long",))  # type: ignore[arg-type]


def test_pictures_are_ranked_by_their_likeness_to_a_caption(tmp_path: Path) -> None:
    model = tiny_towers().eval()
    shards = [[sample(0), sample(9, txt="no image"), sample(1), sample(2)], [sample(3), sample(4)]]
    urls = "::".join(write_shard(tmp_path / f"{i}.tar", samples) for i, samples in enumerate(shards))
    pictures = [decode_image(picture(i), 1000) for i in range(5)]  # the sample without one has no place among them
    pixels = torch.stack([reader().images.transform(one) for one in pictures])
    texts = get_tokenizer("Nano-248", 32)([caption(i) for i in range(5)])
    with torch.no_grad():
        ranked = (model.encode_text(texts, True) @ model.encode_image(pixels, True).T).argsort(dim=1, descending=True)
    found = find_pictures(model, reader(max_drop_rate=0.5), urls, [1, 4, 5], count=3, batch_size=2)
    for row, number in zip(found, (1, 4), strict=True):
        best = ranked[number, :3].tolist()
        assert row.caption == caption(number)
        assert [one.tobytes() for one in row.pictures] == [pictures[i].tobytes() for i in best]
        assert row.right == (best.index(number) if number in best else None)
    assert len(find_pictures(model, reader(max_drop_rate=0.5), urls, [0], count=9)[0].pictures) == 5


def test_too_many_unusable_pictures_are_an_error(tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [sample(0), sample(1, txt="no image")])
    with pytest.raises(DataError, match="1 of 2 samples were dropped"):
        find_pictures(tiny_towers(), reader(), url, [0])
