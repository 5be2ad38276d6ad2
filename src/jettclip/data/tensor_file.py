"""Safetensors files: written whole or not at all, and read a row at a time.

Such a file is the length of a header (8 bytes, little-endian), the header (JSON), and the bytes of the tensors. The
library safetensors writes it; for reading, only the header is parsed here, and rows are fetched with one system call
each, since the library's slices take some 15 microseconds a row. Nothing in the header is trusted.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from jettclip.data.counts import DataError, Dropped
from jettclip.files import whole_file

HEADER_LIMIT = 100_000_000
"""Bytes of a header at most, as in the library safetensors; 10,000 keys take some 300 kB."""

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""The number formats that are read, by their names in a header."""


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # its first byte
    size: int  # in bytes


class TensorFile:
    """An open safetensors file, of which nothing but the header is in memory.

    Rows are read with ``pread``: it has no position that forked workers would share, and finds a file that was cut
    short since where a mapped one would kill the process.

    Args:
        path: the file.

    Raises:
        OSError: if it cannot be opened.
        ValueError, RecursionError: if it is no safetensors file, or its header does not fit its bytes.
        Dropped: if it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        file_size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(self.read(0, 8), "little")
        if length > min(HEADER_LIMIT, file_size - 8):
            raise ValueError(f"its header would have {length} bytes")
        header = json.loads(self.read(8, length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        self.metadata = _metadata(header.pop("__metadata__", {}))
        self.entries = {name: _entry(name, what, 8 + length, file_size) for name, what in header.items()}

    def read(self, start: int, size: int) -> bytes:
        """Returns `size` bytes of the file, the first of them at `start`.

        Raises:
            Dropped: if they cannot be read, or the file is too short.
        """
        try:
            data = os.pread(self._descriptor, size, start)
        except OSError as error:
            raise Dropped("feature store cannot be read", f"{self.path}: {error}") from error
        if len(data) != size:
            raise Dropped("feature store cannot be read", f"{self.path} ends {size - len(data)} bytes too early")
        return data

    def load(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
        """Returns all bytes of a tensor.

        Raises:
            Dropped: if they cannot be read.
            ValueError: if there is no tensor of that name, number format and shape.
        """
        entry = self.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            raise ValueError(f"{name} is {entry and entry[:2]}, and {(dtype, shape)} is needed")
        return self.read(entry.start, entry.size)


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its metadata is not text by name")
    return value


def _entry(name: str, what: Any, first: int, file_size: int) -> Entry:
    """Returns where a tensor lies, from what the header says of it; the tensors begin at the byte `first`."""
    what = what if isinstance(what, dict) else {}
    dtype, shape, offsets = DTYPES.get(str(what.get("dtype"))), what.get("shape"), what.get("data_offsets")
    if dtype is None or not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"its header does not say where {name} lies: {str(what)[:200]}")
    start, stop = offsets
    if start > stop or stop > file_size - first or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {str(shape)[:100]} does not lie at {str(offsets)[:100]}")
    return Entry(dtype, tuple(shape), first + start, stop - start)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    check: Callable[[str], object],
) -> None:
    """Writes a safetensors file, which appears only when it is whole.

    Args:
        path: file to write.
        tensors: what to write, by name.
        metadata: text that stands in the header.
        check: called with the path of the file before it gets its name; what it raises keeps the file from appearing.

    Raises:
        DataError: if it cannot be written, as on a full disk; nothing is left behind then.
    """
    try:
        with whole_file(path) as partial:
            with open(partial, "wb") as stream:
                mode = os.fstat(stream.fileno()).st_mode  # what the user's umask allows; the library makes them private
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
            os.chmod(partial, mode)
            check(partial)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be written ({error}); free some space, or choose another folder that can be written to"
        ) from error
