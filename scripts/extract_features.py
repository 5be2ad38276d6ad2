#!/usr/bin/env python
"""Fills a feature store: asks a teacher about every sample of a data set, and keeps its features beside the shards.

    python scripts/extract_features.py --data 'shards/{000..099}.tar' --model ViT-L-14 --pretrained openai --store vitl
    torchrun --nproc-per-node 8 -- scripts/extract_features.py ...      # each GPU takes its share of the shards

Train with `--features vitl`. For several teachers run it once for each, and train with `--features vitl,convnext`.
Caption flags must be those of the training. A second run keeps the stores that are there and of this teacher; where
images or captions have changed since, add `--overwrite`.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist

from jettclip.data.counts import describe
from jettclip.data.sample import SampleReader
from jettclip.extract import DTYPES, extract_features
from jettclip.models.factory import create_model_and_transforms, get_tokenizer
from jettclip.models.teacher import Teacher
from jettclip.openclip import init_distributed_device_so, keep_uint8
from jettclip.params import add_flags, read_flags
from jettclip.settings import SampleSettings
from jettclip.types import VIEWS


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="shards, with braces, joined by ::")
    parser.add_argument("--model", required=True, help="name of the teacher's model, ours or OpenCLIP's")
    parser.add_argument("--pretrained", required=True, help="tag, or checkpoint file or folder")
    parser.add_argument("--store", required=True, help="name of the store: NNNNNN.STORE.safetensors beside NNNNNN.tar")
    parser.add_argument("--features-dir", default="", help="folder of the store; beside the shards by default")
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=list(VIEWS), help="captions to ask about")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="to store the features in (default: bf16)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="write stores anew that are there already")
    add_flags(parser, SampleSettings)
    args = parser.parse_args()
    settings = read_flags(SampleSettings, args)
    problems = settings.problems()
    if args.batch_size < 1:
        problems.append(f"--batch-size {args.batch_size} must be at least 1")
    if problems:
        parser.error("\n  ".join(problems))
    place = init_distributed_device_so(args.device)
    try:
        tokenizer = get_tokenizer(args.model)  # first, since an adapter has none
        model, _, transform = create_model_and_transforms(args.model, args.pretrained, device=place["device"])
        reader = SampleReader(settings, keep_uint8(transform), tokenizer, tuple(args.views))
        done = extract_features(
            Teacher(model, args.model),
            reader,
            args.data,
            args.store,
            folder=args.features_dir,
            batch_size=args.batch_size,
            workers=args.workers,
            dtype=DTYPES[args.dtype],
            device=place["device"],
            rank=place["global_rank"],
            world_size=place["world_size"],
            overwrite=args.overwrite,
        )
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted; the same command keeps the stores that are done")
    if dist.is_initialized():
        dist.destroy_process_group()
    print(
        f"store {args.store!r}: {done.samples} samples in {done.shards} shards written, {done.kept} shards kept; "
        f"dropped {describe(done.dropped)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
