"""The folder of the output: whose it is, what of it is ours, and the urls of the shards in it."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from jettclip.data.counts import DataError
from jettclip.data.streams import is_local
from jettclip.prepare.references import input_shards
from jettclip.prepare.report import read_json, write_json, writing
from jettclip.prepare.settings import BuildSettings
from jettclip.prepare.shard_job import PART

REPORT = "report.json"
ORIGIN = "build.json"
LOCK = "build.lock"
SPLITS = ("train", "holdout")
_UNFINISHED = re.compile(r"(\d{6,}|build|report|sizes)\..*\.partial")


@contextmanager
def prepared(settings: BuildSettings) -> Iterator[None]:
    """Makes the folders, keeps other builds out of them, and removes what a killed run left unfinished.

    Raises:
        DataError: if the output cannot be written, holds what is not ours to replace, or another build writes there.
    """
    folders = folders_of(settings)
    origin = {"input": os.path.abspath(settings.input) if is_local(settings.input) else settings.input}
    _check_folders(settings, folders, origin)
    used = [folder_of(settings, split) for split in SPLITS] if settings.holdout else []
    for folder in [settings.output, *used]:
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
    with _locked(settings.output):
        for folder in [settings.output, *used]:
            with writing(folder):
                for name in filter(_UNFINISHED.fullmatch, os.listdir(folder)):
                    os.remove(os.path.join(folder, name))
        write_json(os.path.join(settings.output, ORIGIN), origin)
        yield


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keeps the lock on a folder, which ends with this process and its workers, however they end."""
    path = os.path.join(folder, LOCK)
    with writing(path):
        stream = open(path, "w")  # noqa: SIM115 (closed below)
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another build is writing here, to {folder!r}; wait for it, or name another --output"
            ) from error
        except OSError:  # of a file system without locks, where one must see to it oneself
            pass
        yield


def _check_folders(settings: BuildSettings, folders: list[str], origin: dict[str, str]) -> None:
    before = read_json(os.path.join(settings.output, ORIGIN))
    if before != origin and any(_has_shards(folder) for folder in folders):
        raise DataError(
            f"--output {settings.output!r} holds the shards of another input, {before}; delete them, or name another "
            "folder"
        )
    if settings.kind == "shards":
        _check_apart(settings, folders)
    if settings.kind == "folder" and os.path.realpath(settings.input) == os.path.realpath(settings.output):
        raise DataError(f"--output {settings.output!r} is the folder that is read; name another one, or one in it")
    if before is not None:
        return
    foreign = [os.path.join(settings.output, REPORT)]
    for folder in filter(os.path.isdir, folders):
        ours = shards_of_ours(folder)
        foreign += [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".tar")]
        foreign = [path for path in foreign if os.path.basename(path) not in ours]
    found = next(filter(os.path.lexists, foreign), None)
    if found is not None:
        raise DataError(f"--output holds {found!r}, of another program; name another folder")


def _check_apart(settings: BuildSettings, folders: list[str]) -> None:
    outputs = {os.path.realpath(folder) for folder in folders}
    for url in filter(None, (url for pair in input_shards(settings) for url in pair)):
        if is_local(url) and os.path.dirname(os.path.realpath(url.removeprefix("file:"))) in outputs:
            raise DataError(f"--output would overwrite the shard {url!r}, which is read; name another folder")


def folder_of(settings: BuildSettings, split: str) -> str:
    """Returns the folder of a split; "" stands for all rows."""
    return os.path.join(settings.output, split) if split else settings.output


def folders_of(settings: BuildSettings) -> list[str]:
    """Returns the folders that may hold shards, of all of them and of each split."""
    return [folder_of(settings, split) for split in ("", *SPLITS)]


def shards_of_ours(folder: str) -> set[str]:
    """Returns the names of the shards in a folder that this program has finished, of which some hold no samples."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return {name.removesuffix(PART) + ".tar" for name in names if re.fullmatch(rf"\d{{6,}}{re.escape(PART)}", name)}


def _has_shards(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in shards_of_ours(folder))


def urls_of(folder: str, names: Iterable[str]) -> str:
    """Returns the urls of shards as few braces as there are gaps between their numbers, joined by ``::``."""
    runs: list[list[str]] = []
    for name in sorted((name.removesuffix(".tar") for name in names), key=int):
        if runs and int(name) == int(runs[-1][-1]) + 1 and len(name) == len(runs[-1][-1]):
            runs[-1][1:] = [name]
        else:
            runs.append([name])
    braces = [f"{{{run[0]}..{run[1]}}}" if len(run) > 1 else run[0] for run in runs]
    return "::".join(os.path.join(folder, f"{brace}.tar") for brace in braces)
