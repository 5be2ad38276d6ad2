from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/loader.py"


def test_the_loader_benchmark_compares_equal_samples() -> None:
    pytest.importorskip("pandas", reason="OpenCLIP's own loader imports pandas")
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["ratio"] > 1.5  # a bound for busy machines; benchmarks/README.md has what was measured
    assert min(last["psnr"].values()) >= 60
    assert 60_000 < last["jpeg_bytes"] < 80_000
    rates = last["samples_per_second"]
    assert rates.keys() >= {"OpenCLIP", "ours", "decode only: libjpeg-turbo of the same bytes"}
    assert all(f"| {name} |" in done.stdout for name in rates)
