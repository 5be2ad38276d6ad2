from __future__ import annotations

import pytest
import torch

from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.engine.optimizer import create_optimizer
from jettclip.losses.factory import create_loss
from jettclip.models.teacher import Teacher
from jettclip.settings import LossSettings
from jettclip.train import NonFiniteLoss, train_step
from jettclip.types import Batch, BatchInfo, TeacherFeatures
from support import tiny_towers


def make_engine(loss: str = "1*clip@long", teacher: Teacher | None = None) -> DDPEngine:
    student = Student(tiny_towers(), create_loss(LossSettings(loss=loss), 16, [teacher.info] if teacher else ()))
    return DDPEngine(student, create_optimizer(student, "adamw", lr=1e-2, weight_decay=0.1), torch.device("cpu"))


def make_batch(rows: int = 8) -> Batch:
    ids = torch.randint(1, 400, (rows, 9))
    ids[:, -1] = 49407
    return Batch(torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8), ids, ids, None)


def info(rows: int = 8) -> BatchInfo:
    return BatchInfo([f"sample{i}" for i in range(rows)], {}, {}, {})


def test_steps_make_the_loss_smaller() -> None:
    engine, batch = make_engine("1*clip@long + 1*clip@short"), make_batch()
    losses = [float(train_step(engine, engine.student.loss, batch, info())[0].total.detach()) for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_terms_and_samples() -> None:
    engine = make_engine()
    with torch.no_grad():
        engine.student.towers.logit_scale.fill_(float("inf"))
    before = {name: value.clone() for name, value in engine.student.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match=r"clip@long.*nothing was updated.*sample0, sample1"):
        train_step(engine, engine.student.loss, make_batch(), info())
    assert all(torch.equal(value, before[name]) for name, value in engine.student.state_dict().items())


def test_a_teacher_online_gives_the_loss_of_its_stored_features() -> None:
    teacher = Teacher(tiny_towers(), "t")
    batch = make_batch()
    stored = batch._replace(teacher=TeacherFeatures(*teacher(batch)))
    reports = []
    for one, with_teacher in ((batch, teacher), (stored, None)):
        torch.manual_seed(0)
        engine = make_engine("1*clip@long + 1*kd@long", teacher)
        reports.append(train_step(engine, engine.student.loss, one, info(), with_teacher)[0])
    assert torch.equal(reports[0].total, reports[1].total)
    assert reports[0].terms.keys() == {"clip@long", "kd@long"}
