from __future__ import annotations

import gc
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jettclip.data.counts import DataError, Dropped
from jettclip.data.decode import decode_vector
from jettclip.data.embedding_tars import OPEN_TARS, EmbeddingTars, embedding_tar_path
from support import write_shard

WIDTH = 6


def embedding(key: str, view: str) -> bytes:
    seed = int.from_bytes(f"{key} {view}".encode(), "little") % 2**32
    return np.random.default_rng(seed).normal(size=WIDTH).astype("<f4").tobytes()


def members(key: str) -> dict[str, Any]:
    return {"__key__": key, **{f"{view}SV_captions": embedding(key, view) for view in ("short", "long")}}


def group(shard: str | Path, key: str) -> dict[str, Any]:
    return {"__key__": key, "__shard__": str(shard), "jpg": b"..."}


def expected(key: str) -> dict[str, bytes]:
    return {"shortsv_captions": embedding(key, "short"), "longsv_captions": embedding(key, "long")}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("prefix", ["", "file:"])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_embeddings_are_joined_by_key_and_not_by_position(tmp_path: Path, suffix: str, prefix: str) -> None:
    write_shard(tmp_path / "00003_text_embeddings.tar", [members(key) for key in ("c", "surplus", "a", "b")])
    shard = f"{prefix}{tmp_path}/00003{suffix}"
    tars = EmbeddingTars([shard], "error")
    for key in ("a", "b", "c", "a"):
        assert tars.members_of(group(shard, key)) == expected(key)
    assert torch.equal(
        decode_vector(tars.members_of(group(shard, "b"))["longsv_captions"]),
        torch.from_numpy(np.frombuffer(embedding("b", "long"), "<f4").copy()),
    )


def test_keys_may_have_folders_and_long_names(tmp_path: Path) -> None:
    keys = ["folder/a", "folder/" + "x" * 200, "ä"]
    write_shard(tmp_path / "0_text_embeddings.tar", [members(key) for key in keys])
    tars = EmbeddingTars([f"{tmp_path}/0.tar"], "error")
    for key in keys:
        assert tars.members_of(group(tmp_path / "0.tar", key)) == expected(key)


def test_missing_tars_are_found_before_training(tmp_path: Path) -> None:
    shards = [f"{tmp_path}/{n}.tar" for n in range(3)]
    for on_missing in ("error", "drop"):
        with pytest.raises(DataError, match=rf"3 of 3 tars of text embeddings are missing, .*{tmp_path}/0_text_emb"):
            EmbeddingTars(shards, on_missing)
    write_shard(tmp_path / "1_text_embeddings.tar", [members("a")])
    with pytest.raises(DataError, match=r"2 of 3 tars .*leave out --text-embeddings"):
        EmbeddingTars(shards, "error")
    tars = EmbeddingTars(shards, "drop")
    assert tars.members_of(group(shards[1], "a")) == expected("a")
    for shard, key in ((shards[0], "a"), (shards[0], "a"), (shards[1], "b")):
        with pytest.raises(Dropped) as dropped:
            tars.members_of(group(shard, key))
        assert dropped.value.reason == "text embeddings are missing"


def test_a_missing_key_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    write_shard(tmp_path / "0_text_embeddings.tar", [members("a")])
    tars = EmbeddingTars([f"{tmp_path}/0.tar"], "error")
    with pytest.raises(
        DataError, match=rf"{tmp_path}/0.tar, sample b: text embeddings are missing: .*has none of this"
    ):
        tars.members_of(group(tmp_path / "0.tar", "b"))
    with pytest.raises(DataError, match=r"make .*0_text_embeddings.tar again, or give --on-missing-features drop"):
        tars.members_of(group(tmp_path / "0.tar", "b"))


@pytest.mark.parametrize("url", ["s3://bucket/0.tar", "https://host/0.tar", "pipe:cat 0.tar"])
def test_a_shard_elsewhere_has_no_tar_beside_it(url: str) -> None:
    with pytest.raises(DataError, match="is not on this machine"):
        EmbeddingTars([url], "drop")


def test_a_tar_that_is_cut_short_costs_what_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(write_shard(tmp_path / "0_text_embeddings.tar", [members(key) for key in "abc"]))
    path.write_bytes(path.read_bytes()[: 512 * 8 + 512 + 10])  # two blocks a member: within c's first embedding
    tars = EmbeddingTars([f"{tmp_path}/0.tar"], "drop")
    with caplog.at_level(logging.WARNING):
        assert tars.members_of(group(tmp_path / "0.tar", "b")) == expected("b")
    assert "shard is cut short" in caplog.text
    with pytest.raises(Dropped) as dropped:
        tars.members_of(group(tmp_path / "0.tar", "c"))
    assert dropped.value.reason == "text embedding is cut short or too large"


def test_what_is_too_large_for_an_embedding_is_not_read(tmp_path: Path) -> None:
    large = {"__key__": "a", "longSV_captions": b"\0" * (2**20 + 4)}
    write_shard(tmp_path / "0_text_embeddings.tar", [large, members("b")])
    tars = EmbeddingTars([f"{tmp_path}/0.tar"], "drop")
    with pytest.raises(Dropped, match="too large"):
        tars.members_of(group(tmp_path / "0.tar", "a"))
    assert tars.members_of(group(tmp_path / "0.tar", "b")) == expected("b")


def test_a_key_that_comes_twice_keeps_its_first_embeddings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {**members("b"), "__key__": "a"}
    write_shard(tmp_path / "0_text_embeddings.tar", [members("a"), other, {"__key__": "no", "": b"name"}])
    tars = EmbeddingTars([f"{tmp_path}/0.tar"], "error")
    with caplog.at_level(logging.WARNING):
        assert tars.members_of(group(tmp_path / "0.tar", "a")) == expected("a")
    assert "member occurs twice in a sample" in caplog.text


def test_few_tars_stay_open(tmp_path: Path) -> None:
    shards = [f"{tmp_path}/{n}.tar" for n in range(OPEN_TARS + 4)]
    for n, shard in enumerate(shards):
        write_shard(Path(embedding_tar_path(shard)), [members(f"key{n}")])
    gc.collect()  # what tests before this one have left open
    before = open_files()
    tars = EmbeddingTars(shards, "error")
    for _ in range(2):
        for n, shard in enumerate(shards):
            assert tars.members_of(group(shard, f"key{n}")) == expected(f"key{n}")
            assert open_files() - before <= OPEN_TARS
    del tars
    assert open_files() == before


def test_forked_workers_may_share_an_open_tar(tmp_path: Path) -> None:
    keys = [f"key{n}" for n in range(50)]
    write_shard(tmp_path / "0_text_embeddings.tar", [members(key) for key in keys])
    tars = EmbeddingTars([f"{tmp_path}/0.tar"], "error")
    tars.members_of(group(tmp_path / "0.tar", keys[0]))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            right = all(tars.members_of(group(tmp_path / "0.tar", key)) == expected(key) for key in keys * 20)
            os._exit(0 if right else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
