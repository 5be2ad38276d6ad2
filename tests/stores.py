"""What the tests of feature stores share: rows of three samples, and stores of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def content(part: str, key: str) -> str | bytes:
    """Returns what a row was computed from."""
    return f"{part} of {key}".encode() if part == "image" else f"{part} of {key}"


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


def contents(key: str) -> dict[str, str | bytes]:
    """Returns what all rows of a key were computed from."""
    return {part: content(part, key) for part in PARTS}
