from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.engine.optimizer import create_optimizer
from jettclip.losses.factory import create_loss
from jettclip.settings import LossSettings
from jettclip.types import Features, TeacherFeatures, TeacherInfo
from support import run_ranks, tiny_towers, unit_rows

CPU = torch.device("cpu")
ROWS, WIDTH, TEACHER_WIDTH = 12, 16, 6
EVERY_TERM = "0.8*clip@long + 0.4*clip@short + 1.5*kd@long + 0.5*kd@short + 0.7*mse@long"


def student_of(formula: str, dtype: torch.dtype = torch.float32) -> Student:
    torch.manual_seed(5)
    settings = LossSettings(formula, pca_components=3, pca_scope="global")
    teachers = [TeacherInfo("teacher", TEACHER_WIDTH, 30.0)]
    towers = tiny_towers(width=WIDTH)
    loss = create_loss(settings, WIDTH, teachers)
    towers.start_logit_bias(loss.recipe.logit_bias_init)
    return Student(towers, loss).to(dtype)


def batch_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, TeacherFeatures]:
    torch.manual_seed(6)
    image = torch.randn(ROWS, 3, 16, 16, dtype=dtype)
    short, long = torch.randint(1, 49406, (2, ROWS, 20))
    short[:, 7], long[:, -1] = 49407, 49407
    return image, short, long, TeacherFeatures(*(unit_rows(ROWS, TEACHER_WIDTH, dtype) for _ in range(3)))


def sgd(student: Student, lr: float = 0.1) -> torch.optim.Optimizer:
    return create_optimizer(student, "timm/sgd", lr=lr, weight_decay=0.1, momentum=0.9)


def engine_of(formula: str = "clip@long", **options: Any) -> DDPEngine:
    student = student_of(formula)
    return DDPEngine(student, create_optimizer(student, "adamw", lr=1e-2, weight_decay=0.1), CPU, **options)


def take_steps(
    engine: DDPEngine, count: int, mine: slice = slice(None), dtype: torch.dtype = torch.float32
) -> Features:
    image, short, long, teacher = batch_of(dtype)
    for _ in range(count):
        with engine.autocast():
            features = engine.model(image[mine], short[mine], long[mine])
        loss = engine.student.loss(features, TeacherFeatures(*(part[mine] for part in teacher)))
        engine.backward(loss.total)
        engine.step()
    return features


def parameters_of(student: Student) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


def trained_on_a_rank(formula: str, static_graph: bool) -> dict[str, Tensor]:
    student = student_of(formula, torch.float64)
    with torch.no_grad():  # as if every rank had seeded its projections itself
        for parameter in student.loss.parameters():
            parameter.add_(dist.get_rank())
    engine = DDPEngine(student, sgd(student), CPU, static_graph=static_graph)
    size = ROWS // dist.get_world_size()
    take_steps(engine, 3, slice(dist.get_rank() * size, (dist.get_rank() + 1) * size), torch.float64)
    return parameters_of(student)


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("formula", [EVERY_TERM, "clip@long", "1*mse@long", "siglip@long + clip@short"])
def test_ranks_train_what_one_process_trains_on_the_whole_batch(formula: str, static_graph: bool) -> None:
    student = student_of(formula, torch.float64)
    start = parameters_of(student)
    take_steps(DDPEngine(student, sgd(student), CPU), 3, dtype=torch.float64)
    expected = parameters_of(student)
    results = run_ranks(2, trained_on_a_rank, formula, static_graph)
    for name, parameter in expected.items():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(results[0][name], parameter, rtol=0, atol=1e-10)
    unmoved = {name for name in expected if torch.equal(expected[name], start[name])}
    assert unmoved == ({"towers.logit_scale"} if "clip" not in formula else set())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("amp_bf16", torch.bfloat16), ("amp", torch.float16)]
)
def test_precision_is_the_towers_and_the_loss_stays_in_float32(precision: str, dtype: torch.dtype) -> None:
    engine = engine_of("clip@short + clip@long", precision=precision)
    before = parameters_of(engine.student)
    with engine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    features = take_steps(engine, 12)  # the gradient scaler finds its scale by skipping steps
    assert {part.dtype for part in (*features.of_rows, *features.of_model)} == {torch.float32}
    assert {parameter.dtype for parameter in engine.student.parameters()} == {torch.float32}
    assert not any(torch.equal(before[name], after) for name, after in parameters_of(engine.student).items())


@pytest.mark.parametrize("clip_norm", [None, 1e-2])
def test_the_gradient_scaler_does_not_change_a_step(clip_norm: float | None) -> None:
    trained = []
    for precision in ("fp32", "amp"):
        student = student_of("clip@long")
        engine = DDPEngine(student, sgd(student), CPU, precision=precision, clip_norm=clip_norm)
        for _ in range(2):
            engine.backward(sum(parameter.square().mean() for parameter in student.parameters()))
            engine.step()
        trained.append(parameters_of(student))
    torch.testing.assert_close(trained[0], trained[1])


def test_a_gradient_that_overflows_is_skipped_under_amp() -> None:
    engine = engine_of(precision="amp")
    before, scale = parameters_of(engine.student), engine.scaler.get_scale()
    loss = sum(parameter.sum() for parameter in engine.student.parameters())
    engine.backward(loss * 1e38)
    engine.step()
    assert engine.scaler.get_scale() == scale / 2
    torch.testing.assert_close(parameters_of(engine.student), before, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_the_norm_before_clipping_is_returned(precision: str) -> None:
    student = student_of("clip@long")
    engine = DDPEngine(student, torch.optim.SGD(student.parameters(), lr=1.0), CPU, precision=precision, clip_norm=0.5)
    before = parameters_of(student)
    engine.backward(sum((3 * parameter).sum() for parameter in student.parameters()))
    norm = engine.step()
    count = sum(parameter.numel() for parameter in student.parameters())
    assert norm == pytest.approx(3 * math.sqrt(count), rel=1e-4)
    moved = torch.cat([(before[name] - after).flatten() for name, after in parameters_of(student).items()])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)


def test_no_norm_is_returned_without_clipping() -> None:
    engine = engine_of()
    engine.backward(sum(parameter.sum() for parameter in engine.student.parameters()))
    assert engine.step() is None
    assert all(parameter.grad is None for parameter in engine.student.parameters())


@pytest.mark.parametrize(
    ("largest", "value", "expected"),
    [(100.0, 9.0, 100.0), (100.0, -3.0, 1.0), (0.0, 9.0, math.exp(9)), (100.0, 2, None)],
)
def test_the_logit_scale_is_held_between_one_and_its_largest(
    largest: float, value: float, expected: float | None
) -> None:
    engine = engine_of(logit_scale_max=largest)
    nn.init.constant_(engine.student.towers.logit_scale, value)
    engine.step()
    scale = engine.student.towers.logit_scale.exp().item()
    assert scale == pytest.approx(math.exp(value) if expected is None else expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_a_restored_engine_goes_on_identically(precision: str) -> None:
    engine = engine_of(EVERY_TERM, precision=precision)
    take_steps(engine, 2)
    state = copy.deepcopy(engine.state_dict())
    assert set(state) == {"student", "optimizer", "scaler"}
    take_steps(engine, 2)
    other = engine_of(EVERY_TERM, precision=precision)
    with torch.no_grad():
        for parameter in other.student.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    take_steps(other, 2)
    assert parameters_of(other.student).keys() == parameters_of(engine.student).keys()
    torch.testing.assert_close(parameters_of(other.student), parameters_of(engine.student), rtol=0, atol=0)
    assert other.scaler.state_dict() == engine.scaler.state_dict()


def gradients_without_exchange(static_graph: bool) -> list[float]:
    engine = engine_of(static_graph=static_graph)
    image, _, long, _ = batch_of()

    def gradient() -> float:
        return float(engine.student.towers.logit_scale.grad)  # type: ignore[arg-type]

    def add(factor: float) -> float:
        features = engine.model(image, None, long)
        loss = sum(rows.sum() * 0 for rows in features[:3] if rows is not None)
        engine.backward(loss + features.logit_scale.log().sum() * factor)
        return gradient()

    found = []
    for _ in range(2):
        engine.optimizer.zero_grad()
        for _ in range(2):
            with engine.no_sync():
                found.append(add(dist.get_rank() + 1.0))
        found.append(add(0.0))
    return found


@pytest.mark.parametrize("static_graph", [False, True])
def test_gradients_are_exchanged_by_the_pass_after_those_that_need_not(static_graph: bool) -> None:
    # a static graph is learnt from the first pass, which is exchanged at once
    first = [[1.5, 2.5, 3.0], [1.5, 3.5, 3.0]] if static_graph else [[1.0, 2.0, 3.0], [2.0, 4.0, 3.0]]
    expected = [[*ours, *later] for ours, later in zip(first, [[1.0, 2.0, 3.0], [2.0, 4.0, 3.0]], strict=True)]
    for found, wanted in zip(run_ranks(2, gradients_without_exchange, static_graph), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_alone_there_is_nothing_to_exchange() -> None:
    engine = engine_of()
    with engine.no_sync():
        take_steps(engine, 1)
    assert engine.device == CPU


def test_the_promise_of_a_static_graph_reaches_torch() -> None:
    for promised in (False, True):
        assert run_ranks(1, lambda promised=promised: engine_of(static_graph=promised).model.static_graph) == [promised]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), BatchNormAct2d(3, act_layer=nn.GELU)])


def synced_norms() -> list[str]:
    student = student_of("clip@long")
    student.towers.visual = Normed()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):  # torch's own rule
        DDPEngine(student, optimizer, CPU, sync_batch_norm=True)
    plain, with_activation = student.towers.visual.norms
    assert {id(p) for p in student.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    return [type(plain).__name__, type(with_activation).__name__, type(with_activation.act).__name__]


def test_batch_statistics_are_shared_by_norms_with_and_without_activation() -> None:
    assert run_ranks(1, synced_norms) == [["SyncBatchNorm", "SyncBatchNormAct", "GELU"]]


def test_what_is_called_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    # to compile it for real takes half a minute
    compiled = nn.Identity()
    monkeypatch.setattr(torch, "compile", lambda model: compiled if isinstance(model, Student) else None)
    assert engine_of(compile_model=True).model is compiled
    assert engine_of().model is not compiled
