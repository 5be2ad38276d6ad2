from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jettclip.data.augmentation import Augmentation, dump
from jettclip.data.counts import DataError, Dropped
from jettclip.data.features import PARTS, Store, digest, store_path, write_store
from jettclip.types import TeacherInfo
from stores import KEYS, WIDTH, content, features, info, write, write_reinforced

AUGMENTATIONS = [
    dump([Augmentation((row, which, 100, 200), ((6, 0.25), None)) for which in range(3)]) for row in range(len(KEYS))
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_come_back_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = write(tmp_path / "s", {part: row.to(dtype) for part, row in features().items()})
    store = Store(str(tmp_path / "s"))
    assert store.info == info()
    assert store.dtype == dtype
    assert store.keys == KEYS
    for part in PARTS:
        for index, key in enumerate(KEYS):
            row = store.row(part, key, content(part, key))
            assert row.dtype == dtype
            assert torch.equal(row, rows[part][index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_every_row_is_what_the_library_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    write_reinforced(tmp_path / "s", AUGMENTATIONS, captions=5, dtype=dtype)
    store, file = Store(str(tmp_path / "s")), load_file(tmp_path / "s")
    assert store.augmentations == 3
    for part in PARTS:
        for row, key in enumerate(KEYS):
            for column in range(file[part].shape[1]):
                expected = file[part][row, column]
                if dtype == torch.int8:
                    expected = expected.float() * file[f"{part}_scale"][row, column]
                assert torch.equal(store.read(part, row, column), expected)
                wanted = digest(content(part, key, column if part != "image" else 0))
                assert store.find(part, key, wanted) == (row, column if part != "image" else 0)


def test_the_file_has_the_documented_layout(tmp_path: Path) -> None:
    write_reinforced(tmp_path / "s", AUGMENTATIONS, captions=5, dtype=torch.int8)
    file = load_file(tmp_path / "s")
    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in file.items() if name != "paug"}
    assert shapes == {
        "image": ([3, 3, WIDTH], torch.int8),
        **{view: ([3, 5, WIDTH], torch.int8) for view in ("short", "long")},
        "image_scale": ([3, 3], torch.float32),
        **{f"{view}_scale": ([3, 5], torch.float32) for view in ("short", "long")},
        "image_digest": ([3, 8], torch.uint8),
        **{f"{view}_digest": ([3, 5, 8], torch.uint8) for view in ("short", "long")},
        "image_check": ([3, 3, 8], torch.uint8),
        **{f"{view}_check": ([3, 5, 8], torch.uint8) for view in ("short", "long")},
        "paug_end": ([3], torch.int64),
        "image_size": ([3, 2], torch.int32),
    }
    assert bytes(file["long_digest"][1, 2].tolist()) == xxhash.xxh3_64_digest(b"long of b''")
    seed = int(file["image_scale"][2, 1].numpy().view(np.uint32))
    assert bytes(file["image_check"][2, 1].tolist()) == xxhash.xxh3_64_digest(
        file["image"][2, 1].numpy().tobytes(), seed
    )
    starts, ends = [0, *file["paug_end"].tolist()], file["paug_end"].tolist()
    blob = bytes(file["paug"].tolist())
    assert [json.loads(blob[start:end]) for start, end in zip(starts, ends, strict=False)] == [
        json.loads(text) for text in AUGMENTATIONS
    ]


def test_a_digest_is_that_of_the_bytes() -> None:
    assert digest("ein Baum, 一棵树") == digest("ein Baum, 一棵树".encode())
    assert digest("\ud800") == digest("\ud800".encode("utf-8", "surrogatepass"))
    assert len(digest(b"")) == 8


def test_a_caption_is_found_among_fewer_than_the_most(tmp_path: Path) -> None:
    rows = {"long": torch.randn(2, 3, WIDTH)}
    write_store(tmp_path / "s", ["a", "b"], rows, {"long": [[digest("one")], [digest("x"), digest("y")]]}, info())
    store = Store(str(tmp_path / "s"))
    assert torch.equal(store.row("long", "b", "y"), rows["long"][1, 1])
    for key, other in (("a", "x"), ("b", "one"), ("a", "y")):
        with pytest.raises(Dropped, match="long feature is stale, the long has changed since"):
            store.row("long", key, other)


def test_bytes_between_two_digests_are_no_digest(tmp_path: Path) -> None:
    first, second = bytes(range(8)), bytes(range(8, 16))
    write_store(tmp_path / "s", ["a"], {"long": torch.randn(1, 2, WIDTH)}, {"long": [[first, second]]}, info())
    store = Store(str(tmp_path / "s"))
    assert store.find("long", "a", second) == (0, 1)
    with pytest.raises(Dropped, match="stale"):
        store.find("long", "a", (first + second)[4:12])


def test_a_digest_of_another_row_does_not_count(tmp_path: Path) -> None:
    write(tmp_path / "s")
    for key in ("a", "c"):
        with pytest.raises(Dropped, match="image feature is stale"):
            Store(str(tmp_path / "s")).row("image", key, content("image", "b"))


def test_a_store_knows_its_parts(tmp_path: Path) -> None:
    write(tmp_path / "s", {"long": features()["long"]})
    assert Store(str(tmp_path / "s")).parts == {"long"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_a_row_that_is_not_finite_costs_no_other_row(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    rows = {part: row.float() for part, row in features().items()}
    rows["long"][1, 2] = bad
    digests = {part: [digest(content(part, key)) for key in KEYS] for part in PARTS}
    write_store(tmp_path / "s", KEYS, rows, digests, info(), dtype=dtype)
    store = Store(str(tmp_path / "s"))
    with pytest.raises(Dropped, match="long feature is not finite"):
        store.read_all({"image": (1, 0), "long": (1, 0)})
    assert len(store.read_all({"image": (1, 0), "short": (1, 0), "long": (2, 0)})) == 3


@pytest.mark.parametrize("value", [3e38, -65504.0, 1e-45, 0.0])
def test_extreme_finite_rows_are_finite(value: float, tmp_path: Path) -> None:
    dtype = torch.float16 if value == -65504.0 else torch.bfloat16
    rows = {"long": torch.full((1, WIDTH), value).to(dtype)}
    write_store(tmp_path / "s", ["a"], rows, {"long": [digest("x")]}, info())
    assert torch.equal(Store(str(tmp_path / "s")).row("long", "a", "x"), rows["long"][0])


def test_features_of_several_models_side_by_side_are_several_teachers(tmp_path: Path) -> None:
    write(tmp_path / "s", members=json.dumps([["vit", 3, 100.0], ["siglip", 1, 70]]))
    assert Store(str(tmp_path / "s")).info.teachers("dr") == [
        TeacherInfo("dr/vit", 3, 100.0),
        TeacherInfo("dr/siglip", 1, 70.0),
    ]
    assert info().teachers("vit") == [TeacherInfo("vit", WIDTH, 100 / 3)]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ({"rows": {part: rows[:2] for part, rows in features().items()}}, "3 rows of image features are needed"),
        ({"keys": ["a", "b", "a"]}, "1 of its 3 keys stand there twice"),
        ({"keys": []}, "keys"),
        ({"width": 5}, "its features are 4 wide"),
        ({"logit_scale": float("nan")}, "not finite"),
        ({"members": '[["a", 2, 100]]'}, "its features are 4 wide"),
        ({"members": '[["a", 4]]'}, "does not list"),
        ({"members": "[4]"}, "does not list"),
        ({"members": '[["a", 4, 1e999]]'}, "not finite"),
        ({"augmentation": '{"magnitude": 9}'}, "not described by metadata and paug alike"),
        ({"rows": {"image": torch.zeros(3, 2, WIDTH)}}, "not described by metadata and paug alike"),
        ({"rows": {**features(), "long": torch.zeros(3, 5)}}, "of one number format and width"),
        ({"rows": {"long": torch.zeros(3, WIDTH).bool()}}, "its header does not say where long lies"),
        ({"rows": {"long": torch.zeros(3, WIDTH).long()}}, "not torch.int64"),
    ],
)
def test_what_would_be_no_store_is_not_written(harm: dict[str, Any], said: str, tmp_path: Path) -> None:
    options = {**harm}
    rows = options.pop("rows", features())
    keys = options.pop("keys", KEYS)
    digests = {part: [digest(content(part, key)) for key in (keys or KEYS)][: len(rows[part])] for part in rows}
    with pytest.raises(DataError, match=said):
        write_store(tmp_path / "s", keys, rows, digests, info(**options))
    assert not list(tmp_path.iterdir())


def test_augmentations_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 augmentations for 3 image features"):
        write_reinforced(tmp_path / "s", [AUGMENTATIONS[0], json.dumps(json.loads(AUGMENTATIONS[1])[:2]), "[]"])
    with pytest.raises(DataError, match="image_size"):
        write_reinforced(tmp_path / "s", AUGMENTATIONS, image_sizes=[(300, 400)])
    with pytest.raises(DataError, match="not positive"):
        write_reinforced(tmp_path / "s", AUGMENTATIONS, image_sizes=[(300, 400), (0, 1), (2, 2)])
    with pytest.raises(DataError, match="more digests than long features"):
        write_store(tmp_path / "s", ["a"], {"long": torch.zeros(1, 4)}, {"long": [[digest("x"), digest("y")]]}, info())


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Rewrites a store by the library after a change of its tensors and metadata."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


LIES: dict[str, Callable[[dict[str, torch.Tensor], dict[str, str]], Any]] = {
    "old format": lambda tensors, metadata: metadata.update(jettclip_store="1"),
    "no format": lambda tensors, metadata: metadata.pop("jettclip_store"),
    "keys are numbers": lambda tensors, metadata: metadata.update(keys="[1, 2, 3]"),
    "keys are a text": lambda tensors, metadata: metadata.update(keys='"abc"'),
    "keys are an object": lambda tensors, metadata: metadata.update(keys='{"a": 0, "b": 1, "c": 2}'),
    "keys are cut": lambda tensors, metadata: metadata.update(keys='["a", "b"'),
    "keys are deep": lambda tensors, metadata: metadata.update(keys="[" * 100_000),
    "duplicate keys": lambda tensors, metadata: metadata.update(keys='["a", "b", "b"]'),
    "fewer keys": lambda tensors, metadata: metadata.update(keys='["a", "b"]'),
    "width is no number": lambda tensors, metadata: metadata.update(width="four"),
    "width of members only": lambda tensors, metadata: metadata.update(width="5", members='[["a", 4, 2.0]]'),
    "no model": lambda tensors, metadata: metadata.pop("model"),
    "members of another width": lambda tensors, metadata: metadata.update(members='[["a", 1, 2.0]]'),
    "members with a huge scale": lambda tensors, metadata: metadata.update(members=f'[["a", 4, {10**400}]]'),
    "no digests": lambda tensors, metadata: tensors.pop("long_digest"),
    "digests of fewer rows": lambda tensors, metadata: tensors.update(long_digest=tensors["long_digest"][:2].clone()),
    "digests of fewer captions": lambda tensors, metadata: tensors.update(
        long_digest=tensors["long_digest"][:, :2].clone()
    ),
    "fewer rows": lambda tensors, metadata: tensors.update(long=tensors["long"][:2].clone()),
    "no columns": lambda tensors, metadata: tensors.update(long=tensors["long"][:, :0].clone()),
    "other width": lambda tensors, metadata: tensors.update(long=tensors["long"][..., :2].clone()),
    "other number format": lambda tensors, metadata: tensors.update(long=tensors["long"].float()),
    "no parts": lambda tensors, metadata: [tensors.pop(part) for part in PARTS],
    "no scales": lambda tensors, metadata: tensors.pop("long_scale"),
    "half scales": lambda tensors, metadata: tensors.update(long_scale=tensors["long_scale"].half()),
    "no paug": lambda tensors, metadata: tensors.pop("paug"),
    "paug of numbers": lambda tensors, metadata: tensors.update(paug=tensors["paug"].int()),
    "paug_end not ascending": lambda tensors, metadata: tensors.update(paug_end=tensors["paug_end"].flip(0)),
    "paug_end negative": lambda tensors, metadata: tensors.update(paug_end=tensors["paug_end"] - 1000),
    "paug_end beyond": lambda tensors, metadata: tensors.update(paug_end=tensors["paug_end"] + 1),
    "paug_end huge": lambda tensors, metadata: tensors.update(paug_end=torch.full((3,), 2**63 - 1)),
    "paug_end short": lambda tensors, metadata: tensors.update(paug_end=tensors["paug_end"][:2].clone()),
    "no image_size": lambda tensors, metadata: tensors.pop("image_size"),
    "image_size negative": lambda tensors, metadata: tensors.update(image_size=-tensors["image_size"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_store_that_lies_cannot_be_read(lie: str, tmp_path: Path) -> None:
    write_reinforced(tmp_path / "s", AUGMENTATIONS, dtype=torch.int8)
    assert Store(str(tmp_path / "s")).parts
    _edit(tmp_path / "s", LIES[lie])
    with pytest.raises(Dropped) as dropped:
        Store(str(tmp_path / "s"))
    assert dropped.value.reason == "feature store cannot be read"


def test_a_store_of_the_old_format_is_to_be_extracted_again(tmp_path: Path) -> None:
    write(tmp_path / "s")
    _edit(tmp_path / "s", LIES["old format"])
    with pytest.raises(Dropped, match="format '1', and this version reads '2'; extract it again"):
        Store(str(tmp_path / "s"))


def _use(path: Path) -> int:
    """Reads everything in what may be a store; returns how many features it has, or 0 if it is none."""
    found = 0
    try:
        store = Store(str(path))
    except Dropped:
        return 0
    for part in store.parts:
        for key in store.keys:
            for column in range(store.augmentations if part == "image" else 5):
                try:
                    row, caption = store.find(part, key, digest(content(part, key, column)))
                    feature = store.read(part, row, column if part == "image" else caption)
                    drawn = store.drawn(row)
                    if drawn is not None and part == "image":
                        drawn.choose(column, store.augmentations)
                except Dropped:
                    continue
                assert feature.shape == (store.info.width,)
                assert torch.isfinite(feature).all()
                found += 1
    return found


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("valid")
    write_reinforced(folder / "int8", AUGMENTATIONS, dtype=torch.int8)
    write(folder / "bf16")
    assert [_use(folder / name) for name in ("int8", "bf16")] == [39, 9]
    return [(folder / name).read_bytes() for name in ("int8", "bf16")]


MANY = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@MANY
@given(st.binary(max_size=200))
def test_random_bytes_are_no_store(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s").write_bytes(data)
    assert _use(tmp_path / "s") == 0


@MANY
@given(st.data())
def test_a_damaged_store_still_works_or_is_dropped(tmp_path: Path, valid: list[bytes], data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(valid)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "digit", "cut", "insert", "remove"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "digit":  # numbers of the header
            content[place] = data.draw(st.sampled_from(b'0123456789-."[]{},eN'))
        elif kind == "cut":
            del content[max(1, place) :]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=20))
        else:
            del content[place : place + data.draw(st.integers(1, 20))]
        if not content:
            break
    (tmp_path / "s").write_bytes(content)
    _use(tmp_path / "s")


@MANY
@given(st.data())
def test_a_header_with_other_values_still_works_or_is_dropped(
    tmp_path: Path, valid: list[bytes], data: st.DataObject
) -> None:
    whole = data.draw(st.sampled_from(valid))
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    )
    name = data.draw(st.sampled_from(sorted(header)))
    inside = data.draw(st.sampled_from([None, *sorted(header[name])]))
    if inside is None:
        header[name] = data.draw(values)
    elif name == "__metadata__":
        header[name][inside] = data.draw(st.text(max_size=20) | values.map(json.dumps) | values)
    else:
        header[name][inside] = data.draw(
            values | st.sampled_from(["F8_E4M3", "BF16", "F16", "I8", "U8", "I64", "F32"]) | st.just([0, 1])
        )
    text = json.dumps(header).encode()
    (tmp_path / "s").write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    _use(tmp_path / "s")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**12, 100_000_001])
def test_an_absurd_header_is_refused_before_it_is_read(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "s", "wb") as stream:
        stream.write(length.to_bytes(8, "little"))
        stream.truncate(200_000_000)  # a hole
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr("os.pread", lambda file, size, place: read.append(size) or pread(file, size, place))
    with pytest.raises(Dropped, match="its header would have"):
        Store(str(tmp_path / "s"))
    assert read == [8]


def test_features_beyond_the_end_of_the_file_are_found_at_once(tmp_path: Path) -> None:
    write(tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["long"]["data_offsets"] = [offset + 1000 for offset in header["long"]["data_offsets"]]
    text = json.dumps(header).encode()
    (tmp_path / "s").write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(Dropped, match="does not lie at"):
        Store(str(tmp_path / "s"))


def test_a_column_that_is_not_there_is_not_the_next_row(tmp_path: Path) -> None:
    write_reinforced(tmp_path / "s", AUGMENTATIONS)
    for column in (3, -1):
        with pytest.raises(Dropped, match="image feature is missing"):
            Store(str(tmp_path / "s")).read("image", 0, column)


def test_a_store_that_is_cut_while_it_is_open_is_dropped_from_then_on(tmp_path: Path) -> None:
    write(tmp_path / "s")
    store = Store(str(tmp_path / "s"))
    os.truncate(tmp_path / "s", 100)
    with pytest.raises(Dropped, match="feature store cannot be read: .* ends 8 bytes too early"):
        store.row("long", "c", content("long", "c"))


def test_a_store_that_is_replaced_while_it_is_open_keeps_its_rows(tmp_path: Path) -> None:
    rows = write(tmp_path / "s")
    store = Store(str(tmp_path / "s"))
    write(tmp_path / "s", features(seed=1))
    assert torch.equal(store.row("long", "b", content("long", "b")), rows["long"][1])


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(Dropped, match="feature store cannot be read"):
        Store(str(tmp_path))


@contextmanager
def _disk_full_after(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_error_and_leaves_the_old_store(tmp_path: Path) -> None:
    rows = write(tmp_path / "s")
    with _disk_full_after(1_000_000), pytest.raises(DataError, match=r"s cannot be written.*free some space"):
        write(tmp_path / "s", {"long": torch.zeros(3, 500_000)}, width=500_000)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert torch.equal(Store(str(tmp_path / "s")).row("long", "a", content("long", "a")), rows["long"][0])


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "s")


def test_others_may_read_a_store_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "s")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o640


def test_an_open_store_takes_no_memory_for_its_features(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keys = [f"{index:06d}" for index in range(2000)]
    write_store(
        tmp_path / "s",
        keys,
        {"image": torch.zeros(2000, 50_000, dtype=torch.bfloat16)},
        {"image": [digest(key) for key in keys]},
        info(width=50_000),
    )
    assert os.path.getsize(tmp_path / "s") > 200_000_000
    before = resident()
    store = Store(str(tmp_path / "s"))
    for key in keys:
        store.row("image", key, key)
    assert resident() - before < 20_000_000


@pytest.mark.parametrize(
    ("shard", "folder", "expected"),
    [
        ("/data/000012.tar", "", "/data/000012.vit.safetensors"),
        ("/data/000012.tar.gz", "", "/data/000012.vit.safetensors"),
        ("file:/data/000012.tar", "", "/data/000012.vit.safetensors"),
        ("/data/000012.tar", "/features", "/features/000012.vit.safetensors"),
        ("s3://bucket/000012.tar", "/features", "/features/000012.vit.safetensors"),
    ],
)
def test_a_store_lies_beside_its_shard_or_in_the_given_folder(shard: str, folder: str, expected: str) -> None:
    assert store_path(shard, "vit", folder) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_a_row_with_a_flipped_bit_costs_no_other_row(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_reinforced(path, AUGMENTATIONS, captions=5, dtype=dtype)
    whole = Store(str(path))
    expected = [whole.read("long", row, column) for row in range(3) for column in range(5)]
    needle = load_file(path)["long"][1, 2].view(torch.uint8).numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1  # the lowest bit of the first number
    path.write_bytes(data)
    damaged = Store(str(path))
    for place, row in enumerate(expected):
        if place == 1 * 5 + 2:
            with pytest.raises(Dropped, match="long feature is damaged"):
                damaged.read("long", 1, 2)
        else:
            assert torch.equal(damaged.read("long", place // 5, place % 5), row)


def test_a_scale_with_a_flipped_bit_costs_its_row(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_reinforced(path, AUGMENTATIONS, captions=5, dtype=torch.int8)
    data = bytearray(path.read_bytes())
    data[data.index(load_file(path)["long_scale"][1, 2].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(Dropped, match="long feature is damaged"):
        Store(str(path)).read("long", 1, 2)
