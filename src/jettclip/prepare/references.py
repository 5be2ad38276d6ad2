"""Reads existing shards as rows: what stands where, without the pictures; and the samples themselves, in a worker."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import groupby
from typing import Any, NamedTuple

from jettclip.data.counts import DataError, Dropped, Tally
from jettclip.data.decode import decode_json
from jettclip.data.rows import Lost
from jettclip.data.shards import expand_urls
from jettclip.data.streams import find_manifest, is_local, read_shard
from jettclip.data.tar import split_name
from jettclip.prepare.everything import EVERYTHING, members_of
from jettclip.prepare.key_table import KeyTable, read_keys
from jettclip.prepare.settings import BuildSettings

NO_PARTNER = "no partner to join"
NOT_WHOLE = "sample cannot be read whole"
_LOSING = {"key occurs again later in the shard": "duplicate key"}  # damage that costs a sample


class Reference(NamedTuple):
    """A sample of a shard."""

    key: str  # that it will have
    shard: str
    name: str  # its key in the shard
    position: int  # in the shard, or in its manifest: where to begin to read
    partner: str  # the shard with the sample to join; "" for none
    partner_position: int
    where: str  # "000000.tar, sample 000012", for messages


def input_shards(settings: BuildSettings) -> list[tuple[str, str]]:
    """Returns the shards of the input, each with its partner; "" without ``--join``.

    Raises:
        DataError: for a shard that is not there, or if there are not as many partners.
    """
    shards = [url for url, _ in expand_urls(settings.input)]
    partners = [url for url, _ in expand_urls(settings.join)] if settings.join else [""] * len(shards)
    if len(partners) != len(shards):
        raise DataError(f"--join names {len(partners)} shards and --input {len(shards)}; they are joined one by one")
    for url in filter(None, [*shards, *partners]):
        if url.startswith("pipe:"):
            raise DataError(f"{url!r} would run a shell command, which is not done here; give files or other urls")
        if is_local(url) and not os.path.isfile(url.removeprefix("file:")):
            raise DataError(f"shard {url!r} does not exist; check the braces of the url")
    return list(zip(shards, partners, strict=True))


def read_references(settings: BuildSettings, damaged: Tally) -> Iterator[Reference | Lost]:
    """Yields the samples of the input's shards, from the headers of the tars only; memory does not grow with them.

    Args:
        settings: name the shards, what is joined, and which keys are kept.
        damaged: counts damage to the shards.
    """
    with ExitStack() as stack:
        seen = stack.enter_context(closing(KeyTable()))
        partners = stack.enter_context(closing(KeyTable()))
        keep, drop = (
            stack.enter_context(closing(read_keys(path, flag))) if path else None
            for path, flag in ((settings.keep_keys, "--keep-keys"), (settings.drop_keys, "--drop-keys"))
        )
        for shard, partner in input_shards(settings):
            partners.clear()
            if partner:
                for position, group in _placed(partner, frozenset(), damaged):
                    partners.add(group["__key__"], position)
            for item in _references(shard, partner, settings.join_key, damaged):
                if isinstance(item, Lost):
                    yield item
                elif keep is not None and keep.find(item.key) is None:
                    yield Lost("not in --keep-keys", item.where)
                elif drop is not None and drop.find(item.key) is not None:
                    yield Lost("in --drop-keys", item.where)
                elif partner and (found := partners.find(item.key)) is None:
                    yield Lost(NO_PARTNER, item.where)
                elif not seen.add(item.key):
                    yield Lost("duplicate key", item.where)
                else:
                    yield item._replace(partner_position=found) if partner and found is not None else item


def _references(shard: str, partner: str, join_key: str | None, damaged: Tally) -> Iterator[Reference | Lost]:
    tally = Tally()
    wanted = frozenset({"json"} if join_key else ())
    for position, group in _placed(shard, wanted, tally):
        name = group["__key__"]
        where = f"{os.path.basename(shard)}, sample {name}"
        try:
            key = _key_in_json(group, join_key.removeprefix("json:")) if join_key else name
        except Dropped as error:
            yield Lost(error.reason, where)
        else:
            yield Reference(key, shard, name, position, partner, 0, where)
    for event, count in tally.damaged.items():
        if event in _LOSING:
            yield from [Lost(_LOSING[event], shard)] * count
        else:
            damaged.damaged[event] += count
    for reason, count in tally.dropped.items():  # what a manifest misses
        yield from [Lost(reason, shard)] * count


def _placed(shard: str, wanted: frozenset[str], tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the samples of a shard with what `read_shard` takes for their positions."""
    try:
        places = {key: place for place, key in enumerate(find_manifest(shard) or ())}
    except DataError:  # which `read_shard` counts, and reads on without it
        places = {}
    for index, group in enumerate(read_shard(shard, wanted, tally)):
        yield places.get(group["__key__"], index), group


def _key_in_json(group: dict[str, Any], name: str) -> str:
    value = decode_json(group["json"]).get(name) if "json" in group else None
    key = str(value) if isinstance(value, (str, int)) else ""
    if split_name(f"{key}.jpg") != (key, "jpg"):
        raise Dropped("no key to join by")
    return key


def read_groups(references: Sequence[Reference]) -> Iterator[tuple[Reference, dict[str, bytes] | Dropped]]:
    """Yields the members of each sample by extension, with those of its partner that it has not itself.

    Of two ``json`` members the values are merged, in favour of the sample's own.
    """
    for (shard, partner), run in groupby(references, key=lambda reference: (reference.shard, reference.partner)):
        waiting = {reference.name: reference for reference in run}
        joined = _partners(partner, waiting.values()) if partner else {}
        first = min(reference.position for reference in waiting.values())
        for group in read_shard(shard, EVERYTHING, Tally(), first):
            reference = waiting.pop(group["__key__"], None)
            if reference is not None:
                yield reference, _merge(group, joined, reference)
            if not waiting:
                break
        yield from ((reference, Dropped(NOT_WHOLE)) for reference in waiting.values())


def _partners(shard: str, references: Any) -> dict[str, dict[str, bytes]]:
    """Reads the samples of a partner's shard that are wanted, by key."""
    waiting = {reference.key for reference in references}
    first = min(reference.partner_position for reference in references)
    found = {}
    for group in read_shard(shard, EVERYTHING, Tally(), first):
        if group["__key__"] in waiting:
            waiting.remove(group["__key__"])
            found[group["__key__"]] = members_of(group)
        if not waiting:
            break
    return found


def _merge(
    group: dict[str, Any], joined: dict[str, dict[str, bytes]], reference: Reference
) -> dict[str, bytes] | Dropped:
    own = members_of(group)
    if not reference.partner:
        return own
    partner = joined.get(reference.key)
    if partner is None:
        return Dropped(NO_PARTNER, NOT_WHOLE)
    if "json" in own and "json" in partner:
        try:
            own["json"] = encode_json(decode_json(partner["json"]) | decode_json(own["json"]))
        except Dropped as error:
            return error
    return own | {extension: data for extension, data in partner.items() if extension not in own}


def encode_json(value: dict[str, Any]) -> bytes:
    """Returns a JSON object as UTF-8; what JSON does not know, such as a date, becomes text."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
