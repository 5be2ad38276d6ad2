from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from jettclip import get_tokenizer
from jettclip.build import (
    Place,
    build_detectors,
    build_engine,
    build_evaluator,
    build_schedule,
    build_teachers,
    build_train_loader,
    open_source,
)
from jettclip.data.counts import DataError, Tally
from jettclip.data.row_source import RowSource
from jettclip.data.rows import Row
from jettclip.losses.factory import create_loss
from jettclip.models.teacher import Ensemble, Teacher
from jettclip.params import parse_args
from jettclip.settings import LossSettings
from jettclip.types import TeacherTokens
from support import caption, tiny_towers, write_shards

PLACE = Place(torch.device("cpu"))


def parse(*flags: str) -> Namespace:
    return parse_args(["--train-data", "x.tar", "--model", "Nano-248", *flags]).args


def test_every_named_teacher_is_built_from_its_own_checkpoint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = {
        ("ViT-L-14", "openai"): tiny_towers(size=12, context_length=20, logit_scale=60),
        ("Nano-248", "weights.pt"): tiny_towers(size=24, mean=(0.1, 0.1, 0.1), width=10, logit_scale=30),
    }
    monkeypatch.setattr("jettclip.build.create_model", lambda name, pretrained, **_: known[name, pretrained])
    args = parse("--distill-model", "ViT-L-14, Nano-248", "--distill-pretrained", "openai,weights.pt")
    with caplog.at_level(logging.INFO):
        ensemble = build_teachers(args, tiny_towers(), PLACE)
    assert ensemble is not None
    assert [teacher.model for teacher in ensemble.teachers] == list(known.values())
    assert ensemble.infos == [("ViT-L-14", 16, pytest.approx(60)), ("Nano-248", 10, pytest.approx(30))]
    assert "ViT-L-14 sees the student's views at 12 x 12 pixels and reads the first 20 tokens" in caplog.text
    assert "Nano-248 sees the student's views at 24 x 24 pixels and reads the first 32 tokens" in caplog.text


def test_there_are_no_teachers_unless_there_is_something_to_teach() -> None:
    assert build_teachers(parse(), tiny_towers(), PLACE) is None
    teacher = ["--distill-model", "Nano-248", "--distill-pretrained", "not even looked for"]
    evaluation = parse_args(["--val-data", "x.tar", "--model", "Nano-248", *teacher]).args
    assert build_teachers(evaluation, tiny_towers(), PLACE) is None


def test_the_loader_brings_each_teacher_the_token_ids_of_its_tokenizer(tmp_path: Path) -> None:
    student = tiny_towers(context_length=10)
    causal, bidirectional = tiny_towers(causal=True), tiny_towers(mask_padding=False)
    ensemble = Ensemble([Teacher(causal, "ViT-B-32"), Teacher(bidirectional, "Nano-248")], student.mean, student.std)
    options = parse_args(
        [
            "--train-data", write_shards(tmp_path, [8]), "--model", "Nano-248", "--workers", "0", "--batch-size", "8",
            "--loss", "1*clip@long + 1*clip@short + 1*kd@long",
        ]
    )  # fmt: skip
    loader = build_train_loader(options, student, lambda _: torch.zeros(3, 2, 2), ensemble, PLACE)
    assert loader is not None
    (batch,) = loader
    captions = [caption(int(key)) for key in loader.last_info.keys]
    assert isinstance(batch.teacher, TeacherTokens)
    assert batch.teacher.short == []  # which no term distils
    cropped, whole = batch.teacher.long
    assert torch.equal(whole, get_tokenizer("Nano-248")(captions))  # its tower does not ignore padding
    uncropped = get_tokenizer("ViT-B-32")(captions)
    assert torch.equal(cropped, uncropped[:, : cropped.shape[1]])
    assert not uncropped[:, cropped.shape[1] :].any()
    assert cropped.shape[1] < 77
    assert batch.long_caption is not None
    assert batch.long_caption.shape == (8, 10)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("a.csv", "read_table"), ("a.TSV", "read_table"), ("a.parquet", "read_table"), ("a.pq", "read_table"),
        ("a.json", "read_conversations"), ("a.jsonl", "read_conversations"), ("a.ndjson", "read_conversations"),
        ("folder.csv", "read_folder"),
    ],
)  # fmt: skip
def test_the_name_of_the_data_tells_how_to_read_it(
    name: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: str, *_: object) -> list[Row]:
        return [Row("0", "0.png", {"long": [reader]}, {}, "")]

    monkeypatch.setattr(f"jettclip.data.row_source.{reader}", read)
    path = tmp_path / name
    if reader == "read_folder":
        path.mkdir()
    else:
        path.write_text("")
    options = parse_args(["--train-data", str(path), "--model", "Nano-248"])
    source = open_source(options.args, options.data, str(path), None)
    assert isinstance(source, RowSource)
    (group,) = source.read(source.shards[0], frozenset(), Tally())
    assert json.loads(group["json"])["long_caption"] == reader


def test_shards_are_opened_later_and_must_be_named(tmp_path: Path) -> None:
    options = parse_args(["--train-data", str(tmp_path), "--model", "Nano-248"])
    urls = write_shards(tmp_path, [1])
    assert open_source(options.args, options.data, urls, None) == urls
    with pytest.raises(DataError, match=r"shards are named one by one, such as '.*/\{000000\.\.000099\}\.tar'"):
        open_source(options.args, options.data, str(tmp_path), None)


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 5), (2, 2)])
def test_the_log_says_how_many_pairs_a_step_compares(
    accumulated: int, steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--train-data", write_shards(tmp_path, [43]), "--model", "Nano-248", "--workers", "0", "--batch-size", "4"]
    options = parse_args([*flags, "--accum-freq", str(accumulated)])
    place = Place(torch.device("cpu"), rank=1, world_size=2)
    with caplog.at_level(logging.INFO):
        loader = build_train_loader(options, tiny_towers(), lambda _: torch.zeros(3, 2, 2), None, place)
    assert loader is not None
    assert loader.num_batches == steps * accumulated
    expected = (
        f"Training in {steps} steps an epoch, on a global batch of {8 * accumulated} pairs: 4 in a batch x 2 ranks x"
    )
    assert f"{expected} {accumulated} accumulated" in caplog.text


def test_a_global_batch_of_one_pair_is_refused_where_pairs_are_compared(tmp_path: Path) -> None:
    flags = ["--train-data", write_shards(tmp_path, [8]), "--model", "Nano-248", "--workers", "0", "--batch-size", "1"]

    def build(*more: str, ranks: int = 1) -> None:
        options, place = parse_args([*flags, *more]), Place(torch.device("cpu"), 0, ranks)
        build_train_loader(options, tiny_towers(), lambda _: torch.zeros(3, 2, 2), None, place)

    with pytest.raises(
        ValueError, match=r"--batch-size 1 on 1 rank .* clip would .* larger --batch-size or --accum-freq"
    ):
        build()
    build(ranks=2)
    build("--accum-freq", "2")
    build("--loss", "1*mse@long")


def test_micro_batches_of_a_tower_with_batch_norm_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for accumulated, norms, warnings in ((1, 1, 0), (4, 0, 0), (4, 1, 1)):
        caplog.clear()
        towers = tiny_towers()
        towers.visual = torch.nn.Sequential(*[torch.nn.BatchNorm2d(3)] * norms, *towers.visual)
        flags = ["--accum-freq", str(accumulated), "--batch-size", "8", "--precision", "fp32"]
        build_engine(parse(*flags), towers, create_loss(LossSettings("clip@long"), towers.embed_dim), PLACE)
        assert caplog.text.count("--accum-freq 4: the 1 BatchNorm layers of Nano-248 normalise by") == warnings
        assert caplog.text.count("not that of one batch of 32 rows") == warnings


def test_one_rank_warns_for_all(caplog: pytest.LogCaptureFixture) -> None:
    args, said = parse("--accum-freq", "4", "--precision", "amp"), []
    for rank in (0, 1):
        caplog.clear()
        towers = tiny_towers()
        towers.visual = torch.nn.Sequential(torch.nn.BatchNorm2d(3), *towers.visual)
        loss = create_loss(LossSettings("clip@long"), towers.embed_dim)
        build_engine(args, towers, loss, PLACE._replace(rank=rank, world_size=2))
        said.append(sum(record.levelno >= logging.WARNING for record in caplog.records))
    assert said == [2, 0]


@pytest.mark.parametrize(
    ("flags", "batch", "warmup", "limits"),
    [
        (["--warmup", "70", "--loss", "openclip"], 4, 70, (1.0, 100.0)),
        (["--warmup", "70", "--accum-freq", "3", "--logit-scale-max", "50"], 12, 70, (1.0, 50.0)),
        (["--warmup", "70", "--skip-scheduler", "--logit-scale-max", "0"], 4, 0, None),
        (["--loss", "longclip"], 4, 10000, None),
    ],
)
def test_detectors_know_the_run_that_they_watch(
    flags: list[str], batch: int, warmup: int, limits: tuple[float, float] | None
) -> None:
    options = parse_args(["--train-data", "x.tar", "--model", "Nano-248", "--batch-size", "4", *flags])
    loss = create_loss(options.loss, 16)
    for ranks in (1, 2):
        detectors = build_detectors(options.args, loss, Place(torch.device("cpu"), ranks - 1, ranks))
        assert (detectors.global_batch, detectors.warmup, detectors.scale_limits) == (batch * ranks, warmup, limits)


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


def test_synchronised_batch_norm_is_refused_on_the_cpu() -> None:
    args, towers = parse("--use-bn-sync", "--precision", "fp32"), tiny_towers()
    loss = create_loss(LossSettings("clip@long"), towers.embed_dim)
    with pytest.raises(ValueError, match="--use-bn-sync needs GPUs"):
        build_engine(args, towers, loss, PLACE)
