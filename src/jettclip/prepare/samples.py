"""Makes the members of a sample from a row, or from a sample of another shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import xxhash

from jettclip.data.counts import DataError, Dropped
from jettclip.data.decode import IMAGE_EXTENSIONS, decode_json
from jettclip.data.rows import Row, describe_row, read_picture
from jettclip.prepare.picture import store_picture
from jettclip.prepare.references import Reference, encode_json, read_groups
from jettclip.prepare.settings import BuildSettings


class Sample(NamedTuple):
    """What a shard will hold of a row."""

    members: dict[str, bytes]  # by extension
    digest: int  # XXH3 of the picture's bytes as they were found, 64 bits


def make_samples(
    rows: Sequence[Row | Reference], settings: BuildSettings
) -> Iterator[tuple[Row | Reference, Sample | Dropped]]:
    """Yields each row with its sample, or with why there is none."""
    for row, found in _found(rows):
        try:
            if isinstance(found, Dropped):
                raise found
            yield row, _sample_of_group(found, settings) if isinstance(found, dict) else _sample_of_row(found, settings)
        except Dropped as error:
            yield row, error


def _found(rows: Sequence[Row | Reference]) -> Iterator[tuple[Row | Reference, Any]]:
    if rows and isinstance(rows[0], Reference):  # a source has rows of one kind
        yield from read_groups([row for row in rows if isinstance(row, Reference)])
    else:
        yield from ((row, row) for row in rows)


def _sample_of_row(row: Row, settings: BuildSettings) -> Sample:
    data = read_picture(row.image)
    picture = store_picture(data, settings)
    members = {picture.extension: picture.data}
    if "long" in row.captions:  # for which `txt` is taken
        members["txt"] = row.captions["long"][0].encode()
    members["json"] = encode_json(describe_row(row, width=picture.width, height=picture.height))
    return Sample(members, xxhash.xxh3_64_intdigest(data))


def _sample_of_group(group: dict[str, bytes], settings: BuildSettings) -> Sample:
    if settings.max_side and "paug.json" in group:
        raise DataError(
            "the samples hold stored augmentation (paug.json), whose boxes are of pictures of their present size; "
            "leave out --max-side"
        )
    extension = next((name for name in IMAGE_EXTENSIONS if name in group), None)
    if extension is None:
        raise Dropped("no image in the sample")
    picture = store_picture(group[extension], settings)
    members = group
    if picture.changed:  # other pictures of the sample would not be what this one shows
        members = {
            picture.extension if name == extension else name: picture.data if name == extension else data
            for name, data in group.items()
            if name == extension or name not in IMAGE_EXTENSIONS
        }
    if picture.changed and "json" in group:
        description = decode_json(group["json"])
        if "width" in description or "height" in description:
            members["json"] = encode_json({**description, "width": picture.width, "height": picture.height})
    return Sample(members, xxhash.xxh3_64_intdigest(group[extension]))
