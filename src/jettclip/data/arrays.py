"""Reads arrays from the archives of others, without running what they hold or letting them grow without bound.

An archive states how large it will be, and may lie; so its statements are checked before anything is inflated, and
nothing is inflated beyond them. Pickled objects are refused.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jettclip.data.counts import Dropped

MAX_BYTES = 64 * 2**20
"""What an archive may be inflated to; DataCompDR's take some 200 kB."""

MAX_MEMBERS = 64
_SMALL = 2**20
_ENTRY = b"PK\x01\x02"  # begins the entry of every member in a zip's directory, which zipfile makes 500 bytes of
_GZIP = 31  # window bits of zlib that stand for gzip
_TENSOR_GLOBALS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | {
    f"torch {kind}Storage" for kind in ("BFloat16", "Half", "Float", "Double")
}


class _Refused(ValueError):
    """An archive is not what it should be."""


def read_npz(data: bytes) -> dict[str, Tensor]:
    """Reads the arrays of a NumPy archive.

    Returns:
        float32 tensors of any shape, by name.

    Raises:
        Dropped: if it is damaged, too large, or holds something else than floating-point arrays.
    """
    try:
        with _open_zip(data) as archive:
            return {name.removesuffix(".npy"): _read_npy(archive.read(name)) for name in archive.namelist()}
    except Exception as error:  # zipfile and NumPy raise nearly anything over damaged bytes
        raise _unreadable("npz", error) from error


def read_pth_gz(data: bytes) -> dict[str, Tensor]:
    """Reads a dictionary of tensors that ``torch.save`` and gzip have written.

    Returns:
        tensors of bfloat16, float16, float32 or float64, by name.

    Raises:
        Dropped: if it is damaged, too large, or holds something else than such a dictionary.
    """
    try:
        inflated = _gunzip(data)
        with _open_zip(inflated) as archive:
            _check_saved(archive)
        tensors = torch.load(io.BytesIO(inflated), map_location="cpu", weights_only=True)
        _check_tensors(tensors)
    except Exception as error:  # torch raises nearly anything over damaged bytes
        raise _unreadable("pth.gz", error) from error
    return dict(tensors)


def _unreadable(what: str, error: Exception) -> Dropped:
    return Dropped("features cannot be read", f"{what}: {error!r}"[:300])


def _open_zip(data: bytes) -> zipfile.ZipFile:
    """Opens a zip of a few members that state to be small enough."""
    if len(data) > MAX_BYTES or (len(data) > _SMALL and data.count(_ENTRY) > MAX_MEMBERS):
        raise _Refused(f"it has more than {MAX_BYTES >> 20} MiB, or than {MAX_MEMBERS} members")
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = archive.infolist()
    if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > MAX_BYTES:
        raise _Refused(f"it has more than {MAX_MEMBERS} members, or inflates to more than {MAX_BYTES >> 20} MiB")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise _Refused("it is compressed in a way that neither NumPy nor torch writes")
    return archive


def _read_npy(data: bytes) -> Tensor:
    """Reads an array of floating-point numbers, which must be all there and nothing else."""
    field = slice(8, 10) if data[6:7] == b"\x01" else slice(8, 12)  # where the length of the header stands
    start = field.stop + int.from_bytes(data[field], "little")
    shape, fortran_order, dtype = _read_header(data[:start])
    size = math.prod(shape) * dtype.itemsize  # of Python's integers, which do not overflow
    if dtype.kind != "f" or min(shape, default=0) < 0 or size != len(data) - start:
        raise _Refused(f"{dtype} {shape} are not what stands in {len(data) - start} bytes")
    with np.errstate(over="ignore"):  # of float64: what is not finite is found out by whoever uses it
        flat = np.frombuffer(data, dtype, offset=start).astype(np.float32)
    return torch.from_numpy(flat.reshape(shape, order="F" if fortran_order else "C"))


@lru_cache(maxsize=64)  # of a data set nearly all are equal, and NumPy takes 50 microseconds to parse one
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise _Refused(f"version {version} of NumPy's format is not for arrays of numbers")


def _gunzip(data: bytes) -> bytes:
    inflater = zlib.decompressobj(_GZIP)
    inflated = inflater.decompress(data, MAX_BYTES)
    if not inflater.eof or inflater.unused_data:
        raise _Refused(f"gzip is cut short, goes on behind its end, or holds more than {MAX_BYTES >> 20} MiB")
    return inflated


def _check_saved(archive: zipfile.ZipFile) -> None:
    """Raises _Refused if a file of torch has compressed members, or would build anything but tensors when loaded."""
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"{info.filename} is compressed, which torch.save does not do")
        if info.filename.endswith("/data.pkl"):
            for operation, argument, _ in pickletools.genops(archive.read(info)):  # takes it apart, and runs nothing
                loads = operation.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
                if loads and argument not in _TENSOR_GLOBALS:
                    raise _Refused(f"it would load {operation.name} {argument}, which is no part of a tensor")


def _check_tensors(tensors: object) -> None:
    """Raises _Refused for anything but a dictionary of tensors in all their bytes."""
    if not isinstance(tensors, dict):
        raise _Refused(f"it holds a {type(tensors).__name__}, not a dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise _Refused(f"its {name!r} is no tensor of floating-point numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _Refused(f"its {name!r} states {[*tensor.shape]} of fewer numbers")
