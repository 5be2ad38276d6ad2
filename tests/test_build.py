from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

import pytest
import torch

from jettclip.build import Place, build_evaluator, build_schedule, build_teacher
from jettclip.models import config
from jettclip.models.factory import create_model
from jettclip.params import parse_args
from support import tiny_towers

PLACE = Place(torch.device("cpu"))


def parse(*flags: str) -> Namespace:
    return parse_args(["--train-data", "x.tar", "--model", "Nano-248", *flags]).args


def distil(monkeypatch: pytest.MonkeyPatch, *flags: str, **changed: Any) -> None:
    """Builds Nano-248 with some other settings as the teacher of Nano-248."""
    known = config.get_model_config("Nano-248")
    text_cfg = {**known.text_cfg, **changed.pop("text_cfg", {})}
    teacher = config.ModelConfig(**{**vars(known), "name": "Other", "text_cfg": text_cfg, **changed})

    def find(name: str) -> config.ModelConfig:
        return teacher if name == "Other" else known

    monkeypatch.setattr("jettclip.models.factory.get_model_config", find)
    monkeypatch.setattr("jettclip.models.factory.find_weights", lambda *_: (None, {}))
    args = parse("--distill-model", "Other", "--distill-pretrained", "any", *flags)
    assert build_teacher(args, create_model("Nano-248"), PLACE) is not None


def test_a_teacher_that_reads_the_students_batches_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    distil(monkeypatch)
    distil(monkeypatch, text_cfg={"context_length": 77})
    distil(monkeypatch, preprocess_cfg={"mean": [0.1, 0.1, 0.1], "std": [1, 1, 1]})  # images travel as uint8
    assert build_teacher(parse(), tiny_towers(), PLACE) is None


@pytest.mark.parametrize(
    ("flags", "changed", "reason"),
    [
        ([], {"vision_cfg": {"image_size": 64, "timm_model_name": "convmixer_nano", "timm_proj": None}}, "64 pixels"),
        ([], {"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "another tokenizer"),
        ([], {"text_cfg": {"pool_type": "last", "context_length": 77}, "mask_padding": False}, "77 tokens only"),
        (["--aug-cfg", "use_timm=True"], {"preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}, "mean and std"),
    ],
)
def test_a_teacher_that_cannot_read_the_students_batches_is_refused(
    flags: list[str], changed: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"{reason}.*extract its features"):
        distil(monkeypatch, *flags, **changed)


def test_captions_whose_end_cannot_be_told_are_not_truncated() -> None:
    options = parse_args(["--val-data", "x.tar", "--model", "Nano-248", "--val-truncate", "77"])
    model = tiny_towers()
    model.text.pool_type = "last"
    with pytest.raises(ValueError, match="--val-truncate"):
        build_evaluator(options, model, lambda image: image, PLACE)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--lr-scheduler", "const"], [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (["--lr-scheduler", "cosine"], [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        (["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1"], [0.5, 1.0, 1.0, 1.0, 0.666667, 0.333333]),
        (["--skip-scheduler"], [1.0] * 6),
    ],
)
def test_the_schedule_is_openclips(flags: list[str], expected: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    args = parse("--lr", "1", "--warmup", "2", "--epochs", "2", *flags)
    schedule = build_schedule(args, optimizer, epoch_steps=3)
    rates = []
    for step in range(6):
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, abs=1e-5)


def test_a_warmup_that_is_never_over_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with caplog.at_level(logging.WARNING):
        build_schedule(parse("--lr", "1", "--warmup", "50", "--epochs", "2"), optimizer, epoch_steps=3)
    assert "--warmup 50 is not over in the 6 steps" in caplog.text
