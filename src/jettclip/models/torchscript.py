"""Reads the tensors of a TorchScript archive, the form in which OpenAI published CLIP, without executing any of it."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Tells whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of all modules in a TorchScript archive, by their dotted names.

    The code in the archive is not read, and of its pickle only tensors, numbers and containers are.

    Raises:
        pickle.UnpicklingError: if the archive holds anything else.
    """
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        with archive.open(f"{root}/data.pkl") as stream:
            module = _Reader(stream, archive, root).load()
    return dict(_tensors(module, ""))


class _Reader(pickle.Unpickler):
    """Reads the pickle of one archive; what it could change belongs to this reader alone."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(stream)
        self.archive, self.root = archive, root
        self.module_class = type("Module", (), {})  # stands for any class of the archive; holds its attributes

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return self.module_class
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return partial(_rebuild)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which a CLIP model has no use for")

    def persistent_load(self, identity: Any) -> Tensor:
        _, dtype, key, _, count = identity
        entry = self.archive.getinfo(f"{self.root}/data/{int(key)}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"its storage {key} is not of the size that it should be")
        content = bytearray(self.archive.read(entry))
        return torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {list(size)} is larger than what is stored of it")
    return storage.as_strided(size, stride, offset).clone()


def _tensors(value: Any, name: str) -> list[tuple[str, Tensor]]:
    """Returns the tensors in modules and containers, with their dotted names."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, dict):
        parts: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        parts = getattr(value, "__dict__", {}).items()
    return [pair for key, item in parts for pair in _tensors(item, f"{name}.{key}" if name else str(key))]
