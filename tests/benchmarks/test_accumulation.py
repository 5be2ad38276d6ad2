from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], cwd=FOLDER, capture_output=True, text=True, timeout=280)


def test_the_accumulation_benchmark_compares_equal_gradients() -> None:
    pytest.importorskip("pandas", reason="OpenCLIP's own trainer imports pandas")
    done = run("accumulation.py", "--quick")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["measured"].keys() == last["time_ratio"].keys() == {"transformers", "linear layers"}
    for model, of in last["measured"].items():
        assert last["time_ratio"][model] > 0
        for name, its in of.items():
            assert its["gradient_error"] < 1e-5
            assert its["logit_scale_ratio"] == pytest.approx(4 if name == "OpenCLIP" else 1, rel=1e-4)
            assert f"| {name} | {its['seconds']:.2f} |" in done.stdout


@pytest.mark.parametrize("parameter", ["towers.logit_scale", "towers.visual.1.weight"])
def test_the_accumulation_benchmark_prints_nothing_of_gradients_that_are_wrong(parameter: str) -> None:
    pytest.importorskip("pandas", reason="OpenCLIP's own trainer imports pandas")
    program = f"""
import accumulation
right = accumulation.ours
def wrong(student, micro_batches):
    gradients = right(student, micro_batches)
    return gradients | {{{parameter!r}: 1.0001 * gradients[{parameter!r}]}}
accumulation.SIDES["ours"] = wrong
accumulation.compare("linear layers", 64, 1)
"""
    done = run("-c", program)
    assert done.returncode != 0
    assert "the gradients are not those of the one batch" in done.stderr
