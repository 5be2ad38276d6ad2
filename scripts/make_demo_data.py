#!/usr/bin/env python
"""Draws the demo's scenes into ordinary shards: FOLDER/train/NNNNNN.tar and FOLDER/val/NNNNNN.tar."""

from __future__ import annotations

import argparse
import sys

from jettclip.data.demo import write_demo_shards


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where to write; shards that are there are kept")
    parser.add_argument("--train-scenes", type=int, default=9_000)
    parser.add_argument("--val-scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, scenes in (("train", args.train_scenes), ("val", args.val_scenes)):
        try:
            shards = write_demo_shards(args.folder, split, scenes, args.seed)
        except ValueError as error:
            sys.exit(f"{parser.prog}: {error}")
        except KeyboardInterrupt:
            sys.exit(f"{parser.prog}: interrupted; the same command keeps the shards that are done")
        print(f"{args.folder}/{split}: {scenes} scenes in {len(shards)} shards")


if __name__ == "__main__":
    main()
