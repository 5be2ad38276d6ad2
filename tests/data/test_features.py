from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jettclip.data.features import PARTS, Store, store_path
from stores import KEYS, WIDTH, content, features, info, write


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_come_back_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = write(tmp_path / "s", {part: row.to(dtype) for part, row in features().items()})
    store = Store(str(tmp_path / "s"))
    assert store.info == info()
    for part in PARTS:
        for index, key in enumerate(KEYS):
            row = store.row(part, key, content(part, key))
            assert row.dtype == dtype
            assert torch.equal(row, rows[part][index])


def test_the_file_has_the_documented_layout(tmp_path: Path) -> None:
    write(tmp_path / "s")
    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in load_file(tmp_path / "s").items()}
    assert shapes == {
        **{part: ([3, 1, WIDTH], torch.bfloat16) for part in PARTS},
        "image_digest": ([3, 8], torch.uint8),
        "short_digest": ([3, 1, 8], torch.uint8),
        "long_digest": ([3, 1, 8], torch.uint8),
    }


def test_a_store_knows_its_parts(tmp_path: Path) -> None:
    write(tmp_path / "s", {"long": features()["long"]})
    assert Store(str(tmp_path / "s")).parts == {"long"}


def test_rows_that_do_not_match_the_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 keys"):
        write(tmp_path / "s", {part: rows[:2] for part, rows in features().items()})


@pytest.mark.parametrize(
    ("shard", "folder", "expected"),
    [
        ("/data/000012.tar", "", "/data/000012.vit.safetensors"),
        ("/data/000012.tar.gz", "", "/data/000012.vit.safetensors"),
        ("file:/data/000012.tar", "", "/data/000012.vit.safetensors"),
        ("/data/000012.tar", "/features", "/features/000012.vit.safetensors"),
        ("s3://bucket/000012.tar", "/features", "/features/000012.vit.safetensors"),
    ],
)
def test_a_store_lies_beside_its_shard_or_in_the_given_folder(shard: str, folder: str, expected: str) -> None:
    assert store_path(shard, "vit", folder) == expected
