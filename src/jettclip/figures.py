"""Shows what a run has learnt: loss and recall curves, a table of recall, and the pictures found for a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from jettclip.data.collate import collate
from jettclip.data.counts import Tally, check_drop_rate
from jettclip.data.decode import decode_image
from jettclip.data.sample import SampleReader
from jettclip.data.shards import find_shards
from jettclip.models.two_towers import TwoTowers

Lines = Sequence[Mapping[str, Any]]


class Found(NamedTuple):
    """The pictures that a model ranks first for a caption."""

    caption: str
    pictures: list[Image.Image]
    right: int | None  # which of them belongs to the caption, if any


@torch.no_grad()
def find_pictures(
    model: TwoTowers,
    reader: SampleReader,
    urls: str | Sequence[str],
    captions: Sequence[int],
    count: int = 5,
    batch_size: int = 100,
) -> list[Found]:
    """Ranks the pictures of a data set for some of its long captions.

    Args:
        model: in evaluation mode, on the CPU.
        reader: reads the samples, with their long captions, by the model's own image transform and tokenizer.
        urls: shards, with braces, joined by ``::``, or a list of such.
        captions: which samples' captions to ask about, by their place in the data set; those beyond its end are left
            out.
        count: pictures to find for each.
        batch_size: pictures the model sees at once.

    Raises:
        DataError: if shards are missing, or too many of their samples cannot be used.
    """
    settings, tally = reader.settings, Tally(reader.settings.max_drop_rate)
    shards = find_shards(urls, allow_pipe=settings.allow_pipe_urls)
    samples = reader.read_shards([shard.url for shard in shards], tally)
    contents, token_ids, features = [], [], []
    while rows := list(islice(samples, batch_size)):
        contents += [row.contents for row in rows]
        token_ids += [row.long for row in rows if row.long is not None]
        features.append(model.encode_image(collate(rows).image, normalize=True))
    check_drop_rate(tally.kept, tally.dropped, tally.max_drop_rate)
    pictures = torch.cat(features)
    found = []
    for number in captions:
        if number < len(contents):
            caption = str(contents[number]["long"])
            similarities = model.encode_text(torch.stack([token_ids[number]]), normalize=True) @ pictures.T
            best = similarities[0].topk(min(count, len(contents))).indices.tolist()
            shown = [decode_image(bytes(contents[i]["image"]), settings.max_image_pixels) for i in best]
            found.append(Found(caption, shown, best.index(number) if number in best else None))
    return found


def plot_runs(runs: Mapping[str, Lines], loss: str, metric: str, path: Path) -> None:
    """Draws a loss term and an evaluation metric of several runs against the training step.

    Args:
        runs: the lines of each run's ``metrics.jsonl``, by name.
        loss: the term to draw, such as ``clip@long``.
        metric: the metric to draw; the mean of both directions of ``long/R@1`` and the like.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, lines in runs.items():
        train = [line for line in lines if line["kind"] == "train"]
        val = [line for line in lines if line["kind"] == "val"]
        left.plot([line["step"] for line in train], [line[loss] for line in train], label=name)
        right.plot([line["step"] for line in val], [mean_recall(line, metric) for line in val], "o-", label=name)
    left.set(xlabel="step", ylabel=f"training loss, {loss}")
    right.set(xlabel="step", ylabel=f"held-out {metric}", ylim=(0, 1), xlim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def plot_found(rows: Sequence[Found], path: Path) -> None:
    """Draws captions, each with the pictures found for it; the right one has a green frame.

    Args:
        rows: one a caption.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    columns = max(len(row.pictures) for row in rows)
    figure = Figure(figsize=(5 + 1.5 * columns, 1.7 * len(rows)), layout="constrained")
    grid = figure.subplots(
        len(rows), columns + 1, squeeze=False, gridspec_kw={"width_ratios": [5 / 1.5, *[1] * columns]}
    )
    for row, axes in zip(rows, grid, strict=True):
        for cell in axes:
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
        axes[0].text(0, 0.5, textwrap.fill(row.caption, 78), fontsize=7, va="center", transform=axes[0].transAxes)
        for index, (cell, picture) in enumerate(zip(axes[1:], row.pictures, strict=False)):
            cell.imshow(picture)
            if index == row.right:
                cell.spines[:].set(visible=True, color="green", linewidth=3)
    figure.savefig(path, dpi=110)


def recall_table(evaluations: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Returns a table of recall, the mean of both directions.

    Args:
        evaluations: the metrics of each run, by name.
        columns: the title of each metric, such as ``long/R@1``, to show.
    """
    lines = [" " * 26 + "".join(f"{title:>24}" for title in columns.values())]
    for name, line in evaluations.items():
        lines.append(f"{name:<26}" + "".join(f"{mean_recall(line, metric):>24.3f}" for metric in columns))
    return "\n".join(lines)


def mean_recall(line: Mapping[str, Any], metric: str) -> float:
    """Returns the mean over both directions of a recall, named ``long/R@1``, from an evaluation's metrics."""
    view, rank = metric.split("/")
    return float(line[f"{view}/image_to_text_{rank}"] + line[f"{view}/text_to_image_{rank}"]) / 2
