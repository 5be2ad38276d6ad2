from __future__ import annotations

import io
import json
import os
import resource
import signal
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import InterpolationMode

from jettclip import get_tokenizer, get_wds_dataset
from jettclip.data.augmentation import Augmentation, parse, replay
from jettclip.data.counts import DataError
from jettclip.data.features import Store, StoreInfo, digest, store_path, write_store
from jettclip.data.quantize import quantize
from jettclip.data.sample import TeacherTokenizer
from jettclip.extract.members import ClipMember, Member
from jettclip.extract.reader import Drawing
from jettclip.extract.run import DTYPES, Extraction, extract_features
from jettclip.models.factory import Transform
from jettclip.models.teacher import Ensemble, Teacher
from jettclip.openclip import PreprocessCfg, image_transform_v2, keep_uint8
from jettclip.prepare.clean import write_manifests
from jettclip.settings import DataSettings, SampleSettings
from jettclip.types import Batch, TeacherFeatures
from support import caption, picture, run_ranks, sample, tiny_towers, write_shard, write_shards

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


def member(teacher: Teacher, length: int = 32) -> ClipMember:
    return ClipMember(teacher, transform(teacher.image_size[0]), get_tokenizer("Nano-248", length))


def rows(url: str, name: str, part: str) -> Tensor:
    """Returns the features [N, A or K, D] in a store, read without any code of ours."""
    tensors = load_file(store_path(url, name))
    scale = tensors.get(f"{part}_scale")
    return tensors[part].float() if scale is None else tensors[part].float() * scale.unsqueeze(-1)


def extract(
    teacher: Teacher | Sequence[Member],
    urls: str,
    *,
    name: str = "tiny",
    settings: SampleSettings = SETTINGS,
    **options: Any,
) -> Extraction:
    members = [member(teacher)] if isinstance(teacher, Teacher) else teacher
    given = {"batch_size": 4, "dtype": torch.float32, **options}
    return extract_features(members, settings, urls, name, **given)


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
        extract([ClipMember(teacher, transform(teacher.image_size[0]), tokenizer)], url, name=teacher.name)
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


def test_stores_of_the_same_teacher_are_kept(teacher: Teacher, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [4, 4])
    extract(teacher, urls)
    os.remove(store_path(urls.split("::")[1], "tiny"))
    assert extract(teacher, urls)[:3] == (4, 1, 1)
    assert extract(teacher, urls)[:3] == (0, 0, 2)
    assert extract(teacher, urls, overwrite=True)[:3] == (8, 2, 0)


FIELD = SampleSettings(long_caption_field="txt,long_caption")
POLICY = SampleSettings(short_caption_policy="drop-summary")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"dtype": torch.bfloat16}, r"dtype \('float32' there, 'bfloat16' asked for\);"),
        ({"drawing": Drawing(2)}, r"augmentation \('' there, .* asked for\);"),
        ({"precision": "amp_bf16"}, r"precision \('fp32' there, 'amp_bf16' asked for\);"),
        ({"settings": FIELD}, r"long_caption_field \(.* there, 'txt,long_caption' asked for\);"),
        ({"settings": POLICY}, r"short_caption_policy \('first-sentence' there, 'drop-summary' asked for\);"),
    ],
)
def test_a_store_that_differs_is_not_lost_unasked(
    options: dict[str, Any], what: str, teacher: Teacher, tmp_path: Path
) -> None:
    urls = write_shards(tmp_path, [3, 2])
    extract(teacher, urls)
    path = Path(store_path(urls.split("::")[1], "tiny"))
    before = path.read_bytes()
    os.remove(store_path(urls.split("::")[0], "tiny"))
    with pytest.raises(DataError, match=rf"000001.tiny.safetensors is there and differs in {what}.*--overwrite"):
        extract(teacher, urls, **options)
    assert path.read_bytes() == before
    assert not Path(store_path(urls.split("::")[0], "tiny")).exists()  # nothing was asked before
    assert extract(teacher, urls, overwrite=True, **options)[:3] == (5, 2, 0)
    assert extract(teacher, urls, **options).kept == 2


def test_a_store_of_another_teacher_is_not_lost_unasked(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    extract(teacher, url)
    with torch.no_grad():
        teacher.model.logit_scale.add_(1)
    with pytest.raises(DataError, match=r"differs in weights_digest \('\w+' there.*; logit_scale \("):
        extract(teacher, url)
    assert extract(teacher, url, overwrite=True)[:3] == (3, 1, 0)


def test_a_store_that_cannot_be_read_is_written_anew(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    extract(teacher, url)
    Path(store_path(url, "tiny")).write_bytes(b"cut")
    assert extract(teacher, url)[:3] == (3, 1, 0)


@pytest.mark.parametrize("changed", ["image", "key"])
def test_a_store_is_held_against_the_manifest(changed: str, teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    write_manifests([url], 1)
    extract(teacher, url)
    assert extract(teacher, url).unread == 0
    others = [sample(i + 5 * (changed == "key" and i == 2)) for i in range(3)]
    if changed == "image":
        others[1]["png"] = picture(77)
    write_shard(Path(url), others)
    write_manifests([url], 1)
    key, reason = ("000001", "image feature is stale") if changed == "image" else ("000002", "sample is not in")
    with pytest.raises(DataError, match=rf"does not fit {url}: sample {key}: {reason}.*--overwrite"):
        extract(teacher, url)
    assert extract(teacher, url, overwrite=True).shards == 1
    assert extract(teacher, url).kept == 1


def test_samples_that_were_dropped_make_no_store_stale(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [sample(0), sample(1), sample(2, png=b"x", long_caption="a b")])
    write_manifests([url], 1)
    assert extract(teacher, url).samples == 2
    assert extract(teacher, url).kept == 1


def test_a_store_that_describes_itself_otherwise_is_not_lost_unasked(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [1])
    info = StoreInfo("T", "12", 9.0, True, "[no JSON", 16)
    write_store(store_path(url, "tiny"), ["0"], {"long": torch.ones(1, 16)}, {"long": [b"12345678"]}, info)
    with pytest.raises(DataError, match=r"differs in .*model \('T' there, 'tiny' asked for\)"):
        extract(teacher, url)


def test_a_manifest_that_cannot_be_read_stops_nothing(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    (tmp_path / "000000.manifest.json").write_text("{")
    assert extract(teacher, url).damaged == {"manifest cannot be read": 1}
    assert extract(teacher, url)[2] == 1


def test_it_is_told_which_stores_were_kept_unread(teacher: Teacher, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [2, 2])
    write_manifests(urls.split("::")[:1], 1)
    assert "manifest" not in extract(teacher, urls).describe()
    assert "1 of the stores kept were not held against their shards" in extract(teacher, urls).describe()


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
    urls = write_shards(tmp_path, [4, 1, 5, 6])
    assert [extract(teacher, urls, rank=rank, world_size=2).samples for rank in (0, 1)] == [7, 9]
    assert extract(teacher, urls).kept == 4


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
    assert store.dtype == torch.bfloat16
    assert store.info.weights_digest == teacher.weights_digest()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_named_twice_is_asked_about_once(workers: int, teacher: Teacher, tmp_path: Path) -> None:
    one, two, three = write_shards(tmp_path, [9, 5, 7]).split("::")
    assert extract(teacher, f"{one}::{two}::{three}::{one}", workers=workers)[:3] == (21, 3, 0)
    assert rows(one, "tiny", "long").shape == (9, 1, 16)


def test_shards_that_would_share_a_store_are_refused_before_the_teacher_is_asked(
    teacher: Teacher, tmp_path: Path
) -> None:
    urls = "::".join(write_shards(tmp_path / folder, [2]) for folder in ("a", "b"))
    with pytest.raises(DataError, match="same name in several folders"):
        extract(teacher, urls, folder=str(tmp_path / "features"))


def test_rows_of_other_views_are_not_lost_unasked(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    extract(teacher, url, views=("long",))
    with pytest.raises(DataError, match="holds image, long, and image, short are asked for"):
        extract(teacher, url, views=("short",))
    assert extract(teacher, url, views=("short",), overwrite=True).shards == 1
    assert Store(store_path(url, "tiny")).parts == {"image", "short"}


def assert_same_store(path: str, other: str) -> None:
    tensors, others = load_file(path), load_file(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert Store(path).keys == Store(other).keys
    assert Store(path).info == Store(other).info


def test_several_ranks_write_the_stores_of_one(teacher: Teacher, tmp_path: Path) -> None:
    urls, alone = write_shards(tmp_path / "a", [4, 5, 6]), write_shards(tmp_path / "b", [4, 5, 6])
    done = run_ranks(2, lambda: extract(teacher, urls, rank=torch.distributed.get_rank(), world_size=2).samples)
    assert done == [6, 9]
    extract(teacher, alone)
    for ours, theirs in zip(urls.split("::"), alone.split("::"), strict=True):
        assert_same_store(store_path(ours, "tiny"), store_path(theirs, "tiny"))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_does_not_change_the_features(batch_size: int, tmp_path: Path) -> None:
    texts = [{"json": {"long_caption": [caption(i + 50 * n, 5 + n) for n in range(1 + i % 3)]}} for i in range(9)]
    url = write_shard(
        tmp_path / "0.tar", [sample(i, png=smooth_picture(i, 24), **text) for i, text in enumerate(texts)]
    )
    members = [member(Teacher(tiny_towers(width=12), "a")), member(Teacher(tiny_towers(mask_padding=False), "b"))]
    for name, size in (("one", 1), ("other", batch_size)):
        extract(members, url, name=name, batch_size=size, drawing=Drawing(3))
    for part in ("image", "short", "long"):
        assert rows(url, "one", part).shape == (9, 3, 28)
        torch.testing.assert_close(rows(url, "one", part), rows(url, "other", part), atol=1e-5, rtol=0)


def augmentations(url: str, name: str) -> list[list[Augmentation]]:
    """Returns the augmentations that a store holds of each sample."""
    tensors = load_file(store_path(url, name))
    pieces = torch.tensor_split(tensors["paug"], tensors["paug_end"][:-1])
    return [parse(bytes(piece.tolist())) for piece in pieces]


@pytest.mark.parametrize("workers", [0, 2])
def test_teachers_see_the_augmentations_that_are_stored(workers: int, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3, 4])
    options: dict[str, Any] = {"drawing": Drawing(5, seed=3), "workers": workers}
    for name, size in (("small", 16), ("large", 24)):
        teacher = Teacher(tiny_towers(size=size), name)
        extract(teacher, urls, name=name, **options)
        for url in urls.split("::"):
            found = zip(
                Store(store_path(url, name)).keys, rows(url, name, "image"), augmentations(url, name), strict=True
            )
            for key, features, drawn in found:
                image = Image.open(io.BytesIO(picture(int(key)))).convert("RGB")
                views = torch.stack([replay(image, one, (size, size), InterpolationMode.BICUBIC) for one in drawn])
                # the crop of a decoded array is rounded differently from Pillow's
                said = teacher.model.encode_image(views, normalize=True)
                torch.testing.assert_close(features, said, atol=2e-2, rtol=0)


def test_the_same_seed_draws_the_same_augmentations_for_every_teacher(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [4])
    for name, size, seed in (("a", 16, 0), ("b", 24, 0), ("c", 16, 1)):
        extract(Teacher(tiny_towers(size=size), name), url, name=name, drawing=Drawing(3, seed))
    a, b, c = (augmentations(url, name) for name in "abc")
    assert a == b
    for row in range(4):
        assert a[row] != c[row]
        assert len(set(a[row])) == 3
    assert a[0] != a[1]
    assert load_file(store_path(url, "b"))["image_size"].tolist() == [[16, 16]] * 4
    assert json.loads(Store(store_path(url, "a")).info.augmentation) == {
        "augmentations": 3, "seed": 0, "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "operations": 2, "magnitude": 9,
        "crop_size": 224,
    }  # fmt: skip


def test_training_replays_what_the_teacher_saw(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [12])
    extract(teacher, url, drawing=Drawing(4))
    loader = get_wds_dataset(
        SETTINGS, url, transform(), get_tokenizer("Nano-248", 32), is_train=True, batch_size=12, crop_captions=True
    )
    plain = get_wds_dataset(
        DataSettings(), url, transform(), get_tokenizer("Nano-248", 32), is_train=False, batch_size=12
    )
    (batch,) = loader
    assert batch.teacher is not None
    for stored, said in zip(batch.teacher, teacher(*batch[:3]), strict=True):
        torch.testing.assert_close(stored, said, atol=1e-6, rtol=0)
    (unchanged,) = plain
    assert not torch.equal(batch.image.sum(dim=(1, 2, 3)).sort()[0], unchanged.image.sum(dim=(1, 2, 3)).sort()[0])


def test_every_caption_has_its_row(teacher: Teacher, tmp_path: Path) -> None:
    captions = [["a red dog", "big tree", "small car near house"], ["blue cat"], ["river", "green apple"]]
    url = write_shard(tmp_path / "0.tar", [sample(i, png=picture(i), json={"all": c}) for i, c in enumerate(captions)])
    settings = SampleSettings(short_caption_field="none", long_caption_field="json:all", short_caption_policy="none")
    extract(teacher, url, settings=settings, views=("long",))
    tensors, read = load_file(store_path(url, "tiny")), get_tokenizer("Nano-248", 32)
    assert tensors["long"].shape == (3, 3, 16)
    for texts, features, digests in zip(captions, tensors["long"], tensors["long_digest"], strict=True):
        count = len(texts)
        said = teacher.model.encode_text(read(texts), normalize=True)
        torch.testing.assert_close(features[:count], said, atol=1e-6, rtol=0)
        assert [bytes(row.tolist()) for row in digests[:count]] == [digest(text) for text in texts]
        assert not features[count:].any()
        assert not digests[count:].any()


def test_an_ensemble_fills_one_store_side_by_side(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [5])
    small, large = Teacher(tiny_towers(width=12), "small"), Teacher(tiny_towers(size=24, context_length=9), "large")
    members = [member(small), member(large, 9)]
    extract(members, url, name="both", drawing=Drawing(2))
    for one in members:
        extract([one], url, name=one.teacher.name, drawing=Drawing(2))
    info = Store(store_path(url, "both")).info
    scales = [teacher.info.logit_scale for teacher in (small, large)]
    assert json.loads(info.members) == [["small", 12, scales[0]], ["large", 16, scales[1]]]
    assert (info.width, info.model) == (28, "small,large")
    assert augmentations(url, "both") == augmentations(url, "large")
    for part in ("image", "short", "long"):
        expected = torch.cat([rows(url, name, part) for name in ("small", "large")], dim=2)
        torch.testing.assert_close(rows(url, "both", part), expected, atol=1e-6, rtol=0)


def test_a_trainer_knows_the_members_of_an_ensemble(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [5])
    teachers = [Teacher(tiny_towers(width=12, logit_scale=50), "a"), Teacher(tiny_towers(logit_scale=70), "b")]
    extract([member(teacher) for teacher in teachers], url)
    loader = get_wds_dataset(SETTINGS, url, transform(), get_tokenizer("Nano-248", 32), is_train=False, batch_size=5)
    assert [info.width for info in loader.teachers] == [12, 16]
    assert [round(info.logit_scale) for info in loader.teachers] == [50, 70]


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 4e-3), ("int8", 4e-3)])
def test_features_are_stored_in_every_precision(dtype: str, bound: float, teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [5])
    extract(teacher, url, name="whole")
    extract(teacher, url, dtype=DTYPES[dtype])
    assert Store(store_path(url, "tiny")).dtype == DTYPES[dtype]
    assert (rows(url, "tiny", "long") - rows(url, "whole", "long")).abs().max() <= bound
    if dtype == "int8":  # made of the answers as they are, not of rounded ones
        assert torch.equal(load_file(store_path(url, "tiny"))["long"], quantize(rows(url, "whole", "long"))[0])
    assert extract(teacher, url, dtype=DTYPES[dtype]).kept == 1


def test_autocast_computes_in_half_precision(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [5])
    extract(teacher, url, name="whole")
    extract(teacher, url, precision="amp_bf16")
    whole, half = (rows(url, name, "image") for name in ("whole", "tiny"))
    assert 0 < (whole - half).abs().max() < 0.05


class Killed(ClipMember):
    """A teacher whose process is killed when it has seen so many batches."""

    left = 6

    def embed_images(self, images: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_images(images)


def in_a_process(function: Callable[[], object]) -> int | None:
    process = get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    return process.exitcode


def test_a_run_that_was_killed_goes_on_and_gives_what_one_run_gives(teacher: Teacher, tmp_path: Path) -> None:
    urls, whole = write_shards(tmp_path / "a", [9, 8, 7]), write_shards(tmp_path / "b", [9, 8, 7])
    killed = Killed(teacher, transform(), get_tokenizer("Nano-248", 32))
    assert in_a_process(lambda: extract([killed], urls)) == -signal.SIGKILL
    assert [os.path.exists(store_path(url, "tiny")) for url in urls.split("::")] == [True, False, False]
    assert extract(teacher, urls)[:3] == (15, 2, 1)
    extract(teacher, whole)
    for ours, theirs in zip(urls.split("::"), whole.split("::"), strict=True):
        assert_same_store(store_path(ours, "tiny"), store_path(theirs, "tiny"))


def error_of(function: Callable[[], object], told: Path) -> str:
    """Calls a function in a process of its own, and returns the message of its DataError."""

    def run() -> None:
        try:
            function()
        except DataError as error:
            told.write_text(str(error))

    assert in_a_process(run) == 0
    return told.read_text()


def test_a_full_disk_stops_the_extraction_and_leaves_nothing(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path / "data", [9])

    def extract_on_a_small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        extract(teacher, url, folder=str(tmp_path / "features"))

    message = error_of(extract_on_a_small_disk, tmp_path / "told")
    assert "000000.tiny.safetensors cannot be written" in message
    assert "\n" not in message
    assert not list((tmp_path / "features").iterdir())


def test_a_folder_that_cannot_be_made_is_told_before_the_teacher_is_asked(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [9])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/features' cannot be made \(.*\); choose another --features-dir"):
        extract(teacher, url, folder=str(tmp_path / "file" / "features"))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, where nobody can write")
def test_a_folder_that_cannot_be_written_to_is_told(teacher: Teacher, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [9])
    with pytest.raises(DataError, match="'/proc/self' cannot be written to"):
        extract(teacher, url, folder="/proc/self")


def test_a_batch_of_nothing_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--batch-size 0 must be at least 1"):
        extract(teacher, write_shards(tmp_path, [2]), batch_size=0)


def test_what_was_done_is_told(teacher: Teacher, tmp_path: Path) -> None:
    long = sample(7, png=picture(7), long_caption="word " * 60)
    url = write_shard(tmp_path / "0.tar", [sample(0), long, sample(8, txt="no image")])
    done = extract(teacher, url)
    assert done.size == os.path.getsize(store_path(url, "tiny"))
    told = done.describe()
    assert "2 samples in 1 shards written, 0 shards kept; dropped image is missing 1; " in told
    assert f"samples/s, {done.size / 2:.0f} bytes a sample" in told
    assert "noted: short caption by first-sentence 2, " in told
    assert "long caption truncated to 32 tokens 1" in told
