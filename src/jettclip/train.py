"""The training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jettclip.data.loader import Loader
from jettclip.engine.base import Engine
from jettclip.interrupt import raise_if_interrupted
from jettclip.losses.factory import Loss
from jettclip.models.teacher import Ensemble
from jettclip.progress import Progress
from jettclip.report import Reporter
from jettclip.types import Batch, BatchInfo, Features, LossReport, to_device


class NonFiniteLoss(RuntimeError):
    """The loss is not a number; raised before the optimizer would have spoilt the weights with it."""


def train_one_epoch(
    engine: Engine,
    loss: Loss,
    loader: Loader,
    epoch: int,
    *,
    device: torch.device,
    schedule: Callable[[int], float],
    reporter: Reporter,
    report_every: int,
    teachers: Ensemble | None = None,
) -> None:
    """Trains on every batch of one epoch, counted from 0.

    Raises:
        NonFiniteLoss: if the loss stops being a number.
        DataError: if too many samples had to be dropped.
    """
    engine.model.train()
    loader.set_epoch(epoch)
    progress = Progress(epoch, loader, reporter, report_every)
    for step, batch in progress.steps():
        raise_if_interrupted()
        learning_rate = schedule(step)
        report, features, norm = train_step(engine, loss, to_device(batch, device), loader.last_info, teachers)
        progress.update(step, report, loader.last_info, features.logit_scale.detach(), learning_rate, norm)
    progress.check_drops()


def train_step(
    engine: Engine, loss: Loss, batch: Batch, info: BatchInfo, teachers: Ensemble | None = None
) -> tuple[LossReport, Features, float | None]:
    """Takes one step; returns the loss, the features it was computed from, and the gradient norm if it is clipped.

    Raises:
        NonFiniteLoss: before the step, if the loss is not finite.
    """
    with engine.autocast():
        features: Features = engine.model(batch.image, batch.short_caption, batch.long_caption)
        taught = teachers(batch.image, batch.teacher) if teachers else batch.teacher
    report: LossReport = loss(features, taught)
    engine.backward(report.total)
    check_finite(report, info)
    return report, features, engine.step()


def check_finite(report: LossReport, info: BatchInfo) -> None:
    """Raises NonFiniteLoss, naming the terms and the samples, unless the loss is finite."""
    if bool(torch.isfinite(report.total)):
        return
    values = {name: float(value) for name, value in report.terms.items()}
    raise NonFiniteLoss(
        f"the loss is {float(report.total.detach())}, its terms are {values}; nothing was updated. "
        f"This rank's samples: {', '.join(info.keys[:20])}{' ...' if len(info.keys) > 20 else ''}. "
        "Try a lower --lr, a longer --warmup, --grad-clip-norm 1, or --precision amp_bf16"
    )
