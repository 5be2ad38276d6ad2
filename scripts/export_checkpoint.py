#!/usr/bin/env python
"""Exports a checkpoint, in one format or several, each to a folder of its name and compared with the model.

    python scripts/export_checkpoint.py --model MobileCLIP-S0-248 --pretrained logs/mine/checkpoints/epoch_6 \
        --output exported --format onnx reparameterized

openclip         a checkpoint that plain OpenCLIP loads, where it has the architecture; the report says how
hf               a folder for open_clip.create_model('local-dir:FOLDER') or the Hugging Face Hub, with the same limit
onnx             image.onnx (RGB in 0..1) and text.onnx, for any batch and caption length, reparameterised
reparameterized  a copy whose branches are folded into single convolutions, for inference, with its latency
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jettclip.export.formats import FORMATS, export
from jettclip.models.config import get_model_config
from jettclip.models.factory import create_model


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="name of the model, ours or OpenCLIP's")
    parser.add_argument("--pretrained", required=True, help="tag, or checkpoint file or folder")
    parser.add_argument("--output", required=True, type=Path, help="where to make a folder for each format")
    parser.add_argument("--format", required=True, nargs="+", choices=FORMATS, help="one or several")
    args = parser.parse_args()
    try:
        model = create_model(args.model, args.pretrained).eval()
        reports = export(model, get_model_config(args.model), args.output, args.format)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(json.dumps(reports, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
