from __future__ import annotations

import os
import pickle
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from jettclip.data.counts import DataError, Tally
from jettclip.data.features import StoreInfo, digest, write_store
from jettclip.data.manifest import member_digest, write_manifest
from jettclip.data.pipeline import Loader, get_wds_dataset
from jettclip.data.streams import read_shard
from jettclip.identity import identity_of, number_of
from jettclip.models.tokenizer import CachedTokenizer
from jettclip.settings import DataSettings
from jettclip.types import Batch, TeacherFeatures
from support import caption, picture, sample, write_shard, write_shards

END = 49407
# torch warns of more workers than the machine has cores
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def to_tensor(image: Image.Image) -> Tensor:
    return torch.zeros(3, image.height, image.width, dtype=torch.uint8)


def tokenize(text: str) -> Tensor:
    """One token a word between start and end, padded to 20."""
    ids = [END - 1, *(1 + sum(word.encode()) for word in text.split()[:18]), END]
    return torch.tensor([ids + [0] * (20 - len(ids))])


def loader_of(urls: str | list[str], *, is_train: bool = True, batch_size: int = 2, **options: Any) -> Loader:
    names = DataSettings.__dataclass_fields__
    settings = DataSettings(**{name: options.pop(name) for name in list(options) if name in names})
    return get_wds_dataset(settings, urls, to_tensor, tokenize, is_train=is_train, batch_size=batch_size, **options)


def keys_of(loader: Loader) -> list[list[str]]:
    """Returns the keys of every batch."""
    found = []
    for batch in loader:
        assert len(batch.image) == len(loader.last_info.keys)
        found.append(loader.last_info.keys)
    return found


def dropped_by(loader: Loader) -> Counter[str]:
    dropped: Counter[str] = Counter()
    for _ in loader:
        dropped.update(loader.last_info.dropped)
    return dropped


def flat(batches: Iterable[Iterable[str]]) -> list[str]:
    return [key for keys in batches for key in keys]


def numbers(count: int) -> list[str]:
    return [f"{number:06d}" for number in range(count)]


def test_batches_are_tuples_of_image_captions_and_teacher(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [4])
    batches = list(loader_of(urls, is_train=False))
    assert len(batches) == 2
    for index, batch in enumerate(batches):
        image, short, long, teacher = batch
        assert isinstance(batch, Batch)
        assert (image.dtype, image.shape) == (torch.uint8, (2, 3, 16, 16))
        rows = [2 * index, 2 * index + 1]
        assert torch.equal(short, torch.cat([tokenize(f"thing {row}") for row in rows]))  # type: ignore[arg-type]
        assert torch.equal(long, torch.cat([tokenize(caption(row)) for row in rows]))  # type: ignore[arg-type]
        assert teacher is None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_train", [False, True])
def test_the_numbers_of_images_travel_beside_their_keys(is_train: bool, workers: int, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [5, 6])
    write_shard(tmp_path / "000001.tar", [{**sample(number), "png": picture(number % 3)} for number in range(5, 11)])
    loader = loader_of(urls, is_train=is_train, workers=workers)
    read = 0
    for _ in loader:
        expected = [picture(int(key) % 3 if int(key) > 4 else int(key)) for key in loader.last_info.keys]
        assert loader.last_info.images == [number_of(data) for data in expected]
        read += len(loader.last_info.images)
    assert read == (10 if is_train else 11)


def test_an_image_that_is_drawn_twice_is_known_to_be_the_same(tmp_path: Path) -> None:
    loader = loader_of(write_shards(tmp_path, [3]), batch_size=12, resampled=True, num_samples=12)
    (batch,) = loader
    found = identity_of(batch, loader.last_info)
    keys = loader.last_info.keys
    assert len(set(keys)) == 3
    same = torch.tensor([[one == other for other in keys] for one in keys])
    for numbers in found:
        assert numbers is not None
        assert torch.equal(numbers.unsqueeze(0) == numbers.unsqueeze(1), same)


def test_counts_without_a_batch_join_the_one_before_with_all_its_images(tmp_path: Path) -> None:
    """In evaluation, where the worker of the second shard has nothing usable to put into its batch."""
    broken = [{**sample(number), "png": b"no picture"} for number in range(2, 4)]
    urls = write_shards(tmp_path, [2, 2])
    write_shard(tmp_path / "000001.tar", broken)
    loader = loader_of(urls, is_train=False, workers=2, max_drop_rate=1.0)
    (batch,) = loader
    assert loader.last_info.dropped == {"image cannot be decoded": 2}
    assert loader.last_info.images == [number_of(picture(number)) for number in range(2)]
    assert identity_of(batch, loader.last_info).image.tolist() == loader.last_info.images


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_reads_each_sample_once(workers: int, world_size: int, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [5, 0, 1, 11])
    read = []
    for rank in range(world_size):
        loader = loader_of(urls, is_train=False, workers=workers, rank=rank, world_size=world_size, batch_size=3)
        batches = keys_of(loader)
        assert len(batches) == len(loader)
        read += flat(batches)
    assert sorted(read) == numbers(17)
    if workers < 2:
        assert read == numbers(17)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_reads_each_sample_once_in_equal_numbers_of_full_batches(
    workers: int, world_size: int, tmp_path: Path
) -> None:
    urls = write_shards(tmp_path, [5, 0, 1, 13])
    read = []
    for rank in range(world_size):
        loader = loader_of(urls, workers=workers, rank=rank, world_size=world_size)
        batches = keys_of(loader)
        assert [len(keys) for keys in batches] == [2] * (19 // (2 * world_size))
        assert len(loader) == len(batches)
        read += flat(batches)
    assert len(set(read)) == len(read) == 19 // (2 * world_size) * 2 * world_size


def test_epochs_leave_no_sample_out_for_long(tmp_path: Path) -> None:
    loader = loader_of(write_shards(tmp_path, [4, 3]), batch_size=3)  # 6 of 7 samples an epoch
    counts: Counter[str] = Counter()
    for epoch in range(7):
        loader.set_epoch(epoch)
        counts.update(flat(keys_of(loader)))
    assert counts == dict.fromkeys(numbers(7), 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_repeatable_and_another_one_differs(workers: int, tmp_path: Path) -> None:
    loader = loader_of(write_shards(tmp_path, [8, 8]), workers=workers)
    first = keys_of(loader)
    assert keys_of(loader) == first
    loader.set_epoch(1)
    second = keys_of(loader)
    assert second != first
    assert sorted(flat(second)) == sorted(flat(first))
    assert keys_of(loader_of(write_shards(tmp_path, [8, 8]), workers=workers, seed=1)) != first


def test_samples_are_shuffled_within_the_buffer(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [20])
    assert flat(keys_of(loader_of(urls, shuffle_buffer=1))) == numbers(20)
    near = flat(keys_of(loader_of(urls, shuffle_buffer=4)))
    assert near != numbers(20)
    assert all(abs(place - int(key)) < 20 and int(key) - place <= 4 for place, key in enumerate(near))


def test_more_workers_than_batches_make_no_difference_to_their_number(tmp_path: Path) -> None:
    loader = loader_of(write_shards(tmp_path, [5]), workers=3)
    assert [len(keys) for keys in keys_of(loader)] == [2, 2]


def test_batches_are_cropped_to_their_longest_caption_only_on_request(tmp_path: Path) -> None:
    texts = ["one two", "one two three four five", "one", "!"]
    shard = [sample(i, png=picture(i), short_caption="x", long_caption=text) for i, text in enumerate(texts)]
    urls = write_shard(tmp_path / "0.tar", shard)
    for crop, shapes in ((True, [7, 3]), (False, [20, 20])):
        batches = list(loader_of(urls, is_train=False, crop_captions=crop))
        assert [batch.long_caption.shape[1] for batch in batches if batch.long_caption is not None] == shapes
        assert [batch.short_caption.shape[1] for batch in batches if batch.short_caption is not None] == (
            [3, 3] if crop else [20, 20]
        )


def test_an_epoch_may_be_shorter_or_longer_than_the_data(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [7])
    assert len(flat(keys_of(loader_of(urls, num_samples=4)))) == 4
    longer = Counter(flat(keys_of(loader_of(urls, num_samples=14))))
    assert longer == dict.fromkeys(numbers(7), 2)


def test_evaluation_reads_no_sample_twice_however_many_are_announced(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [5])
    assert flat(keys_of(loader_of(urls, is_train=False, num_samples=100))) == numbers(5)
    assert flat(keys_of(loader_of(urls, is_train=False, num_samples=3))) == numbers(3)


def test_resampling_draws_shards_by_the_weight_of_their_source(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [4, 4])
    read = flat(keys_of(loader_of(urls, resampled=True, weights="9::1", num_samples=2000, batch_size=50)))
    assert len(read) == 2000
    assert sum(int(key) < 4 for key in read) / 2000 == pytest.approx(0.9, abs=0.04)


def test_resampling_is_for_training_only(tmp_path: Path) -> None:
    assert flat(keys_of(loader_of(write_shards(tmp_path, [5]), is_train=False, resampled=True))) == numbers(5)


def test_ranks_and_workers_resample_differently(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [1] * 20)
    options: dict[str, Any] = {"resampled": True, "num_samples": 40, "world_size": 2}
    first, second = (flat(keys_of(loader_of(urls, rank=rank, **options))) for rank in (0, 1))
    assert len(first) == len(second) == 20
    assert first != second
    workers = keys_of(loader_of(urls, rank=0, workers=2, **options))
    assert flat(workers[0::2]) != flat(workers[1::2])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_output_of_commands_is_read_with_and_without_resampling(workers: int, tmp_path: Path) -> None:
    urls = [f"pipe:cat {url}" for url in write_shards(tmp_path, [3, 4]).split("::")]
    with pytest.raises(DataError, match="--allow-pipe-urls"):
        loader_of(urls)
    loader = loader_of(urls, is_train=False, workers=workers, allow_pipe_urls=True)
    assert sorted(flat(keys_of(loader))) == numbers(7)
    resampled = loader_of(urls, resampled=True, num_samples=8, workers=workers, allow_pipe_urls=True, shuffle_buffer=1)
    assert set(flat(keys_of(resampled))) <= set(numbers(7))


@pytest.mark.parametrize(
    ("is_train", "options", "message"),
    [
        (True, {"batch_size": 4}, r"7 samples are too few for 2 ranks, which need 8 \(a batch of 4 each\)"),
        (True, {"batch_size": 4, "num_samples": 7}, "--train-num-samples"),
        (False, {"world_size": 8}, r"7 samples are too few for 8 ranks, which need 8 \(one sample each\)"),
        (True, {"resampled": True}, r"0 samples are too few .*--train-num-samples"),
    ],
)
def test_too_few_samples_are_an_error_and_not_a_hang(
    is_train: bool, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        loader_of(write_shards(tmp_path, [7]), is_train=is_train, **{"world_size": 2, **options})


BAD: dict[str, dict[str, Any]] = {
    "image cannot be decoded": {"jpg": picture(0, format="JPEG", size=40)[:500], "txt": "a dog"},
    "image is missing": {"txt": "a dog"},
    "short caption is missing": {"png": picture(0)},
    "long caption is missing": {"png": picture(0), "short_caption": "a dog"},
    "caption is empty": {"png": picture(0), "txt": ""},
    "caption is not UTF-8": {"png": picture(0), "txt": b"caf\xe9"},
    "json cannot be decoded": {"png": picture(0), "json": "[1]"},
    "caption in the json is not text": {"png": picture(0), "json": {"long_caption": 1, "short_caption": 1}},
    "image has too many pixels": {"png": picture(0, size=40), "txt": "a dog"},
}


def with_bad_ones(folder: Path, good: int = 12) -> str:
    """Writes good samples and one of every bad kind among them."""
    bad = [sample(100 + i, **members) for i, members in enumerate(BAD.values())]
    return write_shard(folder / "000000.tar", [sample(0), *bad, *(sample(i) for i in range(1, good))])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_dropped_sample_is_counted_under_its_reason(workers: int, tmp_path: Path) -> None:
    urls = with_bad_ones(tmp_path)
    loader = loader_of(urls, is_train=False, workers=workers, max_image_pixels=1000)
    dropped: Counter[str] = Counter()
    keys = []
    for _ in loader:
        dropped.update(loader.last_info.dropped)
        keys += loader.last_info.keys
    assert dropped == dict.fromkeys(BAD, 1)
    assert sorted(keys) == numbers(12)


def test_a_json_member_that_would_fill_the_memory_is_a_counted_drop(tmp_path: Path) -> None:
    bomb = b'{"long_caption": [' + b"[]," * 2**21 + b"[]]}"  # 6 MiB, of which Python would make 130
    shard = [sample(0), sample(1, png=picture(1), short_caption="a dog", json=bomb), sample(2)]
    loader = loader_of(write_shard(tmp_path / "0.tar", shard), is_train=False)
    assert dropped_by(loader) == {"json is absurdly large": 1}


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_evaluation_counts_what_is_lost_before_between_and_after_the_batches(
    workers: int, place: str, tmp_path: Path
) -> None:
    good, bad = [sample(i) for i in range(6)], [sample(100 + i, txt="no image") for i in range(6)]
    shard = {"first": bad + good, "middle": good[:3] + bad + good[3:], "last": good + bad}[place]
    loader = loader_of(write_shard(tmp_path / "0.tar", shard), is_train=False, workers=workers)
    dropped: Counter[str] = Counter()
    keys = []
    for batch in loader:
        assert len(batch.image)
        dropped.update(loader.last_info.dropped)
        keys += loader.last_info.keys
    assert dropped == {"image is missing": 6}
    assert sorted(keys) == numbers(6)


def damage(shard: Path, *names: bytes) -> None:
    """Spoils the headers of members, and adds members that belong to no sample, in place of the end."""
    data = bytearray(shard.read_bytes())
    for name in names:
        data[data.index(name + b"\0") + 120] ^= 0xFF
    end = -(-len(data.rstrip(b"\0")) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    before, *after = (tarfile.TarInfo(name).tobuf() for name in ("before", "after", "000001.png"))
    shard.write_bytes(before + data[:end] + b"".join(after))


@pytest.mark.parametrize("has_manifest", [False, True])
@pytest.mark.parametrize("is_train", [False, True])
def test_damage_is_counted_once_however_many_read(is_train: bool, has_manifest: bool, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [sample(n) | {"extra": "unread"} for n in range(12)])
    wanted = frozenset({"png", "short_caption", "long_caption"})
    groups = list(read_shard(url, wanted, Tally()))
    lossy = () if is_train else (b"000003.png", b"000007.long_caption", b"000011.png")
    damage(Path(url), b"000004.extra", b"000008.extra", *lossy)  # training reads on in place of what is lost
    if has_manifest:
        write_manifest(url, [(g["__key__"], {name: member_digest(g[name]) for name in wanted}) for g in groups])
    for world_size, workers in product((1, 2), (0, 1, 2)):
        dropped, damaged = Counter[str](), Counter[str]()
        for rank in range(world_size):
            options: dict[str, Any] = {"rank": rank, "world_size": world_size, "workers": workers}
            loader = loader_of(url, is_train=is_train, **options)
            for _ in loader:
                dropped.update(loader.last_info.dropped)
                damaged.update(loader.last_info.damaged)
        assert damaged == {
            "tar header is damaged": 2 + len(lossy),
            "member name has no key and extension": 2,
            "shard is cut short": 1,
            "member occurs again in the shard" if has_manifest else "key occurs again later in the shard": 1,
        }
        assert dropped.total() == len(lossy)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_dropped_samples_so_that_batches_stay_full(workers: int, tmp_path: Path) -> None:
    loader = loader_of(with_bad_ones(tmp_path), workers=workers, max_image_pixels=1000)
    dropped: Counter[str] = Counter()
    batches = []
    for batch in loader:
        dropped.update(loader.last_info.dropped)
        batches.append(len(batch.image))
        assert all(int(key) < 100 for key in loader.last_info.keys)
    assert batches == [2] * 10  # of 21 samples: one is left for the next epoch
    assert dropped.keys() <= BAD.keys()
    assert dropped.total() >= 8


def test_a_batch_carries_what_was_noted(tmp_path: Path) -> None:
    shard = [sample(i, png=picture(i), txt="A dog. It runs.") for i in range(4)]
    loader = loader_of(write_shard(tmp_path / "0.tar", shard), is_train=False)
    for _ in loader:
        assert loader.last_info.noted == {"short caption by first-sentence": 2}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_train", [False, True])
def test_an_input_without_a_usable_sample_stops_naming_what_is_missing(
    workers: int, is_train: bool, tmp_path: Path
) -> None:
    urls = write_shard(tmp_path / "0.tar", [sample(i, gif=b"", txt="a dog") for i in range(8)])
    loader = loader_of(urls, is_train=is_train, workers=workers)
    with pytest.raises(DataError, match=r"^no.* usable: image is missing \d+") as error:
        list(loader)
    if is_train:
        assert re.search(r"last: sample \d+ of .*0\.tar \(image is missing: it has txt\)$", str(error.value))
    assert "Traceback" not in str(error.value)


def test_too_many_drops_stop_the_worker(tmp_path: Path) -> None:
    tiny = picture(0, size=1)
    shard = [sample(i, txt="A dog.", **({} if i % 50 == 20 else {"png": tiny})) for i in range(1100)]  # 2 % are bad
    urls = write_shard(tmp_path / "0.tar", shard)
    with pytest.raises(DataError, match=r"of 1\d\d\d samples were dropped \(image is missing \d+\).*--max-drop-rate"):
        list(loader_of(urls, is_train=False, batch_size=100))
    assert dropped_by(loader_of(urls, is_train=False, batch_size=100, max_drop_rate=0.03)).total() == 22


def test_a_shard_that_was_cut_since_it_was_counted_is_counted_as_lost(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [6, 6])
    loader = loader_of(urls, is_train=False)
    first = Path(urls.split("::")[0])
    first.write_bytes(first.read_bytes()[:6000])
    dropped, damaged = Counter[str](), Counter[str]()
    for _ in loader:
        dropped.update(loader.last_info.dropped)
        damaged.update(loader.last_info.damaged)
    lost = dropped["shard holds fewer samples than it did when counted"]
    assert 0 < lost < 6
    assert damaged == {"shard is cut short": 1}


@pytest.mark.parametrize("is_train", [False, True])
@pytest.mark.parametrize("grown", [0, 1])
def test_a_shard_that_has_grown_since_it_was_counted_is_reported(is_train: bool, grown: int, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [6, 6])
    loader = loader_of(urls, is_train=is_train, shuffle_buffer=1)
    write_shard(tmp_path / f"{grown:06d}.tar", [sample(6 * grown + i) for i in range(9)])
    damaged = Counter[str]()
    keys = []
    for _ in loader:
        damaged.update(loader.last_info.damaged)
        keys += loader.last_info.keys
    assert damaged == {"shard holds more samples than it did when counted": 1}
    assert sorted(keys) == numbers(12)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_that_runs_out_of_samples_ends_training_with_an_error(workers: int, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [4] * max(1, workers))  # a shard for each worker
    loader = loader_of(urls, workers=workers)
    write_shard(Path(urls.split("::")[0]), [])
    with pytest.raises(DataError, match="^no usable sample is left: shard holds fewer .* than it did when counted 4"):
        list(loader)  # not fewer batches than on the other ranks


def test_resampling_nothing_but_empty_shards_ends_with_an_error(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [0, 0])
    with pytest.raises(DataError, match="shard holds no samples"):
        list(loader_of(urls, resampled=True, num_samples=10))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanished_is_an_error_naming_it(workers: int, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [6])
    loader = loader_of(urls, workers=workers)
    Path(urls).unlink()
    with pytest.raises(DataError, match=r"^shard .*000000\.tar' cannot be opened"):
        list(loader)


@pytest.mark.parametrize("extension", ["pickle", "pkl", "pyd", "pth", "pth.gz", "json.pickle"])
def test_no_member_is_ever_executed(extension: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {mark}",)

    data = pickle.dumps(Attack())
    members = {"png": picture(0), "short_caption": "a dog", "long_caption": "a dog", extension: data}
    urls = write_shard(tmp_path / "0.tar", [sample(i, **members) for i in range(2)])
    (batch,) = loader_of(urls, is_train=False)
    assert len(batch.image) == 2
    assert dropped_by(loader_of(urls, is_train=False)).total() == 0
    with pytest.raises(DataError, match="caption is not UTF-8"):  # nor where a flag takes it for a caption
        list(loader_of(urls, is_train=False, long_caption_field=extension))
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists()  # the attack is a real one


def write_features(url: str, name: str, count: int, width: int = 4, **changes: Any) -> dict[str, Tensor]:
    """Writes a store for ordinary samples 0 to `count`, rows in reverse order; returns the rows in sample order."""
    generator = torch.Generator().manual_seed(width)
    features = {part: torch.randn(count, width, generator=generator).bfloat16() for part in TeacherFeatures._fields}
    contents = [(picture(i), f"thing {i}", caption(i)) for i in range(count)]
    order = list(reversed(range(count)))
    digests = {
        part: [digest(contents[i][column]) for i in order] for column, part in enumerate(TeacherFeatures._fields)
    }
    info = StoreInfo(**{"model": name, "weights_digest": "", "logit_scale": 20.0, "normalized": True,
                        "preprocess": "", "width": width, **changes})  # fmt: skip
    path = url.removesuffix(".tar") + f".{name}.safetensors"
    write_store(path, numbers(count)[::-1], {part: rows[order] for part, rows in features.items()}, digests, info)
    return features


@pytest.mark.parametrize("workers", [0, 2])
def test_teacher_features_reach_the_row_of_their_sample(workers: int, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [8])
    small, large = write_features(url, "small", 8, 4), write_features(url, "large", 8, 6, logit_scale=50.0)
    loader = loader_of(url, features="small, large", workers=workers)
    assert [tuple(teacher) for teacher in loader.teachers] == [("small", 4, 20.0), ("large", 6, 50.0)]
    for batch in loader:
        rows = [int(key) for key in loader.last_info.keys]
        assert batch.teacher is not None
        for part, found in batch.teacher._asdict().items():
            assert torch.equal(found, torch.cat([small[part], large[part]], dim=1)[rows])


def test_only_the_teacher_parts_that_the_loss_needs_are_read(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    features = write_features(url, "vit", 2)
    (batch,) = loader_of(url, is_train=False, features="vit", teacher_parts=("image", "long"))
    assert batch.teacher is not None
    assert batch.teacher.short is None
    assert torch.equal(batch.teacher.long, features["long"])  # type: ignore[arg-type]
    assert list(loader_of(url, is_train=False, features="vit", teacher_parts=()))[0].teacher is None


def test_a_teacher_part_without_its_view_is_refused(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    write_features(url, "vit", 2)
    with pytest.raises(ValueError, match=r"teacher_parts \['short'\]"):
        loader_of(url, features="vit", views=("long",))


def test_stores_may_lie_in_another_folder(tmp_path: Path) -> None:
    url = write_shards(tmp_path / "shards", [2])
    write_features(url, "vit", 2)
    (tmp_path / "features").mkdir()
    (tmp_path / "shards/000000.vit.safetensors").rename(tmp_path / "features/000000.vit.safetensors")
    with pytest.raises(DataError, match="--features-dir"):
        loader_of(url, features="vit")
    assert list(loader_of(url, features="vit", features_dir=str(tmp_path / "features")))


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_features_are_an_error_or_counted_drops(workers: int, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [8])
    write_features(url, "vit", 6)
    with pytest.raises(DataError, match=r"^.*000000\.tar, sample 00000[67]: image feature is missing.*again"):
        list(loader_of(url, is_train=False, features="vit", workers=workers))
    loader = loader_of(url, is_train=False, features="vit", on_missing_features="drop", workers=workers)
    assert dropped_by(loader) == {"image feature is missing": 2}


@pytest.mark.parametrize("source", ["members", "llm"])
def test_stored_embeddings_take_the_place_of_token_ids(source: str, tmp_path: Path) -> None:
    if source == "members":
        vectors = {view: torch.randn(4, 5) for view in ("short", "long")}
        members = [
            {f"{view}_caption": struct.pack("<5f", *rows[i]) for view, rows in vectors.items()} for i in range(4)
        ]
        shard = [sample(i, png=picture(i), **members[i]) for i in range(4)]
        url = write_shard(tmp_path / "000000.tar", shard)
    else:
        url = write_shards(tmp_path, [4])
        vectors = {part: rows.float() for part, rows in write_features(url, "llm", 4, 5).items()}
    batches = list(loader_of(url, is_train=False, text_embeddings=source, crop_captions=True))
    for view, rows in vectors.items():
        if view != "image":
            found = torch.cat([getattr(batch, f"{view}_caption") for batch in batches])
            assert found.dtype == torch.float32
            assert torch.equal(found, rows)


def test_embeddings_of_different_widths_are_an_error(tmp_path: Path) -> None:
    shard = [sample(i, png=picture(i), short_caption=bytes(4), long_caption=bytes(4 + 4 * i)) for i in range(2)]
    with pytest.raises(DataError, match=r"long captions of one batch have embeddings of widths \[1, 2\]"):
        list(loader_of(write_shard(tmp_path / "0.tar", shard), text_embeddings="members"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_left_early_leaves_nothing_open(workers: int, tmp_path: Path) -> None:
    loader = loader_of(write_shards(tmp_path, [8, 8]), workers=workers)
    for _ in loader:
        break  # warnings of what stays open are errors here
    assert len(keys_of(loader)) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_captions_are_noted_once_by_the_loader_that_read_them(tmp_path: Path, workers: int) -> None:
    lengths = [3, 9, 12, 4, 20, 10, 5, 6]  # words; four of them do not fit between the start and end of ten tokens
    captions = [sample(n, png=picture(n), long_caption="dog " * words) for n, words in enumerate(lengths)]
    urls = write_shard(tmp_path / "0.tar", captions)
    tokenizer = CachedTokenizer(context_length=10)
    train, evaluation = (
        get_wds_dataset(
            DataSettings(), urls, to_tensor, tokenizer, is_train=is_train, batch_size=2, views=["long"], workers=workers
        )
        for is_train in (True, False)
    )
    for epoch in range(2):
        train.set_epoch(epoch)
        noted: Counter[str] = Counter()
        for _ in train:
            noted.update(train.last_info.noted)
            assert len(list(evaluation)) == 4  # reads the same captions meanwhile
        assert noted == {"long caption truncated to 10 tokens": 4}
