"""Writes what a check found to be right: cleaned shards in another folder, or manifests of shards that are whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from jettclip.data.counts import DataError, Tally, describe
from jettclip.data.manifest import digests_of, manifest_path, write_manifest
from jettclip.data.sizes import write_sizes
from jettclip.data.streams import is_local, open_shard, read_shard
from jettclip.data.tar import read_samples
from jettclip.prepare.everything import EVERYTHING, members_of
from jettclip.prepare.key_index import KeyIndex
from jettclip.prepare.pool import run
from jettclip.prepare.writer import write_shard

T = TypeVar("T")


class Cleaned(NamedTuple):
    """What was written."""

    shards: int
    samples: int


def clean_shards(urls: Sequence[str], folder: str, index: KeyIndex, workers: int) -> Cleaned:
    """Copies shards into a folder, but for what `check_shards` found to be unusable; each with its manifest.

    Every member is copied as it is, so that stores of the shards fit the copies as they fitted the shards. A shard of
    which nothing is left is not written, and what an earlier call wrote of it is removed; but for a shard that cannot
    be opened now, whose copy may be all that there is.

    Raises:
        DataError: if two shards would get one name, or one would take the place of its original.
        OSError: if the folder cannot be written to.
    """
    targets = {url: os.path.join(folder, _name_of_copy(url)) for url in urls}
    if len(set(targets.values())) < len(targets):
        raise DataError(f"shards of the same name in several folders would share one in {folder}; fix folder by folder")
    for url, target in targets.items():
        if is_local(url) and os.path.realpath(url.removeprefix("file:")) == os.path.realpath(target):
            raise DataError(f"{target} would be overwritten by its cleaned copy; give --fix another folder")
    os.makedirs(folder, exist_ok=True)
    jobs = ((url, target, index.left_out(url)) for url, target in targets.items())
    answers = run(partial(_itself, _clean), jobs, len(targets), workers, "writing")
    written = dict(zip(targets.values(), answers, strict=True))
    sizes = {os.path.basename(target): size for target, size in written.items() if size}
    write_sizes(folder, sizes)
    return Cleaned(len(sizes), sum(sizes.values()))


def _name_of_copy(url: str) -> str:
    name = os.path.basename(url.split()[-1] if url.startswith("pipe:") else url)
    return name.removesuffix(".gz")


def _itself(task: T) -> T:
    return task


def _clean(job: tuple[str, str, set[str]]) -> int:
    url, target, left_out = job
    try:
        groups = read_shard(url, EVERYTHING, Tally())
        written = write_shard(target, (group for group in groups if group["__key__"] not in left_out))
    except DataError:  # it cannot be opened, which the check has reported
        return 0
    if not written:
        for path in (manifest_path(target), target):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
    return written


def write_manifests(urls: Sequence[str], workers: int) -> dict[str, str]:
    """Writes the manifests of shards as they are now; returns what is wrong with those that get none, by shard.

    Only the tar itself must be whole: that an image in it cannot be decoded is no reason to have no manifest.
    """
    answers = run(partial(_itself, _write_manifest), urls, len(urls), workers, "writing manifests")
    answers = zip(urls, answers, strict=True)
    return {url: problem for url, problem in answers if problem}


def _write_manifest(url: str) -> str:
    """Writes the manifest of a shard; returns why it cannot, if so."""
    if not is_local(url):
        return "it is not on this machine"
    tally, samples = Tally(), []
    try:
        with open_shard(url) as stream:  # read as it is, whatever an old manifest says
            for group in read_samples(stream, EVERYTHING, tally, url):
                samples.append((group["__key__"], digests_of(members_of(group))))
        if tally.damaged:
            return describe(tally.damaged)
        if not samples:
            return "it holds no samples"
        write_manifest(url.removeprefix("file:"), samples)
    except (DataError, OSError) as error:
        return str(error)
    return ""
