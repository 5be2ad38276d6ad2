"""Notices training that goes on without getting anywhere: collapsed features, a stuck loss, a scale at its limit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jettclip.ranks import mean_over_ranks
from jettclip.types import VIEWS, Features, LossReport, at_least_float32

COLLAPSED = 1e-4
"""Below this spread features are a point. Rounding to bfloat16 alone spreads them by 1e-6, and untrained towers, of
which images leave in a narrow cone, by 7e-3 (ViT-B-32) and more."""

STUCK = 0.01
"""A loss within this share of ln B of it has learnt nothing. Every healthy run begins there, and leaves in warm-up."""

AT_LIMIT = 1e-3
"""Relative distance from its limit within which the logit scale is at it."""

PATIENCE = 500
"""Steps for which something must last without a break before it is told."""

LONG = 1000
"""The same for the logit scale, which may well end at its limit in a good run."""


class Finding(NamedTuple):
    """What may have to be told of the steps between two looks."""

    name: str
    is_there: bool
    patience: int
    is_usual_in_warmup: bool
    rule: str  # the value, and what it is held against
    remedy: str


class Detectors:
    """Watches a whole run: what each rank sees of its own rows, averaged over ranks, so that all come to the same.

    Every step leaves a few numbers on the device, and `look` reads their means, since to read is to wait for a GPU.
    What has been there in all intervals between looks for so many steps is told, and not again before an interval
    without it: collapsed features after 500 steps (`PATIENCE`), whenever; a stuck loss after 500 and a scale at its
    limit after 1000 (`LONG`), both counted from the first interval that lies after warm-up as a whole. Of a run
    that is shorter nothing is told, and a resumed one is counted anew, since nothing of this is kept in checkpoints.

    Args:
        global_batch: B, the rows of all ranks and micro-batches.
        warmup: steps of it.
        scale_limits: between which S = exp(logit_scale) is held; None for no limits.

    Attributes:
        found: how often each trouble was told.
        figures: means over the interval before the last look, to be logged: ``spread@image``, ``spread@long`` ...
    """

    def __init__(
        self, global_batch: int, *, warmup: int = 0, scale_limits: tuple[float, float] | None = (1.0, 100.0)
    ) -> None:
        self.global_batch, self.warmup, self.scale_limits = global_batch, warmup, scale_limits
        self.found: Counter[str] = Counter()
        self.figures: dict[str, float] = {}
        self._lasted: Counter[str] = Counter()  # steps, by what has been there without a break
        self._told: set[str] = set()
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    @torch.no_grad()
    def update(self, report: LossReport, features: Features) -> None:
        """Takes in a step of this rank, without waiting for its tensors."""
        values = {"scale": features.logit_scale.squeeze()}
        for part in ("image", *VIEWS):
            rows = getattr(features, part)
            if rows is not None and len(rows) > 1:  # a single row has no spread
                values[f"spread@{part}"] = spread(rows)
        for name, value in report.terms.items():
            if name.startswith("clip@"):
                values[name] = (value - math.log(self.global_batch)).abs()
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.float()
        self._steps += 1

    def look(self, steps: int) -> list[str]:
        """Reads what was seen since the last look, and returns a message for all that is to be told, on every rank.

        All ranks must look at the same steps: they exchange a few numbers.

        Args:
            steps: taken since the beginning of training.
        """
        if not self._steps:
            return []
        seen = mean_over_ranks(torch.stack(list(self._sums.values())) / self._steps)
        means = dict(zip(self._sums, seen.tolist(), strict=True))
        self.figures = {name: value for name, value in means.items() if name.startswith("spread@")}
        is_warm = steps - self._steps >= self.warmup
        messages = []
        for name, is_there, patience, is_usual_in_warmup, rule, remedy in self._findings(means):
            counts = is_there and (is_warm or not is_usual_in_warmup)
            self._lasted[name] = self._lasted[name] + self._steps if counts else 0
            if not self._lasted[name]:
                self._told.discard(name)
            elif self._lasted[name] >= patience and name not in self._told:
                self._told.add(name)
                self.found[name] += 1
                messages.append(f"step {steps}: {name}. For {self._lasted[name]} steps now, {rule}. {remedy}")
        self._restart()
        return messages

    def _findings(self, means: dict[str, float]) -> Iterator[Finding]:
        for name, value in means.items():
            term, _, part = name.partition("@")
            if term == "spread":
                yield _collapse(part, value)
            elif term == "clip":
                yield _stuck(name, value, self.global_batch)
            elif term == "scale" and self.scale_limits is not None:
                yield _at_lower_limit(value, self.scale_limits[0])
                yield _at_upper_limit(value, self.scale_limits[1])


def spread(rows: Tensor) -> Tensor:
    """Returns the variance of rows [b, D] over their mean square, 0-D: 0 if they are all one, and at most 1.

    Of rows of unit length it is 1 - |mean row|^2, which is the mean of 1 - cosine over all pairs of them.
    """
    rows = at_least_float32(rows)
    return (rows - rows.mean(dim=0)).square().sum() / rows.square().sum()


def _collapse(part: str, value: float) -> Finding:
    is_image = part == "image"
    return Finding(
        f"{'image features' if is_image else f'features of {part} captions'} collapsed to a point",
        value < COLLAPSED,
        PATIENCE,
        False,
        f"the mean of 1 - cosine over pairs of them has been {value:.1e}, below {COLLAPSED:g}",
        "Go back to a checkpoint before that, with a lower --lr, a longer --warmup or --grad-clip-norm 1; if it was so "
        f"from the start, see whether all samples have the same {'image' if is_image else 'caption'}.",
    )


def _stuck(name: str, distance: float, global_batch: int) -> Finding:
    uniform = math.log(global_batch)
    return Finding(
        f"{name} is stuck at ln(global batch)",
        distance < STUCK * uniform,
        PATIENCE,
        True,
        f"it has kept {distance:.1e} from ln {global_batch} = {uniform:.4f} on average, closer than {STUCK:.0%} of "
        "that: it is the loss of a model to which all pairs are alike, whatever --label-smoothing is",
        "See whether captions belong to their images, and whether --lr is too low to move or so high that features "
        "collapse (spread@ in the metrics).",
    )


def _at_lower_limit(scale: float, limit: float) -> Finding:
    return Finding(
        "logit scale at its lower limit",
        scale < limit * (1 + AT_LIMIT),
        LONG,
        True,
        f"it has been {scale:.4g} on average, and is held to {limit:g} or more",
        "The model has given up telling pairs apart: see whether captions belong to their images, or lower --lr.",
    )


def _at_upper_limit(scale: float, limit: float) -> Finding:
    return Finding(
        "logit scale at its upper limit",
        scale > limit * (1 - AT_LIMIT),
        LONG,
        True,
        f"it has been {scale:.4g} on average, and is held to {limit:g} or less",
        "That is usual late in a long run, or from a checkpoint that ended there; early, the loss asks for more "
        "contrast than the features have: lower --lr, or raise --logit-scale-max.",
    )
