from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from jettclip import get_tokenizer, get_wds_dataset
from jettclip.data.counts import DataError
from jettclip.data.features import Store, store_path
from jettclip.data.sample import SampleReader, TeacherTokenizer
from jettclip.extract import Extraction, extract_features
from jettclip.models.factory import Transform
from jettclip.models.teacher import Ensemble, Teacher
from jettclip.openclip import PreprocessCfg, image_transform_v2, keep_uint8
from jettclip.settings import DataSettings, SampleSettings
from jettclip.types import Batch, TeacherFeatures
from support import caption, picture, sample, tiny_towers, write_shard, write_shards

SETTINGS = DataSettings(features="tiny", max_drop_rate=0.5)


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(tiny_towers(), "tiny")


def transform(size: int = 16) -> Transform:
    return keep_uint8(image_transform_v2(PreprocessCfg(size=size), is_train=False))


def smooth_picture(seed: int, size: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture(seed, 5))).resize((size, size)).save(stream, "PNG")
    return stream.getvalue()


def extract(
    teacher: Teacher,
    urls: str,
    *,
    views: tuple[str, ...] = ("short", "long"),
    settings: SampleSettings = SETTINGS,
    **options: object,
) -> Extraction:
    reader = SampleReader(settings, transform(), get_tokenizer("Nano-248", 32), views)
    given = {"batch_size": 4, "dtype": torch.float32, **options}
    return extract_features(teacher, reader, urls, "tiny", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_reads_from_the_store_what_the_teacher_says_of_its_batches(
    workers: int, teacher: Teacher, tmp_path: Path
) -> None:
    urls = write_shards(tmp_path, [9, 5, 8])
    done = extract(teacher, urls, workers=workers)
    assert (done.samples, done.shards, done.kept, done.dropped.total()) == (22, 3, 0, 0)
    loader = get_wds_dataset(
        SETTINGS, urls, transform(), get_tokenizer("Nano-248", 32), is_train=True, batch_size=6, crop_captions=True
    )
    (info,) = loader.teachers
    assert (info.name, info.width, round(info.logit_scale, 2)) == ("tiny", 16, 14.29)
    for batch in loader:
        assert batch.teacher is not None
        for stored, said in zip(batch.teacher, teacher(*batch[:3]), strict=True):
            torch.testing.assert_close(stored, said, atol=1e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_teachers_asked_in_training_say_what_their_stores_say(workers: int, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [{**sample(i), "png": smooth_picture(i, 24)} for i in range(9)])
    models = {
        "smaller": tiny_towers(width=12),
        "other": tiny_towers(size=24, mean=(0.1, 0.2, 0.3), context_length=9, mask_padding=False),
    }
    tokenizers = [get_tokenizer("Nano-248", 32), get_tokenizer("Nano-248", 9, clean="canonicalize")]
    teachers = [Teacher(model, name) for name, model in models.items()]
    asked = []
    for teacher, tokenizer in zip(teachers, tokenizers, strict=True):
        reader = SampleReader(SETTINGS, transform(teacher.image_size[0]), tokenizer, ("short", "long"))
        extract_features(teacher, reader, url, teacher.name, batch_size=4, dtype=torch.float32)
        asked.append(TeacherTokenizer(tokenizer, teacher.model.ignores_padding))

    def read(settings: DataSettings, online: list[TeacherTokenizer]) -> Batch:
        tokenizer = get_tokenizer("Nano-248", 5)  # a student of few tokens does not make its teachers forget words
        options = {"is_train": False, "batch_size": 9, "workers": workers, "teacher_tokenizers": online}
        (batch,) = get_wds_dataset(settings, url, transform(24), tokenizer, **options)  # type: ignore[arg-type]
        return batch

    stored, online = read(DataSettings(features="smaller,other"), []), read(DataSettings(), asked)
    adapter = read(DataSettings(text_embeddings="smaller"), asked)  # which reads stored embeddings, its teachers words
    assert adapter.long_caption is not None
    assert adapter.long_caption.shape == (9, 12)
    torch.testing.assert_close(adapter.teacher, online.teacher)
    said = Ensemble(teachers, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))(online.image, online.teacher)
    assert isinstance(stored.teacher, TeacherFeatures)
    torch.testing.assert_close(stored.teacher[1:], said[1:], atol=1e-6, rtol=0)
    difference = (stored.teacher.image - said.image).abs()
    assert difference[:, :12].max() < 5e-3  # Pillow and torchvision round resized pixels differently
    assert difference[:, 12:].max() < 1e-6


def test_stores_of_the_same_teacher_are_kept_and_others_written_anew(teacher: Teacher, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [4, 4])
    extract(teacher, urls)
    os.remove(store_path(urls.split("::")[1], "tiny"))
    assert extract(teacher, urls)[:3] == (4, 1, 1)
    assert extract(teacher, urls)[:3] == (0, 0, 2)
    assert extract(teacher, urls, overwrite=True)[:3] == (8, 2, 0)
    with torch.no_grad():
        teacher.model.logit_scale.add_(1)
    assert extract(teacher, urls)[:3] == (8, 2, 0)


def test_a_store_without_a_view_that_is_asked_for_is_written_anew(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [4])
    extract(teacher, url, views=("long",))
    assert Store(store_path(url, "tiny")).parts == {"image", "long"}
    assert extract(teacher, url).shards == 1
    assert Store(store_path(url, "tiny")).parts == {"image", "short", "long"}
    assert extract(teacher, url, views=("short",)).kept == 1


def test_the_error_of_a_stale_store_names_what_mends_it(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [4])
    extract(teacher, url)
    write_shard(Path(url), [sample(i, png=picture(i), long_caption=f"new {i}", short_caption="new") for i in range(4)])
    assert extract(teacher, url).kept == 1
    options = {"is_train": False, "batch_size": 4}

    def train() -> int:
        loader = get_wds_dataset(SETTINGS, url, transform(), get_tokenizer("Nano-248", 32), **options)  # type: ignore[arg-type]
        return len(list(loader))

    with pytest.raises(DataError, match=r"has changed since.*scripts/extract_features\.py --overwrite"):
        train()
    extract(teacher, url, overwrite=True)
    assert train() == 1


def test_ranks_share_the_shards(teacher: Teacher, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [4, 5, 6])
    assert [extract(teacher, urls, rank=rank, world_size=2).samples for rank in (0, 1)] == [10, 5]


def test_samples_that_cannot_be_used_are_counted_and_trained_without(teacher: Teacher, tmp_path: Path) -> None:
    broken = [sample(50, png=b"x", long_caption="a"), sample(51, png=picture(1))]
    url = write_shard(tmp_path / "0.tar", [*(sample(i) for i in range(6)), *broken])
    done = extract(teacher, url)
    assert done.samples == 6
    assert done.dropped == {"image cannot be decoded": 1, "short caption is missing": 1}
    loader = get_wds_dataset(
        SETTINGS, url, transform(), get_tokenizer("Nano-248", 32), is_train=False, batch_size=8
    )  # the default, --on-missing-features error, does not stop at samples that are dropped anyway
    assert [len(batch.image) for batch in loader] == [6]


def test_a_shard_of_unusable_samples_stops_the_extraction(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [sample(i, txt="x") for i in range(120)])
    with pytest.raises(DataError, match="image is missing"):
        extract(teacher, url)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_drops_stop_the_extraction_however_they_are_spread(
    workers: int, teacher: Teacher, tmp_path: Path
) -> None:
    shards = [[sample(10 * i), sample(10 * i + 1), sample(10 * i + 2, txt="no image")] for i in range(4)]
    urls = "::".join(write_shard(tmp_path / f"{i}.tar", samples) for i, samples in enumerate(shards))
    for rate, rank, world_size in ((0.3, 0, 1), (0.3, 1, 2)):
        with pytest.raises(
            DataError, match=r"^\d+ of \d+ samples were dropped \(image is missing \d\).*--max-drop-rate"
        ):
            extract(
                teacher, urls, settings=SampleSettings(max_drop_rate=rate), workers=workers, rank=rank,
                world_size=world_size, overwrite=True,
            )  # fmt: skip
    done = extract(teacher, urls, settings=SampleSettings(max_drop_rate=0.4), workers=workers, overwrite=True)
    assert done.dropped == {"image is missing": 4}


def test_a_mistake_that_a_worker_finds_is_told_without_its_traceback(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [sample(i, txt="x") for i in range(120)])
    with pytest.raises(DataError, match="^none of the first 100 samples is usable") as error:
        extract(teacher, url, workers=1)
    assert "Traceback" not in str(error.value)


def test_features_are_stored_in_the_asked_precision_and_folder(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path / "data", [3])
    extract(teacher, url, dtype=torch.bfloat16, folder=str(tmp_path / "features"))
    store = Store(store_path(url, "tiny", str(tmp_path / "features")))
    assert store.row("long", "000001", caption(1)).dtype == torch.bfloat16
    assert store.info.weights_digest == teacher.weights_digest()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_named_twice_is_asked_about_once(workers: int, teacher: Teacher, tmp_path: Path) -> None:
    one, two, three = write_shards(tmp_path, [9, 5, 7]).split("::")
    assert extract(teacher, f"{one}::{two}::{three}::{one}", workers=workers)[:3] == (21, 3, 0)
    store = Store(store_path(one, "tiny"))
    assert store.row("long", "000008", caption(8)).shape == (16,)


def test_shards_that_would_share_a_store_are_refused_before_the_teacher_is_asked(
    teacher: Teacher, tmp_path: Path
) -> None:
    urls = "::".join(write_shards(tmp_path / folder, [2]) for folder in ("a", "b"))
    with pytest.raises(DataError, match="same name in several folders"):
        extract(teacher, urls, folder=str(tmp_path / "features"))


def test_a_store_of_another_precision_is_written_anew(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    extract(teacher, url, dtype=torch.bfloat16)
    assert extract(teacher, url, dtype=torch.float32).shards == 1
    assert Store(store_path(url, "tiny")).dtype == torch.float32


def test_rows_of_other_views_are_not_lost_unasked(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    extract(teacher, url, views=("long",))
    with pytest.raises(DataError, match="holds image, long, and image, short are asked for"):
        extract(teacher, url, views=("short",))
    assert extract(teacher, url, views=("short",), overwrite=True).shards == 1
    assert Store(store_path(url, "tiny")).parts == {"image", "short"}
