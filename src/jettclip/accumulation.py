"""One step over several micro-batches, with the gradient of the one batch that they are together.

A loss that compares every row with every other one cannot be added up from micro-batches. GradCache (arXiv 2101.06983)
computes it exactly, at the price of a second forward pass: all micro-batches are embedded, and of their features alone,
which are small, one loss gives each feature's gradient; then each micro-batch is embedded once more, with the same
random numbers, and takes its features' gradients back to the weights. The first is spared that: its activations stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # private: the only base that all kinds share

from jettclip.engine.base import Engine
from jettclip.identity import identity_of
from jettclip.losses.factory import Loss
from jettclip.models.teacher import Ensemble
from jettclip.seeding import random_state, set_random_state
from jettclip.types import Batch, BatchInfo, Features, Identity, LossReport, TeacherFeatures, TeacherTokens, to_device


class LossInput(NamedTuple):
    """What a loss is computed from."""

    features: Features
    teacher: TeacherFeatures | None
    identity: Identity | None


def loss_input(
    engine: Engine, loss: Loss, batch: Batch, info: BatchInfo, teachers: Ensemble | None = None
) -> LossInput:
    """Embeds a batch, asks the teachers about it, if there are any, and tells who is who in it, if the loss reads that.

    What it returns lies on the engine's device.
    """
    batch = to_device(batch, engine.device)
    features = _embed(engine, batch)
    with engine.autocast():
        taught = teachers(batch.image, batch.teacher) if teachers else batch.teacher
    assert not isinstance(taught, TeacherTokens)
    return LossInput(features, taught, identity_of(batch, info) if loss.reads_identity else None)


def accumulate(
    engine: Engine, loss: Loss, micro_batches: Sequence[tuple[Batch, BatchInfo]], teachers: Ensemble | None = None
) -> tuple[LossReport, Features]:
    """Adds the gradient of one loss over all micro-batches to the parameters, with the activations of one in memory.

    It is that of the one batch, the logits' scale and bias and the loss's own parameters included, wherever a row's
    features do not depend on the rows beside it; see `batch_norms` for where they do. This rank's rows are those of its
    micro-batches, one after the other.

    Args:
        engine: whose parameters take the gradient; it is exchanged with other ranks once, in the last backward pass.
        loss: of the rows of all micro-batches and ranks.
        micro_batches: two or more, on any device; they are moved to the engine's one at a time.
        teachers: asked once about every micro-batch.

    Returns:
        the loss, and the features of all rows, without gradient.
    """
    first, *others = micro_batches
    states = []
    with engine.no_sync():
        inputs = [loss_input(engine, loss, *first, teachers)]
        with torch.no_grad(), running_statistics_kept(engine.model):
            for micro_batch in others:
                states.append(random_state())
                inputs.append(loss_input(engine, loss, *micro_batch, teachers))
        report, features, gradients = _cached_gradients(loss, inputs)
        engine.backward(_dot(inputs[0].features, loss, gradients[0]))
    for number, ((batch, _), state) in enumerate(zip(others, states, strict=True), start=1):
        with nullcontext() if number == len(others) else engine.no_sync():
            set_random_state(state)
            again = _embed(engine, to_device(batch._replace(teacher=None), engine.device))
            engine.backward(_dot(again, loss, gradients[number]))
    return report, features


def _cached_gradients(loss: Loss, inputs: Sequence[LossInput]) -> tuple[LossReport, Features, list[list[Tensor]]]:
    """Computes the loss of all rows; returns it, their features, and a list of gradients for each micro-batch.

    These are of its rows' features, and then its share of those of the logits' scale and bias and of the loss's own
    parameters: they belong to no row, and are shared out so that the graphs of all micro-batches are alike.
    """
    features, teacher, identity = _together(inputs)
    rows, shared = ([leaf.requires_grad_() for leaf in leaves] for leaves in (features.of_rows, features.of_model))
    report: LossReport = loss(features, teacher, identity)
    gradients = torch.autograd.grad(report.total, [*rows, *shared, *_trained(loss)], materialize_grads=True)
    of_rows, of_shared = gradients[: len(rows)], gradients[len(rows) :]
    pieces = zip(*(gradient.split([len(one.features.image) for one in inputs]) for gradient in of_rows), strict=True)
    shares = [gradient / len(inputs) for gradient in of_shared]
    detached = Features._make(None if part is None else part.detach() for part in features)
    return report, detached, [[*piece, *shares] for piece in pieces]


def _dot(features: Features, loss: Loss, gradients: Sequence[Tensor]) -> Tensor:
    """Returns a scalar of which features, the logits' scale and bias and the loss's parameters have these gradients."""
    values = [*features.of_rows, *features.of_model, *_trained(loss)]
    return torch.stack([(value * gradient).sum() for value, gradient in zip(values, gradients, strict=True)]).sum()


def _trained(loss: Loss) -> list[nn.Parameter]:
    return [parameter for parameter in loss.parameters() if parameter.requires_grad]


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the layers whose output depends on the rows beside a row, so that micro-batches are not one batch."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keeps BatchNorm from counting in its running statistics what it sees; it normalises as before."""
    tracking = [norm for norm in batch_norms(model) if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _embed(engine: Engine, batch: Batch) -> Features:
    with engine.autocast():
        features: Features = engine.model(batch.image, batch.short_caption, batch.long_caption)
    return features


@torch.no_grad()
def _together(inputs: Sequence[LossInput]) -> LossInput:
    features, teacher, identity = zip(*inputs, strict=True)
    scale, bias = features[0].logit_scale.detach(), features[0].logit_bias
    return LossInput(
        _concatenated(features)._replace(logit_scale=scale, logit_bias=None if bias is None else bias.detach()),
        None if teacher[0] is None else _concatenated(teacher),
        None if identity[0] is None else _concatenated(identity),
    )


def _concatenated(parts: Sequence[Any]) -> Any:
    """Puts rows after one another, of `Features`, `TeacherFeatures` or `Identity`."""
    return type(parts[0])(*(None if rows[0] is None else torch.cat(rows) for rows in zip(*parts, strict=True)))
