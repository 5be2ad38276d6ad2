"""Reads tar shards sample by sample, and says so when a shard is damaged.

Python's ``tarfile`` ends an archive quietly at the first bad header, and webdataset 1.0 inherits that: the rest of the
shard is lost without a word. Here the members are walked one by one, every irregularity is counted, and after a damaged
header the walk goes on at the next good one. Headers are read as ``tarfile`` reads them: by it, or several times faster
if there is nothing special about them.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import IO, Any, NamedTuple

from jettclip.data.counts import HeldDamage, Tally

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBER_BYTES = 256 * 2**20
MAX_NAME_BYTES = 2**20
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
_LONG_NAMES = {tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}
_REMARKS = {tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK}  # about the whole archive, or a link's target
_WITHOUT_DATA = {  # whatever size they state
    tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
}  # fmt: skip


_NUMBER = rb"[0-7]{7}[\0 ]"
_PLAIN = re.compile(  # what most headers are: of a regular file, with a short name, and all numbers written out
    rb"(?s)(.{100})" + 3 * _NUMBER + rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6}\0 )0.{100}ustar(?:\x0000|  \0).{64}"
    rb"(?:" + _NUMBER + rb"|\0{8}){2}\0"
)  # fmt: skip


class Header(NamedTuple):
    """What counts of a member's header."""

    name: str
    size: int
    type: bytes  # as in tarfile


class Member:
    """A regular file inside an open tar."""

    def __init__(self, name: str, size: int, stream: IO[bytes], position: int) -> None:
        self.name, self.size, self._stream, self.position = name, size, stream, position

    def read(self) -> bytes:
        """Returns the member's bytes; fewer than `size` if the archive is cut short."""
        return _read_at(self._stream, self.position, self.size)


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a member name into sample key and extension at the first dot of the file name, as webdataset does.

    Returns None for a name that has not both parts (``README``, ``.hidden``).
    """
    match = _KEY_AND_EXTENSION.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def stem_of(shard: str) -> str:
    """Returns the path of a shard without its suffixes; what belongs to it lies beside it by this name."""
    return shard.removeprefix("file:").removesuffix(".gz").removesuffix(".tar")


def walk(stream: IO[bytes], tally: Tally | HeldDamage, shard: str) -> Iterator[Member]:
    """Yields the regular members of a seekable, uncompressed tar; damage is counted in `tally`."""
    name: str | None = None  # the long name of the next member
    for header, position in _headers(stream, tally, shard):
        if header is None:
            name = None
        elif header.type in _LONG_NAMES:
            data = _read_at(stream, position, min(header.size, MAX_NAME_BYTES))
            name = _long_name(header.type, data) or name
        elif header.type not in _REMARKS:
            if header.type in _REGULAR:
                yield Member(name or header.name, header.size, stream, position)
            elif header.type != tarfile.DIRTYPE:
                tally.damage("member is not a regular file", shard)
            name = None


def _headers(stream: IO[bytes], tally: Tally | HeldDamage, shard: str) -> Iterator[tuple[Header | None, int]]:
    """Yields every header with the position of what follows it; None where headers were damaged."""
    position = 0
    ended = lost_track = False
    while len(block := _read_at(stream, position, BLOCK)) == BLOCK:
        position += BLOCK
        if block == bytes(BLOCK):
            ended = True
            continue
        header = _header(block)
        if header is None:
            if not lost_track:
                tally.damage("tar header is damaged", shard)
                yield None, position
            lost_track = True  # headers carry a checksum, so the next good one can be told from data
            continue
        if ended and not lost_track:
            tally.damage("members follow the end of the archive", shard)
        ended = lost_track = False
        yield header, position
        if header.type not in _WITHOUT_DATA:
            position += -(-header.size // BLOCK) * BLOCK
    if not ended:
        tally.damage("shard is cut short", shard)


def _read_at(stream: IO[bytes], position: int, size: int) -> bytes:
    """Returns the bytes at a position; fewer where the archive, or its compression, breaks off."""
    try:
        stream.seek(position)
        return stream.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return b""


def _header(block: bytes) -> Header | None:
    """Parses a header block; None if it is damaged."""
    plain = _PLAIN.match(block)
    if plain and sum(block) - sum(plain[3]) + 8 * ord(" ") == int(plain[3][:6], 8):
        name = plain[1].partition(b"\0")[0].decode("utf-8", "backslashreplace")
        return Header(name, int(plain[2], 8), tarfile.REGTYPE)
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")  # names end up in logs, which are UTF-8
    except tarfile.HeaderError:
        return None
    # a negative size would lead the walk back, for ever
    return Header(header.name, header.size, header.type) if header.size >= 0 else None


def _long_name(kind: bytes, data: bytes) -> str | None:
    """Returns the name that a GNU or PAX extension header gives to the next member, if it gives one."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "backslashreplace")
    path = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data)
    return path.group(1).decode("utf-8", "backslashreplace") if path else None


def read_samples(
    stream: IO[bytes], wanted: frozenset[str], tally: Tally, shard: str, first: int = 0, stop: int | None = None
) -> Iterator[dict[str, Any]]:
    """Groups consecutive members of one key into samples ``{"__key__": str, "jpg": bytes, ...}``.

    Yields the samples with index `first` to `stop`. Only members whose extension is in `wanted` are read; the others
    are passed over, whatever they hold. A sample that lacks members is still yielded, so that whoever needs one can
    count it. A key that comes again later in the shard is counted and left out. Damage is counted by one slice of the
    shard only: what comes before a sample begins, by that of the sample; the rest, by the one without a `stop`.
    """
    held = HeldDamage(tally)
    index = 0
    keys: set[str] = set()
    for key, members in groupby(_named_members(stream, held, shard), key=lambda named: named[0]):
        if key in keys:
            held.damage("key occurs again later in the shard", shard)
            continue
        keys.add(key)
        if index == stop:
            return
        held.settle(index >= first)
        if index >= first:
            yield {"__key__": key, **_read_members(members, wanted, tally, shard)}
        index += 1
    held.settle(stop is None)


def _named_members(stream: IO[bytes], tally: HeldDamage, shard: str) -> Iterator[tuple[str, str, Member]]:
    """Yields the members with their key and extension."""
    for member in walk(stream, tally, shard):
        name = split_name(member.name)
        if name is None:
            tally.damage("member name has no key and extension", shard)
        else:
            yield *name, member


def _read_members(
    members: Iterable[tuple[str, str, Member]], wanted: frozenset[str], tally: Tally, shard: str
) -> dict[str, bytes]:
    """Reads the wanted members of one sample, by extension."""
    found: dict[str, bytes] = {}
    for _, extension, member in members:
        if extension not in wanted:
            continue
        if extension in found:
            tally.damage("member occurs twice in a sample", shard)
        elif member.size > MAX_MEMBER_BYTES:
            tally.damage(f"member is larger than {MAX_MEMBER_BYTES >> 20} MiB", shard)
        else:
            data = member.read()
            if len(data) == member.size:  # otherwise the shard is cut short, which `walk` counts
                found[extension] = data
    return found
