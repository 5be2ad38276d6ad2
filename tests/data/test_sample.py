from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from torch import Tensor

from jettclip.data.counts import DataError, Dropped, Tally
from jettclip.data.sample import SampleReader, TeacherTokenizer
from jettclip.identity import number_of
from jettclip.settings import SampleSettings
from jettclip.types import TeacherTokens
from support import caption, picture, sample, write_shard


def to_tensor(image: Image.Image) -> Tensor:
    return torch.full((3, 2, 2), image.width)


def tokenize(text: str) -> Tensor:
    return torch.tensor([[len(text)]])


def reader(
    views: tuple[str, ...] = ("short", "long"),
    transform: Callable[[Image.Image], Tensor] = to_tensor,
    seed: int = 0,
    embeddings: Literal["members"] | None = None,
    **settings: Any,
) -> SampleReader:
    return SampleReader(SampleSettings(**settings), transform, tokenize, views, embeddings=embeddings, seed=seed)


def group(**members: bytes | str) -> dict[str, Any]:
    encoded = {name: value.encode() if isinstance(value, str) else value for name, value in members.items()}
    return {"__key__": "0001", "__shard__": "shard", **encoded}


def ordinary(**members: bytes | str) -> dict[str, Any]:
    return group(**{"png": picture(0), "short_caption": "a dog", "long_caption": "a dog runs", **members})


def test_an_ordinary_sample_is_decoded() -> None:
    made = reader().read(ordinary(), 0, Tally())
    assert made.key == "0001"
    assert torch.equal(made.image, torch.full((3, 2, 2), 16))
    assert (made.short, made.long) == (torch.tensor([5]), torch.tensor([10]))
    assert made.teacher is None


def test_an_image_has_the_number_of_its_bytes_whatever_belongs_to_it() -> None:
    first, second = (reader().read(ordinary(long_caption=text), 0, Tally()) for text in ("a dog", "a cat"))
    assert first.image_number == second.image_number == number_of(picture(0))
    assert reader().read(ordinary(png=picture(1)), 0, Tally()).image_number == number_of(picture(1))


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_the_image_may_have_any_allowed_extension(extension: str) -> None:
    members = {"long_caption": "a dog", "short_caption": "dog", extension: picture(0)}
    assert reader().read(group(**members), 0, Tally()).image.shape == (3, 2, 2)


def test_openclips_layout_gives_the_long_caption_and_a_short_one_by_policy() -> None:
    tally = Tally()
    made = reader().read(group(jpg=picture(0), txt="A dog runs. It is brown."), 0, tally)
    assert (made.short, made.long) == (torch.tensor([len("A dog runs")]), torch.tensor([24]))
    assert tally.noted == {"short caption by first-sentence": 1}


def test_captions_come_from_the_json_too() -> None:
    members = group(jpg=picture(0), json=json.dumps({"short_caption": "dog", "long_caption": "a dog"}), txt="no")
    made = reader().read(members, 0, Tally())
    assert (made.short, made.long) == (torch.tensor([3]), torch.tensor([5]))


def test_only_the_views_that_are_asked_for_are_needed() -> None:
    made = reader(views=("long",)).read(group(jpg=picture(0), long_caption="a dog"), 0, Tally())
    assert made.short is None
    assert made.long is not None


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        (group(txt="a dog", gif=b""), {}, "image is missing: it has gif, txt"),
        (group(jpg=picture(0)), {}, "short caption is missing: looked for short_caption or json:short_caption"),
        (
            group(jpg=picture(0), txt="A dog"),
            {"short_caption_policy": "none"},
            "short caption is missing: .*; it has jpg, txt",
        ),
        (group(jpg=picture(0), short_caption="a dog"), {}, "long caption is missing"),
        (ordinary(long_caption=" "), {}, "caption is empty"),
        (ordinary(long_caption=b"caf\xe9"), {}, "caption is not UTF-8"),
        (group(jpg=picture(0), json="[]"), {}, "json cannot be decoded"),
        (ordinary(png=b"no picture"), {}, "image cannot be decoded"),
        (ordinary(png=picture(0, format="JPEG")[:-50]), {}, "image cannot be decoded"),
        (ordinary(png=picture(0, size=30)), {"max_image_pixels": 899}, "image has too many pixels: 30 x 30"),
        (ordinary(), {"embeddings": "members"}, "embedding is not raw float32"),
    ],
)
def test_a_sample_that_cannot_be_used_is_dropped_with_its_reason(
    members: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(Dropped, match=message):
        reader(**settings).read(members, 0, Tally())


def test_members_may_hold_embeddings() -> None:
    short, long = struct.pack("<3f", 1, 2, 3), struct.pack("<3f", 4, 5, 6)
    made = reader(embeddings="members").read(ordinary(short_caption=short, long_caption=long), 0, Tally())
    assert torch.equal(torch.stack([made.short, made.long]), torch.arange(1.0, 7).view(2, 3))  # type: ignore[list-item]


def test_teachers_read_the_captions_through_their_own_tokenizers() -> None:
    def spell(text: str) -> Tensor:
        return torch.tensor([list(text.encode())])

    teachers = [TeacherTokenizer(spell), TeacherTokenizer(lambda text: tokenize(text) + 100)]
    for parts, short in ((("image", "short", "long"), [[*b"a dog"], [105]]), (("image", "long"), [])):
        asked = SampleReader(
            SampleSettings(), to_tensor, tokenize, ("short", "long"), teacher_parts=parts, teacher_tokenizers=teachers
        )
        made = asked.read(ordinary(), 0, Tally())
        assert (made.short, made.long) == (torch.tensor([5]), torch.tensor([10]))  # the student's own
        assert isinstance(made.teacher, TeacherTokens)
        assert [ids.tolist() for ids in made.teacher.short] == short
        assert [ids.tolist() for ids in made.teacher.long] == [[*b"a dog runs"], [110]]


def test_captions_that_the_tokenizer_says_it_cut_are_noted() -> None:
    class CutsToEight:
        truncated = 3  # elsewhere, before

        def __call__(self, text: str) -> Tensor:
            self.truncated += len(text) > 8
            return torch.zeros(1, 8)

    reads = reader()
    reads.tokenizer = CutsToEight()
    tally = Tally()
    for long_caption in ("a dog runs", "a dog", "a dog that runs"):
        reads.read(ordinary(long_caption=long_caption), 0, tally)
        assert "short caption truncated to 8 tokens" not in tally.noted
    reads.read(ordinary(short_caption="a dog runs"), 0, tally)
    assert tally.noted == {"long caption truncated to 8 tokens": 3, "short caption truncated to 8 tokens": 1}


def test_no_member_is_wanted_but_images_and_the_declared_fields() -> None:
    assert reader().wanted == {"jpg", "jpeg", "png", "webp", "short_caption", "long_caption", "json", "txt"}
    own = reader(short_caption_field="a.txt", long_caption_field="json:b").wanted
    assert own == {"jpg", "jpeg", "png", "webp", "a.txt", "json"}


def test_a_random_transform_is_a_function_of_seed_epoch_and_key() -> None:
    def draw(seed: int = 0, epoch: int = 0, key: str = "0001") -> float:
        made = reader(transform=lambda _: torch.rand(1), seed=seed).read({**ordinary(), "__key__": key}, epoch, Tally())
        return float(made.image)

    state = torch.get_rng_state()
    assert draw() == draw()
    assert len({draw(), draw(seed=1), draw(epoch=1), draw(key="0002")}) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_an_undecodable_image_counts_before_a_missing_feature() -> None:
    class Nothing:
        members = frozenset[str]()
        has_augmentations = False

        def lookup(self, *_: object) -> None:
            raise DataError("a store has no row for such a sample")

    broken = reader()
    broken.stores = broken.embeddings = Nothing()  # type: ignore[assignment]
    with pytest.raises(Dropped, match="image cannot be decoded"):
        broken.read(ordinary(png=b"x", long_caption=caption(0)), 0, Tally())


def test_the_samples_of_several_shards_come_in_order_with_what_they_were_made_of(tmp_path: Path) -> None:
    broken = [sample(1, png=b"x", long_caption="a"), sample(2)]
    urls = [write_shard(tmp_path / "0.tar", [sample(0), *broken]), write_shard(tmp_path / "1.tar", [sample(3)])]
    tally = Tally()
    read = list(reader().read_shards(urls, tally))
    assert [one.key for one in read] == ["000000", "000002", "000003"]
    assert read[1].contents == {"image": picture(2), "short": "thing 2", "long": caption(2)}
    assert (tally.kept, tally.dropped) == (3, {"image cannot be decoded": 1})
