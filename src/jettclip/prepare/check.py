"""Checks shards and their feature stores, sample by sample, as the trainer would read them and more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, TypeVar

from jettclip.data.captions import Caption, CaptionReader
from jettclip.data.counts import DataError, Dropped, Tally
from jettclip.data.decode import decode_image
from jettclip.data.features import Store, StoreInfo, digest, store_path
from jettclip.data.sample import image_bytes
from jettclip.data.streams import read_shard
from jettclip.models.tokenizer import CachedTokenizer
from jettclip.prepare.everything import EVERYTHING
from jettclip.prepare.findings import Findings, Norms, StoreFindings
from jettclip.prepare.key_index import KeyIndex
from jettclip.prepare.pool import run
from jettclip.settings import SampleSettings

T = TypeVar("T")


class StoreKind(NamedTuple):
    """What the stores of one name must have in common."""

    path: str  # of one of them
    info: StoreInfo
    dtype: str

    def compare(self, first: StoreKind) -> None:
        """Raises Dropped if a trainer would not take the store beside the first one."""
        ours, theirs = ({**asdict(kind.info), "dtype": kind.dtype} for kind in (self, first))
        different = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        if different:
            what = "another number format" if [*different] == ["dtype"] else "another teacher"
            raise Dropped(f"feature store is of {what}", f"{self.path}: {different} (here, in {first.path})")


class ShardFindings(NamedTuple):
    """What was found in one shard."""

    findings: Findings
    usable: list[tuple[str, bytes]]  # samples in which nothing is wrong: key, and digest of the image
    unusable: list[str]  # keys of those that are there and cannot be used
    stores: dict[str, StoreKind]  # by name, those that can be read


class ShardChecker:
    """Checks one shard after the other; made once in every process.

    Args:
        settings: where captions stand, and the largest image.
        views: the captions that a sample must have, of ``short`` and ``long``.
        stores: names of the feature stores to check.
        folder: where those lie; beside the shards if empty.
    """

    def __init__(
        self, settings: SampleSettings, views: Sequence[str], stores: Sequence[str] = (), folder: str = ""
    ) -> None:
        self.settings, self.stores, self.folder = settings, stores, folder
        self.captions = CaptionReader(settings, views)
        self.tokenizer = CachedTokenizer()

    def __call__(self, url: str) -> ShardFindings:
        """Reads a shard to its end; nothing that it may hold is an error."""
        tally, found = Tally(), Findings(shards=1)
        stores = self._open_stores(url, found)
        kinds = {name: StoreKind(store.path, store.info, _number_format(store)) for name, store in stores.items()}
        result = ShardFindings(found, [], [], kinds)
        keys = set()
        try:
            for group in read_shard(url, EVERYTHING, tally):
                found.samples += 1
                keys.add(group["__key__"])
                self._check(group, stores, tally, result)
            if not found.samples:
                tally.damage("shard holds no samples", url)
        except (DataError, OSError) as error:
            found.damaged["shard cannot be read"] += 1
            found.examples["shard cannot be read"] = f"{url}: {error}"
        for name, store in stores.items():
            found.stores[name].unused = len(set(store.keys) - keys)
        found.samples += tally.dropped.total()
        found.bad = found.samples - len(result.usable)
        found.problems.update(tally.dropped)
        found.damaged.update(tally.damaged)
        found.noted.update(tally.noted)
        found.examples = {**dict.fromkeys([*tally.dropped, *tally.damaged], url), **found.examples}
        return result

    def _check(
        self, group: Mapping[str, Any], stores: Mapping[str, Store], tally: Tally, result: ShardFindings
    ) -> None:
        found, key, where = result.findings, group["__key__"], f"sample {group['__key__']} of {group['__shard__']}"
        problems: list[Dropped] = []
        image = _attempt(partial(self._image, group, tally, found), problems)
        captions = _attempt(partial(self._captions, group, tally), problems)
        if captions:
            self._measure(captions, found)
        if image is None or captions is None:
            for problem in problems:
                found.problem(problem.reason, f"{where} ({problem})")
            result.unusable.append(key)
            return
        data, size = image
        result.usable.append((key, digest(data)))
        for name, store in stores.items():
            for problem in _check_rows(store, key, {"image": [data], **captions}, size, found.stores[name].norms):
                found.stores[name].problems[problem.reason] += 1
                found.examples.setdefault(problem.reason, f"{where} ({problem})")

    def _image(self, group: Mapping[str, Any], tally: Tally, found: Findings) -> tuple[bytes, tuple[int, int]]:
        """Decodes an image to its last pixel; returns its bytes, and its height and width."""
        data = image_bytes(group)
        width, height = decode_image(data, self.settings.max_image_pixels, tally).size
        found.widths[width] += 1
        found.heights[height] += 1
        found.shorter_sides[min(width, height)] += 1
        found.pixels += width * height
        found.image_bytes += len(data)
        return data, (height, width)

    def _captions(self, group: Mapping[str, Any], tally: Tally) -> dict[str, list[str]]:
        """Returns the captions of every view."""
        found: Mapping[str, list[Caption]]
        if self.captions.random_views:  # these have no end
            found = {view: [caption] for view, caption in self.captions.read(group, 0, tally).items()}
        else:
            found = self.captions.every(group, tally)
        return {view: [str(caption.text) for caption in captions] for view, captions in found.items()}

    def _measure(self, captions: Mapping[str, list[str]], found: Findings) -> None:
        for view, texts in captions.items():
            lengths = found.tokens.setdefault(view, Counter())
            lengths.update(len(self.tokenizer.encode(text)) + 2 for text in texts)

    def _open_stores(self, url: str, found: Findings) -> dict[str, Store]:
        opened = {}
        for name in self.stores:
            of_name = found.stores[name] = StoreFindings()
            try:
                store = opened[name] = Store(store_path(url, name, self.folder))
            except Dropped as problem:
                of_name.problems[problem.reason] += 1
                found.examples.setdefault(problem.reason, str(problem))
            else:
                of_name.teachers[_name_of_teacher(store)] += 1
        return opened


def _number_format(store: Store) -> str:
    return str(store.dtype).removeprefix("torch.")


def _name_of_teacher(store: Store) -> str:
    """Returns what to call a teacher; two may be called alike."""
    info = store.info
    return f"{info.model} ({info.weights_digest[:8]}), width {info.width}, {_number_format(store)}"


def _attempt(read: Callable[[], T], problems: list[Dropped]) -> T | None:
    try:
        return read()
    except Dropped as problem:
        problems.append(problem)
        return None


def _check_rows(
    store: Store,
    key: str,
    contents: Mapping[str, Sequence[bytes | str]],
    size: tuple[int, int],
    norms: dict[str, Norms],
) -> Iterator[Dropped]:
    """Reads all rows of one sample, for what the store has of image, short and long captions; yields what is wrong.

    Of the image, that is a row for each augmentation, with the augmentation itself, which must be of an image of its
    `size`, height and width.
    """
    for part in sorted(store.parts & contents.keys()):
        for content in contents[part]:
            try:
                row, column = store.find(part, key, digest(content))
            except Dropped as problem:
                yield problem
                continue
            for number in range(store.augmentations) if part == "image" else [column]:
                try:
                    if part == "image" and (drawn := store.drawn(row)):
                        drawn.choose(number, store.augmentations).check(size)
                    norm = float(store.read(part, row, number).float().norm())
                except Dropped as problem:
                    yield problem
                else:
                    norms.setdefault(part, Norms()).add(Norms(1, norm, norm, norm))


def check_shards(
    urls: Sequence[str], make_checker: Callable[[], ShardChecker], index: KeyIndex, workers: int
) -> Findings:
    """Checks shards in so many processes; `index` learns their samples, and which of those are not to be kept.

    A key that comes again in another shard is a fault if it is the same image there, and only noted otherwise: stores
    are found by shard and key.
    """
    found, first = Findings(), dict[str, StoreKind]()
    for url, of_shard in zip(urls, run(make_checker, urls, len(urls), workers, "checking"), strict=True):
        found.add(of_shard.findings)
        copies, clashes = index.add(of_shard.usable)
        index.leave_out(url, [*of_shard.unusable, *copies])
        for key in copies:
            found.problem("sample is in an earlier shard too", f"sample {key} of {url}")
        found.bad += len(copies)
        if clashes:
            found.noted["key of another image in an earlier shard"] += len(clashes)
        for name, kind in of_shard.stores.items():
            try:
                kind.compare(first.setdefault(name, kind))
            except Dropped as problem:
                found.stores[name].problems[problem.reason] += 1
                found.examples.setdefault(problem.reason, str(problem))
    return found
