from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from jettclip.accumulation import accumulate, batch_norms, loss_input, running_statistics_kept
from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.identity import identity_of
from jettclip.losses.factory import create_loss
from jettclip.models.teacher import Ensemble, Teacher
from jettclip.settings import LossSettings
from jettclip.types import Batch, BatchInfo, Features, LossReport, TeacherFeatures, TeacherInfo, TeacherTokens
from support import run_ranks, tiny_towers, unit_rows

CPU = torch.device("cpu")
ROWS, WIDTH, TEACHER_WIDTHS = 12, 16, (6, 5)
BOTH_VIEWS = "0.8*clip@long + 0.4*clip@short + 1.5*kd@long + 0.5*kd@short + 0.7*mse@long"
MicroBatches = list[tuple[Batch, BatchInfo]]


def student_of(
    formula: str = BOTH_VIEWS,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Student], object] = lambda student: None,
    **settings: Any,
) -> Student:
    torch.manual_seed(5)
    teachers = [TeacherInfo(f"teacher {width}", width, 30.0) for width in TEACHER_WIDTHS]
    loss = create_loss(LossSettings(formula, pca_components=3, **settings), WIDTH, teachers)
    towers = tiny_towers(width=WIDTH)
    towers.start_logit_bias(loss.recipe.logit_bias_init)
    student = Student(towers, loss)
    change(student)
    return student.to(dtype)


def engine_of(student: Student, **options: Any) -> DDPEngine:
    return DDPEngine(student, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9), CPU, **options)


def captions(lengths: Sequence[int]) -> Tensor:
    ids = torch.randint(1, 49000, (len(lengths), max(lengths)))
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1] = 49407
        row[length:] = 0
    return ids


def big_batch(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Batch:
    torch.manual_seed(6)
    image = torch.randn(rows, 3, 16, 16, dtype=dtype)
    lengths = [3 + 5 * row // 4 for row in range(rows)]  # the longest of a micro-batch is another in each
    teacher = TeacherFeatures(*(unit_rows(rows, sum(TEACHER_WIDTHS), dtype) for _ in range(3)))
    return Batch(image, captions(lengths), captions(lengths[::-1]), teacher)


def info_of(rows: Sequence[int]) -> BatchInfo:
    return BatchInfo([f"sample{row}" for row in rows], {}, {}, {}, [row % 5 for row in rows])


def cropped(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids[:, : int((ids != 0).sum(dim=1).max())]


def part(batch: Batch, rows: slice) -> tuple[Batch, BatchInfo]:
    assert isinstance(batch.teacher, TeacherFeatures)
    assert batch.short_caption is not None
    assert batch.long_caption is not None
    teacher = TeacherFeatures(*(None if of is None else of[rows] for of in batch.teacher))
    ids = [cropped(view[rows]) for view in (batch.short_caption, batch.long_caption)]
    return Batch(batch.image[rows], *ids, teacher), info_of(range(ROWS)[rows])


def parts(batch: Batch, count: int, first: int = 0, stop: int = ROWS) -> MicroBatches:
    size = (stop - first) // count
    return [part(batch, slice(start, start + size)) for start in range(first, stop, size)]


def at_once(engine: DDPEngine, batch: Batch) -> LossReport:
    report: LossReport = engine.student.loss(
        *loss_input(engine, engine.student.loss, batch, info_of(range(len(batch.image))))
    )
    engine.backward(report.total)
    return report


def with_activations_kept(engine: DDPEngine, micro_batches: MicroBatches) -> LossReport:
    """Computes the same gradient by one backward pass, through the graphs of all micro-batches at once."""
    inputs = [loss_input(engine, engine.student.loss, *micro_batch) for micro_batch in micro_batches]
    rows = {name: torch.cat([getattr(one.features, name) for one in inputs]) for name in ("image", "short", "long")}
    features = inputs[0].features._replace(**rows)
    teacher = TeacherFeatures(*(torch.cat(columns) for columns in zip(*(one.teacher for one in inputs), strict=True)))
    report: LossReport = engine.student.loss(features, teacher)
    engine.backward(report.total)
    return report


def gradients_of(student: Student) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def assert_same(ours: Student, theirs: Student, tolerance: float) -> None:
    """Compares every gradient, to a share of its largest element."""
    expected = gradients_of(theirs)
    for name, gradient in gradients_of(ours).items():
        wanted = expected[name]
        assert (gradient is None) == (wanted is None), name
        if gradient is not None and wanted is not None:
            error = (gradient - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
            assert error <= tolerance or torch.equal(gradient, wanted), f"{name}: {error}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("formula", "settings"),
    [
        (BOTH_VIEWS, {}),
        *(
            (f"1*{term}@{view}", {})
            for term in ("clip", "siglip", "kd", "crd", "icl", "mse", "fd", "cosine", "gd")
            for view in ("long", "short")
        ),
        ("1*siglip@long + 0.5*siglip@short", {"multi_positive": True}),
        ("1*clip@long + 0.5*clip@short", {"multi_positive": True, "clip_margin": 0.3}),
        ("1*clip@long + 0.5*clip@short + 1*kd@short", {"pca_side": "text"}),
        ("clip-kd", {}),
    ],
)
def test_micro_batches_give_the_gradient_of_the_one_batch(
    formula: str, settings: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    batch, whole, divided = big_batch(dtype), *(student_of(formula, dtype, **settings) for _ in range(2))
    expected = at_once(engine_of(whole), batch)
    micro_batches = parts(batch, 3)
    assert len({one.long_caption.shape for one, _ in micro_batches if one.long_caption is not None}) == 3
    report, features = accumulate(engine_of(divided), divided.loss, micro_batches)
    assert_same(divided, whole, tolerance)
    assert (whole.towers.logit_scale.grad != 0) == any(
        term in formula for term in ("clip", "siglip", "kd", "crd", "gd")
    )
    of_no_row = [*divided.loss.parameters(), *([divided.towers.logit_bias] if "siglip" in formula else [])]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in of_no_row)
    torch.testing.assert_close(report, expected, rtol=tolerance, atol=0)
    assert [len(rows) for rows in features[:4]] == [ROWS, ROWS, ROWS, 1]  # type: ignore[arg-type]
    assert not any(rows.requires_grad for rows in features if rows is not None)


def steps_on_a_rank(micro_batches: int, static_graph: bool) -> tuple[dict[str, Tensor], list[int]]:
    student = student_of(dtype=torch.float64, pca_scope="global")
    engine = engine_of(student, static_graph=static_graph)
    exchanges = [0]

    def count(bucket: dist.GradBucket) -> Any:
        exchanges[-1] += bucket.is_last()
        return allreduce_hook(dist.group.WORLD, bucket)

    if dist.is_initialized():
        engine.model.register_comm_hook(None, lambda _, bucket: count(bucket))
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mine = parts(big_batch(torch.float64), micro_batches, ROWS // ranks * rank, ROWS // ranks * (rank + 1))
    for _ in range(3):
        if micro_batches > 1:
            accumulate(engine, student.loss, mine)
        else:
            at_once(engine, big_batch(torch.float64))
        engine.step()
        exchanges.append(0)
    return {name: value.clone() for name, value in student.state_dict().items()}, exchanges[:-1]


@pytest.mark.parametrize("static_graph", [False, True])
def test_ranks_with_micro_batches_train_what_one_process_trains_on_the_whole_batch(static_graph: bool) -> None:
    expected, _ = steps_on_a_rank(1, False)
    for weights, exchanges in run_ranks(2, steps_on_a_rank, 3, static_graph):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)
        assert exchanges == [2 if static_graph else 1, 1, 1]


def drop_out(student: Student) -> None:
    visual = student.towers.visual
    student.towers.visual = nn.Sequential(visual[0], visual[1], nn.Dropout(0.5), PythonNoise(), visual[2])


class PythonNoise(nn.Module):
    """Scales by a number that Python draws."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


def test_dropout_is_replayed() -> None:
    batch, kept, replayed = big_batch(), student_of(change=drop_out), student_of(change=drop_out)
    after = []
    for student, work in ((kept, with_activations_kept), (replayed, lambda e, m: accumulate(e, e.student.loss, m))):
        random.seed(1)
        torch.manual_seed(1)
        work(engine_of(student), parts(batch, 3))
        after.append((random.random(), float(torch.rand(()))))
    assert_same(replayed, kept, 1e-5)
    assert after[0] == after[1]  # as if there had been one pass


@pytest.mark.parametrize("precision", ["amp_bf16", "amp"])
def test_mixed_precision_gives_the_gradient_of_one_backward_pass(precision: str) -> None:
    batch, kept, replayed = big_batch(), student_of(), student_of()
    for student, work in ((kept, with_activations_kept), (replayed, lambda e, m: accumulate(e, e.student.loss, m))):
        engine = engine_of(student, precision=precision)
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "amp")
        work(engine, parts(batch, 3))
    assert_same(replayed, kept, 2e-2)  # what half precision leaves of sums in another order
    logit_scale = [student.towers.logit_scale.grad for student in (replayed, kept)]
    torch.testing.assert_close(*logit_scale, rtol=1e-5, atol=0)  # float32 throughout


def normalise(student: Student) -> None:
    visual = student.towers.visual
    convolution = nn.Conv2d(3, 3, 1)
    student.towers.visual = nn.Sequential(convolution, nn.BatchNorm2d(3, momentum=None), BatchNormAct2d(3), *visual)


def test_batch_norm_counts_every_micro_batch_once() -> None:
    batch, kept, replayed = big_batch(), student_of(change=normalise), student_of(change=normalise)
    with_activations_kept(engine_of(kept), parts(batch, 3))
    accumulate(engine_of(replayed), replayed.loss, parts(batch, 3))
    assert int(replayed.towers.visual[1].num_batches_tracked) == 3
    torch.testing.assert_close(dict(replayed.named_buffers()), dict(kept.named_buffers()), rtol=0, atol=0)
    assert_same(replayed, kept, 1e-4)


def test_running_statistics_are_kept_and_outputs_unchanged_in_training_and_evaluation() -> None:
    norms, images = nn.Sequential(nn.BatchNorm2d(3), BatchNormAct2d(3)), torch.randn(4, 3, 2, 2)
    norms(images)  # so that its running statistics are not those it was built with
    for training in (True, False):
        norms.train(training)
        before = {name: buffer.clone() for name, buffer in norms.named_buffers()}
        with running_statistics_kept(norms):
            inside = norms(images)
        torch.testing.assert_close(dict(norms.named_buffers()), before, rtol=0, atol=0)
        assert torch.equal(inside, norms(images))
    with pytest.raises(ZeroDivisionError), running_statistics_kept(norms):
        raise ZeroDivisionError
    assert all(norm.track_running_stats for norm in batch_norms(norms))


def test_a_locked_tower_stays_without_gradient() -> None:
    def lock(student: Student) -> None:
        student.towers.visual.requires_grad_(False)

    batch, whole, divided = big_batch(), student_of(change=lock), student_of(change=lock)
    at_once(engine_of(whole), batch)
    accumulate(engine_of(divided), divided.loss, parts(batch, 2))
    assert_same(divided, whole, 1e-5)
    assert gradients_of(divided)["towers.visual.2.weight"] is None


class Recorded(nn.Module):
    """Notes how many rows pass, and whether with gradient."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.seen = module, list[tuple[int, bool]]()

    def forward(self, image: Tensor, *captions: Any) -> Any:
        self.seen.append((len(image), torch.is_grad_enabled()))
        return self.module(image, *captions)


def test_there_is_one_micro_batch_at_a_time_and_teachers_are_asked_of_each_once() -> None:
    torch.manual_seed(2)
    first, second = tiny_towers(), tiny_towers(size=12, width=10, context_length=7)
    ensemble = Ensemble([Teacher(first, "first"), Teacher(second, "second")], first.mean, first.std)
    batch = big_batch()._replace(image=torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8))
    views = [[captions([9] * ROWS), captions([7] * ROWS)] for _ in range(2)]
    stored = ensemble(batch.image, TeacherTokens(*views))
    settings = LossSettings("1*clip@long + 1*kd@long + 1*mse@short", pca_components=3)
    results = []
    for asked in (False, True):
        torch.manual_seed(5)
        student = Student(tiny_towers(), create_loss(settings, WIDTH, ensemble.infos))
        engine, teachers = engine_of(student), Recorded(ensemble)
        engine.model = Recorded(student)
        micro_batches = parts(batch._replace(teacher=stored), 3)
        if asked:
            for index, (one, info) in enumerate(micro_batches):
                rows = slice(4 * index, 4 * index + 4)
                tokens = TeacherTokens(*([ids[rows] for ids in view] for view in views))
                micro_batches[index] = one._replace(teacher=tokens), info
        report, _ = accumulate(engine, student.loss, micro_batches, teachers if asked else None)
        results.append((report.total, student))
        assert engine.model.seen == [(4, True), (4, False), (4, False), (4, True), (4, True)]
        assert [rows for rows, _ in teachers.seen] == [4] * 3 * asked
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same(results[1][1], results[0][1], 1e-5)


def test_the_loss_is_told_who_is_who_in_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    student, batch, told = student_of("1*clip@long"), big_batch(), []

    def loss(features: Features, teacher: TeacherFeatures, identity: Any) -> LossReport:
        told.append((teacher, identity))
        return LossReport((features.image.sum() + features.logit_scale).sum(), {})

    monkeypatch.setattr(student.loss, "forward", loss)
    accumulate(engine_of(student), student.loss, parts(batch, 3))
    ((teacher, identity),) = told
    torch.testing.assert_close(teacher, batch.teacher)
    torch.testing.assert_close(identity, identity_of(batch, info_of(range(ROWS))))
