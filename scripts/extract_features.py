#!/usr/bin/env python
"""Fills a feature store: asks teachers about every sample of a data set, and keeps their features beside the shards.

    python scripts/extract_features.py --data 'shards/{000..099}.tar' --model ViT-L-14 --pretrained openai --store vitl
    torchrun --nproc-per-node 8 -- scripts/extract_features.py ...      # each GPU takes its share of the shards

Train with `--features vitl`. Several teachers go into one store with `--model a,b --pretrained x,y`, or into one each
by running it for each of them; then train with `--features vitl,convnext`.

    ... --augmentations 10 --precision amp_bf16       # features of 10 random views of every image, to be replayed
    ... --text-model Qwen/Qwen3-0.6B --bidirectional  # embeddings of captions; train with --text-embeddings STORE

Caption flags must be those of the training. A second run keeps the stores that are there, so that a run that was
stopped goes on; where they are of another teacher or were made with other flags, it stops and says so. `--overwrite`
replaces them; give it too where images or captions have changed, of which only manifests tell, and of images only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from jettclip.extract.members import Member, TextMember, load_clip_members
from jettclip.extract.reader import Drawing
from jettclip.extract.run import DTYPES, extract_features
from jettclip.models.text_encoder import POOLINGS, TextEncoderOptions, load_text_encoder
from jettclip.openclip import init_distributed_device_so
from jettclip.params import add_flags, read_flags
from jettclip.settings import SampleSettings, comma_separated
from jettclip.types import VIEWS

TEXT_FLAGS = ("text_pooling", "bidirectional", "instruction", "text_max_length", "text_dtype", "normalize_text")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", required=True, help="shards, with braces, joined by ::")
    add("--store", required=True, help="name of the store: NNNNNN.STORE.safetensors beside NNNNNN.tar")
    add("--model", default="", help="the teacher's model, ours or OpenCLIP's; several separated by commas")
    add("--pretrained", default="", help="its tag, or checkpoint file or folder; as many as models")
    add("--features-dir", default="", help="folder of the store; beside the shards by default")
    add("--views", nargs="+", choices=VIEWS, default=list(VIEWS), help="captions to ask about")
    add(
        "--augmentations", type=int, default=0, help="random views of every image (default: the image as in evaluation)"
    )
    add("--augmentation-seed", type=int, default=0, help="of those views; with the same, teachers see the same ones")
    add("--dtype", choices=DTYPES, default="bf16", help="to store the features in (default: bf16)")
    add("--precision", choices=("fp32", "amp_bf16"), default="fp32", help="to compute in (default: fp32)")
    add("--batch-size", type=int, default=256, help="images, or captions, that a model sees at once (default: 256)")
    add("--workers", type=int, default=4)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--overwrite", action="store_true", help="write stores anew that are there already")
    text = parser.add_argument_group("Language model", "Embeds captions, in place of --model (LLM2CLIP).")
    add = partial(text.add_argument, default=argparse.SUPPRESS)  # so that flags without the first can be refused
    add("--text-model", default="", help="folder, GGUF file or name of a model of transformers")
    add("--text-pooling", choices=POOLINGS, help="the mean of a caption's tokens (default), or its first or last token")
    add("--bidirectional", action="store_true", help="let a decoder's tokens attend to those after them (LLM2Vec)")
    add("--instruction", metavar="TEXT", help="what to read before each caption, or around {caption}; not averaged")
    add("--text-max-length", type=int, help="tokens that captions are cut to (default: 512, or what the model reads)")
    add("--text-dtype", choices=("fp32", "bf16"), help="of the language model's weights (default: fp32)")
    add("--normalize-text", action="store_true", help="scale embeddings to unit length; LLM2CLIP does it in training")
    add_flags(parser, SampleSettings)
    return parser


def find_problems(args: argparse.Namespace) -> list[str]:
    """Returns the mistakes in the flags, but for those of the settings."""
    problems = []
    if args.batch_size < 1:
        problems.append(f"--batch-size {args.batch_size} must be at least 1")
    if args.augmentations < 0:
        problems.append(f"--augmentations {args.augmentations} must be positive, or 0 for the image as in evaluation")
    if args.workers < 0:
        problems.append(f"--workers {args.workers} must be positive, or 0 to read in the main process")
    if bool(args.model) == bool(args.text_model):
        problems.append("give one of --model, for a teacher of images and captions, and --text-model")
    elif args.text_model and args.augmentations:
        problems.append(f"--augmentations {args.augmentations}: --text-model sees no images; leave one of them out")
    elif args.model and not args.pretrained:
        problems.append("--model needs its weights; give --pretrained a tag, or a checkpoint file or folder")
    idle = [f"--{name.replace('_', '-')}" for name in TEXT_FLAGS if hasattr(args, name) and not args.text_model]
    if idle:
        problems.append(f"{', '.join(idle)}: only --text-model heeds them; leave them out")
    return problems


def load_members(args: argparse.Namespace, device: str) -> Sequence[Member]:
    """Loads the models to ask.

    Raises:
        ValueError: if one cannot be loaded.
    """
    if args.text_model:
        options = TextEncoderOptions(
            pooling=getattr(args, "text_pooling", "mean"),
            bidirectional=hasattr(args, "bidirectional"),
            instruction=getattr(args, "instruction", ""),
            max_length=getattr(args, "text_max_length", 512),
            normalize=hasattr(args, "normalize_text"),
        )
        dtype = DTYPES[getattr(args, "text_dtype", "fp32")]
        return [TextMember(load_text_encoder(args.text_model, options, dtype=dtype, device=device))]
    models = comma_separated(args.model)
    weights = comma_separated(args.pretrained) if len(models) > 1 else [args.pretrained]
    return load_clip_members(models, weights, device)


def main() -> int:
    """Runs the command line; returns the exit status."""
    flags = parser()
    args = flags.parse_args()
    settings = read_flags(SampleSettings, args)
    problems = find_problems(args) + settings.problems()
    if problems:
        flags.error("\n  ".join(problems))
    place = init_distributed_device_so(args.device)
    try:
        done = extract_features(
            load_members(args, place["device"]),
            settings,
            args.data,
            args.store,
            views=args.views,
            drawing=Drawing(args.augmentations, args.augmentation_seed),
            folder=args.features_dir,
            batch_size=args.batch_size,
            workers=args.workers,
            dtype=DTYPES[args.dtype],
            precision=args.precision,
            device=place["device"],
            rank=place["global_rank"],
            world_size=place["world_size"],
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"{flags.prog}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(f"{flags.prog}: interrupted; the same command keeps the stores that are done")
    if dist.is_initialized():
        dist.destroy_process_group()
    print(f"store {args.store!r}: {done.describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
