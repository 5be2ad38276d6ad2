from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/tokenizer.py"


def test_the_tokenizer_benchmark_compares_equal_ids() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["ratio"] > 0
    assert last["ids_equal"] is True
    for case, rates in last["captions_per_second"].items():
        assert {"OpenCLIP", "ours"} <= rates.keys()
        assert all(rate > 0 for rate in rates.values())
        assert f"| {case} |" in done.stdout
