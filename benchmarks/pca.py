#!/usr/bin/env python
"""Measures how long rebuilding a batch's features from its principal components takes, forward and backward.

    python benchmarks/pca.py            # --quick: fewer shapes and repeats

Ours against singular value decomposition under autograd, as Long-CLIP has it (arXiv 2403.15378). Both rebuild the same
features in float32, on one thread; a time is the median over interleaved repeats, each of a new batch, of CPU time.
Beside stand the largest errors of the features and of the gradient against SVD in float64. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from jettclip.losses.pca import principal_components

KEPT = 32
ROWS, WIDTHS = (128, 256, 512, 1024, 2048, 4096), (512, 768)
PROMISED = "1024 x 512"
LARGEST_ERROR = 1e-4
Rebuild = Callable[[Tensor], Tensor]


def by_svd(features: Tensor) -> Tensor:
    """Rebuilds features [n, D] from their leading right singular vectors; autograd differentiates."""
    mean = features.mean(dim=0)
    directions = torch.linalg.svd(features - mean, full_matrices=False).Vh[:KEPT]
    return (features - mean) @ directions.T @ directions + mean


def ours(features: Tensor) -> Tensor:
    """Rebuilds features [n, D] from their principal components."""
    return principal_components(features, KEPT).rebuilt()


SIDES: dict[str, Rebuild] = {"SVD": by_svd, "ours": ours}


def batch(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Draws unit-length features around a common direction, whose spread falls off by a power law, float64 [n, D]."""
    spread = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    drawn = torch.randn(rows, width, generator=generator, dtype=torch.float64) * spread
    mean = torch.randn(width, generator=generator, dtype=torch.float64)
    return F.normalize(drawn + 2 * mean / mean.norm(), dim=1)


def timed(rebuild: Rebuild, features: Tensor, upstream: Tensor) -> tuple[float, Tensor, Tensor]:
    """Returns the CPU time of forward and backward, the rebuilt features, and the gradient of <rebuilt, upstream>."""
    leaf = features.clone().requires_grad_()
    start = time.process_time()
    rebuilt = rebuild(leaf)
    rebuilt.backward(upstream)
    seconds = time.process_time() - start
    assert leaf.grad is not None
    return seconds, rebuilt.detach(), leaf.grad


def error(found: Tensor, truth: Tensor) -> float:
    """Returns the norm of the difference as a share of the truth's."""
    return float((found.double() - truth).norm() / truth.norm())


def measure(rows: int, width: int, repeats: int, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """Returns the median milliseconds of each side, and its errors of the first batch; sides take turns to begin."""
    names = list(SIDES)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):  # the first is warm-up
        features = batch(rows, width, generator)
        upstream = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        for name in names:
            taken[name].append(timed(SIDES[name], features.float(), upstream.float())[0])
        names.reverse()
    _, value, gradient = timed(by_svd, features, upstream)
    results = {}
    for name, rebuild in SIDES.items():
        _, found, found_gradient = timed(rebuild, features.float(), upstream.float())
        results[name] = {
            "ms": 1e3 * statistics.median(taken[name][1:]),
            "value_error": error(found, value),
            "gradient_error": error(found_gradient, gradient),
        }
    return results


def finite_with_duplicates(generator: torch.Generator) -> dict[str, bool]:
    """Tells of each side whether the gradient is finite for a batch of which only every eighth image is another."""
    features = batch(128, 512, generator).float().repeat(8, 1)
    upstream = torch.randn(features.shape, generator=generator)
    return {name: bool(timed(rebuild, features, upstream)[2].isfinite().all()) for name, rebuild in SIDES.items()}


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shapes = [(256, 512), (1024, 512)] if args.quick else [(rows, width) for width in WIDTHS for rows in ROWS]
    measured = {}
    print("Milliseconds of CPU time, forward and backward, one thread; errors relative to SVD in float64\n")
    print("| features | SVD | ours | SVD / ours | error: SVD | ours | of the gradient: SVD | ours |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for rows, width in shapes:
        results = measured[f"{rows} x {width}"] = measure(rows, width, 3 if args.quick else 11, generator)
        svd, own = results["SVD"], results["ours"]
        errors = [f"{side[kind]:.0e}" for kind in ("value_error", "gradient_error") for side in (svd, own)]
        print(f"| {rows} x {width} | {svd['ms']:.1f} | {own['ms']:.1f} | {svd['ms'] / own['ms']:.1f} |", end="")
        print(f" {' | '.join(errors)} |", flush=True)
    wrong = [
        shape
        for shape, results in measured.items()
        if max(results["ours"]["value_error"], results["ours"]["gradient_error"]) > LARGEST_ERROR
    ]
    if wrong:
        sys.exit(f"ours is not what SVD gives, so there is nothing to compare: {wrong}")
    finite = finite_with_duplicates(generator)
    print(f"\nGradient of 1024 rows, of which 128 are different, finite: {finite}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}; {os.cpu_count()} CPU cores, one is used\n")
    ratio = measured[PROMISED]["SVD"]["ms"] / measured[PROMISED]["ours"]["ms"]
    print(json.dumps({"ratio": round(ratio, 2), "finite_with_duplicates": finite, "measured": measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
