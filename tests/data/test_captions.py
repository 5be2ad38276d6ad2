from __future__ import annotations

import json
from typing import Any

import pytest

from jettclip.data.captions import CaptionField, first_sentence
from jettclip.data.counts import Dropped


def with_json(value: Any, **members: bytes) -> dict[str, Any]:
    return {"__key__": "0", "json": json.dumps(value).encode(), **members}


@pytest.mark.parametrize(
    ("places", "members", "expected"),
    [
        ("long_caption", {"long_caption": b" a dog\n"}, "a dog"),
        ("long_caption,txt", {"txt": b"a dog"}, "a dog"),
        ("txt, long_caption", {"txt": b"first", "long_caption": b"second"}, "first"),
        ("long_caption,txt", {"txt": b"second", "long_caption": b"first"}, "first"),
        ("Long.TXT", {"long.txt": b"a dog"}, "a dog"),  # extensions are lower case, as in webdataset
        ("json:text", with_json({"text": "a d\u00f6g"}), "a d\u00f6g"),
        ("json:text,txt", with_json({"text": None}, txt=b"a dog"), "a dog"),
        ("json:Text,txt", with_json({"text": "other"}, txt=b"a dog"), "a dog"),
        ("long_caption,json:text", {"long_caption": b"a dog", "json": b"no json at all"}, "a dog"),
        ("long_caption", {"txt": b"a dog"}, None),
    ],
)
def test_the_first_place_that_exists_holds_the_caption(
    places: str, members: dict[str, Any], expected: str | None
) -> None:
    assert CaptionField(places).text(members) == expected


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b""}, "caption is empty"),
        ({"txt": b" \n\t"}, "caption is empty"),
        ({"txt": b"caf\xe9"}, "caption is not UTF-8"),
        (with_json({"text": ["a dog"]}), "caption in the json is not text"),
        (with_json({"text": "\ud800"}), "caption is not UTF-8"),
        (with_json(["a dog"]), "json cannot be decoded"),
        ({"json": b"{"}, "json cannot be decoded"),
    ],
)
def test_an_unusable_caption_has_its_own_reason(members: dict[str, Any], reason: str) -> None:
    with pytest.raises(Dropped) as dropped:
        CaptionField("txt,json:text").text(members)
    assert dropped.value.reason == reason


def test_members_are_the_extensions_to_read() -> None:
    assert CaptionField("long_caption,json:a,json:b,TXT").members == {"long_caption", "json", "txt"}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog runs. It is brown.", "A dog runs"),
        ("A dog of 2.5 kg\nruns. It", "A dog of 2.5 kg runs"),
        ("A dog runs.", "A dog runs."),
    ],
)
def test_first_sentence_ends_at_a_full_stop_and_a_blank(caption: str, expected: str) -> None:
    assert first_sentence(caption) == expected
