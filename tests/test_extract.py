from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from jettclip import get_tokenizer, get_wds_dataset
from jettclip.data.counts import DataError
from jettclip.data.features import Store, store_path
from jettclip.data.sample import SampleReader
from jettclip.extract import Extraction, extract_features
from jettclip.models.factory import Transform
from jettclip.models.teacher import Teacher
from jettclip.openclip import PreprocessCfg, image_transform_v2, keep_uint8
from jettclip.settings import DataSettings
from support import caption, picture, sample, tiny_towers, write_shard, write_shards

SETTINGS = DataSettings(features="tiny", max_drop_rate=0.5)


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(tiny_towers(), "tiny")


def transform() -> Transform:
    return keep_uint8(image_transform_v2(PreprocessCfg(size=16), is_train=False))


def extract(teacher: Teacher, urls: str, **options: object) -> Extraction:
    reader = SampleReader(SETTINGS, transform(), get_tokenizer("Nano-248", 32), ("short", "long"))
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
        for stored, said in zip(batch.teacher, teacher(batch), strict=True):
            torch.testing.assert_close(stored, said, atol=1e-6, rtol=0)


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


def test_features_are_stored_in_the_asked_precision_and_folder(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path / "data", [3])
    extract(teacher, url, dtype=torch.bfloat16, folder=str(tmp_path / "features"))
    store = Store(store_path(url, "tiny", str(tmp_path / "features")))
    assert store.row("long", "000001", caption(1)).dtype == torch.bfloat16
    assert store.info.weights_digest == teacher.weights_digest()
