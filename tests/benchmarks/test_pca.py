from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/pca.py"


def test_the_pca_benchmark_compares_what_agrees() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["ratio"] > 0  # benchmarks/README.md has what was measured
    assert last["finite_with_duplicates"] == {"SVD": False, "ours": True}
    assert "1024 x 512" in last["measured"]
    for shape, sides in last["measured"].items():
        assert f"| {shape} |" in done.stdout
        for side in sides.values():
            assert side["ms"] > 0
            assert max(side["value_error"], side["gradient_error"]) < 1e-3
        assert max(sides["ours"]["value_error"], sides["ours"]["gradient_error"]) < 1e-4
