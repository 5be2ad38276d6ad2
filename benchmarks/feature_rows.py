#!/usr/bin/env python
"""Measures what it costs to fetch the teachers' features of a sample from feature stores.

    python benchmarks/feature_rows.py            # --quick: smaller stores and fewer repeats

A sample is an encoded image of 72 kB with a short and a long caption; its cost is that of `StoreGroup.lookup`: digests
of all three, the rows, the check that they are finite, and tensors to collate. It is the median over interleaved
repeats, in microseconds of CPU time on one thread, with the stores in the page cache. The rows are held against those
that the library safetensors reads, before anything is printed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1"}

import torch
from safetensors.torch import load_file

from jettclip.data.augmentation import draw, dump
from jettclip.data.captions import Caption
from jettclip.data.features import StoreInfo, digest, store_path, write_store
from jettclip.data.store_group import StoreGroup, open_stores

IMAGE_BYTES = 72_000  # a JPEG of 500 x 375 at quality 95
IMAGE_SIZE = (375, 500)


class Case(NamedTuple):
    """What stores hold of every sample."""

    width: int
    teachers: int = 1
    augmentations: int = 1
    captions: int = 1  # of each view
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "1 image + 2 captions, 768": Case(768),
    "the same in int8": Case(768, dtype=torch.int8),
    "the same in float32": Case(768, dtype=torch.float32),
    "two teachers": Case(768, teachers=2),
    "30 images + 2 x 3 captions, 1536": Case(1536, augmentations=30, captions=3),
}


class Stores:
    """Stores of one case for a shard, and the samples they belong to."""

    def __init__(self, folder: str, name: str, case: Case, samples: int) -> None:
        self.case, self.samples = case, samples
        self.shard = f"{folder}/{name}.tar"
        self.names = [f"teacher{index}" for index in range(case.teachers)]
        self.keys = [f"{index:09d}" for index in range(samples)]
        self.random = random.Random(0)
        self.image = self.random.randbytes(IMAGE_BYTES)
        for name in self.names:
            self._write(store_path(self.shard, name))
        self.group = open_stores([self.shard], self.names, "", "error")

    def caption(self, view: str, row: int, index: int) -> str:
        """Returns a caption of 12 or 150 words."""
        return f"{view} caption {index} of {row}".ljust(60 if view == "short" else 900, ".")

    def contents(self, row: int) -> dict[str, bytes | Caption]:
        """Returns what is looked up for a sample: its image, and its last captions."""
        last = self.case.captions - 1
        return {"image": self.image} | {
            view: Caption(self.caption(view, row, last), view) for view in ("short", "long")
        }

    def timed(self, rows: Sequence[int]) -> float:
        """Returns the microseconds that a sample takes."""
        asked = [({"__key__": self.keys[row], "__shard__": self.shard}, self.contents(row)) for row in rows]
        start = time.process_time()
        for group, contents in asked:
            self.group.lookup(group, contents, _last)
        return (time.process_time() - start) / len(rows) * 1e6

    def opened(self) -> float:
        """Returns the milliseconds that opening one of the stores takes."""
        fresh = StoreGroup(self.names[:1], "", self.group.expected[:1], "error")
        start = time.process_time()
        fresh._stores(self.shard)
        return (time.process_time() - start) * 1e3

    def check(self, row: int) -> None:
        """Ends the program if a sample's features are not what the library reads."""
        found = self.group.lookup({"__key__": self.keys[row], "__shard__": self.shard}, self.contents(row), _last)
        files = [load_file(store_path(self.shard, name)) for name in self.names]
        for part, ours in found.features._asdict().items():
            expected = torch.cat([file[part][row, -1] for file in files])
            if self.case.dtype == torch.int8:
                expected = expected.float() * files[0][f"{part}_scale"][row, -1]
            if not torch.equal(ours, expected):
                sys.exit(f"the {part} rows are not those that safetensors reads, so there is nothing to measure")

    def _write(self, path: str) -> None:
        case, count = self.case, self.samples
        columns = {"image": case.augmentations, "short": case.captions, "long": case.captions}
        digests: dict[str, list[list[bytes]]] = {"image": [[digest(self.image)]] * count}
        for view in ("short", "long"):
            digests[view] = [
                [digest(self.caption(view, row, index)) for index in range(case.captions)] for row in range(count)
            ]
        drawn = [dump([draw(IMAGE_SIZE, self.random) for _ in range(case.augmentations)]) for _ in range(count)]
        write_store(
            path,
            self.keys,
            {part: torch.randn(count, its, case.width).bfloat16() for part, its in columns.items()},
            digests,
            StoreInfo("teacher", "", 100.0, True, "{}", case.width, "{}" if case.augmentations > 1 else ""),
            dtype=case.dtype,
            augmentations=drawn if case.augmentations > 1 else None,
            image_sizes=[IMAGE_SIZE] * count,
        )


def _last(count: int) -> int:
    return count - 1


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller stores and fewer repeats")
    args = parser.parse_args()
    samples, repeats = (2000, 7) if args.quick else (10_000, 21)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            name: Stores(folder, str(index), case, min(samples, 10_000_000 // (case.width * case.augmentations)))
            for index, (name, case) in enumerate(CASES.items())
        }
        for one in stores.values():
            one.check(one.samples // 3)
        chosen = random.Random(1)
        taken: dict[str, list[float]] = {name: [] for name in stores}
        opening: dict[str, list[float]] = {name: [] for name in stores}
        for _ in range(repeats):
            for name, one in stores.items():
                taken[name].append(one.timed(chosen.choices(range(one.samples), k=1000)))
                opening[name].append(one.opened())
    microseconds = {name: round(statistics.median(times), 1) for name, times in taken.items()}
    print("| stored of a sample | samples | us a sample | ms to open |\n|---|--:|--:|--:|")
    for name, one in stores.items():
        print(f"| {name} | {one.samples:,} | {microseconds[name]} | {statistics.median(opening[name]):.1f} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "xxhash", "safetensors"))
    print(f"\nPython {platform.python_version()}, {packages}; {os.cpu_count()} CPU cores, of which one is used\n")
    print(json.dumps({"microseconds": microseconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
