"""Runs with ``--siglip``: the bias of the logits goes with the model, from one run to the next and out of them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from jettclip import main as main_module
from jettclip.main import main
from jettclip.models import config
from jettclip.report import METRICS, read_metrics
from support import load_script, run_ranks, write_shards

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}
"""A model that OpenCLIP could build, without BatchNorm."""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_logging: None) -> Iterator[None]:
    """Adds the models Tiny, and Biased, whose config has a bias, as SigLIP's do."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "Tiny.json").write_text(json.dumps(TINY))
    (folder / "Biased.json").write_text(json.dumps({**TINY, "init_logit_bias": -7}))
    monkeypatch.setattr(config, "FOLDER", folder)
    config._ours.cache_clear()
    yield
    config._ours.cache_clear()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_shards(tmp_path / "train", [8, 8])
    return tmp_path


def flags(data: Path, name: str, loss: str = "--siglip", **changed: Any) -> list[str]:
    given = {
        "train-data": str(data / "train" / "{000000..000001}.tar"), "model": "Tiny", "device": "cpu",
        "precision": "fp32", "workers": 0, "batch-size": 8, "epochs": 1, "lr": 1e-2, "warmup": 0, "skip-scheduler": "",
        "log-every-n-steps": 1, "logs": str(data / "logs"), "name": name, **changed,
    }  # fmt: skip
    return [loss, *(f"--{flag}={value}" if value != "" else f"--{flag}" for flag, value in given.items())]


def metrics(data: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(data / "logs" / name / METRICS) if line["kind"] == "train"]


def checkpoint(data: Path, name: str, epoch: int = 1) -> Path:
    return data / "logs" / name / f"checkpoints/epoch_{epoch}"


def weights(data: Path, name: str, epoch: int = 1) -> dict[str, Tensor]:
    return load_file(checkpoint(data, name, epoch) / "model.safetensors")


def starts(data: Path, name: str) -> tuple[float, float]:
    """Returns scale and bias at a run's first step."""
    first = metrics(data, name)[0]
    return round(first["logit_scale"], 3), round(first["bias@siglip"], 5)


def test_the_bias_is_trained_and_a_resumed_run_goes_on_from_it(data: Path) -> None:
    assert main(flags(data, "whole", epochs=2)) == 0
    assert main(flags(data, "parts")) == 0
    assert main([*flags(data, "parts", epochs=2), "--resume=latest"]) == 0
    assert starts(data, "whole") == (10, -10)
    biases = [line["bias@siglip"] for line in metrics(data, "whole")]
    assert len(set(biases)) == 4
    assert [line["bias@siglip"] for line in metrics(data, "parts")] == biases
    assert biases[2] == weights(data, "parts")["logit_bias"]
    assert all(torch.equal(value, weights(data, "parts", 2)[name]) for name, value in weights(data, "whole", 2).items())


@pytest.mark.parametrize(
    ("values", "changed", "expected"),
    [
        ({"logit_scale": math.log(111), "logit_bias": -12.9}, {}, (111, -12.9)),
        ({"logit_scale": math.log(111), "logit_bias": -12.9}, {"model": "Biased"}, (111, -12.9)),
        ({"logit_scale": math.log(50)}, {}, (50, -10)),
        ({"logit_scale": math.log(50)}, {"model": "Biased"}, (50, -7)),
        ({"logit_scale": math.log(50), "logit_bias": -12.9}, {"logit-scale-init": 20}, (20, -12.9)),
    ],
)
def test_a_checkpoints_scale_and_bias_are_where_training_starts(
    values: dict[str, float], changed: dict[str, Any], expected: tuple[float, float], data: Path
) -> None:
    assert main(flags(data, "first", loss="--loss=openclip")) == 0
    path = data / "changed.safetensors"
    save_file({**weights(data, "first"), **{name: torch.tensor(value) for name, value in values.items()}}, path)
    assert main(flags(data, "second", pretrained=path, **changed)) == 0
    assert starts(data, "second") == expected


def test_a_run_starts_from_the_bias_of_another_and_of_no_config(data: Path) -> None:
    assert main(flags(data, "first")) == 0
    assert main(flags(data, "second", pretrained=checkpoint(data, "first"))) == 0
    assert metrics(data, "second")[0]["bias@siglip"] == weights(data, "first")["logit_bias"] != -10
    assert main(flags(data, "anew", model="Biased")) == 0
    assert starts(data, "anew") == (10, -10)


def test_a_loss_without_a_bias_leaves_the_checkpoints_as_it_is(data: Path) -> None:
    assert main(flags(data, "first")) == 0
    assert main(flags(data, "second", loss="--loss=openclip", pretrained=checkpoint(data, "first"))) == 0
    assert torch.equal(weights(data, "second")["logit_bias"], weights(data, "first")["logit_bias"])
    assert "bias@siglip" not in metrics(data, "second")[0]


@pytest.mark.parametrize(("then", "now"), [("--siglip", "--loss=openclip"), ("--loss=openclip", "--siglip")])
def test_a_run_is_not_resumed_with_another_loss(
    then: str, now: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(data, "a", loss=then)) == 0
    assert main([*flags(data, "a", loss=now, epochs=2), "--resume=latest"]) == 1
    message = capsys.readouterr().err
    assert "it was trained with another --loss" in message
    assert f"start a new run with --pretrained {checkpoint(data, 'a')}" in message


def test_the_bias_is_exported(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(flags(data, "a")) == 0
    bias, out = weights(data, "a")["logit_bias"], data / "out"
    arguments = ["--model=Tiny", f"--pretrained={checkpoint(data, 'a')}", f"--output={out}", "--format", "hf"]
    monkeypatch.setattr(sys, "argv", ["export_checkpoint.py", *arguments])
    assert load_script("export_checkpoint").main() == 0
    assert torch.equal(load_file(out / "hf/open_clip_model.safetensors")["logit_bias"], bias)
    described = json.loads((out / "hf/open_clip_config.json").read_text())["model_cfg"]
    assert described["init_logit_bias"] == pytest.approx(float(bias))


def test_micro_batches_train_the_bias_as_the_batch_that_they_are(data: Path) -> None:
    assert main(flags(data, "one", epochs=2)) == 0
    assert main(flags(data, "two", epochs=2, **{"batch-size": 4, "accum-freq": 2})) == 0
    for one, two in zip(metrics(data, "one"), metrics(data, "two"), strict=True):
        assert two["bias@siglip"] == pytest.approx(one["bias@siglip"], rel=1e-5)


def on_a_rank(arguments: list[str]) -> int:
    """Runs the command line in a process group that is there already."""
    place = {"device": "cpu", "global_rank": dist.get_rank(), "world_size": dist.get_world_size()}
    main_module.openclip.init_distributed_device_so = lambda *_, **__: place  # type: ignore[assignment]
    dist.destroy_process_group = lambda: None  # the process ends with it
    return main(arguments)


def test_ranks_train_one_bias_whether_their_graph_is_static_or_not(data: Path) -> None:
    usual = {"batch-size": 4, "epochs": 2}
    for name, changed in {"plain": {}, "static": {"ddp-static-graph": ""}}.items():
        assert run_ranks(2, on_a_rank, flags(data, name, **usual, **changed)) == [0, 0]
    assert run_ranks(2, on_a_rank, flags(data, "parts", **{**usual, "batch-size": 2, "accum-freq": 2})) == [0, 0]
    runs = [[line["bias@siglip"] for line in metrics(data, name)] for name in ("plain", "static", "parts")]
    assert len(set(runs[0])) == 4
    assert runs[1] == runs[0]
    assert runs[2] == pytest.approx(runs[0], rel=1e-5)
