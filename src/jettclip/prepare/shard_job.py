"""What a worker process does: it makes one shard of a run of rows, or finds that it is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import xxhash

from jettclip.data.counts import Dropped
from jettclip.data.manifest import manifest_path
from jettclip.data.rows import Row
from jettclip.prepare.pool import is_stopping
from jettclip.prepare.references import Reference
from jettclip.prepare.report import Account, read_json, write_json, writing
from jettclip.prepare.samples import make_samples
from jettclip.prepare.settings import BuildSettings
from jettclip.prepare.writer import write_shard

FORMAT = 1
"""Of the shards: another one makes all of them anew."""

PART = ".report.json"


class Job(NamedTuple):
    """What all shards of a split have in common."""

    folder: str
    settings: BuildSettings
    held_out: frozenset[int]  # digests of the pictures that must not occur
    is_held_out: bool = False  # whether the digests of its own pictures are wanted


class Run(NamedTuple):
    """Consecutive rows, of which one shard is made."""

    number: int
    rows: list[Row | Reference]


class Stopped(Exception):
    """Raised in a worker when the main process gives up."""


class ShardMaker:
    """Makes one shard after the other; made once in every process.

    Args:
        job: what the shards have in common.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._common = xxhash.xxh3_128(json.dumps([FORMAT, job.settings.of_samples, sorted(job.held_out)]).encode())

    def __call__(self, run: Run) -> dict[str, Any]:
        """Writes the shard of a run, then its part of the report, and returns that.

        A part that is there and has the fingerprint of the rows, the files they name and the settings is returned as
        it is. Without any sample, no shard is written.

        Raises:
            DataError: if the shard cannot be written.
        """
        path = shard_path(self.job.folder, run.number)
        fingerprint = self._fingerprint(run)
        part = read_json(part_path(path))
        if isinstance(part, dict) and part.get("fingerprint") == fingerprint and _size(path) == part["bytes"]:
            return {**part, "kept": True}
        account = Account()
        account.read = len(run.rows)
        digests: list[int] = []
        remove_shard(path)
        with writing(path):
            account.written = write_shard(path, self._groups(run, account, digests))
        part = {"fingerprint": fingerprint, "bytes": _size(path), **account.as_json()}
        if self.job.is_held_out:
            part["digests"] = digests
        write_json(part_path(path), part)
        return part

    def _groups(self, run: Run, account: Account, digests: list[int]) -> Iterator[dict[str, Any]]:
        """Yields the samples to write, and counts the rows that make none."""
        for row, sample in make_samples(run.rows, self.job.settings):
            if is_stopping():
                raise Stopped
            if isinstance(sample, Dropped):
                account.drop(sample.reason, f"{row.where} ({sample})")
            elif sample.digest in self.job.held_out:
                account.drop("duplicate image digest across splits", row.where)
            else:
                digests.append(sample.digest)
                yield {"__key__": row.key, **sample.members}

    def _fingerprint(self, run: Run) -> str:
        """Returns a digest of all that decides what the shard will hold."""
        digest = self._common.copy()
        states: dict[str, Any] = {}
        for row in run.rows:
            paths = [row.image] if isinstance(row, Row) else [row.shard, row.partner]
            for path in paths:
                if path not in states:
                    states[path] = _state(path)
            digest.update(json.dumps([row, [states[path] for path in paths]], default=str).encode())
        return digest.hexdigest()


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path.removeprefix("file:"))
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _size(path: str) -> int:
    """Returns the bytes of a file; 0 if there is none."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def shard_path(folder: str, number: int) -> str:
    """Returns where a shard lies."""
    return os.path.join(folder, f"{number:06d}.tar")


def part_path(shard: str) -> str:
    """Returns where a shard's part of the report lies."""
    return shard.removesuffix(".tar") + PART


def remove_shard(path: str) -> None:
    """Removes a shard with what lies beside it: first its part of the report, without which the rest is unfinished."""
    for file in (part_path(path), manifest_path(path), path):
        with writing(file), suppress(FileNotFoundError):
            os.remove(file)
