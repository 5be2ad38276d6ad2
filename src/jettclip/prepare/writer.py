"""Writes shards: whole or not at all, the same bytes for the same samples, each with its manifest."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any

from jettclip.data.manifest import manifest_path, member_digest, write_manifest


def write_shard(path: str | os.PathLike[str], groups: Iterable[Mapping[str, Any]]) -> int:
    """Writes samples to a tar, and its manifest beside it; returns how many there were.

    Files appear only when they are whole, and none is written for no samples.

    Args:
        path: of the tar.
        groups: samples ``{"__key__": str, extension: bytes, ...}``, taken one at a time; other names with ``__`` are
            left out.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    path = os.fspath(path)
    partial = f"{path}.{os.getpid()}.partial"
    digests: dict[str, dict[str, str]] = {}
    try:
        with open(partial, "wb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for group in groups:
                    members = {name: data for name, data in group.items() if not name.startswith("__")}
                    for extension, data in members.items():
                        entry = tarfile.TarInfo(f"{group['__key__']}.{extension}")  # of no owner, and no date
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
                    digests[group["__key__"]] = {name: member_digest(data) for name, data in members.items()}
            stream.flush()
            os.fsync(stream.fileno())
        if digests:
            with contextlib.suppress(FileNotFoundError):
                os.remove(manifest_path(path))  # of another shard that was here
            os.replace(partial, path)
            write_manifest(path, digests.items())
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
    return len(digests)
