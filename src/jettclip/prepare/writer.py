"""Writes shards: whole or not at all, the same bytes for the same samples, each with its manifest."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from jettclip.data.manifest import digests_of, manifest_path, write_manifest
from jettclip.files import whole_file
from jettclip.prepare.everything import members_of


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
    path, groups = os.fspath(path), iter(groups)
    first = next(groups, None)
    if first is None:
        return 0
    digests: dict[str, dict[str, str]] = {}
    with whole_file(path) as partial:
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for group in chain([first], groups):
                members = members_of(group)
                for extension, data in members.items():
                    entry = tarfile.TarInfo(f"{group['__key__']}.{extension}")  # of no owner, and no date
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                digests[group["__key__"]] = digests_of(members)
        with contextlib.suppress(FileNotFoundError):
            os.remove(manifest_path(path))  # of another shard that was here
    write_manifest(path, digests.items())
    return len(digests)
