#!/usr/bin/env python
"""Measures what a step over micro-batches costs, ours and OpenCLIP's, against the one batch that they are together.

    python benchmarks/accumulation.py         # --quick: a smaller batch and fewer repeats

All three train one and the same small model, on the same rows, with the contrastive loss of image and long caption: two
transformers, which take most of the time, or two towers of a few linear layers, beside which the loss does. OpenCLIP's
side is its own ``train_one_epoch``; it embeds every micro-batch twice, too, but computes the whole loss
once for each, of features that are constant but for those of one micro-batch. Time is the median, over interleaved
repeats, of CPU time on one thread. The gradients are held against those of the one batch before anything is printed.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import torch
from open_clip.loss import ClipLoss
from open_clip.transformer import VisionTransformer
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn

from jettclip.accumulation import accumulate
from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.losses.factory import create_loss
from jettclip.models.text_tower import build_text_tower
from jettclip.models.two_towers import TwoTowers
from jettclip.settings import LossSettings
from jettclip.types import Batch, BatchInfo, Features

MICRO_BATCHES, WIDTH, IMAGE, TOKENS, VOCABULARY = 4, 128, 32, 32, 1000
TRANSFORMERS, LINEAR = "transformers", "linear layers"
GRADIENT_ERROR = 1e-5  # relative to the norm of the one batch's
ONE_BATCH, OURS, OPENCLIP = "one batch", "ours", "OpenCLIP"
SCALE = "towers.logit_scale"
Rows = tuple[Tensor, Tensor]  # images float [b, 3, H, W] and token ids int64 [b, L]
Gradients = dict[str, Tensor]


def small_student(model: str) -> Student:
    """Builds a small model, always with the same weights."""
    torch.manual_seed(0)
    visual, text = transformers() if model == TRANSFORMERS else linear_layers()
    towers = TwoTowers(visual, text, embed_dim=WIDTH, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Student(towers, create_loss(LossSettings(loss="openclip"), WIDTH))


def transformers() -> tuple[nn.Module, nn.Module]:
    """Builds an image and a text transformer."""
    visual = VisionTransformer(IMAGE, 8, WIDTH, layers=4, heads=4, mlp_ratio=4.0, output_dim=WIDTH)
    text = {"context_length": TOKENS, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 4, "layers": 4}
    return visual, build_text_tower(text, WIDTH, quick_gelu=False, mask_padding=False)


def linear_layers() -> tuple[nn.Module, nn.Module]:
    """Builds an image and a text tower that cost little."""
    visual = [nn.Flatten(), nn.Linear(3 * IMAGE**2, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*visual), nn.Sequential(nn.EmbeddingBag(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH))


def draw(rows: int) -> Rows:
    """Draws images and captions of random tokens, with the end token, the largest, last."""
    torch.manual_seed(1)
    captions = torch.randint(1, VOCABULARY - 1, (rows, TOKENS))
    captions[:, -1] = VOCABULARY - 1
    return torch.randn(rows, 3, IMAGE, IMAGE), captions


class Keeper(torch.optim.SGD):
    """Keeps the gradients where an optimizer would step, so that all repeats start from the same weights."""

    def __init__(self, student: Student) -> None:
        super().__init__(student.parameters(), lr=0.0)
        self.student, self.gradients = student, {}

    def step(self, closure: Any = None) -> None:
        """Keeps the gradients."""
        self.gradients = {name: p.grad for name, p in self.student.named_parameters() if p.grad is not None}


class OpenClipFace(nn.Module):
    """A student as OpenCLIP's trainer calls a model."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student, self.logit_scale = student, student.towers.logit_scale

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Embeds a batch."""
        features: Features = self.student(image, None, text)
        assert features.long is not None
        return {"image_features": features.image, "text_features": features.long, "logit_scale": features.logit_scale}


class OpenClipData:
    """Micro-batches as OpenCLIP's trainer reads them."""

    def __init__(self, micro_batches: Sequence[Rows]) -> None:
        self.micro_batches = micro_batches
        self.dataloader, self.num_batches = self, len(micro_batches)
        self.num_samples = sum(len(images) for images, _ in micro_batches)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the order is fixed."""

    def __iter__(self) -> Any:
        return iter(self.micro_batches)


def ours(student: Student, micro_batches: Sequence[Rows]) -> Gradients:
    """Returns the gradients of our step over micro-batches."""
    engine = DDPEngine(student, Keeper(student), torch.device("cpu"))
    batches = [
        (Batch(images, None, captions, None), BatchInfo([f"{first}-{n}" for n in range(len(images))], {}, {}, {}))
        for first, (images, captions) in enumerate(micro_batches)
    ]
    accumulate(engine, student.loss, batches)
    return finished(engine)


def one_batch(student: Student, micro_batches: Sequence[Rows]) -> Gradients:
    """Returns the gradients of our step over all rows at once."""
    engine = DDPEngine(student, Keeper(student), torch.device("cpu"))
    images, captions = map(torch.cat, zip(*micro_batches, strict=True))
    engine.backward(student.loss(engine.model(images, None, captions)).total)
    return finished(engine)


def finished(engine: DDPEngine) -> Gradients:
    """Steps our engine; returns the gradients."""
    engine.step()
    keeper = engine.optimizer
    assert isinstance(keeper, Keeper)
    return keeper.gradients


def openclip(student: Student, micro_batches: Sequence[Rows]) -> Gradients:
    """Returns the gradients of OpenCLIP's step over micro-batches."""
    keeper, data = Keeper(student), OpenClipData(micro_batches)
    args = Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=len(micro_batches), skip_scheduler=True,
        grad_clip_norm=None, horovod=False, rank=0, local_rank=0, log_local=False, world_size=1, wandb=False,
        log_every_n_steps=1, batch_size=len(micro_batches[0][0]),
    )  # fmt: skip
    train_one_epoch(OpenClipFace(student), {"train": data}, ClipLoss(), 0, keeper, None, None, None, args)
    return keeper.gradients


SIDES: dict[str, Callable[[Student, Sequence[Rows]], Gradients]] = {
    ONE_BATCH: one_batch,
    OURS: ours,
    OPENCLIP: openclip,
}


def gradient_error(found: Gradients, expected: Gradients) -> float:
    """Returns the largest distance of a parameter's gradient but that of `logit_scale`, relative to its norm.

    Gradients that are nothing but rounding, as that of the keys' bias is, are held against the largest norm.
    """
    least = 1e-4 * max(float(gradient.norm()) for gradient in expected.values())
    return max(
        float((found[name] - gradient).norm() / max(least, float(gradient.norm())))
        for name, gradient in expected.items()
        if name != SCALE
    )


class Result(NamedTuple):
    """What a side took and gave, beside the one batch."""

    seconds: float
    gradient_error: float
    logit_scale_ratio: float


def compare(model: str, rows: int, repeats: int) -> dict[str, Result]:
    """Measures all sides; the program ends if a gradient is wrong, but for that of OpenCLIP's `logit_scale`."""
    student, (images, captions) = small_student(model), draw(rows)
    size = rows // MICRO_BATCHES
    micro_batches = list(zip(images.split(size), captions.split(size), strict=True))
    gradients = {name: side(student, micro_batches) for name, side in SIDES.items()}
    expected = gradients[ONE_BATCH]
    errors = {name: gradient_error(found, expected) for name, found in gradients.items()}
    scales = {name: float(found[SCALE] / expected[SCALE]) for name, found in gradients.items()}
    if not (max(errors.values()) <= GRADIENT_ERROR and abs(scales[OURS] - 1) <= GRADIENT_ERROR):
        sys.exit(f"the gradients are not those of the one batch, so there is nothing to compare: {errors}, {scales}")
    seconds = measure(student, micro_batches, repeats)
    return {name: Result(seconds[name], errors[name], scales[name]) for name in SIDES}


def measure(student: Student, micro_batches: Sequence[Rows], repeats: int) -> dict[str, float]:
    """Returns the median CPU seconds of a step of each side; every round begins with another side."""
    names = list(SIDES)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            start = time.process_time()
            SIDES[name](student, micro_batches)
            taken[name].append(time.process_time() - start)
        names = names[1:] + names[:1]
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer repeats")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    sizes, repeats = ({TRANSFORMERS: 128, LINEAR: 1024}, 3) if args.quick else ({TRANSFORMERS: 1024, LINEAR: 4096}, 7)
    print(f"A step over {MICRO_BATCHES} micro-batches, one thread\n")
    print(f"| towers | rows | step | CPU seconds | / {ONE_BATCH} | gradient error | logit_scale's / {ONE_BATCH} |")
    print("|---|--:|---|--:|--:|--:|--:|")
    results = {}
    for model, rows in sizes.items():
        results[model] = compare(model, rows, repeats)
        for name, (seconds, error, scale) in results[model].items():
            relative = seconds / results[model][ONE_BATCH].seconds
            print(f"| {model} | {rows:,} | {name} | {seconds:.2f} | {relative:.2f} | {error:.0e} | {scale:.4f} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("open_clip_torch", "torch"))
    print(f"\nPython {platform.python_version()}, {packages}; {os.cpu_count()} CPU cores, of which one is used\n")
    ratio = {model: round(of[OURS].seconds / of[OPENCLIP].seconds, 3) for model, of in results.items()}
    measured = {model: {name: its._asdict() for name, its in of.items()} for model, of in results.items()}
    print(json.dumps({"time_ratio": ratio, "measured": measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
