"""Draws what a run has learnt: loss and recall curves, and the pictures found for a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

Lines = Sequence[Mapping[str, Any]]


class Found(NamedTuple):
    """The pictures that a model ranks first for a caption."""

    caption: str
    pictures: list[Image.Image]
    right: int | None  # which of them belongs to the caption, if any


def plot_runs(runs: Mapping[str, Lines], loss: str, metric: str, path: Path) -> None:
    """Draws a loss term and an evaluation metric of several runs against the training step.

    Args:
        runs: the lines of each run's ``metrics.jsonl``, by name.
        loss: the term to draw, such as ``clip@long``.
        metric: the metric to draw; the mean of both directions of ``long/R@1`` and the like.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, lines in runs.items():
        train = [line for line in lines if line["kind"] == "train"]
        val = [line for line in lines if line["kind"] == "val"]
        left.plot([line["step"] + 1 for line in train], [line[loss] for line in train], label=name)
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row.pictures) for row in rows)
    figure = Figure(figsize=(5 + 1.5 * columns, 1.7 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
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


def mean_recall(line: Mapping[str, Any], metric: str) -> float:
    """Returns the mean over both directions of a recall, named ``long/R@1``, from an evaluation's metrics."""
    view, rank = metric.split("/")
    return float(line[f"{view}/image_to_text_{rank}"] + line[f"{view}/text_to_image_{rank}"]) / 2
