from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.engine.optimizer import create_optimizer
from jettclip.identity import identity_of
from jettclip.losses.factory import create_loss
from jettclip.models.teacher import Ensemble, Teacher
from jettclip.settings import LossSettings
from jettclip.train import NonFiniteLoss, check_finite, train_step
from jettclip.types import Batch, BatchInfo, LossReport, TeacherFeatures, TeacherInfo, TeacherTokens
from support import run_ranks, tiny_towers


def make_engine(loss: str = "1*clip@long", teachers: Sequence[TeacherInfo] = ()) -> DDPEngine:
    towers, computed = tiny_towers(), create_loss(LossSettings(loss=loss), 16, teachers)
    towers.start_logit_bias(computed.recipe.logit_bias_init)
    student = Student(towers, computed)
    return DDPEngine(student, create_optimizer(student, "adamw", lr=1e-2, weight_decay=0.1), torch.device("cpu"))


def make_batch(rows: int = 8) -> Batch:
    ids = torch.randint(1, 400, (rows, 9))
    ids[:, -1] = 49407
    return Batch(torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8), ids, ids, None)


def info(rows: int = 8) -> BatchInfo:
    return BatchInfo([f"sample{i}" for i in range(rows)], {}, {}, {})


def test_steps_make_the_loss_smaller() -> None:
    engine, batch = make_engine("1*clip@long + 1*clip@short"), make_batch()
    losses = [float(train_step(engine, engine.student.loss, [(batch, info())])[0].total.detach()) for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_terms_and_samples() -> None:
    engine = make_engine()
    with torch.no_grad():
        engine.student.towers.logit_scale.fill_(float("inf"))
    before = {name: value.clone() for name, value in engine.student.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match=r"clip@long.*nothing was updated.*sample0, sample1"):
        train_step(engine, engine.student.loss, [(make_batch(), info())])
    assert all(torch.equal(value, before[name]) for name, value in engine.student.state_dict().items())


def test_a_step_on_micro_batches_is_the_step_on_all_their_rows() -> None:
    batch = make_batch()
    halves = [(Batch(batch.image[i : i + 4], batch[1][i : i + 4], batch[2][i : i + 4], None), info(4)) for i in (0, 4)]  # type: ignore[index]
    trained = []
    for micro_batches in ([(batch, info())], halves):
        torch.manual_seed(0)
        student = make_engine("1*clip@long + 1*clip@short").student
        engine = DDPEngine(student, torch.optim.SGD(student.parameters(), lr=1.0), torch.device("cpu"), clip_norm=1e3)
        report, features, norm = train_step(engine, student.loss, micro_batches)
        assert features.image.shape == (8, 16)
        assert norm is not None
        trained.append((report.total.detach(), norm, student.state_dict()))
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-5, atol=1e-6)


def test_one_batch_is_embedded_once_and_micro_batches_twice_but_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch, passes = make_engine(), make_batch(), []
    forward = engine.student.towers.forward
    monkeypatch.setattr(engine.student.towers, "forward", lambda *inputs: passes.append(1) or forward(*inputs))
    train_step(engine, engine.student.loss, [(batch, info())])
    assert len(passes) == 1
    train_step(engine, engine.student.loss, [(batch, info())] * 3)
    assert len(passes) == 1 + 1 + 2 * 2


def test_only_terms_that_are_no_number_are_blamed() -> None:
    terms = {"clip@long": torch.tensor(1.5), "kd@long": torch.tensor(torch.nan), "mse@long": torch.tensor(torch.inf)}
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan, by kd@long, mse@long of its terms .*'clip@long': 1\.5"):
        check_finite(LossReport(torch.tensor(torch.nan), terms), ["a"])
    check_finite(LossReport(torch.tensor(1.0), terms), ["a"])


def test_a_sum_that_overflows_is_not_blamed_on_a_term() -> None:
    terms = {"clip@long": torch.tensor(1.5), "floor@long": torch.tensor(0.25)}
    with pytest.raises(NonFiniteLoss) as caught:
        check_finite(LossReport(torch.tensor(torch.inf), terms), ["a"])
    said = "the loss is inf, although its terms are all finite: {'clip@long': 1.5}; nothing was updated. This rank's"
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(("formula", "reads"), [("1*mse@long", False), ("1*siglip@long", False), ("1*clip@long", True)])
def test_who_is_who_is_found_out_only_for_a_loss_that_reads_it(
    formula: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Batch] = []
    monkeypatch.setattr(
        "jettclip.accumulation.identity_of", lambda batch, info: asked.append(batch) or identity_of(batch, info)
    )
    teacher = TeacherFeatures(torch.randn(8, 4), None, torch.randn(8, 4))
    engine, batch = make_engine(formula, [TeacherInfo("teacher", 4, 30.0)]), make_batch()._replace(teacher=teacher)
    for micro_batches in (1, 2):
        train_step(engine, engine.student.loss, [(batch, info())] * micro_batches)
    assert len(asked) == 3 * reads


def test_a_loss_of_micro_batches_that_is_no_number_names_the_samples_of_all() -> None:
    engine = make_engine()
    with torch.no_grad():
        engine.student.towers.logit_scale.fill_(float("inf"))
    before = {name: value.clone() for name, value in engine.student.state_dict().items()}
    others = BatchInfo([f"other{i}" for i in range(8)], {}, {}, {})
    with pytest.raises(NonFiniteLoss, match=r"clip@long.*nothing was updated.*sample0, .*sample7, other0, .*other7\."):
        train_step(engine, engine.student.loss, [(make_batch(), info()), (make_batch(), others)])
    assert all(torch.equal(value, before[name]) for name, value in engine.student.state_dict().items())


@pytest.mark.parametrize("term", ["siglip", "clip"])
def test_a_loss_that_is_no_number_on_one_rank_stops_all_before_the_step(term: str) -> None:
    def on_a_rank() -> tuple[str, bool]:
        torch.manual_seed(0)
        engine = make_engine(f"1*{term}@long")
        batch = make_batch()
        if dist.get_rank() == 1:
            batch = batch._replace(image=torch.full((8, 3, 16, 16), torch.nan))
        before = [value.clone() for value in engine.student.state_dict().values()]
        try:
            train_step(engine, engine.student.loss, [(batch, info())])
        except NonFiniteLoss as error:
            same = all(map(torch.equal, engine.student.state_dict().values(), before))
            return str(error), same
        return "", False

    (first, first_same), (second, second_same) = run_ranks(2, on_a_rank)
    assert first_same
    assert second_same
    assert "the loss is nan" in second
    assert ("another rank" if term == "siglip" else "the loss is nan") in first


BICUBIC = InterpolationMode.BICUBIC
FORMULA = "1*clip@long + 1*kd@long + 0.5*kd@short"


def make_ensemble() -> Ensemble:
    torch.manual_seed(7)
    sharp = tiny_towers(logit_scale=90)
    blurred = tiny_towers(size=12, mean=(0.1, 0.2, 0.3), context_length=7, causal=True, width=10, logit_scale=5)
    return Ensemble([Teacher(sharp, "sharp"), Teacher(blurred, "blurred")], sharp.mean, sharp.std)


def make_asked_batch(rows: int = 8) -> Batch:
    """A batch whose captions have other token ids for every teacher and view."""
    batch, views = make_batch(rows), []
    for _ in range(2):
        ids = [torch.randint(1, 400, (rows, length)) for length in (11, 7)]
        for its_ids in ids:
            its_ids[:, -1] = 49407
        views.append(ids)
    return batch._replace(teacher=TeacherTokens(*views))


def test_teachers_online_give_the_loss_of_their_stored_features() -> None:
    ensemble, batch = make_ensemble(), make_asked_batch()
    stored = batch._replace(teacher=TeacherFeatures(*ensemble(batch.image, batch.teacher)))
    reports = []
    for one, with_teachers in ((batch, ensemble), (stored, None)):
        torch.manual_seed(0)
        engine = make_engine(FORMULA, ensemble.infos)
        reports.append(train_step(engine, engine.student.loss, [(one, info())], with_teachers)[0])
    assert torch.equal(reports[0].total, reports[1].total)
    assert reports[0].terms.keys() == {"clip@long", "kd@long", "kd@short", "floor@long"}


def test_the_student_learns_the_mean_of_the_teachers_probabilities_each_at_its_own_scale() -> None:
    ensemble, batch = make_ensemble(), make_asked_batch()
    engine = make_engine("1*kd@long", ensemble.infos)
    report, student, _ = train_step(engine, engine.student.loss, [(batch, info())], ensemble)
    assert isinstance(batch.teacher, TeacherTokens)
    expected = 0.0
    for direction in (slice(None), slice(None, None, -1)):  # image to text, text to image
        targets = []
        for teacher, ids, scale in zip(ensemble.teachers, batch.teacher.long, (90, 5), strict=True):
            pixels = batch.image if teacher.name == "sharp" else resize(batch.image, [12, 12], BICUBIC)
            pair = [teacher.model.encode_image(pixels, True), teacher.model.encode_text(ids, True)][direction]
            targets.append((scale * pair[0] @ pair[1].T).softmax(dim=1))
        target = sum(targets) / 2
        assert student.long is not None
        pair = [student.image.detach(), student.long.detach()][direction]
        logits = student.logit_scale.detach() * pair[0] @ pair[1].T
        expected += float((target * (target.log() - logits.log_softmax(dim=1))).sum(dim=1).mean()) / 2
    assert float(report.total.detach()) == pytest.approx(expected, rel=1e-4)


def trained_by_teachers(rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Takes a step on this rank's share of the same 8 rows; returns the loss and the student."""
    torch.manual_seed(3)
    ensemble = make_ensemble()
    student = Student(tiny_towers(), create_loss(LossSettings(FORMULA, pca_scope="global"), 16, ensemble.infos))
    engine = DDPEngine(student, create_optimizer(student, "timm/sgd", lr=0.1, weight_decay=0.1), torch.device("cpu"))
    batch, first = make_asked_batch(), rows * (dist.get_rank() if dist.is_initialized() else 0)
    mine = slice(first, first + rows)
    assert isinstance(batch.teacher, TeacherTokens)
    asked = TeacherTokens(*([ids[mine] for ids in view] for view in batch.teacher))
    share = Batch(*(part[mine] for part in batch[:3]), asked)  # type: ignore[index]
    report = train_step(engine, student.loss, [(share, info(rows))], ensemble)[0]
    return report.total.detach(), {name: value.clone() for name, value in student.state_dict().items()}


def test_two_ranks_with_teachers_take_the_step_of_one_process() -> None:
    ranks, (loss, weights) = run_ranks(2, trained_by_teachers, 4), trained_by_teachers(8)
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss, atol=1e-5, rtol=0)
    for _, its_weights in ranks:
        torch.testing.assert_close(its_weights, weights, atol=1e-5, rtol=0)
