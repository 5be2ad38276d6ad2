from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jettclip.checkpoint import (
    MANIFEST,
    STATE,
    Position,
    delete_checkpoint,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.engine.optimizer import create_optimizer
from jettclip.losses.factory import create_loss
from jettclip.models.checkpoints import WEIGHTS
from jettclip.settings import LossSettings
from jettclip.types import TeacherFeatures, TeacherInfo
from support import run_ranks, tiny_towers


def make_engine(
    seed: int = 0, width: int = 16, formula: str = "1*clip@long + 1*mse@long", teacher_width: int = 8
) -> DDPEngine:
    torch.manual_seed(seed)
    loss = create_loss(LossSettings(loss=formula), width, [TeacherInfo("t", teacher_width, 50.0)])
    student = Student(tiny_towers(width=width), loss)
    student.towers.start_logit_bias(loss.recipe.logit_bias_init)
    optimizer = create_optimizer(student, "adamw", lr=1e-2, weight_decay=0.1)
    return DDPEngine(student, optimizer, torch.device("cpu"))


def step(engine: DDPEngine, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids = torch.randint(1, 400, (6, 9), generator=generator)
    ids[:, -1] = 49407
    teacher = TeacherFeatures(*(torch.randn(6, 8, generator=generator) for _ in range(3)))
    report = engine.student.loss(engine.model(image, None, ids), teacher)
    engine.backward(report.total)
    engine.step()
    return float(report.total.detach())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_a_resumed_engine_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    engine = make_engine()
    for seed in range(3):
        step(engine, seed)
    saved = save_checkpoint(tmp_path, engine, Position(1, 3))
    random_numbers = random.random(), np.random.rand(), torch.rand(1)
    losses = [step(engine, seed) for seed in range(3, 6)]

    assert saved is not None
    resumed = make_engine(seed=9)
    assert load_checkpoint(saved, resumed) == Position(1, 3)
    assert (random.random(), np.random.rand(), torch.rand(1)) == random_numbers
    assert [step(resumed, seed) for seed in range(3, 6)] == losses
    assert same(resumed.state_dict(), engine.state_dict())


def test_the_weights_are_openclips_with_a_scalar_logit_scale_and_without_the_losss(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, make_engine(), Position(1, 1))
    assert saved is not None
    weights = load_file(saved / WEIGHTS)
    assert weights["logit_scale"].shape == ()
    assert {name.split(".")[0] for name in weights} == {"visual", "text", "logit_scale"}
    assert (
        os.stat(saved / WEIGHTS).st_mode == os.stat(saved / MANIFEST).st_mode
    )  # others may read it, as they may these


def test_the_losss_own_projections_are_saved_and_restored(tmp_path: Path) -> None:
    engine = make_engine()
    saved = save_checkpoint(tmp_path, engine, Position(1, 1))
    assert saved is not None
    other = make_engine(seed=4)
    names = [name for name, _ in engine.student.loss.named_parameters()]
    assert len(names) == 2
    load_checkpoint(saved, other)
    assert same(engine.student.loss.state_dict(), other.student.loss.state_dict())


def test_nothing_is_left_under_the_final_name_by_a_write_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, make_engine(), Position(1, 1))
    assert not (tmp_path / "epoch_1").exists()
    assert latest_checkpoint(tmp_path) is None


def test_the_latest_whole_checkpoint_is_found_and_damaged_ones_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    for epoch in (1, 2, 10):
        save_checkpoint(tmp_path, engine, Position(epoch, epoch * 5))
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch_10"
    with (tmp_path / "epoch_10" / STATE).open("r+b") as stream:
        stream.truncate(100)
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch_2"
    assert "epoch_10 is damaged" in caplog.text
    (tmp_path / "epoch_2" / MANIFEST).unlink()
    assert find_checkpoint("latest", tmp_path) == tmp_path / "epoch_1"
    assert find_checkpoint("latest", tmp_path / "none") is None
    assert find_checkpoint(None, tmp_path) is None


def test_a_path_that_is_no_checkpoint_of_this_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_checkpoint(str(tmp_path / "nowhere"), None)
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="--pretrained"):
        load_checkpoint(tmp_path / "weights.pt", make_engine())
    saved = save_checkpoint(tmp_path, make_engine(), Position(1, 1))
    assert saved is not None
    with pytest.raises(ValueError, match="does not fit this run"):
        load_checkpoint(saved, make_engine(width=8))


@pytest.mark.parametrize(
    ("then", "now", "found"),
    [
        ({}, {"formula": "1*clip@long"}, r"image_projections.0.weight is \[8, 16\], here missing, loss.terms.mse.text"),
        ({"formula": "1*icl@long"}, {}, r"loss.terms.icl.logit_scale is \[1\], here missing, .*mse.* is missing, here"),
        ({"formula": "1*siglip@long"}, {"formula": "1*clip@long"}, r"\(towers.logit_bias is \[1\], here missing\)"),
        ({"formula": "1*clip@long"}, {"formula": "1*siglip@long"}, r"\(towers.logit_bias is missing, here \[1\]\)"),
        ({}, {"teacher_width": 6}, r"is \[8, 16\], here \[6, 16\]"),
    ],
)
def test_a_checkpoint_of_another_loss_is_explained(
    then: dict[str, Any], now: dict[str, Any], found: str, tmp_path: Path
) -> None:
    saved = save_checkpoint(tmp_path, make_engine(**then), Position(1, 1))
    assert saved is not None
    remedy = f"give the same, or start a new run with --pretrained {saved}$"
    with pytest.raises(
        ValueError, match=rf"was trained with another --loss, .* or other teachers .*{found}.*; {remedy}"
    ):
        load_checkpoint(saved, make_engine(**now))


def test_the_bias_of_the_logits_is_saved_with_the_weights_and_restored(tmp_path: Path) -> None:
    engine = make_engine(formula="1*siglip@long")
    step(engine, 0)
    saved = save_checkpoint(tmp_path, engine, Position(1, 1))
    assert saved is not None
    weights = load_file(saved / WEIGHTS)
    assert weights["logit_bias"].shape == ()
    assert weights["logit_bias"] != -10
    resumed = make_engine(seed=9, formula="1*siglip@long")
    load_checkpoint(saved, resumed)
    assert resumed.student.towers.logit_bias.tolist() == [weights["logit_bias"]]
    assert step(resumed, 1) == step(engine, 1)
    assert same(resumed.state_dict(), engine.state_dict())


def test_a_state_with_code_in_it_is_not_executed(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, make_engine(), Position(1, 1))
    assert saved is not None
    torch.save({"loss": os.path.join}, saved / STATE)  # any function will do
    with pytest.raises(ValueError, match="does not fit this run"):
        load_checkpoint(saved, make_engine())


def test_the_latest_is_of_the_last_epoch_though_an_earlier_one_took_more_steps(tmp_path: Path) -> None:
    for epoch, steps in ((2, 14), (3, 6)):  # as after a larger batch
        save_checkpoint(tmp_path, make_engine(), Position(epoch, steps))
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch_3"


def test_one_checkpoint_is_deleted_and_no_other(tmp_path: Path) -> None:
    for epoch in range(1, 4):
        save_checkpoint(tmp_path, make_engine(), Position(epoch, epoch))
    delete_checkpoint(tmp_path, 2)
    delete_checkpoint(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1", "epoch_3"]


def test_every_rank_gets_its_own_random_state_back(tmp_path: Path) -> None:
    def save_and_load() -> tuple[float, float]:
        rank = torch.distributed.get_rank()
        torch.manual_seed(rank)
        engine = make_engine()
        torch.manual_seed(rank)
        save_checkpoint(tmp_path, engine, Position(1, 1))
        torch.distributed.barrier()
        expected = float(torch.rand(1))
        load_checkpoint(tmp_path / "epoch_1", engine)
        return expected, float(torch.rand(1))

    results = run_ranks(2, save_and_load)
    assert all(expected == found for expected, found in results)
    assert results[0] != results[1]


def test_another_number_of_ranks_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_ranks(2, lambda: save_checkpoint(tmp_path, make_engine(), Position(1, 1)))
    load_checkpoint(tmp_path / "epoch_1", make_engine())
    assert "random states start anew" in caplog.text


def test_the_manifest_names_position_and_versions(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_engine(), Position(3, 12))
    manifest = json.loads((tmp_path / "epoch_3" / MANIFEST).read_text())
    assert (manifest["epoch"], manifest["step"]) == (3, 12)
    assert {"jettclip", "torch", "open_clip_torch"} <= set(manifest["versions"])
