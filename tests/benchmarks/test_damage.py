from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/damage.py"


def test_whatever_is_damaged_nothing_is_lost_silently_and_nothing_wrong_passed_on() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["shards"] == 4 * 27
    zeros = {
        column: last[column] for column in ("crashes", "silent", "under-counted", "over-counted", "wrong", "strays")
    }
    assert not any(zeros.values()), zeros
    assert 0 < last["lost"] < last["samples"] / 3  # a shard of which nothing can be read loses 30; most lose one
