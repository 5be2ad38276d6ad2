from __future__ import annotations

import json
import struct
from collections import Counter
from typing import Any

import pytest

from jettclip.data.captions import Caption, CaptionField, CaptionReader, caption_places
from jettclip.data.counts import Dropped, Tally
from jettclip.data.decode import decode_json
from jettclip.settings import SampleSettings


def with_json(value: Any, **members: bytes) -> dict[str, Any]:
    return {"__key__": "0", "json": json.dumps(value).encode(), **members}


def reader(
    long: str = "txt", short: str = "none", views: tuple[str, ...] = ("long",), embedded: bool = False, **settings: Any
) -> CaptionReader:
    fields = {"short_caption_field": short, "long_caption_field": long}
    return CaptionReader(SampleSettings(**fields, **settings), views, seed=3, embedded=embedded)


def texts(found: dict[str, Caption]) -> dict[str, str | bytes]:
    return {view: caption.text for view, caption in found.items()}


@pytest.mark.parametrize(
    ("places", "members", "expected"),
    [
        ("long_caption", {"long_caption": b" a dog\n"}, "a dog"),
        ("long_caption", {"long_caption": b"a dog\nruns"}, "a dog\nruns"),
        ("long_caption,txt", {"txt": b"a dog"}, "a dog"),
        ("txt, ,long_caption", {"txt": b"first", "long_caption": b"second"}, "first"),
        ("long_caption,txt", {"txt": b"second", "long_caption": b"first"}, "first"),
        ("Long.TXT", {"long.txt": b"a dog"}, "a dog"),  # extensions are lower case, as in webdataset
        ("json:text", with_json({"text": " a d\u00f6g\n"}), "a d\u00f6g"),
        ("json:text", with_json({"text": ["a dog"]}), "a dog"),
        ("json:text,txt", with_json({"text": None}, txt=b"a dog"), "a dog"),
        ("json:text,txt", with_json({"text": []}, txt=b"a dog"), "a dog"),
        ("json:Text,txt", with_json({"text": "other"}, txt=b"a dog"), "a dog"),
        ("json:a+json:b,txt", with_json({"b": "a dog"}, txt=b"no"), "a dog"),
        ("long_caption,json:text", {"long_caption": b"a dog", "json": b"no json at all"}, "a dog"),
    ],
)
def test_the_first_place_that_exists_holds_the_caption(places: str, members: dict[str, Any], expected: str) -> None:
    tally = Tally()
    assert texts(reader(places).read({"__key__": "0", **members}, 0, tally)) == {"long": expected}
    assert not tally.noted


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"long": b"a dog"}, "long caption is missing"),
        ({"txt": b""}, "caption is empty"),
        ({"txt": b" \n\t"}, "caption is empty"),
        ({"txt": b"caf\xe9"}, "caption is not UTF-8"),
        ({"txt": b"a dog " * 20_000}, "caption is absurdly long"),
        (with_json({"text": ["", " "]}), "caption is empty"),
        (with_json({"text": ["a dog", 3]}), "caption in the json is not text"),
        (with_json({"text": {"en": "a dog"}}), "caption in the json is not text"),
        (with_json({"text": "\ud800"}), "caption is not UTF-8"),
        (with_json(["a dog"]), "json cannot be decoded"),
        ({"json": b"{"}, "json cannot be decoded"),
    ],
)
def test_an_unusable_caption_has_its_own_reason(members: dict[str, Any], reason: str) -> None:
    group, made = {"__key__": "0", **members}, reader("txt,json:text")
    for use in (lambda: made.read(group, 0, Tally()), lambda: made.every(group, Tally())):
        with pytest.raises(Dropped) as dropped:
            use()
        assert dropped.value.reason == reason


def test_members_are_the_extensions_to_read() -> None:
    assert CaptionField("long_caption,json:a+json:b*2,TXT").members == {"long_caption", "json", "txt"}
    assert CaptionField("none").members == set()
    assert reader("txt", "json:a").members == {"txt", "json"}


def test_a_field_is_written_as_alternatives_of_weighted_pools() -> None:
    assert caption_places("TXT*2 + json:Syn_Text*0.5, json:b") == [
        [("txt", 2.0), ("json:Syn_Text", 0.5)],
        [("json:b", 1.0)],
    ]
    assert caption_places(" none ") == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' names no place; give a member name or json:KEY"),
        (" , ", "names no place; give a member name or json:KEY"),
        ("txt+", "'' in 'txt\\+' names no place; .*such as txt\\+json:text"),
        ("txt,json:", "'json:' in 'txt,json:' names no place"),
        ("txt,none", "'none' in 'txt,none' names no place"),
        ("txt*0", "'txt\\*0' in 'txt\\*0' has no positive weight; write it as in 'txt\\*2\\+json:text'"),
        ("txt*two", "has no positive weight"),
        ("txt*-1", "has no positive weight"),
        ("txt*nan+json:a", "has no positive weight"),
        ("txt*inf", "has no positive weight"),
        ("txt*", "has no positive weight"),
    ],
)
def test_a_malformed_field_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionField(spec)


def chances(field: str, members: dict[str, Any]) -> dict[str | bytes, float]:
    """How often each caption is chosen, over 4000 epochs."""
    made = reader(field)
    drawn = Counter(made.read(members, epoch, Tally())["long"].text for epoch in range(4000))
    return {text: round(count / 4000, 1) for text, count in drawn.items()}


def test_several_captions_are_chosen_by_weight() -> None:
    several = with_json({"a": ["1", "2", "3", "4", "5"], "b": "6"}, txt=b"0")
    assert chances("json:a", several) == dict.fromkeys("12345", 0.2)
    assert chances("txt*2+json:b", several) == {"0": 0.7, "6": 0.3}
    assert chances("txt+json:a", several) == {"0": 0.5, **dict.fromkeys("12345", 0.1)}
    assert chances("json:b*4+json:a*6,txt", several) == {"6": 0.4, **dict.fromkeys("12345", 0.1)}


def test_captions_that_are_left_out_leave_their_share_to_those_of_their_place() -> None:
    assert chances("txt+json:a", with_json({"a": ["", "1", " "]}, txt=b"0")) == {"0": 0.5, "1": 0.5}


def test_the_choice_is_a_function_of_seed_epoch_key_and_view() -> None:
    made = reader("json:a", "json:a", views=("short", "long"))
    group = with_json({"a": list("0123456789")})
    drawn = [tuple(texts(made.read(group, epoch, Tally())).values()) for epoch in range(100)]
    assert drawn == [tuple(texts(made.read(group, epoch, Tally())).values()) for epoch in range(100)]
    assert {short for short, _ in drawn} == {long for _, long in drawn} == set("0123456789")
    assert 2 < sum(short == long for short, long in drawn) < 25  # they are drawn apart
    others = [texts(made.read({**group, "__key__": "1"}, epoch, Tally()))["long"] for epoch in range(100)]
    assert sum(long == other for (_, long), other in zip(drawn, others, strict=True)) < 25
    alone = reader("json:a", views=("long",))
    assert [alone.read(group, epoch, Tally())["long"].text for epoch in range(100)] == [long for _, long in drawn]


def test_a_caption_knows_where_it_stands() -> None:
    group = with_json({"a": ["", "x", "y"], "b": "z"}, txt=b"w")
    tally = Tally()
    assert [caption[:3] for caption in reader("txt+json:a+json:b").every(group, tally)["long"]] == [
        ("w", "txt", 0), ("x", "json:a", 1), ("y", "json:a", 2), ("z", "json:b", 0),
    ]  # fmt: skip
    assert tally.noted == {"caption is empty, one of several": 1}


def test_a_caption_that_is_read_is_among_those_of_extraction() -> None:
    made = reader("json:a", views=("short", "long"))
    group = with_json({"a": ["A dog runs. It is brown.", "\ud800", "A cat sits. It is gray."]})
    every = made.every(group, Tally())
    assert [caption.text for caption in every["short"]] == ["A dog runs", "A cat sits"]
    for epoch in range(20):
        tally = Tally()
        chosen = made.read(group, epoch, tally)
        assert all(chosen[view] in every[view] for view in ("short", "long"))
        assert every["short"].index(chosen["short"]) == every["long"].index(chosen["long"])  # of the same caption
        assert tally.noted == {"caption is not UTF-8, one of several": 1, "short caption by first-sentence": 1}


@pytest.mark.parametrize(
    ("policy", "short"),
    [("first-sentence", "A dog runs"), ("drop-summary", "It is brown. It barks."), ("pad-shift", "A dog runs")],
)
def test_a_policy_makes_the_short_caption_of_the_long_one(policy: str, short: str) -> None:
    group = {"__key__": "0", "txt": b"A dog runs. It is brown. It barks."}
    for views in (("short", "long"), ("short",)):
        made, tally = reader("txt", "json:a", views, short_caption_policy=policy), Tally()
        assert made.read(group, 0, tally)["short"].text == short
        assert [caption.text for caption in made.every(group, tally)["short"]] == [short]
        assert tally.noted == {f"short caption by {made.policy}": 2}
        assert made.random_views == ()


def test_no_field_leaves_the_short_caption_to_the_policy_although_the_data_has_one() -> None:
    group = with_json({}, txt=b"A dog runs. It is brown.", short_caption=b"a dog")
    assert reader("txt", "none", ("short",)).read(group, 0, Tally())["short"].text == "A dog runs"
    assert reader("txt", "short_caption", ("short",)).read(group, 0, Tally())["short"].text == "a dog"


def test_a_random_policy_draws_anew_in_every_epoch_and_cannot_be_extracted() -> None:
    made = reader("txt", "short_caption", ("short", "long"), short_caption_policy="sample-sentences")
    group = {"__key__": "0", "txt": b"A one. B two. C three. D four."}
    drawn = [made.read(group, epoch, Tally())["short"].text for epoch in range(50)]
    assert drawn == [made.read(group, epoch, Tally())["short"].text for epoch in range(50)]
    assert len(set(drawn)) > 5
    assert made.random_views == ("short",)
    assert reader("txt", views=("long",), short_caption_policy="sample-sentences").random_views == ()
    with pytest.raises(Dropped, match="short caption is missing: sample-sentences makes another one in every epoch"):
        made.every(group, Tally())
    assert made.every({**group, "short_caption": b"a dog"}, Tally())["short"][0].text == "a dog"


@pytest.mark.parametrize(
    ("members", "policy", "message"),
    [
        ({"json": b"{}", "jpg": b""}, "first-sentence", "short caption is missing: looked for txt; it has jpg, json"),
        ({"long": b"A dog"}, "none", "short caption is missing: looked for txt; it has long"),
        ({"txt": b"dog"}, "first-sentence", "long caption is missing: looked for long or json:a .* it has txt"),
        ({"txt": b" ", "long": b"A dog"}, "first-sentence", "caption is empty"),  # what is there is not made anew
    ],
)
def test_a_view_without_captions_is_missing(members: dict[str, Any], policy: str, message: str) -> None:
    made = reader("long,json:a + json:b", "txt", ("short", "long"), short_caption_policy=policy)
    with pytest.raises(Dropped, match=message):
        made.read({"__key__": "0", **members}, 0, Tally())


def test_members_that_hold_embeddings_stay_bytes_and_no_policy_makes_one() -> None:
    vector = struct.pack("<2f", 1, 2)
    made = reader("long_caption,json:text", "short_caption", ("short", "long"), embedded=True)
    group = {"__key__": "0", "long_caption": vector, "short_caption": vector[:4]}
    assert texts(made.read(group, 0, Tally())) == {"short": vector[:4], "long": vector}
    with pytest.raises(Dropped, match="short caption is missing"):
        made.read({"__key__": "0", "long_caption": vector}, 0, Tally())
    text = with_json({"text": "a dog"}, short_caption=vector)
    assert texts(made.read(text, 0, Tally())) == {"short": vector, "long": "a dog"}


def test_the_json_of_a_sample_is_decoded_once_for_all_fields() -> None:
    made = reader("json:a+json:b", "json:c,json:d", ("short", "long"))
    before = decode_json.cache_info().misses
    for key in range(3):
        made.read(with_json({"a": f"{key} a", "b": "b", "d": "d"}), 0, Tally())
    assert decode_json.cache_info().misses == before + 3
