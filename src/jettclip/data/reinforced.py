"""Reads samples that carry teachers' features and augmentations with them, as DataCompDR's do (arXiv 2311.17049).

Beside image and caption such a sample has the members

    syn.json    {"syn_text": [caption, ...]}, or several keys
    paug.json   the augmentations of the image, as `jettclip.data.augmentation.parse` reads them
    npz         image_emb float32 [A, Dt], text_emb [1 + S, Dt]: the real caption, then the synthetic ones
    pth.gz      the same in bfloat16, if there is no npz

In the newer layout (arXiv 2508.20691) text_emb has real captions only, and every key of syn.json an array of its own,
``<key>_emb``. The features of several teachers stand side by side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from jettclip.data.arrays import read_npz, read_pth_gz
from jettclip.data.augmentation import StoredAugmentation, parse, select
from jettclip.data.captions import Caption, Field
from jettclip.data.counts import Dropped
from jettclip.data.decode import decode_json
from jettclip.data.store_group import Rows
from jettclip.types import TeacherFeatures, TeacherInfo

_SYNTHETIC = "syn.json"
_UNFIT = "features do not fit the captions"


class SyntheticCaptions:
    """The captions of ``syn.json``; each of its keys is a place, and all are chosen alike.

    Args:
        regex: what the beginning of a key must match, such as ``^syn_text.*$``.
    """

    members = {_SYNTHETIC}

    def __init__(self, regex: str) -> None:
        self.regex = re.compile(regex)

    def find(self, group: Mapping[str, Any]) -> list[Caption]:
        """Returns all synthetic captions of a sample, of places ``syn.json:<key>``.

        Raises:
            Dropped: if the member is no JSON object of lists of texts.
        """
        return [
            Caption(text, f"{_SYNTHETIC}:{key}", index)
            for key, texts in _synthetic(group).items()
            if self.regex.match(key)
            for index, text in enumerate(texts)
        ]

    def __str__(self) -> str:
        return f"{_SYNTHETIC}:{self.regex.pattern}"


class MixedCaptions:
    """Real captions, of which a part is replaced by synthetic ones.

    Args:
        real, synthetic: where either stands.
        ratio: the chance of a synthetic one, for a sample that has both.
    """

    def __init__(self, real: Field, synthetic: Field, ratio: float) -> None:
        self.real, self.synthetic, self.ratio = real, synthetic, ratio
        self.members = real.members | synthetic.members

    def find(self, group: Mapping[str, Any]) -> list[Caption]:
        """Returns the captions of both that have a chance, with weights that make `ratio` of it."""
        real, synthetic = self.real.find(group), self.synthetic.find(group)
        if not real or not synthetic:
            return real or synthetic
        weighed = _share(real, 1 - self.ratio) + _share(synthetic, self.ratio)
        return [caption for caption in weighed if caption.weight > 0]

    def __str__(self) -> str:
        return f"{self.real} + {self.synthetic}"


def _share(captions: list[Caption], chance: float) -> list[Caption]:
    """Scales the weights so that those of all places make up `chance`."""
    places = {caption.place: caption.weight for caption in captions}
    return [caption._replace(weight=caption.weight * chance / sum(places.values())) for caption in captions]


def _synthetic(group: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the lists of texts in ``syn.json``, by key; nothing if there is no such member."""
    lists: dict[str, list[str]] = decode_json(group[_SYNTHETIC]) if _SYNTHETIC in group else {}
    for key, texts in lists.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Dropped("caption in the json is not text", f"{_SYNTHETIC}:{key} is no list of texts")
    return lists


class ReinforcedFeatures:
    """Takes the teachers' features of a sample from its own members.

    Args:
        teachers: the teachers, in the order in which their features stand side by side.
        real: where the real captions stand, to which the first rows of ``text_emb`` belong.
    """

    has_augmentations = True
    members = frozenset({_SYNTHETIC, "paug.json", "npz", "pth.gz"})
    sees_upright = False  # its augmentations were drawn for images as they are stored, whatever their EXIF data says

    def __init__(self, teachers: Sequence[TeacherInfo], real: Field) -> None:
        self.teachers, self.real = list(teachers), real
        self.width = sum(teacher.width for teacher in teachers)

    def lookup(
        self, group: Mapping[str, Any], contents: Mapping[str, bytes | Caption], pick: Callable[[int], int]
    ) -> Rows:
        """Returns the features float32 [Dt] of one sample, for the parts in `contents`.

        Args:
            group: the members of the sample.
            contents: of ``image``, ``short`` and ``long`` those wanted; the captions say which of the rows are theirs.
            pick: chooses one of so many augmentations.

        Raises:
            Dropped: if something is missing or unreadable, or features do not fit teachers, captions or augmentations.
        """
        arrays = self._arrays(group)
        found, augmentation = {}, None
        for part, content in contents.items():
            if isinstance(content, Caption):
                found[part] = _finite(_caption_row(group, arrays, content, len(self.real.find(group))))
            else:
                index, augmentation = _pick_augmentation(group, len(arrays["image_emb"]), pick)
                found[part] = _finite(arrays["image_emb"][index])
        return Rows(TeacherFeatures(found.get("image"), found.get("short"), found.get("long")), augmentation)

    def _arrays(self, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the sample's arrays, each [rows, Dt]."""
        if "npz" in group:
            arrays = read_npz(group["npz"])
        elif "pth.gz" in group:
            arrays = read_pth_gz(group["pth.gz"])
        else:
            raise Dropped("features are missing", "there is neither npz nor pth.gz")
        if not {"image_emb", "text_emb"} <= arrays.keys():
            raise Dropped("features are missing", f"image_emb and text_emb are not among {', '.join(sorted(arrays))}")
        for name, rows in arrays.items():
            if name.endswith("_emb") and (rows.ndim != 2 or rows.shape[1] != self.width):
                widths = " + ".join(str(teacher.width) for teacher in self.teachers)
                raise Dropped(
                    "features are of another width", f"{name} is {[*rows.shape]}, and the teachers have {widths}"
                )
        return arrays


def _finite(row: Tensor) -> Tensor:
    row = row.float()
    if not np.isfinite(row.numpy()).all():  # several times faster than torch's
        raise Dropped("feature is not finite")
    return row


def _pick_augmentation(
    group: Mapping[str, Any], rows: int, pick: Callable[[int], int]
) -> tuple[int, StoredAugmentation]:
    if "paug.json" not in group:
        raise Dropped("stored augmentation is missing", "image features belong to augmentations that are not there")
    augmentations = parse(group["paug.json"])
    if len(augmentations) != rows:
        raise Dropped("features do not fit the augmentations", f"{rows} of the image for {len(augmentations)}")
    index = pick(rows)
    return index, select(augmentations, index)


def _caption_row(group: Mapping[str, Any], arrays: Mapping[str, Tensor], caption: Caption, real: int) -> Tensor:
    """Returns the row of a caption: of ``text_emb``, or of its key's own array; there must be a row a caption.

    Args:
        group, arrays: the sample.
        caption: the caption.
        real: captions of the sample that are not synthetic.
    """
    if caption.policy:
        raise Dropped("feature is missing", f"none belongs to a caption made by {caption.policy}")
    rows, synthetic = arrays["text_emb"], _synthetic(group)
    place, _, key = caption.place.partition(":")
    if not any(name.endswith("_emb") for name in arrays.keys() - {"image_emb", "text_emb"}):  # the older layout
        if len(rows) != real + sum(map(len, synthetic.values())) or len(synthetic) > 1:
            lists = ", ".join(f"{len(texts)} of {name}" for name, texts in synthetic.items())
            raise Dropped(_UNFIT, f"{len(rows)} rows of text_emb for {real} real captions and {lists or 'no others'}")
        rows = rows[real:] if place == _SYNTHETIC else rows[:real]
    elif place == _SYNTHETIC:
        rows = arrays.get(f"{key}_emb", rows[:0])
    expected = len(synthetic[key]) if place == _SYNTHETIC else real
    if len(rows) != expected:
        raise Dropped(_UNFIT, f"{len(rows)} rows for the {expected} captions of {caption.place}")
    return rows[caption.index]
