from __future__ import annotations

import pickle
import random
import string
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jettclip import openclip
from jettclip.models import factory, tokenizer
from jettclip.models.factory import get_tokenizer
from jettclip.models.tokenizer import CachedTokenizer

CLEAN = ("lower", "whitespace", "canonicalize")
REFERENCE = {clean: open_clip.SimpleTokenizer(clean=clean) for clean in CLEAN}
OURS = {clean: CachedTokenizer(clean=clean) for clean in CLEAN}  # all tests share what these remember

ODD = [
    "", " ", "\n", "\t \r\n\t", "a", "0", "!", "'", "_", "&", "<", "a dog", "  A  Dog\n\non\tthe\r\nROAD ",
    # contractions, digits, punctuation
    "it's they're I've I'm we'll he'd can't 'S 'RE '''s s's 'tis o'clock 'sdog", "3.14 1,000 2026-10-05 a1b2c3 007",
    "!?!?...--- (a) [b] {c} \"d\" `e` ~f~ #g @h $i %j ^k *l +m =n |o \\p /q ;r :s ,t .u <v> _w_ a_b __init__",
    # special tokens as text, in any case and company
    "<start_of_text>", "<end_of_text>", "a <START_OF_TEXT> b", "<End_Of_Text>", "a<start_of_text>b<end_of_text>c",
    "!<start_of_text>", "<start_of_text><end_of_text>", "<start_of_text", "<start_of_text >", "<start_of_\ntext>",
    "&lt;start_of_text&gt;", "<|endoftext|>", "<\uff53tart_of_text>",
    # HTML entities: whole, cut off, escaped again
    "salt &amp; pepper", "&amp;amp; &amp;amp;amp; &lt;b&gt;", "AT&T R&D a&b &", "&ampere &copy &nbsp;x&#8217;s &#x41;",
    "&#0; &#128; &#xD800; &#1114112; &#28;&#31;", "&Eacute;T&Eacute; &AMP; &bogus;", "&amp &amp;lt;end_of_text&amp;gt;",
    # mojibake, ligatures, full width, accents, quotes, dashes, emoji
    "caf\u00c3\u00a9 \u00e2\u20ac\u2122s \u00e2\u20ac\u0153quote\u00e2\u20ac\ufffd", "\u00c2\u00a35 \u00c2\u00a0x",
    "\ufb01sh \ufb02ow o\ufb03ce", "\uff26\uff35\uff2c\uff2c \uff17\u3000width", "cafe\u0301 caf\u00e9 \u00c9T\u00c9",
    "\u2018a\u2019 \u201cb\u201d \u2013 \u2014 \u2026 it\u2019s", "caf\u00e9\u2019s \u201cno. 1\u201d",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f", "\U0001f1eb\U0001f1f7\U0001f44d\U0001f3fd",
    # scripts, and letters whose case is peculiar
    "\u4e00\u53ea\u72d7\u5728\u8dd1\u3002\u65e5\u672c\u8a9e", "\ud55c\uad6d\uc5b4 \u0645\u0631\u062d\u0628",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0663", "\u00bd \u00b2 \u2460 \u2167 \u0e51 \u0131 \u017ft '\u017f",
    "\u212a \u1e9e \u0130stanbul \u03a3\u03a3\u03a3 \u039f\u03a3 \u01c5",
    # white space and control characters of all kinds
    "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g\u200bh\ufeffi", "a\x00b\x0bc\x0cd\x1be\x1cf\x1dg\x1eh\x1fi\x7fj\x80k",
    *(f"a{chr(code)}b{chr(code)} c" for code in [*range(33), 127]),
    "\x1b[31mred\x1b[0m", "a\x0bb <start_of\x1f_text>", "\ufffd \ud800 \udfff \U0010ffff \ue000", "\ufeffbom",
    # long
    "a dog and a cat. " * 2500, "word" * 3000, "x" * 5000 + "!" * 5000, "\u72d7" * 3000, "1" * 3000,
    "https://a.b/" + "c%20" * 99,
]  # fmt: skip


def assert_same(text: str, clean: str = "lower", length: int = 77) -> None:
    ids, expected = OURS[clean](text, length), REFERENCE[clean](text, length)
    assert torch.equal(ids, expected)
    assert (ids.dtype, ids.shape) == (torch.int64, (1, length))
    assert OURS[clean].encode(text) == REFERENCE[clean].encode(text)


@pytest.mark.parametrize("clean", CLEAN)
def test_ids_of_odd_texts_are_openclips(clean: str) -> None:
    for text in ODD + ODD[::-1]:  # first met, and remembered
        assert_same(text, clean)


@pytest.mark.parametrize("clean", CLEAN)
def test_ids_of_ten_thousand_words_are_openclips(clean: str) -> None:
    words = random.Random(0).choices(ODD, k=9000) + ["the"] * 1000
    assert_same(" ".join(text[:20] for text in words), clean, 20_000)


FRAGMENTS = [
    *"aAzZ09_&;<>'!. \n\t\r\x0b\x0c\x1c\x1f\x7f\u00a0\u3000\u017f\u0130\u00e9",
    *("'s", "'t", "'RE", "'ll", "&amp", "lt;", "<end_of_text>"),
    *(text for text in ODD if len(text) < 120),
]
TEXTS = st.one_of(
    st.text(max_size=200),
    st.text(string.printable, max_size=200),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.characters()), max_size=30).map("".join),
)


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.sampled_from(CLEAN), st.sampled_from([1, 2, 3, 20, 77]))
def test_ids_of_any_text_are_openclips(text: str, clean: str, length: int) -> None:
    assert_same(text, clean, length)


@pytest.mark.parametrize("length", [None, 1, 2, 3, 20, 248])
def test_texts_may_be_one_several_or_none(length: int | None) -> None:
    ours, reference = CachedTokenizer(context_length=30), open_clip.SimpleTokenizer(context_length=30)
    for texts in ("a dog", [], [""], ["a dog"], ODD, tuple(ODD)):
        assert torch.equal(ours(texts, length), reference(texts, length))
    assert torch.equal(ours((text for text in ODD), context_length=length), reference(ODD, length))


def test_rows_are_the_callers_to_change() -> None:
    first, second = OURS["lower"]("a dog"), OURS["lower"]("a dog")
    first.zero_()
    assert torch.equal(second, REFERENCE["lower"]("a dog"))
    assert torch.equal(OURS["lower"]("a dog"), second)


@pytest.mark.parametrize("mask", ["simple", "random", "shuffle"])
def test_a_reduction_mask_draws_as_openclips(mask: str) -> None:
    options: dict[str, Any] = {"context_length": 10, "reduction_mask": mask}
    drawn = []
    for make in (CachedTokenizer, open_clip.SimpleTokenizer):
        torch.manual_seed(0)
        random.seed(0)
        drawn.append(make(**options)(ODD))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("tokens", [["<mask>"], ["<a b>", "<c>"], ["d.g"], ["<\u00e9>"], ["<start_of_text>"]])
@pytest.mark.parametrize("clean", CLEAN)
def test_additional_special_tokens_are_found_as_openclip_finds_them(tokens: list[str], clean: str) -> None:
    options: dict[str, Any] = {"additional_special_tokens": tokens, "clean": clean}
    ours, reference = CachedTokenizer(**options), open_clip.SimpleTokenizer(**options)
    texts = ["a <mask> b<MASK>c", "x <a b> <c><C>", "dog dig d.g", "<\u00e9>", "<start_of_text>!"]
    assert torch.equal(ours(texts + ODD[:-6]), reference(texts + ODD[:-6]))
    assert (ours.vocab_size, ours.all_special_ids) == (reference.vocab_size, reference.all_special_ids)


def test_ids_are_decoded() -> None:
    ids = OURS["lower"]("A dog's life!")[0]
    assert OURS["lower"].decode(ids[1:6].tolist()) == REFERENCE["lower"].decode(ids[1:6].tolist()) == "a dog 's life ! "


def test_captions_that_were_cut_are_counted() -> None:
    ours = CachedTokenizer(context_length=8)
    assert ours.truncated == 0
    for words in (5, 6, 7, 8):  # the end token makes the seventh the first too many
        ids = ours("dog " * words)
        assert ids[0, -1] == (0 if words == 5 else ours.eot_token_id)
        assert ours.truncated == max(0, words - 6)
    ours(["dog " * 20, "dog", "dog " * 7])
    assert ours.truncated == 4
    ours("dog " * 20, 22)
    ours.encode("dog " * 20)
    assert ours.truncated == 4


def test_words_met_before_are_not_split_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = CachedTokenizer()
    captions = ["A dog's tail,\nand a caf\u00e9 &amp; bar.", "x" * tokenizer.LONGEST_WORD]
    expected = ours(captions)
    monkeypatch.setattr(ours, "pat", None)  # a new word would need it
    assert torch.equal(ours(captions), expected)
    assert torch.equal(ours("BAR.  caf\u00e9\tdog's")[:, 1:-1], REFERENCE["lower"]("bar. caf\u00e9 dog's")[:, 1:-1])
    with pytest.raises(AttributeError):
        ours("cat")


@pytest.mark.parametrize("special", [[], ["<mask>"]])
def test_what_is_remembered_is_bounded(special: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "MOST_WORDS", 20)
    ours = CachedTokenizer(additional_special_tokens=special)
    reference = open_clip.SimpleTokenizer(additional_special_tokens=special)
    for start in range(0, 120, 5):
        text = "<start_of_text> " + " ".join(f"{chr(97 + n % 26)}{chr(97 + n // 26)}q" for n in range(start, start + 5))
        assert torch.equal(ours(text), reference(text))
        assert len(ours._ids) <= 20
        assert len(ours.cache) <= 20


def test_long_words_are_not_remembered() -> None:
    ours = CachedTokenizer()
    assert torch.equal(ours("\u72d7" * 65 + " dog"), REFERENCE["lower"]("\u72d7" * 65 + " dog"))
    assert list(ours._ids) == ["dog"]


@pytest.mark.parametrize("letters", ["ab", "aaab", "thein", string.ascii_lowercase, "ha!?", "\u4e00\u4e8c\xe9"])
def test_endless_words_are_split_as_openclip_splits_them(letters: str) -> None:
    generator = random.Random(letters)
    for length in (63, 64, 65, 66, 100, 999, 2000):
        word = "".join(generator.choices(letters, k=length))
        assert OURS["lower"].encode(word) == REFERENCE["lower"].encode(word)


def test_a_word_without_end_takes_no_time_without_end() -> None:
    word = "".join(random.Random(0).choices(string.ascii_lowercase, k=100_000))
    splits = 0

    class Counted(dict[Any, Any]):
        def get(self, *key: Any) -> Any:
            nonlocal splits
            splits += 1
            return super().get(*key)

    ours = CachedTokenizer()
    ours.bpe_ranks = Counted(ours.bpe_ranks)
    assert len(ours.encode(word)) > 10_000
    assert splits < 10 * len(word)  # pairs looked up; OpenCLIP's looks up all that are left for every merge


def test_it_survives_the_way_to_a_worker() -> None:
    ours = CachedTokenizer(context_length=9, reduction_mask="", clean="whitespace")
    ours(ODD)
    copied = pickle.loads(pickle.dumps(ours))
    assert torch.equal(copied(ODD), open_clip.SimpleTokenizer(context_length=9, clean="whitespace")(ODD))
    assert copied.truncated == 2 * ours.truncated > 0


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What is constructed, by whom: tokenizers of transformers by name, and both of OpenCLIP's kind by options."""
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(factory, "CachedTokenizer", lambda **options: made.append(("simple", options)))
    monkeypatch.setattr(open_clip.factory, "SimpleTokenizer", lambda **options: made.append(("simple", options)))
    monkeypatch.setattr(factory, "find_spec", lambda name: name)  # as if transformers were installed
    monkeypatch.setattr(open_clip.factory, "HFTokenizer", lambda name, **options: made.append((name, options)))
    return made


@pytest.mark.parametrize("given", [{}, {"context_length": 20}, {"clean": "whitespace"}])
def test_models_have_it_where_openclip_has_its_own(given: dict[str, Any], chosen: list[tuple[str, Any]]) -> None:
    names = [name for name in openclip.list_models() if not name.startswith("coca")]  # not ours to train
    for name in names:
        get_tokenizer(name, **given)
    ours = chosen.copy()
    chosen.clear()
    for name in names:
        open_clip.get_tokenizer(name, **given)
    assert ours == chosen
    assert len({name for name, _ in ours}) > 10


def test_tokenizer_options_of_a_config_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    config["text_cfg"] |= {"context_length": 9, "tokenizer_kwargs": {"clean": "whitespace"}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "other", config)
    ours = get_tokenizer("other")
    assert isinstance(ours, CachedTokenizer)
    assert torch.equal(ours(ODD), open_clip.get_tokenizer("other")(ODD))
    assert torch.equal(get_tokenizer("other", clean="lower")(ODD), REFERENCE["lower"](ODD, 9))
