from __future__ import annotations

import logging
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from jettclip.data.counts import DataError
from jettclip.detectors import Detectors
from jettclip.progress import Progress, total_over_ranks
from jettclip.ranks import mean_over_ranks
from jettclip.settings import DataSettings
from jettclip.types import BatchInfo, Features, LossReport
from support import run_ranks


class Recorder:
    """Takes the place of a reporter."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, dict[str, Any]]] = []

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self.lines.append((kind, step, values))


class Batches(list):  # type: ignore[type-arg]
    """Takes the place of a loader: each batch is the loss of its step, shared among the batches of one."""

    def __init__(self, losses: list[float], info: BatchInfo) -> None:
        super().__init__(losses)
        self.last_info = info

    dataset = SimpleNamespace(settings=DataSettings(max_drop_rate=0.1))


def follow(
    epoch: int,
    losses: list[float],
    every: int,
    dropped: int = 0,
    accumulated: int = 1,
    detectors: Any = None,
    image: Tensor | None = None,
) -> tuple[Progress, Recorder]:
    recorder, info = (
        Recorder(),
        BatchInfo(["a", "b"], {"image is missing": dropped} if dropped else {}, {}, {"noted": 1}),
    )
    loader, detectors = Batches(losses, info), detectors or Detectors(8)
    progress = Progress(epoch, loader, recorder, detectors, every, accumulated)  # type: ignore[arg-type]
    for step, micro_batches in progress.steps():
        value = torch.tensor(float(sum(loss for loss, _ in micro_batches)))  # type: ignore[misc]
        report = LossReport(value, {"clip@long": value})
        features = Features(torch.eye(2) if image is None else image, None, torch.eye(2), torch.tensor([14.0]))
        progress.update(step, report, features, [info for _, info in micro_batches], 1e-3, None)
    return progress, recorder


def test_means_are_reported_every_few_steps_and_at_the_end() -> None:
    _, recorder = follow(epoch=2, losses=[1, 2, 3, 4, 9], every=2)
    assert [(kind, step, values["loss"]) for kind, step, values in recorder.lines] == [
        ("train", 12, 1.5), ("train", 14, 3.5), ("train", 15, 9.0),
    ]  # fmt: skip
    last = recorder.lines[-1][2]
    assert last["epoch"] == 3.0
    assert last["clip@long"] == 9.0
    assert last["logit_scale"] == 14.0
    assert last["noted"] == {"noted": 5}  # of the whole epoch
    assert 0 <= last["data_wait"] <= 1
    assert last["samples_per_second"] > 0


def test_a_step_takes_the_batches_that_it_accumulates_and_counts_them_all() -> None:
    progress, recorder = follow(epoch=1, losses=[1, 2, 3, 4, 5, 6], every=2, dropped=1, accumulated=2)
    assert [(step, values["loss"]) for _, step, values in recorder.lines] == [(5, (3 + 7) / 2), (6, 11.0)]
    assert [values["epoch"] for _, _, values in recorder.lines] == [pytest.approx(1 + 2 / 3), 2.0]
    assert (progress.kept, progress.dropped["image is missing"], progress.noted["noted"]) == (12, 6, 6)


def test_trouble_is_reported_with_what_the_detectors_measure(caplog: pytest.LogCaptureFixture) -> None:
    detectors = Detectors(8, scale_limits=(1.0, 14.0))
    for epoch in range(4):
        _, recorder = follow(epoch, [1.0] * 300, every=300, detectors=detectors)
    values = recorder.lines[-1][2]
    assert values["trouble"] == {"logit scale at its upper limit": 1}
    assert values["spread@image"] == pytest.approx(0.5)
    assert [record.levelname for record in caplog.records if "upper limit" in record.message] == ["WARNING"]


def test_trouble_on_another_rank_is_reported_by_all_and_told_by_the_first() -> None:
    def work() -> tuple[dict[str, Any], int]:
        warnings: list[str] = []
        logging.getLogger().addFilter(lambda record: warnings.append(record.getMessage()) or True)
        is_second = torch.distributed.get_rank() == 1
        detectors = Detectors(8, scale_limits=None)
        losses = [math.log(8) + 0.04 * (not is_second)] * 500  # of which the mean over ranks is within 1% of ln 8
        rows = torch.eye(2) if is_second else torch.ones(2, 2)
        _, recorder = follow(0, losses, every=500, detectors=detectors, image=rows)
        return recorder.lines[0][2], sum("is stuck at ln" in warning for warning in warnings)

    (first, told), (second, told_again) = run_ranks(2, work)
    assert (told, told_again) == (1, 0)
    assert first["trouble"] == second["trouble"] == {"clip@long is stuck at ln(global batch)": 1}
    assert first["spread@image"] == second["spread@image"] == pytest.approx(0.25)  # the mean of 0 and 0.5


def test_counts_of_the_epoch_are_reported_by_reason() -> None:
    _, recorder = follow(0, [1, 1], every=1, dropped=3)
    assert [values["dropped"] for _, _, values in recorder.lines] == [3, 6]
    assert recorder.lines[-1][2]["dropped_by_reason"] == {"image is missing": 6}


def test_the_log_line_ends_with_what_was_dropped_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        follow(0, [1, 1], every=2, dropped=3)
    assert caplog.messages[-1].endswith("dropped image is missing 6  noted 2")


def test_more_drops_than_allowed_stop_the_run_after_the_epoch() -> None:
    progress, _ = follow(0, [1, 1, 1], every=1, dropped=1)  # 3 of 9
    with pytest.raises(DataError, match=r"3 of 9 samples were dropped \(image is missing 3\)"):
        progress.check_drops()
    follow(0, [1, 1, 1], every=1)[0].check_drops()


def test_ranks_agree_on_means_and_totals() -> None:
    def work() -> tuple[float, Counter[str], dict[str, Any]]:
        rank = torch.distributed.get_rank()
        _, recorder = follow(0, [float(rank)], every=1, dropped=rank)
        counts = total_over_ranks(Counter({f"rank {rank}": 1, "all": 2}))
        return float(mean_over_ranks(torch.tensor(float(rank)))), counts, recorder.lines[0][2]

    for mean, counts, line in run_ranks(3, work):
        assert mean == 1.0
        assert counts == {"rank 0": 1, "rank 1": 1, "rank 2": 1, "all": 6}
        assert (line["loss"], line["dropped"]) == (1.0, 3)
