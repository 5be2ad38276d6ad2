#!/usr/bin/env python
"""Checks shards and their feature stores: every image is decoded whole, every caption and feature row is read.

    python scripts/check_shards.py --data 'shards/{000..099}.tar' --features vitl --json report.json
    python scripts/check_shards.py --data 'shards/{000..099}.tar' --fix cleaned      # copies without what is wrong
    python scripts/check_shards.py --data 'shards/{000..099}.tar' --write-manifests

Caption flags must be those of the training. Feature stores are not mended by --fix: those with faults are to be
extracted again. Exits with status 1 if anything is wrong. Of shards with manifests beside
them, the trainer sees and counts everything that is lost or changed later.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from jettclip.data.shards import find_shards
from jettclip.params import add_flags, read_flags
from jettclip.prepare.check import ShardChecker, check_shards
from jettclip.prepare.check_report import lines, summary
from jettclip.prepare.clean import clean_shards, write_manifests
from jettclip.prepare.key_index import KeyIndex
from jettclip.prepare.pool import all_cores
from jettclip.prepare.report import write_json
from jettclip.settings import SampleSettings, comma_separated
from jettclip.types import VIEWS


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="shards, with braces, joined by ::")
    parser.add_argument(
        "--views", nargs="+", choices=VIEWS, default=list(VIEWS), help="captions that a sample must have"
    )
    parser.add_argument("--features", default="", help="feature stores to check, by name, separated by commas")
    parser.add_argument("--features-dir", default="", help="folder of the stores; beside the shards by default")
    parser.add_argument("--json", default="", metavar="FILE", help="where to write the findings as JSON")
    parser.add_argument("--fix", default="", metavar="FOLDER", help="where to write copies without what is wrong")
    parser.add_argument(
        "--write-manifests", action="store_true", help="write the manifests of shards as they are, old ones anew"
    )
    parser.add_argument("--workers", type=int, default=all_cores(), help="processes (default: all cores, %(default)s)")
    add_flags(parser, SampleSettings)
    args = parser.parse_args()
    settings = read_flags(SampleSettings, args)
    problems = settings.problems()
    if args.workers < 1:
        problems.append(f"--workers {args.workers} must be at least 1")
    if args.features_dir and not args.features:
        problems.append(f"--features-dir {args.features_dir} is of no use alone; name the stores with --features")
    if problems:
        parser.error("\n  ".join(problems))
    try:
        return check(args, settings)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted")


def check(args: argparse.Namespace, settings: SampleSettings) -> int:
    """Does what the flags say; returns the exit status."""
    shards = find_shards(args.data, resampled=True, allow_pipe=settings.allow_pipe_urls)  # resampled: none is counted
    urls = list(dict.fromkeys(shard.url for shard in shards))
    without = write_manifests(urls, args.workers) if args.write_manifests else {}
    make_checker = partial(ShardChecker, settings, args.views, comma_separated(args.features), args.features_dir)
    with KeyIndex() as index:
        found = check_shards(urls, make_checker, index, args.workers)
        print(*lines(found), sep="\n")
        cleaned = clean_shards(urls, args.fix, index, args.workers) if args.fix else None
    if cleaned:
        print(f"\n{cleaned.samples} samples in {cleaned.shards} shards written to {args.fix}")
    for url, problem in without.items():
        print(f"\n{url} gets no manifest: {problem}")
    if args.json:
        write_json(
            args.json,
            summary(found) | {"without_manifest": without} | ({"fixed": cleaned._asdict()} if cleaned else {}),
        )
    return 0 if found.is_clean and not without else 1


if __name__ == "__main__":
    sys.exit(main())
