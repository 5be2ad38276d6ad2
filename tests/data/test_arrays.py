from __future__ import annotations

import gzip
import io
import resource
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch

from jettclip.data.arrays import MAX_BYTES, MAX_MEMBERS, read_npz, read_pth_gz
from jettclip.data.counts import Dropped
from support import run_ranks

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Returns an array with whatever header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def resaved(value: object, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns what torch saves, with its members changed."""
    archive = zipfile.ZipFile(io.BytesIO(saved(value)))
    return zipped({name: change(name, archive.read(name)) for name in archive.namelist()}, compression)


def replaced(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        assert not name.endswith("data.pkl") or old in data
        return data.replace(old, new) if name.endswith("data.pkl") else data

    return change


FEATURES = torch.arange(20, dtype=torch.float32).reshape(4, 5)
VECTOR = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}"  # a header of an array
ZEROS = b"\0" * (MAX_BYTES + 1)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_arrays_are_read_as_float32(dtype: str, compressed: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(3, 4)).astype(dtype), "b": np.asfortranarray(rng.normal(size=(5, 2)).astype(dtype))}
    arrays |= {"empty": np.zeros((0, 4), dtype), "scalar": np.array(3, dtype)}
    read = read_npz(npz(compressed, **arrays))
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == torch.float32
        np.testing.assert_array_equal(read[name].numpy(), array.astype(np.float32))
    read["a"][0] = 0  # the memory is the tensor's own


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_as_they_are(dtype: torch.dtype) -> None:
    tensors = {"image_emb": FEATURES.to(dtype), "text_emb": FEATURES.to(dtype)[1:3], "turned": FEATURES.to(dtype).T}
    read = read_pth_gz(gzip.compress(saved(tensors)))
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


def understated() -> bytes:
    """Returns an array of which the directory states fewer bytes than it will be inflated to."""
    data = bytearray(zipped({"a.npy": npy(VECTOR % 25_000_000, b"\0" * 100_000_000)}))
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 1000)
    return bytes(data)


def objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    return zipped({"a.npy": stream.getvalue()})


def bad_npz() -> dict[str, bytes | Callable[[], bytes]]:
    """Returns damaged archives, and functions that make the large ones."""
    good = npz(a=FEATURES.numpy())
    return {
        "empty": b"",
        "no zip": b"no zip at all" * 10,
        "cut short": good[: len(good) // 2],
        "flipped": good[:150] + bytes([good[150] ^ 1]) + good[151:],
        "bomb": lambda: zipped({"a.npy": npy(VECTOR % (MAX_BYTES // 4), ZEROS)}),
        "many small bombs": lambda: zipped({f"{n}.npy": npy(VECTOR % 5_000_000, b"\0" * 20_000_000) for n in range(4)}),
        "too many members": zipped({f"{n}.npy": npy(VECTOR % 0) for n in range(MAX_MEMBERS + 1)}),
        "a lying directory": understated,
        "more stated than there is": zipped({"a.npy": npy(VECTOR % 10**12, b"\0" * 8)}),
        "an overflowing shape": zipped({"a.npy": npy(VECTOR % f"{2**62}, 16", b"\0" * 8)}),
        "a negative shape": zipped({"a.npy": npy(VECTOR % -2, b"\0" * 8)}),
        "less stated than there is": zipped({"a.npy": npy(VECTOR % 1, b"\0" * 8)}),
        "objects": objects(),
        "integers": npz(a=np.arange(4)),
        "complex numbers": npz(a=np.ones(2, np.complex64)),
        "texts": npz(a=np.array(["a"])),
        "records": npz(a=np.zeros(2, [("x", "<f4")])),
        "no arrays": zipped({"a.txt": b"text"}),
        "a long header": zipped({"a.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 1000}),
        "an unknown version": zipped({"a.npy": npy(VECTOR % 1, b"\0" * 4, b"\x03\x00")}),
        "lzma": zipped({"a.npy": npy(VECTOR % 1, b"\0" * 4)}, zipfile.ZIP_LZMA),
        "too large": lambda: good.ljust(MAX_BYTES + 1),
    }


SHAPE, LARGE_SHAPE = b"K\x04K\x05\x86", b"K\x04J\xff\xff\xff\x0f\x86"  # of `FEATURES`, in a pickle


def of_one_number(value: object) -> bytes:
    """Returns a huge tensor whose strides are 0, so that it needs no memory until it is copied."""

    def change(name: str, data: bytes) -> bytes:
        return replaced(b"K\x05K\x01\x86q", b"K\x00K\x00\x86q")(name, replaced(SHAPE, LARGE_SHAPE)(name, data))

    return resaved(value, change)


def bad_pth_gz() -> dict[str, bytes | Callable[[], bytes]]:
    good = {"image_emb": FEATURES}
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    files = {
        "no torch": b"x",
        "no zip": b"x" * 1000,
        "a list": saved([FEATURES]),
        "texts": saved({"image_emb": "text"}),
        "integers": saved({"image_emb": FEATURES.int()}),
        "numbered": saved({0: FEATURES}),
        "a sparse tensor": saved({"image_emb": FEATURES.to_sparse()}),
        "a module": saved({"image_emb": torch.nn.Linear(2, 2)}),
        "a call of bytearray": resaved(good, replaced(rebuild, b"cbuiltins\nbytearray\n")),
        "a call of print": resaved(good, replaced(rebuild, b"cbuiltins\nprint\n")),
        "a larger shape than there is": resaved(good, replaced(SHAPE, LARGE_SHAPE)),
        "a shape of the same bytes": of_one_number(good),
        "a larger storage than there is": resaved(good, replaced(b"K\x14t", b"J\xff\xff\xff\x0ft")),
        "compressed inside": resaved({"a": torch.zeros(1000)}, lambda _, data: data, zipfile.ZIP_DEFLATED),
        "no pickle": resaved(good, lambda name, data: b"junk" if name.endswith("data.pkl") else data),
        "legacy": legacy(good),
    }  # fmt: skip
    packed = gzip.compress(saved(good))
    return {name: gzip.compress(data) for name, data in files.items()} | {
        "empty": b"",
        "no gzip": saved(good),
        "cut short": packed[: len(packed) // 2],
        "without its checksum": packed[:-8],
        "flipped": packed[:100] + bytes([packed[100] ^ 1]) + packed[101:],
        "going on": packed + packed,
        "a bomb": lambda: gzip.compress(ZEROS),
    }


def legacy(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize("kind", list(bad_npz()))
def test_a_bad_npz_is_dropped(kind: str) -> None:
    data = bad_npz()[kind]
    with pytest.raises(Dropped, match="features cannot be read: npz: "):
        read_npz(data if isinstance(data, bytes) else data())


@pytest.mark.parametrize("kind", list(bad_pth_gz()))
def test_a_bad_pth_gz_is_dropped(kind: str) -> None:
    data = bad_pth_gz()[kind]
    with pytest.raises(Dropped, match=r"features cannot be read: pth\.gz: "):
        read_pth_gz(data if isinstance(data, bytes) else data())


def test_any_cut_and_any_flipped_byte_is_dropped_or_changes_nothing_that_counts() -> None:
    whole = npz(a=FEATURES.numpy())
    packed = gzip.compress(saved({"a": FEATURES}))
    rng = np.random.default_rng(0)
    for read, data in ((read_npz, whole), (read_pth_gz, packed)):
        lost = 0
        for position in rng.integers(0, len(data), 150):
            for bad in (data[:position], data[:position] + bytes([data[position] ^ 64]) + data[position + 1 :]):
                try:
                    assert torch.equal(read(bad).get("a", FEATURES), FEATURES)
                except Dropped:
                    lost += 1
        assert lost >= 250


def directory(entries: int) -> bytes:
    """Returns a zip that consists of nothing but a directory."""
    data = b"PK\x01\x02".ljust(46, b"\0") * entries
    return data + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(data), 0, 0)


def calling_bytearray(size: int) -> bytes:
    """Returns what asks torch, whose restricted unpickler allows it, for so many bytes of memory."""
    call = b"cbuiltins\nbytearray\nJ" + struct.pack("<i", size) + b"\x85R"
    return resaved({"a": FEATURES}, lambda name, data: b"\x80\x02" + call + b"." if "pkl" in name else data)


def test_memory_does_not_grow_with_bombs() -> None:
    bombs: list[tuple[Callable[[bytes], object], bytes]] = [
        (read_npz, zipped({"a.npy": npy(VECTOR % (MAX_BYTES // 4), ZEROS)})),
        (read_npz, zipped({"a.npy": npy(VECTOR % 2**40, b"\0" * 1000)})),
        (read_npz, directory(600_000)),
        (read_pth_gz, gzip.compress(bytes(400_000_000), 1)),
        (read_pth_gz, gzip.compress(calling_bytearray(400_000_000))),
        (read_pth_gz, gzip.compress(of_one_number({"a": FEATURES}))),
    ]

    def grown() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(9):
            for read, data in bombs:
                with pytest.raises(Dropped):
                    read(data)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    assert run_ranks(1, grown)[0] < 200  # MiB; of another process, since the peak of this one may be past
