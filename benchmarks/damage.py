#!/usr/bin/env python
"""Damages shards in every way we know of, reads them, and counts what is lost without anyone being told.

    python benchmarks/damage.py            # 27 kinds of damage, 40 shards each; --quick: 4 each

A trial is a data set of two shards in order: a clean one of 8 samples, and one of 30 with one kind of damage. A sample
has a JPEG of 32 pixels, a long caption (txt), a short one (json), and teacher features, in a store beside the shard.
What comes out is compared, sample by sample, with what comes out of the clean data set. Manifest and store are those of
the clean shard; kinds that are about the teacher features change the store. Nothing may go wrong but the loss itself:

- crashes: the reading ended with an error, whatever it says, since most of the data can be read;
- lost: samples that did not come out; silent: of these, in trials without any count or warning; under-counted,
  over-counted: by how many, in the others, the count of dropped samples is off;
- wrong: trials that gave a sample other content; strays: samples that came out twice, or were never there.

`--without-manifest` also reads the shards with only a sizes.json to tell what they held, and with nothing. With
`--peer FOLDER` OpenCLIP's trainer reads them too; it finds features in the shards, and its warnings count for a sample
each. It cannot read with the webdataset that we need: make the folder with

    pip install --target FOLDER --no-deps webdataset==0.2.86 pandas python-dateutil pytz tzdata six

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from damage_kinds import KINDS, Shard, make_groups, write_features
from torch import Tensor
from tqdm import tqdm

from jettclip import get_wds_dataset
from jettclip.data.manifest import manifest_path, member_digest
from jettclip.data.sizes import write_sizes
from jettclip.models.tokenizer import CachedTokenizer
from jettclip.openclip import PreprocessCfg, image_transform_v2, keep_uint8
from jettclip.prepare.writer import write_shard
from jettclip.settings import DataSettings

SAMPLES, FIRST, BATCH = 30, 8, 8
SETTINGS = DataSettings(
    short_caption_field="json:short_caption",
    short_caption_policy="none",
    long_caption_field="txt",
    features="teacher",
    on_missing_features="drop",
    max_drop_rate=1.0,
)
COLUMNS = ("crashes", "lost", "silent", "under-counted", "over-counted", "wrong", "strays")
PEER = "OpenCLIP"
WAYS = {
    "manifest": "Ours, with manifests",
    "sizes.json": "Ours, with a sizes.json in place of manifests",
    "nothing": "Ours, without either",
    PEER: "OpenCLIP's reader",
}
MUST_BE_ZERO = tuple(column for column in COLUMNS if column != "lost")


@dataclass
class Reading:
    """What came out of a data set."""

    samples: list[tuple[str, str]]  # key and digest of the content
    counted: int  # samples that were counted as dropped
    told: bool  # whether anything was counted, or warned of


class Warnings(logging.Handler):
    """Counts warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Takes note of a warning."""
        self.count += 1


class Bench:
    """A folder with a clean data set, whose second shard is replaced by a damaged one in every trial.

    Args:
        folder: an empty one.
        way: how it is read, of `WAYS`.
    """

    def __init__(self, folder: Path, way: str) -> None:
        self.folder, self.way = folder, way
        self.transform = keep_uint8(image_transform_v2(PreprocessCfg(size=32), is_train=False))
        self.tokenizer = CachedTokenizer(context_length=77)
        self.warnings = Warnings()
        logging.getLogger().addHandler(self.warnings)
        self.first, self.second = folder / "000000.tar", folder / "000001.tar"
        self.urls = [str(self.first), str(self.second)]
        self.groups = make_groups(SAMPLES, first=FIRST)
        for path, groups in ((self.first, make_groups(FIRST, first=0)), (self.second, self.groups)):
            write_shard(path, groups)
            write_features(_store_of(path), groups)
            if way != "manifest":
                os.remove(manifest_path(str(path)))
        self.clean = dict(self._read().samples)
        if len(self.clean) != FIRST + SAMPLES:
            raise RuntimeError(f"{len(self.clean)} of {FIRST + SAMPLES} samples of the clean data came out")

    def trial(self, kind: Callable[[Shard], None], number: int) -> dict[str, int]:
        """Damages the shard, reads the data set, and says what went wrong."""
        write_features(_store_of(self.second), self.groups)
        shard = Shard(self.groups, _store_of(self.second), random.Random(f"{kind.__name__} {number}"))
        kind(shard)
        self.second.write_bytes(shard.tar)
        (self.folder / "sizes.json").unlink(missing_ok=True)
        if self.way == "sizes.json":  # written last, as where a disk has changed bits and no date
            write_sizes(str(self.folder), {self.first.name: FIRST, self.second.name: SAMPLES})
        outcome = dict.fromkeys(COLUMNS, 0)
        try:
            found = self._read()
        except Exception as error:
            logging.error(f"{kind.__name__} {number}: {error!r}")
            return outcome | {"crashes": 1}
        return outcome | self._compare(found)

    def _read(self) -> Reading:
        self.warnings.count = 0
        return self._read_as_peer() if self.way == PEER else self._read_as_ours()

    def _read_as_ours(self) -> Reading:
        loader = get_wds_dataset(
            SETTINGS, self.urls, self.transform, self.tokenizer, is_train=False, batch_size=BATCH
        )  # fmt: skip
        samples: list[tuple[str, str]] = []
        dropped: Counter[str] = Counter()
        for batch in loader:
            info = loader.last_info
            dropped.update(info.dropped)
            columns = (batch.image, batch.short_caption, batch.long_caption, *batch.teacher)
            samples += [(key, _digest(row)) for key, *row in zip(info.keys, *columns, strict=True)]
        return Reading(samples, dropped.total(), bool(dropped or self.warnings.count))

    def _read_as_peer(self) -> Reading:
        from damage_peer import read

        samples = [(key, _digest(row)) for key, row in read(self.urls, self.transform, self.tokenizer, BATCH)]
        return Reading(samples, self.warnings.count, self.warnings.count > 0)

    def _compare(self, found: Reading) -> dict[str, int]:
        came = Counter(key for key, _ in found.samples)
        lost = len(self.clean.keys() - came.keys())
        return {
            "lost": lost,
            "silent": 0 if found.told else lost,
            "under-counted": max(0, lost - found.counted) if found.told else 0,
            "over-counted": max(0, found.counted - lost),
            "wrong": int(any(self.clean.get(key, content) != content for key, content in found.samples)),
            "strays": sum(count - (key in self.clean) for key, count in came.items()),
        }


def _store_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}.teacher.safetensors")


def _digest(row: list[Tensor]) -> str:
    return member_digest(b"".join(tensor.numpy().tobytes() for tensor in row))


def measure(way: str, trials: int) -> dict[str, dict[str, int]]:
    """Runs so many trials of every kind of damage; returns the sums by kind."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), way)
        for kind in tqdm(KINDS, way, unit="kind", disable=None):
            outcomes = [bench.trial(kind, number) for number in range(trials)]
            found[kind.__name__.replace("_", " ")] = {
                column: sum(outcome[column] for outcome in outcomes) for column in COLUMNS
            }
    return found


def measure_peer(folder: str, quick: bool) -> dict[str, dict[str, int]]:
    """Measures OpenCLIP's reader in a process of its own, with the packages of a folder."""
    command = [sys.executable, __file__, "--only-peer", *(["--quick"] if quick else [])]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": folder}, stdout=subprocess.PIPE, text=True, check=True
    )
    answer: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def totals(by_kind: dict[str, dict[str, int]]) -> dict[str, int]:
    """Adds up all kinds."""
    return {column: sum(sums[column] for sums in by_kind.values()) for column in COLUMNS}


def report(way: str, by_kind: dict[str, dict[str, int]], trials: int) -> None:
    """Prints the table of one way to read."""
    print(f"\n{WAYS[way]}: {len(KINDS)} kinds of damage x {trials} shards of {SAMPLES} samples\n")
    print(f"| damage | {' | '.join(COLUMNS)} |")
    print("|---|" + "--:|" * len(COLUMNS))
    for kind, sums in [*by_kind.items(), ("**all**", totals(by_kind))]:
        print(f"| {kind} | {' | '.join(str(sums[column]) for column in COLUMNS)} |")


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trials")
    parser.add_argument("--without-manifest", action="store_true", help="also read with less to tell what was there")
    parser.add_argument(
        "--peer", default="", metavar="FOLDER", help="also let OpenCLIP's trainer read, with what is there"
    )
    parser.add_argument("--only-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(handlers=[logging.NullHandler()])  # warnings are counted, not shown
    trials = 4 if args.quick else 40
    if args.only_peer:
        print(json.dumps(measure(PEER, trials)))
        return 0
    start = time.perf_counter()
    asked = {"manifest": True, "sizes.json": args.without_manifest, "nothing": args.without_manifest}
    found = {way: measure(way, trials) for way, wanted in asked.items() if wanted}
    if args.peer:
        found[PEER] = measure_peer(args.peer, args.quick)
    for way, by_kind in found.items():
        report(way, by_kind, trials)
    seconds = time.perf_counter() - start
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "pillow", "safetensors", "webdataset"))
    print(f"\n{seconds:.0f} s; Python {platform.python_version()}, {packages}\n")
    sums = {way: totals(by_kind) for way, by_kind in found.items()}
    shards = trials * len(KINDS)
    print(json.dumps({"shards": shards, "samples": shards * SAMPLES, **sums["manifest"], "ways": sums}))
    return 1 if any(sums["manifest"][column] for column in MUST_BE_ZERO) else 0


if __name__ == "__main__":
    sys.exit(main())
