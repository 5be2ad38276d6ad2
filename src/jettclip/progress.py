"""Follows an epoch: averages the loss, times the steps, counts what was lost, and says so every few steps."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jettclip.data.counts import check_drop_rate, describe
from jettclip.data.loader import Loader
from jettclip.detectors import Detectors
from jettclip.ranks import mean_over_ranks, rank_and_world_size
from jettclip.report import Reporter
from jettclip.types import Batch, BatchInfo, Features, LossReport


class Progress:
    """The figures of one epoch.

    Args:
        epoch: counted from 0.
        loader: of its batches.
        reporter: of the figures.
        detectors: of training that gets nowhere; they watch the epochs before and after, too.
        every: steps between reports.
        accumulated: batches of a step; an epoch has as many steps as it has them whole.

    Attributes:
        kept, dropped, damaged, noted: counts of this rank's epoch so far.
    """

    def __init__(
        self, epoch: int, loader: Loader, reporter: Reporter, detectors: Detectors, every: int, accumulated: int = 1
    ) -> None:
        self.epoch, self.loader, self.reporter, self.detectors, self.every = epoch, loader, reporter, detectors, every
        self.accumulated, self.length = accumulated, len(loader) // accumulated
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.damaged: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self._restart()

    def steps(self) -> Iterator[tuple[int, list[tuple[Batch, BatchInfo]]]]:
        """Yields each step since the beginning of training with its batches, and times the waiting for them."""
        first, batches = self.epoch * self.length, ((batch, self.loader.last_info) for batch in self.loader)
        bar = tqdm(range(self.length), f"epoch {self.epoch + 1}", unit="step", disable=None, leave=False)
        with logging_redirect_tqdm():
            for index in bar:
                asked = time.perf_counter()
                micro_batches = list(islice(batches, self.accumulated))
                self._waited += time.perf_counter() - asked
                yield first + index, micro_batches

    def update(
        self,
        step: int,
        report: LossReport,
        features: Features,
        infos: Sequence[BatchInfo],
        learning_rate: float,
        norm: float | None,
    ) -> None:
        """Takes in a step, and reports the mean over the steps since the last report when it is time.

        Tensors are read only then: to read one is to wait for the GPU.
        """
        for info in infos:
            self.kept += len(info.keys)
            self.dropped.update(info.dropped)
            self.damaged.update(info.damaged)
            self.noted.update(info.noted)
            self._samples += len(info.keys)
        self._steps += 1
        self.detectors.update(report, features)
        for name, value in {"loss": report.total.detach(), **report.terms}.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        done = step + 1 - self.epoch * self.length
        if done % self.every == 0 or done == self.length:
            self._report(step, done, float(features.logit_scale.detach()), learning_rate, norm)
            self._restart()

    def check_drops(self) -> None:
        """Raises DataError if more samples of the epoch were dropped, on all ranks, than ``--max-drop-rate`` allows."""
        kept = total_over_ranks(Counter(kept=self.kept))["kept"]
        check_drop_rate(kept, total_over_ranks(self.dropped), self.loader.dataset.settings.max_drop_rate)

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._samples = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def _report(self, step: int, done: int, scale: float, learning_rate: float, norm: float | None) -> None:
        rank, ranks = rank_and_world_size()
        losses = mean_over_ranks(torch.stack(list(self._sums.values())) / self._steps).tolist()
        dropped, noted = total_over_ranks(self.dropped), total_over_ranks(self.noted)
        for trouble in self.detectors.look(step + 1):  # by all ranks, which see the same
            if rank == 0:
                logging.warning(trouble)
        elapsed = time.perf_counter() - self._since
        rate = self._samples * ranks / elapsed
        values: dict[str, Any] = {
            "epoch": self.epoch + done / self.length,
            **dict(zip(self._sums, losses, strict=True)),
            "samples_per_second": rate,
            "data_wait": self._waited / elapsed,
            "lr": learning_rate,
            "logit_scale": scale,
            "dropped": dropped.total(),
            "dropped_by_reason": dict(dropped),
            "damaged": dict(total_over_ranks(self.damaged)),
            "noted": dict(noted),
            **self.detectors.figures,
            "trouble": dict(self.detectors.found),
        }
        if norm is not None:
            values["gradient_norm"] = norm
        self.reporter.log("train", step + 1, values)  # steps taken, as evaluations have it
        terms = "  ".join(f"{name} {value:.4f}" for name, value in zip(self._sums, losses, strict=True))
        logging.info(
            f"epoch {self.epoch + 1} step {done}/{self.length}  {terms}  {rate:.1f} samples/s "
            f"({rate / ranks:.1f} a rank)  data wait {self._waited / elapsed:.0%}  lr {learning_rate:.2e}  "
            f"logit scale {scale:.2f}  dropped {describe(dropped)}" + (f"  {describe(noted)}" if noted else "")
        )


def total_over_ranks(counts: Counter[str]) -> Counter[str]:
    """Adds up counts over all ranks."""
    if not dist.is_initialized():
        return counts
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, counts)
    return sum(gathered, Counter())
