from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bash(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("TRAIN_DATA", "NNODES", "NAME")}
    clean |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{clean['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", *command], env={**clean, **environment}, capture_output=True, text=True, timeout=280, check=False
    )


def test_the_demo_runs_reports_and_is_reused_in_its_short_form(tmp_path: Path) -> None:
    sizes = {"TRAIN_SCENES": "192", "VAL_SCENES": "20", "DEMO": str(tmp_path)}
    first = bash(str(ROOT / "configs/run_distill_longclip.sh"), "--epochs", "1", "--batch-size", "16", **sizes)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "student, distilled" in first.stdout
    assert "student, not distilled" in first.stdout
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"curves.png", "retrieved.png", "metrics.json"}
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert set(metrics["evaluation"]) == {"teacher", "student, distilled", "student, not distilled"}
    terms = json.loads((tmp_path / "logs/student/metrics.jsonl").read_text().splitlines()[0])
    assert {"clip@long", "clip@short", "kd@long", "kd@short"} <= set(terms)

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    checkpoints = {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").rglob("*.safetensors")}
    second = bash(str(ROOT / "configs/run_distill_longclip.sh"), "--epochs", "1", "--batch-size", "16", **sizes)
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]
    assert "1 shards kept" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints


def test_the_launch_script_trains_on_given_data_and_flags_at_the_end_win(tmp_path: Path) -> None:
    made = bash("-c", f"python {ROOT}/scripts/make_demo_data.py {tmp_path}/data --train-scenes 24 --val-scenes 8")
    assert made.returncode == 0, made.stderr
    launched = bash(
        str(ROOT / "configs/run_distill_longclip.sh"), "--precision", "fp32", "--device", "cpu", "--workers", "0",
        "--batch-size", "8", TRAIN_DATA=f"{tmp_path}/data/train/000000.tar", VAL_DATA=f"{tmp_path}/data/val/000000.tar",
        MODEL="Nano-248", NPROC_PER_NODE="1", EPOCHS="1", LOGS=str(tmp_path / "logs"), NAME="mine",
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "logs/mine/metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "val"]
    config = (tmp_path / "logs/mine/config.yaml").read_text()
    assert "batch_size: 8\n" in config
    assert "loss: longclip\n" in config  # without FEATURES there is nothing to distil from


def test_extraction_explains_mistakes(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/extract_features.py")]
    flags = ["--data", str(tmp_path / "none.tar"), "--model", "Nano-248", "--store", "t"]
    done = subprocess.run([*script, *flags, "--pretrained", "nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "neither a file or folder nor a tag" in done.stderr
    assert "Traceback" not in done.stderr
