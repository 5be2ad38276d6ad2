from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ("--quick", "--batch-sizes", "1024", "--widths", "64")


def test_the_loss_benchmark_compares_equal_losses() -> None:
    done = subprocess.run([sys.executable, FOLDER / "loss.py", *SMALL], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert 0 < last["memory_ratio"] < 0.6  # of 1024 rows; benchmarks/README.md has what was measured of more
    assert 0 < last["memory_ratio_kd"] < 0.6
    assert last["time_ratio"] > 0
    assert last["time_ratio_kd"] > 0
    assert len(last["measured"]) == 2 * 4
    for its in last["measured"]:
        assert its["gradient_error"] < 1e-3
        assert its["loss_error"] is None or its["loss_error"] < 1e-6
        assert f"| 1,024 | {its['loss']}" in done.stdout


@pytest.mark.parametrize("break_ours", ["lambda total: 1.00001 * total", "lambda total: total.detach() + 0 * total"])
def test_the_loss_benchmark_prints_nothing_of_a_loss_that_is_wrong(break_ours: str) -> None:
    program = f"""
import loss, loss_sides
wrong = {break_ours}
loss_sides.SIDES["ours, tiled"] = lambda case: lambda inputs: wrong(loss_sides.ours(case, "auto")(inputs))
loss.main(["--quick", "--batch-sizes", "128", "--widths", "64"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=FOLDER, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0
    assert "ours, tiled: of Case(rows=128, width=64, teachers=0) the" in done.stderr
    assert "| 128 |" not in done.stdout


@pytest.mark.parametrize("teachers", [0, 1, 2])
def test_all_sides_compute_the_same(monkeypatch: pytest.MonkeyPatch, teachers: int) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    sides = importlib.import_module("loss_sides")
    case = sides.Case(rows=80, width=48, teachers=teachers)
    inputs = sides.draw(case, "cpu", torch.float64)
    totals = {name: side(case)(inputs) for name, side in sides.SIDES.items() if teachers < 2 or name != sides.OPENCLIP}
    gradients = {name: torch.autograd.grad(total, inputs.leaves) for name, total in totals.items()}
    for name, total in totals.items():
        if not (name == sides.OPENCLIP and teachers):  # which adds the teacher's entropy
            torch.testing.assert_close(total.sum(), totals[sides.LONGCLIP].sum(), rtol=1e-10, atol=0)
        for found, expected in zip(gradients[name], gradients[sides.LONGCLIP], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-11)
