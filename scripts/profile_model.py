#!/usr/bin/env python
"""Prints what models cost: parameters, multiply-accumulates, and the latency of both towers.

    python scripts/profile_model.py                                             # every model of ours
    python scripts/profile_model.py --models MobileCLIP-S0-248 ViT-B-32 --json profile.json

Weights are random; nothing is downloaded. GMACs are 10^9 multiply-accumulates of convolutions and matrix products,
attention included. A latency is the median of interleaved repeats on one image or one caption of the model's whole
context, on one thread of a CPU; `->` leads to that of the reparameterised copy, where it is another.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from jettclip.models.config import get_model_config, our_models
from jettclip.profiling import profile, table


def main() -> int:
    """Runs the command line; returns the exit status."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--models", nargs="+", default=our_models(), help="names, ours or OpenCLIP's (default: all of ours)"
    )
    parser.add_argument("--json", default="", help="file to write the figures to, too")
    parser.add_argument(
        "--device", nargs="+", choices=devices, default=devices, help="where to measure latency (default: all there is)"
    )
    args = parser.parse_args()
    try:
        for name in args.models:
            get_model_config(name)  # raises for an unknown one, before minutes are spent on the others
        profiles = [profile(name, args.device) for name in tqdm(args.models, disable=None)]
        print(table(profiles))
        if args.json:
            figures = {"torch": torch.__version__, "models": [asdict(found) for found in profiles]}
            Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
