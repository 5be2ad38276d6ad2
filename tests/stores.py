"""What the tests of feature stores share: rows of three samples, and stores of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jettclip.data.captions import Caption
from jettclip.data.features import PARTS, StoreInfo, digest, write_store

KEYS = ["a", "b", "c"]
WIDTH = 4


def info(**changes: Any) -> StoreInfo:
    """Returns what a store says of its teacher, of which some may be given."""
    return StoreInfo(
        **{
            "model": "Teacher",
            "weights_digest": "12ab",
            "logit_scale": 100 / 3,
            "normalized": True,
            "preprocess": '{"size": 224}',
            "width": WIDTH,
        }
        | changes
    )


def content(part: str, key: str, index: int = 0) -> str | bytes:
    """Returns what a row was computed from; a sample may have several captions."""
    return f"{part} of {key}".encode() if part == "image" else f"{part} of {key}" + index * "'"


def features(width: int = WIDTH, seed: int = 0, keys: Sequence[str] = KEYS) -> dict[str, Tensor]:
    """Returns one row a key of image, short and long features."""
    generator = torch.Generator().manual_seed(seed)
    return {part: torch.randn(len(keys), width, generator=generator).bfloat16() for part in PARTS}


def write(
    path: Path, rows: Mapping[str, Tensor] | None = None, keys: Sequence[str] = KEYS, **changes: Any
) -> dict[str, Tensor]:
    """Writes a store of `features`, or of the given rows; returns them."""
    rows = rows or features(changes.get("width", WIDTH))
    digests = {part: [digest(content(part, key)) for key in keys] for part in rows}
    write_store(path, keys, rows, digests, info(**changes))
    return dict(rows)


def write_reinforced(
    path: Path, augmentations: Sequence[str], captions: int = 5, seed: int = 0, **changes: Any
) -> dict[str, Tensor]:
    """Writes a store of one feature for each augmentation and caption of a key; returns them.

    Args:
        path: file to write.
        augmentations: of each key, a JSON list.
        captions: how many each sample has in either view.
        seed: of the features.
        changes: of `info`, or of what else `write_store` takes.
    """
    options = {name: changes.pop(name) for name in ("dtype", "image_sizes") if name in changes}
    generator = torch.Generator().manual_seed(seed)
    width = changes.get("width", WIDTH)
    columns = {"image": len(json.loads(augmentations[0])), "short": captions, "long": captions}
    rows = {part: torch.randn(len(KEYS), its, width, generator=generator).bfloat16() for part, its in columns.items()}
    digests = {
        part: [
            [digest(content(part, key, index)) for index in range(1 if part == "image" else captions)] for key in KEYS
        ]
        for part in PARTS
    }
    write_store(
        path,
        KEYS,
        rows,
        digests,
        info(**{"augmentation": '{"magnitude": 9}'} | changes),
        augmentations=augmentations,
        **{"image_sizes": [(300, 400)] * len(KEYS)} | options,
    )
    return rows


def contents(key: str, parts: Sequence[str] = PARTS, index: int = 0) -> dict[str, bytes | Caption]:
    """Returns what is looked up for a key: its image, and one of its captions in each view."""
    found: dict[str, bytes | Caption] = {}
    for part in parts:
        its = content(part, key, index if part != "image" else 0)
        found[part] = its if isinstance(its, bytes) else Caption(its, f"{part}_caption", index)
    return found


def group(shard: str, key: str) -> dict[str, str]:
    """Returns of a sample's tar members what stores are looked up by."""
    return {"__shard__": shard, "__key__": key}
