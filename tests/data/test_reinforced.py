from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from jettclip.data.augmentation import draw, dump, parse
from jettclip.data.captions import Caption, CaptionField, CaptionReader
from jettclip.data.counts import Dropped, Tally
from jettclip.data.reinforced import MixedCaptions, ReinforcedFeatures, SyntheticCaptions
from jettclip.seeding import generator_of
from jettclip.settings import SampleSettings
from jettclip.types import TeacherInfo

TEACHERS = [TeacherInfo("openai", 3, 100.0), TeacherInfo("datacomp", 4, 100.0)]
WIDTH, AUGMENTATIONS = 7, 10
SYNTHETIC = {"syn_text": [f"synthetic {n}" for n in range(5)]}
NEW_SYNTHETIC = {"syn_text": ["a", "b"], "syn_text_dfn": ["c", "d", "e"], "other": ["f"]}


def arrays_of(texts: int, **others: int) -> dict[str, np.ndarray]:
    """Returns arrays of so many rows; every number in them is another one."""
    rows = {"image_emb": AUGMENTATIONS, "text_emb": texts, **others}
    numbers = np.random.default_rng(0).normal(size=(sum(rows.values()), WIDTH)).astype(np.float32)
    ends = np.cumsum(list(rows.values()))[:-1]
    return dict(zip(rows, np.split(numbers, ends), strict=True))


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def pth_gz(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    torch.save({name: torch.from_numpy(rows).bfloat16() for name, rows in arrays.items()}, stream)
    return gzip.compress(stream.getvalue())


PAUG = dump([draw((375, 500), generator_of(n)) for n in range(AUGMENTATIONS)])
OLD, NEW = arrays_of(6), arrays_of(1, syn_text_emb=2, syn_text_dfn_emb=3)


def group_of(arrays: dict[str, np.ndarray] | None = None, **changes: Any) -> dict[str, Any]:
    """Returns a sample of DataCompDR in the old layout, with some members changed, or left out for None."""
    members = {
        "__key__": "abc",
        "__shard__": "00000000.tar",
        "txt": b"real 0",
        "syn.json": json.dumps(SYNTHETIC).encode(),
        "paug.json": json.dumps({"param_aug": PAUG}).encode(),
        "npz": npz(OLD if arrays is None else arrays),
        **{name.replace("_", "."): data for name, data in changes.items()},
    }
    return {name: data for name, data in members.items() if data is not None}


def new_group(**changes: Any) -> dict[str, Any]:
    return group_of(NEW, **{"syn_json": json.dumps(NEW_SYNTHETIC).encode(), **changes})


REAL = Caption("real 0", "txt", 0)


def lookup(group: dict[str, Any], index: int = 4, real: str = "txt", **contents: Caption) -> Any:
    wanted = {"image": b"image", "long": REAL, "short": Caption("", "syn.json:syn_text", 1), **contents}
    return ReinforcedFeatures(TEACHERS, CaptionField(real)).lookup(group, wanted, lambda count: index % count)


def same(row: torch.Tensor, expected: np.ndarray) -> bool:
    return row.dtype == torch.float32 and bool(np.array_equal(row.numpy(), expected))


@pytest.mark.parametrize("index", range(5))
def test_rows_of_the_old_layout_stand_behind_the_real_caption(index: int) -> None:
    rows = lookup(group_of(), index, short=Caption(f"synthetic {index}", "syn.json:syn_text", index))
    assert same(rows.features.image, OLD["image_emb"][index])
    assert same(rows.features.long, OLD["text_emb"][0])
    assert same(rows.features.short, OLD["text_emb"][1 + index])
    assert rows.augmentation.augmentation == parse(PAUG)[index]
    assert rows.augmentation.count == AUGMENTATIONS
    assert rows.augmentation.drawn_for is None
    boxes = [one.box for one in parse(PAUG)]
    assert rows.augmentation.extent == (max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes))


def test_several_real_captions_stand_before_the_synthetic_ones() -> None:
    arrays = arrays_of(3 + 5)
    group = group_of(arrays, json=json.dumps({"captions": ["a", "b", "c"]}).encode())
    chosen = {"long": Caption("c", "json:captions", 2), "short": Caption("", "syn.json:syn_text", 4)}
    rows = lookup(group, real="json:captions", **chosen)
    assert same(rows.features.long, arrays["text_emb"][2])
    assert same(rows.features.short, arrays["text_emb"][7])


@pytest.mark.parametrize("texts", [4, 5, 7])
def test_a_caption_more_or_less_than_rows_shifts_none(texts: int) -> None:
    for wanted in (REAL, Caption("", "syn.json:syn_text", 0)):
        with pytest.raises(Dropped, match="features do not fit the captions"):
            lookup(group_of(arrays_of(texts)), long=wanted)
    with pytest.raises(Dropped, match="features do not fit the captions"):
        lookup(group_of(syn_json=json.dumps({"syn_text": ["synthetic 1"]}).encode()))


def test_a_caption_that_was_made_has_no_row() -> None:
    for made in (REAL._replace(policy="first-sentence"), Caption("", "syn.json:syn_text", 0, policy="first-sentence")):
        with pytest.raises(Dropped, match="feature is missing: none belongs to a caption made by first-sentence"):
            lookup(group_of(), short=made)


@pytest.mark.parametrize(("key", "index"), [("syn_text", 0), ("syn_text", 1), ("syn_text_dfn", 0), ("syn_text_dfn", 2)])
def test_rows_of_the_newer_layout_stand_in_their_keys_own_array(key: str, index: int) -> None:
    rows = lookup(new_group(), short=Caption("", f"syn.json:{key}", index))
    assert same(rows.features.long, NEW["text_emb"][0])
    assert same(rows.features.short, NEW[f"{key}_emb"][index])


def test_members_of_bfloat16_are_read_where_there_is_no_npz() -> None:
    rows = lookup(group_of(npz=None, pth_gz=pth_gz(OLD)))
    rounded = torch.from_numpy(OLD["text_emb"][2]).bfloat16().float().numpy()
    assert same(rows.features.short, rounded)
    both = lookup(group_of(pth_gz=pth_gz(arrays_of(6, more_emb=1))))  # upstream prefers npz
    assert same(both.features.short, OLD["text_emb"][2])


def test_parts_that_are_not_wanted_need_not_be_there() -> None:
    features = ReinforcedFeatures(TEACHERS, CaptionField("txt"))
    arrays = arrays_of(1)
    rows = features.lookup(group_of(arrays, paug_json=None, syn_json=None), {"long": REAL}, lambda count: 0)
    assert rows.augmentation is None
    assert rows.features.image is None
    assert rows.features.short is None
    assert same(rows.features.long, arrays["text_emb"][0])
    assert features.members == {"npz", "pth.gz", "paug.json", "syn.json"}
    assert features.has_augmentations
    assert features.teachers == TEACHERS


def with_nan(name: str, row: int) -> dict[str, np.ndarray]:
    arrays = {key: rows.copy() for key, rows in OLD.items()}
    arrays[name][row, 3] = np.nan
    return arrays


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (group_of(npz=None), "features are missing"),
        (group_of(npz=b"junk"), "features cannot be read"),
        (group_of(npz=None, pth_gz=b"junk"), "features cannot be read"),
        (group_of({"image_emb": OLD["image_emb"]}), "features are missing"),
        (group_of({"text_emb": OLD["text_emb"]}), "features are missing"),
        (group_of({name: rows[:, :6] for name, rows in OLD.items()}), "features are of another width"),
        (group_of({**OLD, "text_emb": OLD["text_emb"][:, :6]}), "features are of another width"),
        (group_of({**OLD, "image_emb": OLD["image_emb"][0]}), "features are of another width"),
        (group_of({**NEW, "syn_text_emb": NEW["syn_text_emb"][:, :6]}), "features are of another width"),
        (group_of(paug_json=None), "stored augmentation is missing"),
        (group_of(paug_json=b"[]"), "stored augmentation cannot be read"),
        (group_of({**OLD, "image_emb": OLD["image_emb"][:9]}), "features do not fit the augmentations"),
        (group_of({**OLD, "image_emb": OLD["image_emb"][:0]}), "features do not fit the augmentations"),
        (group_of(with_nan("image_emb", 4)), "feature is not finite"),
        (group_of(with_nan("text_emb", 0)), "feature is not finite"),
        (group_of(with_nan("text_emb", 2)), "feature is not finite"),
        (group_of(arrays_of(1)), "features do not fit the captions"),
        (group_of(arrays_of(5)), "features do not fit the captions"),
        (group_of(arrays_of(0)), "features do not fit the captions"),
        (group_of(arrays_of(1, other_emb=5)), "features do not fit the captions"),
        (new_group(syn_json=b'{"syn_text": ["a", "b", "c"]}'), "features do not fit the captions"),
        (new_group(syn_json=b'{"syn_text": ["a"]}'), "features do not fit the captions"),
        (group_of(arrays_of(7), syn_json=json.dumps(NEW_SYNTHETIC).encode()), "features do not fit the captions"),
    ],
)
def test_what_does_not_fit_is_dropped(group: dict[str, Any], reason: str) -> None:
    with pytest.raises(Dropped) as dropped:
        lookup(group)
    assert dropped.value.reason == reason


def test_a_row_that_is_not_finite_costs_only_those_who_want_it() -> None:
    assert same(lookup(group_of(with_nan("text_emb", 3))).features.short, OLD["text_emb"][2])
    assert same(lookup(group_of(with_nan("image_emb", 3))).features.image, OLD["image_emb"][4])


@pytest.mark.parametrize(
    ("regex", "keys"), [("^syn_text.*$", ["syn_text", "syn_text_dfn"]), ("^syn_text_dfn$", ["syn_text_dfn"]), ("x", [])]
)
def test_synthetic_captions_are_those_of_the_keys_that_match(regex: str, keys: list[str]) -> None:
    field = SyntheticCaptions(regex)
    assert field.members == {"syn.json"}
    assert field.find(new_group()) == [
        Caption(text, f"syn.json:{key}", index) for key in keys for index, text in enumerate(NEW_SYNTHETIC[key])
    ]
    assert field.find(group_of(syn_json=None)) == []


@pytest.mark.parametrize("json_", [b"", b"[]", b'{"syn_text": "text"}', b'{"syn_text": [1]}', b'{"syn_text": null}'])
def test_a_bad_member_of_synthetic_captions_is_dropped(json_: bytes) -> None:
    with pytest.raises(Dropped):
        SyntheticCaptions("^syn_text").find(group_of(syn_json=json_))


def chances(field: Any, group: dict[str, Any], draws: int = 3000) -> Counter[tuple[str, int]]:
    reader = CaptionReader(SampleSettings(), ("long",), fields={"long": field})
    chosen = (reader.read(group, epoch, Tally())["long"] for epoch in range(draws))
    return Counter((caption.place, caption.index) for caption in chosen)


def test_keys_are_chosen_alike_and_then_their_captions() -> None:
    counted = chances(SyntheticCaptions("^syn_text"), new_group())
    expected = {("syn.json:syn_text", n): 1 / 4 for n in range(2)}
    expected |= {("syn.json:syn_text_dfn", n): 1 / 6 for n in range(3)}
    assert counted.keys() == expected.keys()
    assert all(abs(number / 3000 - expected[caption]) < 0.035 for caption, number in counted.items())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_part_of_the_real_captions_is_replaced(ratio: float) -> None:
    field = MixedCaptions(CaptionField("txt*3+json:more,caption"), SyntheticCaptions("^syn_text"), ratio)
    assert field.members == {"txt", "json", "caption", "syn.json"}
    counted = chances(field, new_group(json=b'{"more": ["x", "y"]}'))
    synthetic = sum(number for (place, _), number in counted.items() if place.startswith("syn.json:")) / 3000
    assert abs(synthetic - ratio) <= (0.03 if 0 < ratio < 1 else 0)
    real = {place: number / 3000 for (place, _), number in counted.items() if not place.startswith("syn.json:")}
    if ratio < 1:
        assert abs(real["txt"] - 0.75 * (1 - ratio)) < 0.035


def test_captions_without_a_chance_are_not_among_them() -> None:
    real, synthetic = CaptionField("txt"), SyntheticCaptions("^syn_text")
    assert [one.place for one in MixedCaptions(real, synthetic, 0.0).find(group_of())] == ["txt"]
    assert {one.place for one in MixedCaptions(real, synthetic, 1.0).find(group_of())} == {"syn.json:syn_text"}


def test_a_sample_without_either_kind_has_the_other() -> None:
    field = MixedCaptions(CaptionField("txt"), SyntheticCaptions("^syn_text"), 1.0)
    assert field.find(group_of(syn_json=None)) == [Caption(b"real 0", "txt", 0)]
    assert {caption.place for caption in field.find(group_of(txt=None))} == {"syn.json:syn_text"}
    assert field.find(group_of(txt=None, syn_json=None)) == []


@pytest.mark.parametrize("group", [group_of(), new_group()], ids=["old", "new"])
def test_the_row_travels_with_the_caption_that_is_chosen(group: dict[str, Any]) -> None:
    field = MixedCaptions(CaptionField("txt"), SyntheticCaptions("^syn_text"), 0.5)
    reader = CaptionReader(SampleSettings(), ("long",), fields={"long": field})
    features = ReinforcedFeatures(TEACHERS, CaptionField("txt"))
    is_new = "other" in json.loads(group["syn.json"])
    expected = {"real 0": (NEW if is_new else OLD)["text_emb"][0]}
    for key, texts in json.loads(group["syn.json"]).items():
        if f"{key}_emb" in NEW and is_new:
            expected |= dict(zip(texts, NEW[f"{key}_emb"], strict=True))
        elif not is_new:
            expected |= dict(zip(texts, OLD["text_emb"][1:], strict=True))
    seen = set()
    for epoch in range(100):
        caption = reader.read(group, epoch, Tally())["long"]
        rows = features.lookup(group, {"long": caption}, lambda count: 0)
        assert same(rows.features.long, expected[str(caption.text)])
        seen.add(caption.text)
    assert seen == expected.keys()
