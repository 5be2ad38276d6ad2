"""Writes files that appear only when they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Gives the path of a file to write, which takes the place of `path` once it is whole and on the disk.

    Nothing is left of it if writing fails; what a killed process left has a name of its own.

    Raises:
        OSError: if it cannot be written.
    """
    partial = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
        yield partial
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # it is not there any more if all went well
            os.remove(partial)
