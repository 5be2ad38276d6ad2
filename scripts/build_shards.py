#!/usr/bin/env python
"""Makes shards of pictures and captions: NNNNNN.tar with the members jpg (png, webp), txt and json, and report.json.

    python scripts/build_shards.py --input pairs.csv --image-root images --output shards
    python scripts/build_shards.py --input share-captioner_coco_lcs_sam_1246k_1107.json --image-root data \\
        --output shards --holdout 1000 first                      # ShareGPT4V, with Long-CLIP's test split
    python scripts/build_shards.py --input pictures --output shards              # a folder of x.jpg with x.txt
    python scripts/build_shards.py --input 'datacomp/{00000000..00001023}.tar' --join-key json:uid \\
        --join 'datacompdr/{00000000..00001023}.tar' --output shards            # DataComp with DataCompDR's features

Every row of the input is in report.json: written, or dropped, by reason. A killed run leaves no half shard, and the
same command goes on where it stopped; shards whose rows, pictures or flags have changed are made anew.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from jettclip.data.counts import describe
from jettclip.prepare.build import build_shards
from jettclip.prepare.settings import HOLDOUT_WAYS, IMAGE_FORMATS, INPUT_TYPES, BuildSettings


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser()
    settings = read_settings(parser.parse_args(), parser)
    problems = settings.problems()
    if problems:
        parser.error("\n  ".join(problems))
    try:
        built = build_shards(settings)
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted; the same command keeps the shards that are done")
    print(
        f"{settings.output}: {built.written} samples in {built.shards} shards, of which {built.kept} were there; "
        f"dropped {describe(built.dropped)}" + (f"; damaged {describe(built.damaged)}" if built.damaged else "")
    )
    for urls in built.urls:
        print(f"to train on, or to evaluate: {shlex.quote(urls)}")
    return 0 if built.written else 1


def make_parser() -> argparse.ArgumentParser:
    """Declares the flags; their defaults are those of `BuildSettings`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(**{name: field.default for name, field in BuildSettings.__dataclass_fields__.items()})
    add = parser.add_argument_group("input").add_argument
    add("--input", required=True, help="JSON of conversations, CSV, TSV, Parquet, a folder, or shards with braces")
    add("--input-type", choices=INPUT_TYPES, help="what the input is; by default its name tells")
    add("--image-root", metavar="DIR", help="folder of relative picture paths; that of the input by default")
    add("--image-column", metavar="NAME", help="column of a table; found by name: filepath, image_path, image, ...")
    add("--long-caption-column", metavar="NAME", nargs="+", help="likewise: long_caption, title, text, caption")
    add("--short-caption-column", metavar="NAME", nargs="+", help="likewise: short_caption; in DreamLIP's lists, all")
    add("--separator", help="of a text table; a tab if its first line has one, a comma otherwise")
    add(
        "--caption-pattern",
        metavar="REGEX",
        help="of a folder's texts, take only lines in which this is found, and of them its first group, if any",
    )
    add = parser.add_argument_group("existing shards").add_argument
    add("--join", metavar="SHARDS", help="add the members of these shards' samples; as many shards as the input's")
    add("--join-key", metavar="json:KEY", help="name samples by this value of the json member (DataComp: json:uid)")
    add("--keep-keys", metavar="FILE", help="keep only the samples whose keys are in this file, one a line")
    add("--drop-keys", metavar="FILE", help="leave out the samples whose keys are in this file")
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", required=True, help="folder of the shards")
    add("--shard-size", metavar="N", type=int, help="rows a shard is made of (default: %(default)s)")
    add(
        "--holdout",
        nargs=2,
        metavar=("N", "WAY"),
        help="write DIR/holdout and DIR/train: hold out the first N rows (first), or N pictures chosen by a digest of "
        "their paths, with all of their rows (hash); pictures of the one never occur in the other",
    )
    add("--workers", metavar="N", type=int, help="processes (default: one a core); the shards are the same")
    add = parser.add_argument_group(
        "pictures", "All are decoded to the end. JPEG, PNG and WebP stay as they are, unless they have to be shrunk."
    ).add_argument
    add("--max-side", metavar="PIXELS", type=int, help="shrink larger pictures to this longer side; 0 for never")
    add("--min-side", metavar="PIXELS", type=int, help="drop pictures with a shorter side below this")
    add("--max-image-pixels", metavar="N", type=int, help="drop pictures with more pixels (default: %(default)s)")
    add("--reencode", action="store_true", help="encode all pictures anew: RGB, upright, without metadata")
    add("--image-format", choices=IMAGE_FORMATS, help="of pictures that are encoded anew (default: %(default)s)")
    add("--quality", metavar="Q", type=int, help="of JPEG and WebP, 1 to 100 (default: %(default)s)")
    add("--background", metavar="COLOUR", help="behind transparent pictures encoded anew (default: %(default)s)")
    return parser


def read_settings(args: argparse.Namespace, parser: argparse.ArgumentParser) -> BuildSettings:
    """Makes the settings of the parsed flags."""
    values = {name: getattr(args, name) for name in BuildSettings.__dataclass_fields__ if hasattr(args, name)}
    if isinstance(args.holdout, list):
        count, way = args.holdout
        if not count.isdecimal() or int(count) < 1 or way not in HOLDOUT_WAYS:
            parser.error(f"--holdout {count} {way} must be a number of rows and a way, such as 1000 first")
        values |= {"holdout": int(count), "holdout_way": way}
    return BuildSettings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


if __name__ == "__main__":
    sys.exit(main())
