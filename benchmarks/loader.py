#!/usr/bin/env python
"""Measures how many samples a second our loader and OpenCLIP's make of the same shards, bytes to batch, on one core.

    python benchmarks/loader.py               # --quick: fewer samples and repeats

Needs pandas, which OpenCLIP's trainer requires. A sample is a JPEG of 500 x 375 at quality 95, drawn on the fly, a
caption of 150 words, one of 12, and the features of a teacher, 3 x 768. OpenCLIP's side is the pipeline that its own
``get_wds_dataset`` builds, with its own transform and tokenizer. Its batches hold an image and a text; the three stages
that pick those are replaced by the same ones with a second caption, and features from an npz member, which webdataset
decodes. Ours reads the features from a store beside the shard.

Each side runs in a process of its own on one thread, as a loader worker does, and reads every shard once an epoch, in
turn with the others; a rate is the median over the epochs of samples per second of CPU time. No rate is given unless
both sides give the same token ids and features for every key, and crops alike within 60 dB PSNR. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import open_clip_train.data
import open_clip_train.params
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from tokenizer import Captions
from torch import Tensor

from jettclip import get_wds_dataset
from jettclip.data.counts import Tally
from jettclip.data.features import StoreInfo, digest, store_path, write_store
from jettclip.data.images import ImageReader
from jettclip.data.streams import read_shard
from jettclip.data.workers import settle_in
from jettclip.models.tokenizer import CachedTokenizer
from jettclip.openclip import PreprocessCfg, SimpleTokenizer, image_transform_v2, keep_uint8
from jettclip.settings import DataSettings
from jettclip.types import TeacherFeatures

WIDTH, HEIGHT, QUALITY = 500, 375, 95
NOISE = 5.0  # standard deviation, so that a JPEG takes about 72 kB, as photographs of this size and quality do
CONTEXT, DIMENSIONS = 248, 768
LEAST_PSNR = 60.0
PARTS = ("image", "short", "long")
SETTINGS = DataSettings(
    short_caption_field="short.txt", long_caption_field="txt", features="teacher", shuffle_buffer=5000
)
PER_SHARD, BATCH = 600, 100


class Sample(NamedTuple):
    """One sample, as a loader gave it."""

    key: str
    image: Tensor  # [3, 224, 224]
    short: Tensor  # int64 [L]
    long: Tensor  # int64 [L]
    features: Tensor  # [3, D]


def photograph(seed: int) -> bytes:
    """Returns a JPEG of smooth shapes, some edges and some noise."""
    draw = np.random.default_rng(seed)
    coarse, edges = (
        np.asarray(Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), way))
        for way in (Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
    )
    pixels = 0.85 * coarse + 0.15 * edges + draw.normal(0, NOISE, coarse.shape)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def write_shard(path: Path, number: int, captions: Captions) -> list[bytes]:
    """Writes one shard and its feature store; returns its images."""
    count, first = PER_SHARD, number * PER_SHARD
    long, short = captions.english(count, 150), captions.english(count, 12)
    rows = torch.randn(3, count, DIMENSIONS, generator=torch.Generator().manual_seed(first))
    features = torch.nn.functional.normalize(rows, dim=2).bfloat16()
    keys = [f"{first + index:06d}" for index in range(count)]
    images = [photograph(first + index) for index in range(count)]
    digests = {part: list(map(digest, contents)) for part, contents in zip(PARTS, (images, short, long), strict=True)}
    with tarfile.open(path, "w") as tar:
        for index, key in enumerate(keys):
            npz = io.BytesIO()
            np.savez(npz, **{part: features[place, index].float().numpy() for place, part in enumerate(PARTS)})
            texts = {"short.txt": short[index].encode(), "txt": long[index].encode()}
            for extension, data in {"jpg": images[index], **texts, "npz": npz.getvalue()}.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    info = StoreInfo("teacher", "0", 100.0, True, "{}", DIMENSIONS)
    write_store(store_path(str(path), "teacher"), keys, dict(zip(PARTS, features, strict=True)), digests, info)
    return images


class OpenClip:
    """OpenCLIP's pipeline; an epoch yields ``(keys, image, short, long, features)``, batch by batch."""

    name = "OpenCLIP"

    def __init__(self, urls: str, samples: int, batch: int, transform: Callable[..., Tensor]) -> None:
        # webdataset 1.0 ends every shard with an empty sample, at which OpenCLIP 3.3's reader raises a KeyError
        data = open_clip_train.data
        data.tar_file_expander = partial(wds.tariterators.tar_file_expander, eof_value=None)
        args = open_clip_train.params.parse_args(
            ["--train-data", urls, "--train-num-samples", str(samples), "--batch-size", str(batch), "--workers", "0"]
        )
        args.world_size = 1
        tokenizer = SimpleTokenizer(context_length=CONTEXT)
        self.loader = data.get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer).dataloader
        stages = self.loader.pipeline[0].dataset.pipeline
        names = [getattr(getattr(stage, "f", None), "__name__", "") for stage in stages]
        picks = names.index("_rename")
        assert names[picks : picks + 4] == ["_rename", "_map_dict", "_to_tuple", "_batched"], names
        stages[picks : picks + 3] = [
            wds.rename(image="jpg;png;jpeg;webp", text="txt", short="short.txt", features="npz"),
            wds.map_dict(
                image=transform,
                text=lambda text: tokenizer(text)[0],
                short=lambda text: tokenizer(text)[0],
                features=lambda npz: torch.from_numpy(np.stack([npz[part] for part in PARTS])),
            ),
            wds.to_tuple("__key__", "image", "short", "text", "features"),
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def samples(self) -> Iterator[Sample]:
        """Yields the samples of an epoch."""
        for batch in self:
            yield from map(Sample, *batch)


class Ours:
    """Our loader, with one of its two decoders."""

    def __init__(self, urls: str, batch: int, transform: Callable[..., Tensor], decoder: str = "fast") -> None:
        self.name = "ours" if decoder == "fast" else f"ours, --image-decoder {decoder}"
        self.loader = get_wds_dataset(
            replace(SETTINGS, image_decoder=decoder),
            urls,
            keep_uint8(transform),
            CachedTokenizer(context_length=CONTEXT),
            is_train=True,
            batch_size=batch,
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def samples(self) -> Iterator[Sample]:
        """Yields the samples of an epoch."""
        for batch in self.loader:
            teacher = batch.teacher
            assert isinstance(teacher, TeacherFeatures)
            features = torch.stack([teacher.image, teacher.short, teacher.long], dim=1)  # type: ignore[list-item]
            keys = self.loader.last_info.keys
            assert len(keys) == len(batch.image), "some samples were dropped"
            yield from map(Sample, keys, batch.image, batch.short_caption, batch.long_caption, features)


Side = OpenClip | Ours


def check(reference: Side, ours: Side, samples: int, psnr: Callable[[Tensor, Tensor], float]) -> float:
    """Returns the least PSNR between the crops of two sides; ids and features must be equal.

    Raises:
        SystemExit: saying what differs.
    """
    expected, found = ({sample.key: sample for sample in side.samples()} for side in (reference, ours))
    if not len(expected) == len(found) == samples or expected.keys() != found.keys():
        sys.exit(f"{reference.name} read {len(expected)} samples and {ours.name} {len(found)} of {samples}")
    worst = math.inf
    for key, sample in expected.items():
        other = found[key]
        for name in ("short", "long"):
            if not torch.equal(getattr(sample, name), getattr(other, name)):
                sys.exit(f"the token ids of the {name} caption of sample {key} are not OpenCLIP's")
        if not torch.equal(sample.features, other.features.float()):
            sys.exit(f"the features of sample {key} are not those of the npz")
        worst = min(worst, psnr(sample.image, other.image))
    if worst < LEAST_PSNR:
        sys.exit(f"the crops are alike within {worst:.1f} dB PSNR only")
    return worst


def psnr_to_normalised(cfg: PreprocessCfg) -> Callable[[Tensor, Tensor], float]:
    """Returns what compares normalised floats with uint8 pixels, in dB."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.mean, cfg.std))

    def psnr(normalised: Tensor, pixels: Tensor) -> float:
        error = (normalised * std + mean) * 255 - pixels.float()
        return 10 * math.log10(255**2 / max(1e-9, float(error.square().mean())))

    return psnr


def check_random_crops(images: list[bytes], cfg: PreprocessCfg) -> float:
    """Returns the least PSNR between random crops by OpenCLIP's training transform and ours, drawn from one seed."""
    transform, psnr = image_transform_v2(cfg, True), psnr_to_normalised(cfg)
    reader = ImageReader(keep_uint8(transform), max_pixels=10**8)
    worst = math.inf
    for number, data in enumerate(images):
        torch.manual_seed(number)
        expected = transform(Image.open(io.BytesIO(data)).convert("RGB"))
        torch.manual_seed(number)
        worst = min(worst, psnr(expected, reader.transform(reader.decode(data, Tally()))))
    if worst < LEAST_PSNR:
        sys.exit(f"the random crops are alike within {worst:.1f} dB PSNR only")
    return worst


class Process:
    """A process of its own for what is measured, as loader workers are; torch has one thread in it.

    Args:
        work: what it may be asked to run, by name.
        settled: set up as our loader sets up its workers.
    """

    def __init__(self, work: Mapping[str, Callable[[], object]], settled: bool) -> None:
        context = multiprocessing.get_context("fork")
        self.names, (self.pipe, theirs) = list(work), context.Pipe()
        context.Process(target=self._serve, args=(theirs, work, settled), daemon=True).start()

    def seconds(self, name: str) -> float:
        """Runs a piece of work; returns the CPU seconds that it took."""
        self.pipe.send(name)
        return float(self.pipe.recv())

    @staticmethod
    def _serve(pipe: Any, work: Mapping[str, Callable[[], object]], settled: bool) -> None:
        torch.set_num_threads(1)
        if settled:
            settle_in()
        while True:
            name = pipe.recv()
            start = time.process_time()
            work[name]()
            pipe.send(time.process_time() - start)


def stages_of(urls: list[str], ours: Ours) -> dict[str, Callable[[], object]]:
    """Returns the parts of our way from bytes to batch, over all samples of the shards, each on its own."""
    reader = ours.loader.dataset.reader
    groups = [group for url in urls for group in read_shard(url, reader.wanted, Tally())]
    images = [group["jpg"] for group in groups]
    texts = [group[extension].decode() for group in groups for extension in ("txt", "short.txt")]
    decoded = [reader.images.decode(data, Tally()) for data in images[:50]]
    rows = list(reader.read_groups(groups[: ours.loader.dataset.division.batch_size], 0, Tally()))
    times = len(images) // 50

    def collated() -> None:
        for _ in range(len(images) // len(rows)):
            ours.loader.dataset.collate(rows)

    return {
        "decode only: libjpeg-turbo of the same bytes": lambda: [simplejpeg.decode_jpeg(data) for data in images],
        "tar to members": lambda: [len(group) for url in urls for group in read_shard(url, reader.wanted, Tally())],
        "image to pixels": lambda: [reader.images.decode(data, Tally()) for data in images],
        "crop and resize": lambda: [reader.images.transform(image, str(n)) for n in range(times) for image in decoded],
        "two captions to ids": lambda: [reader.tokenizer(text) for text in texts],
        "all of a sample": lambda: sum(1 for _ in reader.read_groups(groups, 0, Tally())),
        "samples to batch": collated,
    }


def measure(processes: Sequence[Process], samples: int, repeats: int) -> dict[str, float]:
    """Returns the median samples a second of CPU time of each piece of work; the first round warms up."""
    rounds = [(process, name) for process in processes for name in process.names]
    taken: dict[str, list[float]] = {name: [] for _, name in rounds}
    for repeat in range(repeats + 1):
        for process, name in rounds:
            seconds = process.seconds(name)
            if repeat:
                taken[name].append(seconds / samples)
        rounds = rounds[1:] + rounds[:1]
    return {name: 1 / statistics.median(seconds) for name, seconds in taken.items()}


def epoch_of(side: Side) -> dict[str, Callable[[], object]]:
    """Returns the work of running an epoch, by the name of the side."""
    return {side.name: lambda: sum(1 for _ in side)}


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and repeats")
    args = parser.parse_args()
    shards, repeats = (1, 3) if args.quick else (2, 7)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cfg, samples = PreprocessCfg(), shards * PER_SHARD
    with tempfile.TemporaryDirectory() as folder:
        captions = Captions(SimpleTokenizer())
        paths = [Path(folder) / f"{number:06d}.tar" for number in range(shards)]
        images = [data for number, path in enumerate(paths) for data in write_shard(path, number, captions)]
        urls = "::".join(map(str, paths))
        train, plain = image_transform_v2(cfg, True), image_transform_v2(cfg, False)
        psnr = {
            "central crops": check(
                OpenClip(urls, samples, BATCH, plain), Ours(urls, BATCH, plain), samples, psnr_to_normalised(cfg)
            ),
            "random crops": check_random_crops(images[:100], cfg),
        }
        openclip, ours = OpenClip(urls, samples, BATCH, train), Ours(urls, BATCH, train)
        processes = [
            Process(epoch_of(openclip), settled=False),
            Process(epoch_of(ours), settled=True),
            Process(stages_of([str(path) for path in paths], ours), settled=True),
        ]
        if not args.quick:
            pillow = Ours(urls, BATCH, train, "pillow")
            processes.append(Process(epoch_of(pillow), settled=True))
            helped = {f"{OpenClip.name}, in a process set up as our workers are": epoch_of(openclip)[OpenClip.name]}
            processes.append(Process(helped, settled=True))
        rates = measure(processes, samples, repeats)
    report(rates, psnr, statistics.mean(map(len, images)))
    return 0


def report(rates: dict[str, float], psnr: dict[str, float], size: float) -> None:
    """Prints the table, what it was measured with, and the JSON."""
    print(f"Samples per second of CPU time, one thread; {size / 1000:.1f} kB a JPEG\n")
    print("| | samples/s | us/sample | / OpenCLIP |\n|---|--:|--:|--:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {1e6 / rate:,.0f} | {rate / rates[OpenClip.name]:.2f} |")
    ratio = rates["ours"] / rates[OpenClip.name]
    print("\nequal token ids and features; PSNR of " + ", ".join(f"{name} {db:.1f} dB" for name, db in psnr.items()))
    names = ("open_clip_torch", "webdataset", "torch", "torchvision", "pillow", "simplejpeg", "numpy")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"Python {platform.python_version()}, {packages}; {os.cpu_count()} CPU cores, of which one is used\n")
    print(
        json.dumps(
            {
                "ratio": round(ratio, 2),
                "psnr": {name: round(db, 1) for name, db in psnr.items()},
                "jpeg_bytes": round(size),
                "samples_per_second": {name: round(rate, 1) for name, rate in rates.items()},
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
