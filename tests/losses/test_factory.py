from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jettclip.losses.factory import Loss, create_loss, teacher_parts_of, views_of
from jettclip.losses.formula import find_recipe, parse_formula
from jettclip.settings import LossSettings
from jettclip.types import Features, TeacherFeatures, TeacherInfo
from support import run_ranks, unit_rows

ROWS, WIDTH, COMPONENTS = 24, 10, 4
TEACHERS = [TeacherInfo("a", 6, 30.0), TeacherInfo("b", 9, 50.0)]
DT = sum(teacher.width for teacher in TEACHERS)
EVERY_TERM = "0.8*clip@long + 0.4*clip@short + 1.5*kd@long + 0.5*kd@short + 0.7*mse@long + 0.3*mse@short"


def batch_of(dtype: torch.dtype, rows: int = ROWS) -> tuple[Features, TeacherFeatures]:
    torch.manual_seed(3)
    student = [unit_rows(rows, WIDTH, torch.float64) for _ in range(3)]
    taught = [
        torch.cat([unit_rows(rows, one.width, torch.float64) for one in TEACHERS], dim=1).to(dtype) for _ in range(3)
    ]
    leaves = [one.to(dtype).requires_grad_() for one in (*student, torch.tensor([20.0]))]
    return Features(*leaves), TeacherFeatures(*taught)


def loss_of(formula: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Loss:
    torch.manual_seed(4)
    teachers = TEACHERS if teacher_parts_of(find_recipe(LossSettings(loss=formula)).formula) else []
    return create_loss(LossSettings(formula, **{"pca_components": COMPONENTS, **settings}), WIDTH, teachers).to(dtype)


def rows_of(features: Features, teacher: TeacherFeatures, mine: slice) -> tuple[Features, TeacherFeatures]:
    *parts, scale = features
    return Features(*(part[mine] for part in parts), scale), TeacherFeatures(*(part[mine] for part in teacher))


def coarse(image: Tensor, components: int, chunks: int) -> Tensor:
    rebuilt = []
    for part in image.chunk(chunks):
        mean = part.mean(dim=0)
        directions = torch.linalg.svd(part - mean, full_matrices=False).Vh[:components]
        rebuilt.append((part - mean) @ directions.T @ directions + mean)
    return torch.cat(rebuilt)


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def dense(loss: Loss, features: Features, teacher: TeacherFeatures, *, components: int, chunks: int) -> Tensor:
    """The whole loss in the most obvious way, one process, principal components of `chunks` parts of the batch."""
    total = torch.zeros((), dtype=features.image.dtype)
    parameters = dict(loss.named_parameters())
    split = [part.split([one.width for one in TEACHERS], dim=1) for part in teacher]
    teachers = [TeacherFeatures(*(part[index] for part in split)) for index in range(len(TEACHERS))]
    rows = len(features.image)
    for weight, term, view in parse_formula(loss.recipe.formula):
        x, y = features.image, getattr(features, view)
        u, w = [one.image for one in teachers], [getattr(one, view) for one in teachers]
        if view == "short":
            x, u = coarse(x, components, chunks), [coarse(one, components, chunks) for one in u]
        scales = [loss.recipe.teacher_scale or one.logit_scale for one in TEACHERS]
        logits = features.logit_scale * x @ y.T
        taught = [scale * a @ b.T for scale, a, b in zip(scales, u, w, strict=True)]
        value = torch.zeros_like(total)
        if term == "mse":
            for index, (a, b) in enumerate(zip(u, w, strict=True)):
                for modality, mine, theirs in (("image", x, a), ("text", y, b)):
                    mapped = mine @ parameters[f"terms.mse.{modality}_projections.{index}.weight"].T
                    difference = mapped / mapped.norm(dim=1, keepdim=True) - theirs / theirs.norm(dim=1, keepdim=True)
                    value = value + difference.square().sum() / rows / 4
        for direction in range(0 if term == "mse" else 2):
            log_student = log_softmax(logits.T if direction else logits)
            if term == "clip":
                smoothing = loss.recipe.label_smoothing
                target = torch.eye(rows).to(total) * (1 - smoothing) + smoothing / rows
                value = value - (target * log_student).sum() / rows / 2
            else:
                target = sum(log_softmax(one.T if direction else one).exp() for one in taught) / len(taught)
                value = value + (target * (target.log() - log_student)).sum() / rows / 2
        total = total + weight * value
    return total


def gradients(total: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("formula", ["openclip", "longclip", "jettclip", "mse@long + mse@short", EVERY_TERM])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_value_and_gradient_are_the_dense_formulas(formula: str, dtype: torch.dtype, tolerance: float) -> None:
    loss = loss_of(formula, dtype)
    features, teacher = batch_of(dtype)
    used = [getattr(features, name) for name in ("image", *loss.views, "logit_scale")]
    inputs = [*used, *loss.parameters()]
    report = loss(features, teacher)
    exact = loss_of(formula)
    exact_features, exact_teacher = batch_of(torch.float64)
    expected = dense(exact, exact_features, exact_teacher, components=COMPONENTS, chunks=1)
    expected = expected + 0 * exact_features.logit_scale.sum()
    assert report.total.dtype == dtype
    torch.testing.assert_close(report.total.double(), expected, rtol=tolerance, atol=tolerance)
    exact_inputs = [*(getattr(exact_features, name) for name in ("image", *loss.views, "logit_scale"))]
    for ours, theirs in zip(
        gradients(report.total, inputs), gradients(expected, [*exact_inputs, *exact.parameters()]), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def reinforced(features: Features, teacher: TeacherFeatures, weight: float) -> tuple[Tensor, Tensor]:
    """MobileCLIP's loss of its equations 2 to 4 (arXiv 2311.17049), lambda = 1 - weight, and its code's.

    Returns:
        as the paper has it, with the mean of the teachers' divergences; and as the code has it, with the divergence
        from the mean of their probabilities, whose gradient is the same.
    """
    ends = [0, *torch.tensor([one.width for one in TEACHERS]).cumsum(0).tolist()]
    papers = codes = torch.zeros((), dtype=torch.float64)
    for view in ("long", "short"):  # real captions, and synthetic ones
        for image, text in (("image", view), (view, "image")):
            logits = features.logit_scale * getattr(features, image) @ getattr(features, text).T
            student = (logits.exp() / logits.exp().sum(dim=1, keepdim=True)).log()
            probabilities = []
            for k, one in enumerate(TEACHERS):
                columns = slice(ends[k], ends[k + 1])
                exponents = one.logit_scale * getattr(teacher, image)[:, columns] @ getattr(teacher, text)[:, columns].T
                probabilities.append(exponents.exp() / exponents.exp().sum(dim=1, keepdim=True))
                divergence = (probabilities[k] * (probabilities[k].log() - student)).sum() / ROWS
                papers = papers + (1 - weight) * divergence / len(TEACHERS) / 2
            mean = torch.stack(probabilities).mean(dim=0)
            contrast = -student.diagonal().mean() / 2
            papers = papers + weight * contrast
            codes = codes + weight * contrast + (1 - weight) * (mean * (mean.log() - student)).sum() / ROWS / 2
    return papers, codes


@pytest.mark.parametrize(
    ("formula", "settings", "weight"),
    [
        ("mobileclip-dr", {"pca_components": None}, 0.0),
        ("0.25*clip@long + 0.25*clip@short + 0.75*kd@long + 0.75*kd@short", {"pca_components": 0}, 0.25),
    ],
)
def test_mobileclips_loss_is_summed_over_real_and_synthetic_captions(
    formula: str, settings: dict[str, Any], weight: float
) -> None:
    features, teacher = batch_of(torch.float64)
    total = loss_of(formula, **settings)(features, teacher).total
    papers, codes = reinforced(features, teacher, weight)
    torch.testing.assert_close(total, codes, rtol=1e-11, atol=1e-11)
    assert not torch.isclose(total, papers)  # by the teachers' entropies, which are constant
    for ours, theirs in zip(gradients(total, features), gradients(papers, features), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_the_presets_principal_components_are_kept_unless_settings_say_otherwise() -> None:
    features, teacher = batch_of(torch.float64)
    assert loss_of("mobileclip-dr", pca_components=None).pca_components == 0
    assert loss_of("longclip", pca_components=None).pca_components == 32
    changed = loss_of("mobileclip-dr", pca_components=COMPONENTS)
    assert torch.equal(changed(features, teacher).total, loss_of("kd@long + kd@short")(features, teacher).total)


def test_terms_are_reported_unweighted_and_sum_up_to_the_total() -> None:
    features, teacher = batch_of(torch.float64)
    loss = loss_of(EVERY_TERM)
    report = loss(features, teacher)
    assert list(report.terms) == [f"{one.term}@{one.view}" for one in loss.summands]
    assert not any(value.requires_grad for value in report.terms.values())
    weighted = sum(one.weight * report.terms[f"{one.term}@{one.view}"] for one in loss.summands)
    torch.testing.assert_close(report.total.detach(), weighted)


def test_half_precision_features_are_computed_in_float32_whatever_autocast_says() -> None:
    features, teacher = batch_of(torch.float32)
    halves = Features(*(part.detach().bfloat16() for part in features[:3]), features.logit_scale)
    stored = TeacherFeatures(*(part.bfloat16() for part in teacher))
    raised = TeacherFeatures(*(part.float() for part in stored))
    loss = loss_of(EVERY_TERM, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        report = loss(halves, stored)
    expected = loss(Features(*(part.float() for part in halves[:3]), features.logit_scale), raised)
    assert report.total.dtype == torch.float32
    assert torch.equal(report.total, expected.total)


def test_teachers_rows_are_scaled_to_unit_length_and_get_no_gradient() -> None:
    features, teacher = batch_of(torch.float64)
    loss = loss_of(EVERY_TERM)
    longer = TeacherFeatures(*(3 * part.requires_grad_() for part in teacher))
    report = loss(features, longer)
    torch.testing.assert_close(report.total, loss(features, teacher).total)
    report.total.backward()
    assert all(part.grad is None for part in teacher)


def test_a_parameter_that_no_term_uses_still_has_a_gradient() -> None:
    features, teacher = batch_of(torch.float64)
    loss_of("mse@long")(features, teacher).total.backward()
    assert features.logit_scale.grad is not None
    assert features.logit_scale.grad.item() == 0


def test_zero_components_leave_the_short_views_image_whole() -> None:
    features, teacher = batch_of(torch.float64)
    whole = Features(features.image, None, features.short, features.logit_scale)
    torch.testing.assert_close(
        loss_of("clip@short", pca_components=0)(features, teacher).total, loss_of("clip@long")(whole).total
    )
    assert loss_of("clip@short")(features).total != loss_of("clip@short", pca_components=0)(features).total


@pytest.mark.parametrize(("rows", "components"), [(5, 4), (ROWS, WIDTH)])
def test_too_small_a_batch_is_reported_once(rows: int, components: int, caplog: pytest.LogCaptureFixture) -> None:
    features, teacher = batch_of(torch.float32, rows)
    loss = loss_of("clip@short + kd@short", torch.float32, pca_components=components)
    with caplog.at_level(logging.WARNING):
        values = [loss(features, teacher).total for _ in range(2)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"--pca-components {components} keeps everything of {rows} image features" in caplog.text
    assert "--batch-size" in caplog.text
    expected = loss_of("clip@short + kd@short", torch.float32, pca_components=0)(features, teacher).total
    torch.testing.assert_close(values, [expected, expected])


def test_a_large_enough_batch_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    loss_of("clip@short + kd@short", torch.float32)(*batch_of(torch.float32, COMPONENTS + 2))
    assert caplog.records == []


def repeated(features: Features, distinct: int) -> Features:
    return features._replace(image=features.image[torch.arange(len(features.image)) % distinct])


@pytest.mark.parametrize(("distinct", "warned"), [(COMPONENTS + 1, True), (COMPONENTS + 2, False)])
def test_a_batch_of_duplicates_is_reported_whenever_it_comes(
    distinct: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loss = loss_of("clip@short", torch.float32)
    features, _ = batch_of(torch.float32)
    loss(features)
    assert caplog.records == []
    for _ in range(2):
        loss(repeated(features, distinct))
    assert len(caplog.records) == warned
    assert (f"whose rank is {COMPONENTS}, so the short view sees whole image features" in caplog.text) == warned


def warnings_on_a_rank(caplog: pytest.LogCaptureFixture) -> list[str]:
    loss_of("clip@short")(repeated(batch_of(torch.float64)[0], 2))
    return caplog.messages


def test_only_the_first_rank_reports(caplog: pytest.LogCaptureFixture) -> None:
    first, *others = run_ranks(2, warnings_on_a_rank, caplog)
    assert len(first) == 1
    assert "--pca-scope global" in first[0]
    assert others == [[]]


def test_a_formula_names_its_views_and_what_it_needs_of_the_teachers() -> None:
    assert views_of("kd@long + clip@short") == ("short", "long")
    assert views_of("clip@long") == ("long",)
    assert teacher_parts_of("clip@long + clip@short") == ()
    assert teacher_parts_of("clip@short + mse@long") == ("image", "long")
    assert teacher_parts_of("kd@long + kd@short") == ("image", "short", "long")


def test_what_a_formula_does_not_name_may_be_missing() -> None:
    features, teacher = batch_of(torch.float64)
    lean = Features(features.image, None, features.long, features.logit_scale)
    taught = TeacherFeatures(teacher.image, None, teacher.long)
    for formula in ("1*clip@long + 2*kd@long", "mse@long"):
        assert torch.equal(loss_of(formula)(lean, taught).total, loss_of(formula)(features, teacher).total)


def test_what_a_formula_names_must_not_be_missing() -> None:
    features, teacher = batch_of(torch.float64)
    with pytest.raises(ValueError, match="'kd@long' distils from a teacher, but there is none; name a feature store"):
        create_loss(LossSettings("kd@long"), WIDTH)
    with pytest.raises(ValueError, match="the batch has no teacher features"):
        loss_of("kd@long")(features)
    with pytest.raises(ValueError, match="of the teacher, but the batch has no short ones"):
        loss_of("kd@short")(features, teacher._replace(short=None))
    with pytest.raises(ValueError, match="of the student, but the batch has no short ones"):
        loss_of("clip@short")(features._replace(short=None))


def on_a_rank(formula: str, dtype: torch.dtype, scope: str) -> dict[str, Any]:
    loss = loss_of(formula, dtype, pca_scope=scope)
    size = ROWS // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    features, teacher = rows_of(*batch_of(dtype), mine)
    features = Features(*(part.detach().requires_grad_() for part in features))
    total = loss(features, teacher).total
    inputs = [*(getattr(features, name) for name in ("image", *loss.views)), features.logit_scale, *loss.parameters()]
    return {"total": total.detach(), "gradients": gradients(total, inputs)}


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_average_to_the_single_process(world_size: int, dtype: torch.dtype, tolerance: float, scope: str) -> None:
    results = run_ranks(world_size, on_a_rank, EVERY_TERM, dtype, scope)
    loss = loss_of(EVERY_TERM)
    features, teacher = batch_of(torch.float64)
    chunks = world_size if scope == "local" else 1
    expected = dense(loss, features, teacher, components=COMPONENTS, chunks=chunks)
    total = torch.stack([result["total"] for result in results]).mean()
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)
    inputs = [features.image, features.short, features.long, features.logit_scale, *loss.parameters()]
    for index, theirs in enumerate(gradients(expected, inputs)):
        ours = [result["gradients"][index].double() for result in results]
        of_a_feature = index < 3  # it belongs to one rank; DistributedDataParallel divides by their number
        averaged = torch.cat(ours) / world_size if of_a_feature else torch.stack(ours).mean(dim=0)
        torch.testing.assert_close(averaged, theirs, rtol=tolerance, atol=tolerance)


def with_a_bad_rank() -> bool:
    loss = loss_of("clip@short", pca_scope="local")
    features, _ = batch_of(torch.float64)
    image = features.image * (torch.nan if dist.get_rank() == 1 else 1)
    total = loss(features._replace(image=image)).total
    total.backward()
    return bool(total.isnan())


def test_a_rank_that_is_not_finite_neither_hangs_nor_hides_from_the_others() -> None:
    assert run_ranks(2, with_a_bad_rank) == [True, True]


def exchanges_on_a_rank(scope: str, components: int) -> list[int]:
    widths = []
    exchange = dist.all_gather_into_tensor

    def counted(everywhere: Tensor, rows: Tensor) -> None:
        widths.append(rows.shape[1])
        exchange(everywhere, rows)

    dist.all_gather_into_tensor = counted
    loss_of(EVERY_TERM, pca_scope=scope, pca_components=components)(*batch_of(torch.float64))
    return widths


@pytest.mark.parametrize(
    ("scope", "components", "features"), [("global", COMPONENTS, 3), ("local", COMPONENTS, 4), ("local", 0, 3)]
)
def test_every_feature_is_exchanged_once(scope: str, components: int, features: int) -> None:
    # one exchange for the student and one a teacher; the rebuilt image features are a feature of their own
    widths = [WIDTH * features, *(teacher.width * features for teacher in TEACHERS)]
    assert run_ranks(2, exchanges_on_a_rank, scope, components) == [widths, widths]
