"""Which evaluators there are, when they run, and on what."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from jettclip.data.counts import check_drop_rate, describe
from jettclip.data.loader import Loader
from jettclip.evaluate.retrieval import gather_uneven, retrieval_metrics
from jettclip.models.text_tower import truncate_captions
from jettclip.models.two_towers import TwoTowers
from jettclip.progress import total_over_ranks
from jettclip.types import to_device

Metrics = dict[str, Any]


@dataclass
class Evaluator:
    """Evaluates a model on held-out data; all ranks must call it, and share the work.

    Attributes:
        device: where to compute.
        autocast: the precision to compute in.
        val: held-out image-caption pairs for retrieval, if any.
        val_frequency: epochs between retrievals; 0 for none during training.
        truncate: also evaluate the long captions cut to so many tokens, as the views ``long@77`` and so on.
        zero_shot: computes further metrics of a model, if any.
        zero_shot_frequency: epochs between them.
    """

    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    val: Loader | None = None
    val_frequency: int = 1
    truncate: Sequence[int] = field(default_factory=tuple)
    zero_shot: Callable[[TwoTowers], Metrics] | None = None
    zero_shot_frequency: int = 1

    def run(self, model: TwoTowers, epoch: int | None = None, epochs: int | None = None) -> Metrics:
        """Returns the metrics due after an epoch of `epochs`, or all of them if none is given; may be none."""

        def due(frequency: int) -> bool:
            return epoch is None or (frequency > 0 and (epoch % frequency == 0 or epoch == epochs))

        was_training = model.training
        model.eval()
        share_buffers(model)
        metrics: Metrics = {}
        if self.val is not None and due(self.val_frequency):
            metrics |= self._retrieval(model, self.val)
        if self.zero_shot is not None and due(self.zero_shot_frequency):
            metrics |= self.zero_shot(model)
        model.train(was_training)
        if metrics:
            logging.info(f"Evaluation{f' after epoch {epoch}' if epoch else ''}: {in_words(metrics)}")
        return metrics

    @torch.no_grad()
    def _retrieval(self, model: TwoTowers, loader: Loader) -> Metrics:
        rows: dict[str, list[Tensor]] = defaultdict(list)
        dropped, damaged = Counter[str](), Counter[str]()
        for batch in tqdm(loader, "evaluating", unit="batch", disable=None, leave=False):
            batch = to_device(batch, self.device)
            dropped.update(loader.last_info.dropped)
            damaged.update(loader.last_info.damaged)
            captions = {"short": batch.short_caption, "long": batch.long_caption}
            if batch.long_caption is not None:
                captions |= {f"long@{n}": truncate_captions(batch.long_caption, n) for n in self.truncate}
            with self.autocast():
                rows["image"].append(model.encode_image(batch.image, normalize=True))
                for view, ids in captions.items():
                    if ids is not None:
                        rows[view].append(model.encode_text(ids, normalize=True))
        features = {view: gather_uneven(torch.cat(parts)) for view, parts in rows.items()}
        image = features.pop("image")
        dropped, damaged = total_over_ranks(dropped), total_over_ranks(damaged)
        check_drop_rate(len(image), dropped, loader.dataset.settings.max_drop_rate)
        metrics: Metrics = {
            "samples": len(image),
            "dropped": dropped.total(),
            "dropped_by_reason": dict(dropped),
            "damaged": dict(damaged),
        }
        for view, text in features.items():
            metrics |= {f"{view}/{name}": value for name, value in retrieval_metrics(image, text).items()}
        return metrics


def share_buffers(model: nn.Module) -> None:
    """Gives all ranks rank 0's buffers, which are those that are saved.

    DistributedDataParallel does so before every step only, so that after the last one each rank has its own
    BatchNorm statistics, and would embed its share of the data with another model.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def in_words(metrics: Metrics) -> str:
    """Puts metrics into words: a line for each view and direction, with recall at 1, 5 and 10."""
    lines: dict[str, str] = {}
    for name, value in metrics.items():
        if isinstance(value, float):
            group, _, rank = name.partition("_R@")
            lines[group] = lines.get(group, "") + f"  {rank and f'R@{rank} '}{value:.4f}"
    shown = [f"{group.replace('_', ' ').replace('/', ' captions, '):<34}{line}" for group, line in lines.items()]
    if "samples" in metrics:
        lost = f"dropped {describe(metrics['dropped_by_reason'])}"
        damaged = f", damaged {describe(metrics['damaged'])}" if metrics["damaged"] else ""
        shown.insert(0, f"{metrics['samples']} samples, {lost}{damaged}")
    return "\n  ".join(shown)
