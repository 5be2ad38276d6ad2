"""Manifests: what a shard held when it was written, against which everything that is read from it later is held.

``000012.manifest.json`` beside ``000012.tar`` names every sample in order, with a digest of each of its members:

    {"jettclip_manifest": 1, "samples": {"000012000": {"jpg": "1b8f6c5e0a2d4971", "txt": "..."}, ...}}

A tar has a checksum over each header and none over the data, so that a shard may lose samples, or hold other bytes,
without a trace. With a manifest nothing that has changed is passed on, and every sample that is lost is counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import xxhash

from jettclip.data.counts import DataError, HeldDamage, Tally
from jettclip.data.tar import MAX_MEMBER_BYTES, Member, split_name, stem_of, walk
from jettclip.files import whole_file

FORMAT = 1
MISSING = "sample of the manifest is missing"
INCOMPLETE = "sample lacks a member of the manifest"
DIFFERS = "sample differs from the manifest"

Manifest = dict[str, dict[str, str]]
"""The samples of a shard, in order: key to digests by extension."""


def member_digest(data: bytes) -> str:
    """Returns what a manifest keeps of a member's bytes: XXH3, 64 bits in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def digests_of(members: Mapping[str, bytes]) -> dict[str, str]:
    """Returns the `member_digest` of each member of a sample, by extension."""
    return {extension: member_digest(data) for extension, data in members.items()}


def manifest_path(shard: str) -> str:
    """Returns where the manifest of a shard lies, or would: ``a/0.manifest.json`` for ``a/0.tar``."""
    return stem_of(shard) + ".manifest.json"


def write_manifest(shard: str | os.PathLike[str], samples: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Writes the manifest of a shard beside it; the file appears only when it is whole.

    Args:
        shard: path of the tar.
        samples: key and `member_digest` by extension, in the order of the shard.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    content = {"jettclip_manifest": FORMAT, "samples": {key: dict(digests) for key, digests in samples}}
    with whole_file(manifest_path(os.fspath(shard))) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, separators=(",", ":")))


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Returns the samples of a manifest.

    Raises:
        DataError: if it is none, or of another format; with what to do about it.
    """
    try:
        content = json.loads(data)
        samples = content["samples"]
        texts = (text for digests in samples.values() for named in digests.items() for text in named)
        if content["jettclip_manifest"] != FORMAT or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"it is not of format {FORMAT}")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no manifest ({error!r}); {remedy(path)}") from error
    return dict(samples)


def remedy(path: str) -> str:
    """Says what to do about a manifest that does not fit its shard."""
    return (
        f"if the shard was written anew by another tool, delete {path}, or write it anew with scripts/check_shards.py "
        "--write-manifests"
    )


class ManifestReader:
    """Reads the samples of a shard that are what its manifest says.

    Args:
        manifest: of the shard.
        wanted: extensions of the members to read; the others are passed over, whatever they hold.
        tally: counts what is lost, and the irregularities of the shard.
        shard: its url, for messages.
        first, stop: which samples of the manifest to read.
    """

    def __init__(
        self,
        manifest: Manifest,
        wanted: frozenset[str],
        tally: Tally,
        shard: str,
        first: int = 0,
        stop: int | None = None,
    ) -> None:
        self.manifest, self.wanted, self.tally, self.shard = manifest, wanted, tally, shard
        self._held = HeldDamage(tally)
        self.to_end = stop is None or stop >= len(manifest)
        self._waiting = {  # the samples that have not come yet, and the digests of what must come of them
            key: {extension: digest for extension, digest in digests.items() if extension in wanted}
            for key, digests in list(manifest.items())[first:stop]
        }
        self._mine = frozenset(self._waiting)
        self._come: dict[str, dict[str, Member]] = {}  # members of those that are what they should be
        self._read: dict[str, bytes] = {}  # what was read of the sample that is being read; the others are read again
        self._seen: dict[str, set[str]] = {}  # the extensions that have come, by key, of all slices of the shard
        self._differing: set[str] = set()

    def read(self, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
        """Yields the samples as `read_samples` does, each when the last of its wanted members has come.

        The members of a sample need not stand together. A sample that does not come is counted once, with the reason.
        The shard is read only until all of them have come, but to its end for the last slice. Damage is counted as
        `read_samples` does, by one slice only; so all slices must see the same.
        """
        last = ""  # the key of the member before
        for member in walk(stream, self._held, self.shard):
            key, extension = split_name(member.name) or ("", "")
            if key != last:
                self._read = {}
            if not key:
                self._damage("member name has no key and extension")
            elif key in self.manifest:
                self._inspect(key, extension, member.size)
                if self._take(key, extension, member):
                    del self._waiting[key]
                    yield {"__key__": key, **self._bytes_of(self._come.pop(key, {}))}
                    if not self._waiting and not self.to_end:
                        return
            elif key != last:
                self._damage("key is not in the manifest")
            last = key
        self._held.settle(self.to_end)
        self._count_lost()

    def _damage(self, event: str) -> None:
        self._held.damage(event, self.shard)

    def _inspect(self, key: str, extension: str, size: int) -> None:
        """Finds the damage that a member's header tells, of any slice."""
        if key not in self._seen:  # of the next sample, whose slice is certainly being read here
            self._held.settle(key in self._mine)
        seen = self._seen.setdefault(key, set())
        if extension not in self.wanted:
            return
        if extension not in self.manifest[key]:
            self._damage("member is not in the manifest")
        elif size > MAX_MEMBER_BYTES:
            self._damage(f"member is larger than {MAX_MEMBER_BYTES >> 20} MiB")
        elif extension in seen:
            self._damage("member occurs again in the shard")
        seen.add(extension)

    def _take(self, key: str, extension: str, member: Member) -> bool:
        """Reads a member if it belongs to a sample of this slice; tells whether that made the sample complete."""
        digests = self._waiting.get(key)
        if digests is None:
            return False
        come = self._come.setdefault(key, {})
        if extension in digests and extension not in come:
            if not self._is_whole(extension, member, digests[extension]):
                self._differing.add(key)
                return False
            come[extension] = member
        return len(come) == len(digests)

    def _is_whole(self, extension: str, member: Member, digest: str) -> bool:
        if member.size > MAX_MEMBER_BYTES:
            return False
        self._read[extension] = data = member.read()
        return member_digest(data) == digest

    def _bytes_of(self, members: Mapping[str, Member]) -> dict[str, bytes]:
        return {
            extension: self._read[extension] if extension in self._read else member.read()
            for extension, member in members.items()
        }

    def _count_lost(self) -> None:
        hint = remedy(manifest_path(self.shard))
        for key in self._waiting:
            reason = DIFFERS if key in self._differing else INCOMPLETE if key in self._seen else MISSING
            self.tally.lose(reason, f"sample {key} of {self.shard} ({hint})")
