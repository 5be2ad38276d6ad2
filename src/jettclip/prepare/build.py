"""Makes shards of a data set: streaming, on all cores, resumable, the same bytes every time, every row accounted for.

The main process streams the rows. Shard n holds what survives of the n-th run of `shard_size` consecutive rows, so its
bytes depend neither on the number of worker processes nor on what was there before; rows that the source itself gives
up, such as a file that is no picture, belong to no run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from jettclip.data.counts import Tally
from jettclip.data.rows import Lost
from jettclip.data.sizes import write_sizes
from jettclip.data.streams import SIZES
from jettclip.prepare.holdout import Item, split_rows
from jettclip.prepare.output import REPORT, folder_of, folders_of, prepared, shards_of_ours, urls_of
from jettclip.prepare.pool import all_cores, in_processes
from jettclip.prepare.report import Account, write_json, writing
from jettclip.prepare.settings import BuildSettings
from jettclip.prepare.shard_job import Job, Run, ShardMaker, remove_shard, shard_path
from jettclip.prepare.source import open_source


class Built(NamedTuple):
    """What a build did."""

    written: int  # samples
    shards: int  # with samples in them
    kept: int  # of the shards, those that were there already
    dropped: dict[str, int]  # rows, by reason
    damaged: dict[str, int]  # damage to the shards that were read, by kind
    urls: list[str]  # of the shards of each split that has any


def build_shards(settings: BuildSettings) -> Built:
    """Makes the shards, and writes ``report.json`` when all of them are there.

    Raises:
        DataError: if the input cannot be read, or the output not written; the same call goes on where it stopped.
        ValueError: for settings that the input does not fit.
    """
    with prepared(settings):
        return _build(settings)


def _build(settings: BuildSettings) -> Built:
    source, builder = open_source(settings), _Builder(settings)
    if settings.holdout:
        held, rest = split_rows(
            lambda: source.rows(builder.new_tally()), source.root, settings.holdout, settings.holdout_way
        )
        digests = builder.build("holdout", held)
        builder.build("train", rest, digests)
    else:
        builder.build("", source.rows(builder.new_tally()))
    return builder.finish()


class _Builder:
    """Builds one split after the other.

    Attributes:
        accounts: of the splits.
        sizes: samples by shard, by folder.
        damaged: damage to the shards that are read, in the pass that began last, which reads all of them.
    """

    def __init__(self, settings: BuildSettings) -> None:
        self.settings = settings
        self.accounts: dict[str, Account] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        self.kept = 0
        self.damaged = Tally()

    def new_tally(self) -> Tally:
        """Begins to count damage anew."""
        self.damaged = Tally()
        return self.damaged

    def build(self, split: str, items: Iterable[Item], held_out: frozenset[int] = frozenset()) -> frozenset[int]:
        """Writes the shards of a split; returns the digests of its pictures if it is the held-out one."""
        folder = folder_of(self.settings, split)
        account = self.accounts[split or "all"] = Account()
        sizes = self.sizes[folder] = {}
        digests: set[int] = set()
        runs = _runs(items, self.settings.shard_size, account)
        workers = self.settings.workers or all_cores()
        with tqdm(desc=f"building {split}".rstrip(), unit="row", disable=None) as bar:
            make_shard = partial(ShardMaker, Job(folder, self.settings, held_out, split == "holdout"))
            for number, part in enumerate(in_processes(make_shard, runs, workers)):
                account.add({**part, "read": 0})  # which `_runs` counted
                self.kept += part.get("kept", False)
                if part["written"]:
                    sizes[os.path.basename(shard_path(folder, number))] = part["written"]
                if split == "holdout":
                    digests.update(part["digests"])
                bar.update(part["read"])
        account.check()
        return frozenset(digests)

    def finish(self) -> Built:
        """Removes the shards of an earlier, longer or otherwise split input, and writes the sizes and the report."""
        for folder in folders_of(self.settings):
            gone = shards_of_ours(folder) - self.sizes.get(folder, {}).keys()
            if gone and folder not in self.sizes:
                with writing(folder), suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, SIZES))
            for name in gone:
                remove_shard(os.path.join(folder, name))
        for folder, sizes in self.sizes.items():
            with writing(folder):
                write_sizes(folder, sizes)
        total = Account()
        for account in self.accounts.values():
            total.add(account.as_json())
        splits = {split: account.as_json() for split, account in self.accounts.items()}
        report: dict[str, Any] = {**total.as_json(), "splits": splits, "damaged": dict(self.damaged.damaged)}
        write_json(os.path.join(self.settings.output, REPORT), report)
        shards = sum(len(sizes) for sizes in self.sizes.values())
        urls = [urls_of(folder, sizes) for folder, sizes in self.sizes.items() if sizes]
        return Built(total.written, shards, self.kept, total.counts(), dict(self.damaged.damaged), urls)


def _runs(items: Iterable[Item], size: int, account: Account) -> Iterator[Run]:
    """Gathers rows into runs, and counts them; what is lost already is in none."""
    number, rows = 0, []
    for item in items:
        account.read += 1
        if isinstance(item, Lost):
            account.drop(item.reason, item.where)
            continue
        rows.append(item)
        if len(rows) == size:
            yield Run(number, rows)
            number, rows = number + 1, []
    if rows:
        yield Run(number, rows)
