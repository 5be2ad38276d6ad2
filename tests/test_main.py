from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from jettclip import main as main_module
from jettclip.checkpoint import STATE, save_checkpoint
from jettclip.data.features import digest, store_path, write_store
from jettclip.main import main
from jettclip.models import config
from jettclip.models.factory import create_model
from jettclip.models.positions import stretch_positions
from jettclip.models.two_towers import TwoTowers
from jettclip.report import METRICS, read_metrics
from stores import info
from support import caption, picture, sample, unit_rows, write_shard, write_shards

CONFIGS = config.FOLDER

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "convmixer_nano", "timm_pool": "avg", "timm_proj": None, "image_size": 32},
    "text_cfg": {
        "context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True,
    },
    "mask_padding": True,
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_logging: None) -> Iterator[None]:
    """Adds the model Tiny."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "Tiny.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(config, "FOLDER", folder)
    config._ours.cache_clear()
    yield
    config._ours.cache_clear()


def flags(folder: Path, name: str, **changed: Any) -> list[str]:
    given = {
        "train-data": str(folder / "train" / "{000000..000001}.tar"), "val-data": str(folder / "val" / "000000.tar"),
        "model": "Tiny", "device": "cpu", "precision": "fp32", "workers": 0, "batch-size": 8, "epochs": 3,
        "lr": 1e-3, "warmup": 2, "log-every-n-steps": 1, "logs": str(folder / "logs"), "name": name,
        "loss": "longclip", "pca-components": 4, **changed,
    }  # fmt: skip
    return [f"--{flag}={value}" for flag, value in given.items() if value is not None]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_shards(tmp_path / "train", [18, 10])
    write_shards(tmp_path / "val", [12])
    return tmp_path


def metrics(data: Path, name: str, kind: str = "train") -> list[dict[str, Any]]:
    return [line for line in read_metrics(data / "logs" / name / METRICS) if line["kind"] == kind]


def losses(data: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(data, name)]


def test_a_run_trains_evaluates_saves_and_reports(data: Path) -> None:
    assert main(flags(data, "a", **{"val-truncate": 20, "report-to": "tensorboard"})) == 0
    folder = data / "logs" / "a"
    assert [line["step"] for line in metrics(data, "a")] == list(range(1, 10))  # 28 samples, batches of 8, 3 epochs
    reported = {"loss", "clip@long", "clip@short", "samples_per_second", "data_wait", "lr", "logit_scale", "dropped"}
    assert reported <= set(metrics(data, "a")[0])
    val = metrics(data, "a", "val")
    assert [line["step"] for line in val] == [3, 6, 9]
    views, ways, ranks = ("short", "long", "long@20"), ("image_to_text", "text_to_image"), (1, 5, 10)
    names = {f"{view}/{way}_R@{rank}" for view in views for way in ways for rank in ranks}
    assert names <= set(val[0])
    assert val[0]["samples"] == 12
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["epoch_1", "epoch_2", "epoch_3"]
    assert (folder / "out.log").read_text().count("INFO epoch") == 9
    assert list((folder / "tensorboard").iterdir())


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(flags(data, "whole", workers=1)) == 0

    class StopInTheThirdEpoch(main_module.Position):
        def __init__(self, epoch: int, step: int) -> None:
            super().__init__(epoch, step)
            if epoch == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(main_module, "Position", StopInTheThirdEpoch)
        assert main(flags(data, "parts", workers=1)) == 130
    assert len(losses(data, "parts")) == 9  # the third epoch was trained, but not saved
    torch.manual_seed(99)  # whatever happens in between
    assert main([*flags(data, "parts", workers=1), "--resume", "latest"]) == 0

    assert losses(data, "parts") == losses(data, "whole")
    assert metrics(data, "parts", "val") == metrics(data, "whole", "val")
    weights = [load_file(data / "logs" / run / "checkpoints/epoch_3/model.safetensors") for run in ("parts", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_run_with_micro_batches_takes_fewer_steps_and_goes_on_where_it_stopped(data: Path) -> None:
    small = {
        "batch-size": 4, "accum-freq": 3, "workers": 1, "report-to": "tensorboard",
        "lr-scheduler": "const",  # which does not depend on the number of epochs
    }  # fmt: skip
    assert main(flags(data, "whole", **small)) == 0
    assert [line["step"] for line in metrics(data, "whole")] == [1, 2, 3, 4, 5, 6]  # 28 samples, 12 a step
    assert [line["epoch"] for line in metrics(data, "whole")] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert [line["lr"] for line in metrics(data, "whole")][:3] == pytest.approx(
        [5e-4, 1e-3, 1e-3]
    )  # warm-up of 2 steps
    log = (data / "logs/whole/out.log").read_text()
    assert "2 steps an epoch, on a global batch of 12 pairs: 4 in a batch x 1 ranks x 3 accumulated" in log
    assert log.count("BatchNorm layers of Tiny normalise by the statistics of one micro-batch, not of all 3") == 1
    assert main(flags(data, "parts", **{**small, "epochs": 2})) == 0
    torch.manual_seed(99)  # whatever happens in between
    assert main([*flags(data, "parts", **small), "--resume", "latest"]) == 0
    assert losses(data, "parts") == losses(data, "whole")


COPIES = [3, 3, 3, 3, 1, 1]
"""How many samples have each of the captions that `distilled` makes."""


def distilled(folder: Path, **changed: Any) -> dict[str, Any]:
    """Writes a shard with images and captions that occur more than once, and a teacher's features of it.

    Returns:
        the flags to learn from both, in steps of the whole shard.
    """
    captions = [caption(number) for number, copies in enumerate(COPIES) for _ in range(copies)]
    samples = [sample(i, png=picture(i % 5), long_caption=text) for i, text in enumerate(captions)]
    shard = write_shard(folder / "twins" / "000000.tar", samples)
    contents = {"image": [one["png"] for one in samples], "long": captions}
    write_store(
        store_path(shard, "teacher"),
        [one["__key__"] for one in samples],
        {part: unit_rows(len(samples), 6) for part in contents},
        {part: [digest(content) for content in its] for part, its in contents.items()},
        info(width=6),
    )
    return {
        "train-data": shard, "val-data": None, "features": "teacher", "loss": "clip-kd", "pca-components": None,
        "lr-scheduler": "const", "batch-size": len(samples), **changed,
    }  # fmt: skip


def test_clip_kd_goes_on_with_the_parameters_of_its_loss(data: Path) -> None:
    given = distilled(data)
    assert main(flags(data, "whole", **given)) == 0
    assert main(flags(data, "parts", **{**given, "epochs": 2})) == 0
    assert main([*flags(data, "parts", **given), "--resume", "latest"]) == 0
    assert {"clip@long", "crd@long", "icl@long", "fd@long"} <= set(metrics(data, "whole")[0])
    assert losses(data, "parts") == losses(data, "whole")
    first, *last = (
        torch.load(data / "logs" / epoch / STATE, weights_only=True)["loss"]
        for epoch in ("parts/checkpoints/epoch_2", "parts/checkpoints/epoch_3", "whole/checkpoints/epoch_3")
    )
    assert first.keys() == last[0].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in first)
    assert not any(torch.equal(first[name], last[0][name]) for name in first)  # all of them are trained


def test_what_is_equal_is_a_positive_if_asked_and_else_sets_a_floor(data: Path) -> None:
    given = distilled(data, epochs=1, **{"loss": "1*clip@long", "features": None})
    assert main(flags(data, "negatives", **given)) == 0
    assert main([*flags(data, "positives", **given), "--multi-positive"]) == 0
    (negatives,), (positives,) = metrics(data, "negatives"), metrics(data, "positives")
    expected = sum(copies * math.log(copies) for copies in COPIES) / sum(COPIES)
    assert negatives["floor@long"] == pytest.approx(expected, rel=1e-6)
    assert negatives["clip@long"] > expected
    assert "floor@long" not in positives
    assert abs(positives["clip@long"] - negatives["clip@long"]) > 1e-3  # of the same weights


def test_micro_batches_train_as_the_batch_that_they_are(data: Path) -> None:
    tiny_vit = {**TINY, "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}}
    (data / "configs" / "TinyViT.json").write_text(json.dumps(tiny_vit))
    config._ours.cache_clear()
    for name, sizes in (("one", {"batch-size": 12}), ("three", {"batch-size": 4, "accum-freq": 3})):
        assert main(flags(data, name, model="TinyViT", **sizes)) == 0
    for one, three in zip(metrics(data, "one"), metrics(data, "three"), strict=True):
        assert three["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert three["logit_scale"] == pytest.approx(one["logit_scale"], rel=1e-5)
        assert (three["step"], three["lr"], three["dropped"]) == (one["step"], one["lr"], one["dropped"])


def test_one_pair_a_step_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(data, "a", **{"batch-size": 1})) == 1
    assert "give a larger --batch-size or --accum-freq" in capsys.readouterr().err


def test_a_run_that_is_done_does_nothing_more(data: Path) -> None:
    assert main(flags(data, "a", epochs=1)) == 0
    written = (data / "logs/a" / METRICS).read_text()
    assert main([*flags(data, "a", epochs=1), "--resume", "latest"]) == 0
    assert (data / "logs/a" / METRICS).read_text() == written


def test_the_saved_config_repeats_the_run(data: Path) -> None:
    assert main(flags(data, "a", epochs=1)) == 0
    assert main(["--config", str(data / "logs/a/config.yaml"), "--name", "again"]) == 0
    assert losses(data, "again") == losses(data, "a")
    assert yaml.safe_load((data / "logs/again/config.yaml").read_text())["name"] == "again"


def test_a_name_that_is_taken_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(data, "a", epochs=1)) == 0
    assert main(flags(data, "a", epochs=1)) == 1
    assert "add --resume latest" in capsys.readouterr().err


def test_evaluation_alone_gives_the_metrics_of_the_training(data: Path) -> None:
    assert main(flags(data, "a", epochs=1)) == 0
    checkpoint = str(data / "logs/a/checkpoints/epoch_1")
    assert main([*flags(data, "eval", **{"train-data": None}), f"--pretrained={checkpoint}"]) == 0
    during, alone = metrics(data, "a", "val")[0], metrics(data, "eval", "val")[0]
    assert {k: v for k, v in alone.items() if k != "step"} == {k: v for k, v in during.items() if k != "step"}


def test_an_evaluation_of_a_run_adds_to_its_metrics_and_leaves_its_config(data: Path) -> None:
    assert main(flags(data, "a", epochs=2)) == 0
    before, config = read_metrics(data / "logs/a" / METRICS), (data / "logs/a/config.yaml").read_text()
    assert main([*flags(data, "a", **{"train-data": None}), "--resume", "latest"]) == 0
    after = read_metrics(data / "logs/a" / METRICS)
    assert after == [*before, before[-1]]  # the last line is the evaluation after the last epoch, once more
    assert (data / "logs/a/config.yaml").read_text() == config


def test_an_evaluation_without_weights_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(data, "a", **{"train-data": None})) == 1
    assert "no weights to evaluate" in capsys.readouterr().err


def test_checkpoints_are_written_as_often_as_asked_and_the_previous_deleted(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def save(folder: Path, *arguments: Any) -> None:
        save_checkpoint(folder, *arguments)
        saved.append(sorted(path.name for path in folder.iterdir()))

    monkeypatch.setattr(main_module, "save_checkpoint", save)
    assert main([*flags(data, "a", epochs=3), "--delete-previous-checkpoint"]) == 0
    assert saved == [["epoch_1"], ["epoch_1", "epoch_2"], ["epoch_2", "epoch_3"]]  # before the previous one goes
    assert [path.name for path in (data / "logs/a/checkpoints").iterdir()] == ["epoch_3"]


def test_a_resumed_run_deletes_only_what_its_flags_say(data: Path) -> None:
    assert main(flags(data, "a", epochs=2)) == 0
    assert main([*flags(data, "a", epochs=3), "--resume", "latest", "--save-frequency", "0"]) == 0
    assert len(list((data / "logs/a/checkpoints").iterdir())) == 3
    assert main([*flags(data, "a", epochs=4), "--resume", "latest", "--delete-previous-checkpoint"]) == 0
    assert sorted(path.name[6:] for path in (data / "logs/a/checkpoints").iterdir()) == ["1", "2", "4"]


def test_a_run_resumed_with_longer_batches_goes_on_with_its_epochs(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(data, "a", epochs=2)) == 0
    for epochs in (3, 4):
        longer = {"epochs": epochs, "batch-size": 14}
        assert main([*flags(data, "a", **longer), "--resume", "latest"]) == 0
    assert "Resuming from" in capsys.readouterr().err
    assert [line["step"] for line in metrics(data, "a", "val")][-2:] == [6, 8]  # two steps an epoch now
    steps = [line["step"] for line in metrics(data, "a")]
    assert steps == sorted(set(steps))


def test_dropped_samples_are_reported_with_the_metrics(data: Path) -> None:
    broken = [sample(100 + i, png=b"no picture", long_caption="a", short_caption="b") for i in range(2)]
    write_shard(data / "train" / "000001.tar", [*(sample(i) for i in range(20, 30)), *broken])
    assert main(flags(data, "a", **{"epochs": 1, "max-drop-rate": 0.5})) == 0
    assert metrics(data, "a")[-1]["dropped_by_reason"] == {"image cannot be decoded": 2}
    assert main(flags(data, "b", epochs=1)) == 1  # more than the 1 % that are allowed by default
    assert "image cannot be decoded 2" in (data / "logs/b/out.log").read_text()


def test_unusable_data_ends_the_run_and_says_what_is_missing(data: Path) -> None:
    write_shard(data / "bad" / "000000.tar", [sample(i, txt="only a text") for i in range(30)])
    assert main(flags(data, "a", **{"train-data": str(data / "bad/000000.tar")})) == 1
    assert "image is missing" in (data / "logs/a/out.log").read_text()


def test_nothing_is_written_without_logs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    assert main(flags(data, "a", epochs=1, logs="none")) == 0
    assert not (data / "logs").exists()
    assert not (data / "none").exists()


@pytest.mark.parametrize(("flag", "locked"), [("--lock-image", "visual."), ("--lock-text", "text.")])
def test_a_locked_tower_stays_as_it_is(flag: str, locked: str, data: Path) -> None:
    assert main([*flags(data, "a", epochs=2, **{"val-data": None}), flag, "--lock-image-freeze-bn-stats"]) == 0
    first, last = (load_file(data / f"logs/a/checkpoints/epoch_{epoch}/model.safetensors") for epoch in (1, 2))
    changed = {name.split(".")[0] + "." for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"visual.", "text.", "logit_scale."} - {locked}


def test_gradient_checkpointing_is_switched_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switched: list[object] = []
    monkeypatch.setattr(TwoTowers, "set_grad_checkpointing", lambda self: switched.append(self))
    assert main([*flags(data, "a", epochs=1, **{"val-data": None}), "--grad-checkpointing"]) == 0
    assert len(switched) == 1


def test_a_run_learns_from_two_teachers_that_have_little_in_common(data: Path) -> None:
    other = {
        **TINY,
        "embed_dim": 24,
        "vision_cfg": {**TINY["vision_cfg"], "image_size": 64},
        "text_cfg": {**TINY["text_cfg"], "context_length": 10, "tokenizer_kwargs": {"clean": "canonicalize"}},
        "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"},
    }  # fmt: skip
    (data / "configs" / "Other.json").write_text(json.dumps(other))
    config._ours.cache_clear()
    for name in ("Tiny", "Other"):
        save_file(create_model(name).state_dict(), data / f"{name}.safetensors")
    teachers = {
        "distill-model": "Tiny,Other", "distill-pretrained": f"{data}/Tiny.safetensors,{data}/Other.safetensors",
        "loss": "1*clip@long + 1*kd@long + 1*kd@short", "epochs": 1, "batch-size": 14,
    }  # fmt: skip
    assert main(flags(data, "a", workers=1, **teachers)) == 0
    assert [line["step"] for line in metrics(data, "a")] == [1, 2]
    assert all(line["kd@long"] > 0 for line in metrics(data, "a"))
    assert (data / "logs/a/out.log").read_text().count("INFO Teacher ") == 2
    saved, student = load_file(data / "logs/a/checkpoints/epoch_1/model.safetensors"), create_model("Tiny")
    assert saved.keys() == student.state_dict().keys()
    assert not list((data / "logs/a/checkpoints/epoch_1").glob("*teacher*"))
    timm = [*flags(data, "b", **teachers), "--aug-cfg", "use_timm=True"]  # whose images come as normalised floats
    assert main(timm) == 0


def test_an_unknown_teacher_ends_the_run(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    teachers = {"distill-model": "Tiny,Tinny", "distill-pretrained": "x,y", "loss": "jettclip"}
    assert main(flags(data, "a", **teachers)) == 1
    assert "'Tinny' is not known; did you mean Tiny" in caplog.text


def torchrun(arguments: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Launches two ranks; the -- keeps torchrun from taking --logs for a flag of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    return subprocess.run(
        [*command, "jettclip.main", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def test_torchrun_trains_on_two_ranks_and_evaluates_the_model_that_is_saved(data: Path) -> None:
    done = torchrun(flags(data, "two", **{"batch-size": 4, "epochs": 1, "model": "Nano-248", "pca-scope": "global"}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (data / "logs" / "two" / "out.log").exists()
    assert len(metrics(data, "two")) == 3
    during = metrics(data, "two", "val")[0]
    assert during["samples"] == 12

    shutil.copy(CONFIGS / "Nano-248.json", data / "configs")
    config._ours.cache_clear()
    alone = flags(data, "alone", **{"train-data": None, "model": "Nano-248"})
    assert main([*alone, f"--pretrained={data}/logs/two/checkpoints/epoch_1"]) == 0
    after = metrics(data, "alone", "val")[0]
    assert {k: v for k, v in after.items() if k != "step"} == {k: v for k, v in during.items() if k != "step"}


def test_ctrl_c_ends_the_run_and_says_how_to_go_on(data: Path) -> None:
    arguments = flags(data, "a", **{"model": "Nano-248", "epochs": 500, "workers": 1})
    command = [sys.executable, "-m", "jettclip.main", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        shown = ""
        while "epoch 2 step 1/" not in shown:
            shown += running.stderr.readline()
        running.send_signal(signal.SIGINT)
        shown += running.stderr.read()
        assert running.wait(60) == 130
    assert "the same command with --name a --resume latest goes on" in shown
    assert "Traceback" not in shown
    assert (data / "logs/a/checkpoints/epoch_1/checkpoint.json").exists()


def test_a_rank_that_fails_ends_the_run_on_all(data: Path) -> None:
    write_shard(data / "bad" / "000000.tar", [sample(i, txt="only a text") for i in range(30)])
    bad = {"train-data": str(data / "bad/000000.tar"), "model": "Nano-248", "batch-size": 4}
    done = torchrun(flags(data, "bad", **bad), timeout=120)
    assert done.returncode != 0
    assert "image is missing" in done.stderr


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def bad_checkpoint(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.pt"
    if kind == "code":
        torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Malicious()}, path)
    elif kind == "other":
        torch.save(create_model("Tiny", force_context_length=20).state_dict() | {"text.more": torch.zeros(1)}, path)
    else:
        torch.save(create_model("Tiny").state_dict(), path)
        path.write_bytes(path.read_bytes()[:-200] if kind == "truncated" else b"\0" * 999)
    return path


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model": "Tinny"}, "model 'Tinny' is not known; did you mean Tiny"),
        ({"pretrained": "corrupt"}, "corrupt.pt cannot be read as a checkpoint"),
        ({"pretrained": "truncated"}, "truncated.pt cannot be read as a checkpoint"),
        ({"pretrained": "code"}, "code.pt cannot be read as a checkpoint"),
        (
            {"pretrained": "other", "position-keep": 5},
            "other.pt does not fit the model, 1 keys differ: unknown text.more",
        ),
        ({"pretrained": "other", "force-context-length": 15}, r"embedding is \[20, 16\], the model's is \[15, 16\]"),
        ({"pretrained": "absent"}, "'absent' is neither a file or folder nor a tag of Tiny"),
        ({"freeze-position-prefix": 41}, "--freeze-position-prefix 41 must be a number of the tower's 40 positions"),
        ({"force-patch-dropout": 0.5}, "--force-patch-dropout 0.5: the image tower of Tiny has no patches"),
        ({"pretrained-image-from": "absent"}, "--pretrained-image-from 'absent' is neither"),
    ],
)
def test_a_model_that_cannot_be_built_ends_the_run_with_one_line(
    changed: dict[str, Any],
    expected: str,
    data: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(data)
    if changed.get("pretrained", "absent") != "absent":
        changed = {**changed, "pretrained": bad_checkpoint(changed["pretrained"], data)}
    assert main(flags(data, "a", logs="none", **changed)) == 1
    said = [*(record.getMessage() for record in caplog.records), *capsys.readouterr().err.splitlines()]
    (error,) = [line for line in said if re.search(expected, line)]
    assert "\n" not in error
    assert "Traceback" not in "".join(said)
    assert not Path("executed").exists()


def test_an_unknown_model_leaves_no_folder_behind(data: Path) -> None:
    assert main(flags(data, "a", model="Tinny")) == 1
    assert not (data / "logs").exists()


def test_frozen_positions_stay_as_they_were_stretched(data: Path) -> None:
    torch.save(create_model("Tiny", force_context_length=20).state_dict(), data / "short.pt")
    line = flags(data, "a", **{"pretrained": data / "short.pt", "position-keep": 5, "freeze-position-prefix": 9})
    assert main([*line, "--position-tail=interpolate"]) == 0
    before = torch.load(data / "short.pt", weights_only=True)["text.positional_embedding"]
    after = load_file(data / "logs/a/checkpoints/epoch_3/model.safetensors")["text.positional_embedding"]
    expected = stretch_positions(before, 40, keep=5, tail="interpolate")
    assert torch.equal(after[:9], expected[:9])
    assert not (after[9:13] == expected[9:13]).all(dim=1).any()  # those behind were not reached by any caption


def test_a_run_that_never_began_leaves_its_name(data: Path) -> None:
    assert main(flags(data, "a", epochs=1, pretrained="absent")) == 1
    assert main(flags(data, "a", epochs=1)) == 0


def test_captions_are_cut_at_the_length_that_a_checkpoint_was_trained_with(data: Path) -> None:
    assert main(flags(data, "a", epochs=1, **{"force-context-length": 12})) == 0
    assert main(flags(data, "b", epochs=1, pretrained=data / "logs/a/checkpoints/epoch_1")) == 0
    saved = load_file(data / "logs/b/checkpoints/epoch_1/model.safetensors")
    assert saved["text.positional_embedding"].shape[0] == 12
    assert any("truncated to 12 tokens" in event for event in metrics(data, "b")[-1]["noted"])
