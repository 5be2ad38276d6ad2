from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jettclip.report import METRICS, Reporter, read_metrics, set_up_logging


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_metrics_are_written_a_line_a_step(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, [])
    reporter.log("train", 0, {"loss": 1.5, "dropped_by_reason": {"image is missing": 2}})
    reporter.log("val", 1, {"long/image_to_text_R@1": 0.5})
    assert lines(tmp_path) == [  # at once, without closing
        {"kind": "train", "step": 0, "loss": 1.5, "dropped_by_reason": {"image is missing": 2}},
        {"kind": "val", "step": 1, "long/image_to_text_R@1": 0.5},
    ]
    reporter.close()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Reporter(None, ["tensorboard", "wandb"]).log("train", 0, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_replaces_what_was_written_past_its_checkpoint(tmp_path: Path) -> None:
    first = Reporter(tmp_path, [])
    for step in range(1, 7):
        first.log("train", step, {"loss": 1.0})
        if step % 3 == 0:
            first.log("val", step, {"score": step})
    first.close()
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"kind": "train", "st')  # killed while it wrote
    resumed = Reporter(tmp_path, [], first_step=3)
    resumed.log("train", 4, {"loss": 2.0})
    resumed.close()
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [
        ("train", 1), ("train", 2), ("train", 3), ("val", 3), ("train", 4),
    ]  # fmt: skip


def test_a_tracker_that_cannot_start_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    reporter = Reporter(tmp_path, ["wandb"])
    reporter.log("train", 0, {"loss": 1.0})
    reporter.close()
    assert "wandb failed and gets no more metrics: ConnectionError: no network" in caplog.text
    assert len(lines(tmp_path)) == 1


def test_a_tracker_that_fails_later_is_dropped_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise OSError("disk full")

    run = SimpleNamespace(log=refuse, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    reporter = Reporter(tmp_path, ["wandb"])
    for step in range(3):
        reporter.log("train", step, {"loss": 1.0})
    reporter.close()
    assert caplog.text.count("disk full") == 1
    assert len(lines(tmp_path)) == 3


def test_a_package_that_is_not_installed_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    Reporter(tmp_path, ["wandb"]).close()
    assert "wandb failed" in caplog.text


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, ["tensorboard"])
    reporter.log("train", 3, {"loss": 1.5, "dropped_by_reason": {}})
    reporter.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 1.5)]


def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    reporter = Reporter(tmp_path, ["wandb"], name="a", config={"lr": 1e-3}, project="p")
    reporter.log("train", 0, {"loss": 1.0})
    reporter.close()
    assert "failed" not in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_the_log_file_gets_what_the_console_gets(tmp_path: Path) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        set_up_logging(tmp_path / "out.log", rank=0)
        logging.info("hello")
        set_up_logging(tmp_path / "other.log", rank=1)
        logging.info("not said")
        logging.warning("said")
    finally:
        for handler in logging.getLogger().handlers:
            handler.close()
        logging.getLogger().handlers[:], logging.getLogger().level = before
        logging.captureWarnings(False)
    assert "INFO hello" in (tmp_path / "out.log").read_text()
    assert (tmp_path / "other.log").read_text().strip().endswith("rank 1 WARNING said")


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"kind": "train", "step": 0}\n{"kind"')
    assert read_metrics(tmp_path / METRICS) == [{"kind": "train", "step": 0}]


def test_an_evaluation_adds_to_the_metrics_of_a_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"kind": "train", "step": 7}\n{"kind": "tr')
    with Reporter(tmp_path, []) as reporter:
        reporter.log("val", 5, {"score": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [7, 5]


@pytest.mark.parametrize(("first_step", "expected"), [(2, [1.0, 2.0, 9.0]), (0, [9.0])])
def test_tensorboard_shows_no_step_that_was_taken_again(first_step: int, expected: list[float], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Reporter(tmp_path, ["tensorboard"], first_step=0) as killed:
        for step in range(1, 5):
            killed.log("train", step, {"loss": float(step)})
    with Reporter(tmp_path, ["tensorboard"], first_step=first_step) as resumed:
        resumed.log("train", first_step + 1, {"loss": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == expected
