"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from jettclip.accumulation import accumulate, loss_input
from jettclip.data.loader import Loader
from jettclip.detectors import Detectors
from jettclip.engine.base import Engine
from jettclip.interrupt import raise_if_interrupted
from jettclip.losses.factory import Loss
from jettclip.models.teacher import Ensemble
from jettclip.progress import Progress
from jettclip.ranks import holds_on_all_ranks
from jettclip.report import Reporter
from jettclip.types import Batch, BatchInfo, Features, LossReport


class NonFiniteLoss(RuntimeError):
    """The loss is not a number; raised before the optimizer would have spoilt the weights with it."""


def train_one_epoch(
    engine: Engine,
    loss: Loss,
    loader: Loader,
    epoch: int,
    *,
    schedule: Callable[[int], float],
    reporter: Reporter,
    detectors: Detectors,
    report_every: int,
    teachers: Ensemble | None = None,
    accumulated: int = 1,
) -> None:
    """Trains on every batch of one epoch, counted from 0, taking a step for every `accumulated` batches.

    Raises:
        NonFiniteLoss: if the loss stops being a number.
        DataError: if too many samples had to be dropped.
    """
    engine.model.train()
    loader.set_epoch(epoch)
    progress = Progress(epoch, loader, reporter, detectors, report_every, accumulated)
    for step, micro_batches in progress.steps():
        raise_if_interrupted()
        learning_rate = schedule(step)
        report, features, norm = train_step(engine, loss, micro_batches, teachers)
        infos = [info for _, info in micro_batches]
        progress.update(step, report, features, infos, learning_rate, norm)
    progress.check_drops()


def train_step(
    engine: Engine, loss: Loss, micro_batches: Sequence[tuple[Batch, BatchInfo]], teachers: Ensemble | None = None
) -> tuple[LossReport, Features, float | None]:
    """Takes one step on the rows of one or more micro-batches together.

    Returns:
        the loss, the features it was computed from, and the gradient norm if it is clipped.

    Raises:
        NonFiniteLoss: before the step, if the loss is not finite.
    """
    if len(micro_batches) > 1:
        report, features = accumulate(engine, loss, micro_batches, teachers)
    else:
        features, taught, identity = loss_input(engine, loss, *micro_batches[0], teachers)
        report = loss(features, taught, identity)
        engine.backward(report.total)
    check_finite(report, [key for _, info in micro_batches for key in info.keys])
    return report, features, engine.step()


def check_finite(report: LossReport, keys: Sequence[str]) -> None:
    """Raises NonFiniteLoss, naming the terms and the samples, unless the loss is finite on all ranks.

    One rank's loss can be a number although another's is not, whose gradient has reached it all the same.
    """
    is_finite = torch.isfinite(report.total.detach())
    if holds_on_all_ranks(is_finite):
        return
    if bool(is_finite):
        raise NonFiniteLoss("the loss of another rank is not finite, and that rank says why; nothing was updated")
    values = {name: float(value) for name, value in report.terms.items() if not name.startswith("floor@")}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    cause = f"by {', '.join(bad)} of its terms" if bad else "although its terms are all finite:"
    raise NonFiniteLoss(
        f"the loss is {float(report.total.detach())}, {cause} {values}; nothing was updated. "
        f"This rank's samples: {', '.join(keys[:20])}{' ...' if len(keys) > 20 else ''}. "
        "Try a lower --lr, a longer --warmup, --grad-clip-norm 1, or --precision amp_bf16"
    )
