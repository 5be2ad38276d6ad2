"""Data that is in no shards, from the command line to the metrics."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jettclip.main import main
from jettclip.report import METRICS, read_metrics
from support import caption, picture, write_shard

pytestmark = pytest.mark.usefixtures("restored_logging")

COUNT = 20
BROKEN = {3: b"no picture", 7: None}  # None: a file that is not there


def write_pictures(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(COUNT):
        data = BROKEN.get(number, picture(number))
        if data is not None:
            (folder / f"{number:02d}.png").write_bytes(data)


def as_shards(folder: Path) -> str:
    samples = []
    for number in range(COUNT):
        data = BROKEN.get(number, picture(number))
        members = {"__key__": f"{number:02d}", "txt": caption(number)}
        samples.append(members if data is None else {**members, "png": data})
    return write_shard(folder / "000000.tar", samples)


def as_table(folder: Path, separator: str = ",") -> str:
    write_pictures(folder / "images")
    path = folder / ("pairs.csv" if separator == "," else "pairs.tsv")
    with open(path, "w", newline="") as stream:
        rows = csv.writer(stream, delimiter=separator)
        rows.writerow(["text", "image_path"])
        rows.writerows([caption(number), f"images/{number:02d}.png"] for number in range(COUNT))
    return str(path)


def as_json(folder: Path) -> str:
    write_pictures(folder / "images")
    entries = [
        {
            "id": str(number),
            "image": f"images/{number:02d}.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption(number)}],
        }
        for number in range(COUNT)
    ]
    (folder / "list.json").write_text(json.dumps(entries))
    return str(folder / "list.json")


def as_folder(folder: Path) -> str:
    write_pictures(folder)
    for number in range(COUNT):
        (folder / f"{number:02d}.txt").write_text(caption(number) + "\n")
    return str(folder)


KINDS: dict[str, Callable[[Path], str]] = {
    "csv": as_table,
    "tsv": lambda folder: as_table(folder, "\t"),
    "json": as_json,
    "folder": as_folder,
}


def evaluate(folder: Path, data: str, checkpoint: Path, *flags: str) -> dict[str, Any]:
    """Evaluates a checkpoint on all samples; returns the metrics."""
    given = {
        "val-data": data, "model": "Nano-248", "pretrained": checkpoint, "device": "cpu", "precision": "fp32",
        "workers": 0, "batch-size": 8, "logs": folder / "logs", "name": "evaluated", "max-drop-rate": 0.2,
        "loss": "longclip",
    }  # fmt: skip
    assert main([*(f"--{flag}={value}" for flag, value in given.items()), *flags]) == 0
    (line,) = [line for line in read_metrics(folder / "logs" / "evaluated" / METRICS) if line["kind"] == "val"]
    return line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains on synthetic data, which is all that OpenCLIP's own line for it needs."""
    folder = tmp_path_factory.mktemp("synthetic")
    given = {
        "dataset-type": "synthetic", "train-num-samples": 16, "model": "Nano-248", "device": "cpu",
        "precision": "fp32", "workers": 0, "batch-size": 8, "epochs": 1, "lr": 1e-3, "warmup": 1,
        "log-every-n-steps": 1, "logs": folder, "name": "a", "save-frequency": 1,
    }  # fmt: skip
    assert main([f"--{flag}={value}" for flag, value in given.items()]) == 0
    assert len([line for line in read_metrics(folder / "a" / METRICS) if line["kind"] == "train"]) == 2
    return folder / "a" / "checkpoints" / "epoch_1"


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_shards_gives_the_metrics_of_shards(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    shards = evaluate(tmp_path / "s", as_shards(tmp_path), checkpoint)
    (tmp_path / kind).mkdir()
    rows = evaluate(tmp_path / "r", KINDS[kind](tmp_path / kind), checkpoint)
    assert shards["samples"] == rows["samples"] == COUNT - 2
    names = [name for name in shards if "R@" in name]
    assert len(names) == 12
    assert {name: rows[name] for name in names} == {name: shards[name] for name in names}
    lost_before = kind == "folder"  # where a text without a picture is no sample
    assert rows["dropped_by_reason"]["image cannot be decoded"] == 1
    assert rows["dropped"] == (1 if lost_before else 2)
    assert rows["damaged"].get("no picture for the text", 0) == lost_before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_training_on_data_without_shards(kind: str, workers: int, tmp_path: Path) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    given = {
        "train-data": KINDS[kind](folder), "model": "Nano-248", "device": "cpu", "precision": "fp32",
        "workers": workers, "batch-size": 6, "epochs": 2, "lr": 1e-3, "warmup": 1, "log-every-n-steps": 1,
        "logs": tmp_path / "logs", "name": "a", "max-drop-rate": 0.5,
    }  # fmt: skip
    assert main([f"--{flag}={value}" for flag, value in given.items()]) == 0
    lines = [line for line in read_metrics(tmp_path / "logs" / "a" / METRICS) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert any("image cannot be decoded" in line["dropped_by_reason"] for line in lines)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train-data", "pairs.csv"], "'pairs.csv' does not exist"),
        (["--dataset-type", "csv", "--train-data", "{missing}.csv"], "does not exist"),
        (["--train-data", "TABLE", "--csv-caption-key", "words"], "column 'words', but text, image_path"),
        (
            ["--train-data", "TABLE", "--dataset-resampled", "--train-num-samples", "9"],
            "--dataset-resampled draws shards",
        ),
        (
            ["--train-data", "TABLE", "--features", "vit", "--loss", "jettclip"],
            "features and embeddings stand beside shards",
        ),
    ],
)
def test_data_that_cannot_be_opened_ends_the_run_with_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = as_table(tmp_path)
    argv = [table if flag == "TABLE" else flag for flag in flags]
    usual = ["--model=Nano-248", "--device=cpu", "--precision=fp32", "--workers=0", "--logs=none", "--batch-size=4"]
    assert main([*argv, *usual]) == 1
    assert said in capsys.readouterr().err
