from __future__ import annotations

import re
from argparse import Namespace

import pytest

from jettclip.openclip import trainer_arguments
from jettclip.rules import (
    TRACKERS,
    combination_rules,
    distillation_pairs,
    range_rules,
    trackers,
    unsupported_flags,
)
from jettclip.settings import DataSettings

USUAL = "--train-data x.tar"


def parsed(flags: str) -> Namespace:
    return trainer_arguments(f"{USUAL} {flags}".split())


def said_of(flags: str, data: DataSettings = DataSettings()) -> list[str]:  # noqa: B008 (it is frozen)
    args = parsed(flags)
    rules = [*range_rules(args), *combination_rules(args, data), *unsupported_flags(args)]
    return [message for broken, message in rules if broken]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--grad-clip-norm 0", "--grad-clip-norm 0.0 must be positive"),
        ("--grad-clip-norm=-1", "--grad-clip-norm -1.0 must be positive"),
        ("--wd=-0.1", "--wd -0.1 must be positive, or 0"),
        ("--epochs 3 --epochs-cooldown 4", "--epochs-cooldown 4 must be part of the run, 0 to --epochs 3"),
        ("--epochs-cooldown=-1", "--epochs-cooldown -1 must be"),
        ("--report-to wandb --logs none", "--report-to wandb writes into the folder of the run; give --logs"),
        ("--report-to tensorboard --logs None", "--report-to tensorboard writes"),
        ("--resume latest", "--resume latest looks .* give --name, and --logs"),
        ("--resume latest --name a --logs none", "--resume latest looks .* give --name, and --logs"),
        ("--distill-model a", "--distill-model and --distill-pretrained go together"),
        (
            "--distill-model a,b --distill-pretrained x",
            "--distill-model a,b names 2 teachers, and --distill-pretrained x 1 checkpoints; give one .* for each",
        ),
        ("--distill-model a --distill-pretrained x,y", "names 1 teachers, and --distill-pretrained x,y 2 checkpoints"),
    ],
)
def test_a_broken_rule_says_what_to_do(flags: str, expected: str) -> None:
    (message,) = said_of(flags)
    assert re.search(expected, message)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--grad-clip-norm 0.5",
        "--wd 0",
        "--epochs 3 --epochs-cooldown 3 --lr-scheduler const-cooldown",
        "--report-to all --logs runs",
        "--logs none",
        "--resume latest --name a",
        "--resume runs/a/checkpoints/epoch_1 --logs none",
        "--distill-model a --distill-pretrained x",
        "--distill-model a,b --distill-pretrained x,y",
    ],
)
def test_what_is_in_order_is_left_alone(flags: str) -> None:
    assert said_of(flags) == []


def test_teachers_of_both_kinds_and_teachers_without_text_are_refused() -> None:
    teachers = "--distill-model a,b --distill-pretrained x,y"
    (message,) = said_of(teachers, DataSettings(features="vitl"))
    assert "--distill-model computes teacher features that --features and --dataset-reinforcement read" in message
    (message,) = said_of(teachers, DataSettings(text_embeddings="members"))
    assert "--distill-model reads captions, and with --text-embeddings members there are none" in message
    (message,) = said_of(teachers, DataSettings(text_embeddings="tars"))
    assert "with --text-embeddings tars there are none" in message
    assert said_of(teachers, DataSettings(text_embeddings="llm")) == []
    (message,) = said_of("", DataSettings(features="vitl", text_embeddings="members"))
    assert "--features vitl belong to captions, and with --text-embeddings members there are none" in message


def test_every_teacher_goes_with_its_checkpoint() -> None:
    args = parsed("--distill-model a,b --distill-pretrained x,y.pt")
    assert distillation_pairs(args) == [("a", "x"), ("b", "y.pt")]
    assert distillation_pairs(parsed("--distill-model a/b --distill-pretrained x")) == [("a/b", "x")]


def test_all_stands_for_every_tracker() -> None:
    assert trackers(parsed("--report-to all")) == list(TRACKERS)
    assert trackers(parsed("--report-to wandb")) == ["wandb"]
    assert trackers(parsed("")) == []
    assert said_of("--report-to mlflow,wandb") == [
        "--report-to 'mlflow,wandb' names mlflow; give tensorboard, wandb or all"
    ]
