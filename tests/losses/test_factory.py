from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import loss_formulas as formulas
from jettclip.losses.factory import Loss, create_loss
from jettclip.losses.formula import TEACHER_TERMS, find_recipe, parse_formula, teacher_parts_of, views_of
from jettclip.losses.presets import Recipe
from jettclip.settings import LossSettings
from jettclip.types import Features, Identity, TeacherFeatures, TeacherInfo
from support import run_ranks, unit_rows

ROWS, WIDTH, COMPONENTS = 24, 10, 4
TEACHERS = [TeacherInfo("a", 6, 30.0), TeacherInfo("b", 9, 50.0)]
DT = sum(teacher.width for teacher in TEACHERS)
USUAL_TERMS = "0.8*clip@long + 0.4*clip@short + 1.5*kd@long + 0.5*kd@short + 0.7*mse@long + 0.3*mse@short"
OTHER_TERMS = (
    "0.5*siglip@long + 0.2*siglip@short + 0.6*crd@long + 0.3*crd@short + 1.1*icl@long + 0.9*icl@short + 0.3*clip@short"
    " + 0.6*fd@short + 0.7*fd@long + 0.2*cosine@long + 0.4*cosine@short + 30*gd@long + 20*gd@short"
)
OPTIONS: dict[str, Any] = {"clip_margin": 0.3, "multi_positive": True, "label_smoothing": 0.1}


def batch_of(dtype: torch.dtype, rows: int = ROWS) -> tuple[Features, TeacherFeatures]:
    torch.manual_seed(3)
    student = [unit_rows(rows, WIDTH, torch.float64) for _ in range(3)]
    taught = [
        torch.cat([unit_rows(rows, one.width, torch.float64) for one in TEACHERS], dim=1).to(dtype) for _ in range(3)
    ]
    leaves = [one.to(dtype).requires_grad_() for one in (*student, torch.tensor([20.0]), torch.tensor([-10.0]))]
    return Features(*leaves), TeacherFeatures(*taught)


def identity_of(rows: int = ROWS) -> Identity:
    """Returns rows of which some share the image, and some a caption."""
    numbers = torch.arange(rows)
    return Identity(numbers % (rows - 2), numbers // 2 * 2**40, numbers % (rows - 5) - 2**60)


def loss_of(formula: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Loss:
    torch.manual_seed(4)
    asked = LossSettings(formula, **{"pca_components": COMPONENTS, **settings})
    return create_loss(asked, WIDTH, TEACHERS if teacher_parts_of(find_recipe(asked)) else []).to(dtype)


def rows_of(
    mine: slice, features: Features, teacher: TeacherFeatures, identity: Identity | None = None
) -> tuple[Features, TeacherFeatures, Identity | None]:
    *parts, scale, bias = features
    return (
        Features(*(part[mine] for part in parts), scale, bias),
        TeacherFeatures(*(part[mine] for part in teacher)),
        Identity(*(part[mine] for part in identity)) if identity else None,
    )


class Dense:
    """The whole loss in the most obvious way, one process, principal components of `chunks` parts of the batch."""

    def __init__(self, loss: Loss, features: Features, teacher: TeacherFeatures, chunks: int = 1) -> None:
        self.recipe, self.parameters = loss.recipe, dict(loss.named_parameters())
        self.features, self.chunks, self.detach = features, chunks, loss.recipe.pca_detach
        split = [part.split([one.width for one in TEACHERS], dim=1) for part in teacher]
        self.teachers = [[part[index] for part in split] for index in range(len(TEACHERS))]
        scales = self.recipe.teacher_scale or tuple(one.logit_scale for one in TEACHERS)
        self.scales = scales * 2 if len(scales) == 1 else scales

    def total(self, identity: Identity | None, margin: float) -> Tensor:
        total = torch.zeros((), dtype=self.features.image.dtype)
        for weight, term, view in parse_formula(self.recipe.formula):
            belongs, captions = None, getattr(self.features, self.caption(view))
            if identity is not None:
                numbers = identity.image, getattr(identity, self.caption(view))
                belongs = torch.stack([one.unsqueeze(1) == one for one in numbers]).any(dim=0)
            x, y = self.seen(self.features[:3], view)
            scale, smoothing = self.features.logit_scale, self.recipe.label_smoothing
            if term == "clip":
                value = formulas.clip(x, y, scale, smoothing, belongs=belongs, margin=margin, captions=captions)
            elif term == "siglip":
                value = formulas.siglip(x, y, scale, self.features.logit_bias, belongs)
            else:
                value = self.distilled(term, x, y, view)
            total = total + weight * value
        return total

    def distilled(self, term: str, x: Tensor, y: Tensor, view: str) -> Tensor:
        pairs = [self.seen(parts, view) for parts in self.teachers]
        taught = [(*pair, scale) for pair, scale in zip(pairs, self.scales, strict=True)]
        if term in ("kd", "crd"):
            return getattr(formulas, term)(x, y, self.features.logit_scale, taught)
        mapped = [
            tuple(
                formulas.unit(rows @ self.parameters[f"terms.{term}.{modality}_projections.{index}.weight"].T)
                for modality, rows in (("image", x), ("text", y))
            )
            for index in range(len(TEACHERS))
        ]
        if term == "icl":
            return formulas.icl(mapped, self.parameters["terms.icl.logit_scale"].exp(), taught)
        if term == "gd":
            return formulas.gd(mapped, self.features.logit_scale, taught)
        squares = formulas.squared(mapped, taught)
        means = torch.stack([one.mean() if term == "fd" else one.sum(dim=1).mean() for one in squares])
        return means.mean() * {"mse": 1, "fd": 2, "cosine": 0.5}[term]

    def caption(self, view: str) -> str:
        return "long" if self.recipe.pca_side == "text" else view

    def seen(self, parts: Sequence[Tensor], view: str) -> tuple[Tensor, Tensor]:
        image, short, long = parts
        text = {"short": short, "long": long}[self.caption(view)]
        if view == "long" or not self.recipe.has_pca:
            return image, text
        is_text = self.recipe.pca_side == "text"
        rows = text if is_text else image
        components, variance = self.recipe.pca_components, self.recipe.pca_variance
        coarse = formulas.coarse(rows, components, self.chunks, variance, detach=self.detach)
        return (image, coarse) if is_text else (coarse, text)


def dense(
    loss: Loss,
    features: Features,
    teacher: TeacherFeatures,
    identity: Identity | None = None,
    *,
    chunks: int = 1,
    margin: float = 0.0,
) -> Tensor:
    return Dense(loss, features, teacher, chunks).total(identity, margin)


def gradients(total: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, inputs))


CASES: list[tuple[str, dict[str, Any]]] = [
    (USUAL_TERMS, {}),
    (USUAL_TERMS, {"loss_tile": "off"}),
    (USUAL_TERMS, {"loss_tile": "7", "pca_variance": 0.7, "pca_components": None}),
    (USUAL_TERMS, OPTIONS),
    (USUAL_TERMS, {**OPTIONS, "pca_side": "text", "loss_tile": "7"}),
    (USUAL_TERMS, {**OPTIONS, "pca_side": "text", "loss_tile": "off"}),
    (OTHER_TERMS, {"label_smoothing": 0.2}),
    (OTHER_TERMS, {"loss_tile": "off", "teacher_scale": (40.0, 20.0)}),
    (OTHER_TERMS, {**OPTIONS, "loss_tile": "7", "teacher_scale": (40.0,)}),
    (OTHER_TERMS, {**OPTIONS, "pca_side": "text", "loss_tile": "7"}),
    (OTHER_TERMS, {"pca_components": 0}),
]


def inputs_of(loss: Loss, features: Features) -> list[Tensor]:
    names = ["image", *loss.views, "logit_scale", *(["logit_bias"] if "siglip" in loss.terms else [])]
    return [*(getattr(features, name) for name in names), *loss.parameters()]


@pytest.mark.parametrize(("formula", "settings"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_value_and_gradient_are_the_dense_formulas(
    formula: str, settings: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    identity = identity_of() if "multi_positive" in settings else None
    loss, exact = (loss_of(formula, one, **settings) for one in (dtype, torch.float64))
    features, teacher = batch_of(dtype)
    report = loss(features, teacher, identity)
    exact_features, exact_teacher = batch_of(torch.float64)
    expected = dense(exact, exact_features, exact_teacher, identity, margin=settings.get("clip_margin", 0))
    assert report.total.dtype == dtype
    torch.testing.assert_close(report.total.double(), expected, rtol=tolerance, atol=tolerance)
    found = gradients(report.total, inputs_of(loss, features))
    for ours, theirs in zip(found, gradients(expected, inputs_of(exact, exact_features)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("formula", [USUAL_TERMS, OTHER_TERMS])
@pytest.mark.parametrize("options", [{}, OPTIONS, {**OPTIONS, "pca_side": "text"}, {"pca_detach": True}])
def test_tiles_change_nothing(formula: str, options: dict[str, Any]) -> None:
    results = []
    for tile in ("off", "1", "7", "auto"):
        loss = loss_of(formula, loss_tile=tile, **options)
        features, teacher = batch_of(torch.float64)
        total = loss(features, teacher, identity_of()).total
        results.append([total.detach(), *gradients(total, inputs_of(loss, features))])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({}, COMPONENTS + 1),
        ({"pca_side": "text"}, COMPONENTS + 1),
        ({"pca_components": 0}, WIDTH),
        ({"loss_tile": "off"}, WIDTH),
    ],
)
def test_the_short_views_similarities_are_of_low_rank_in_tiles(settings: dict[str, Any], width: int) -> None:
    features, _ = batch_of(torch.float64)
    loss = loss_of("clip@long + clip@short", **settings)
    parts = {name: getattr(features, name) for name in ("image", *loss.views)}
    found = loss.match(parts, features.logit_scale)
    assert [found[view].block.rows.shape for view in ("long", "short")] == [(ROWS, WIDTH), (ROWS, width)]
    assert found["short"].block.columns.shape == (ROWS, width)


def test_detached_components_keep_the_value_and_change_the_gradient() -> None:
    features, teacher = batch_of(torch.float64)
    totals = [loss_of("clip@short", pca_detach=detach)(features, teacher).total for detach in (False, True)]
    assert torch.equal(*totals)
    whole, detached = (gradients(total, [features.image])[0] for total in totals)
    rebuilt = formulas.coarse(features.image, COMPONENTS, detach=True)
    expected = formulas.clip(rebuilt, features.short, features.logit_scale)
    torch.testing.assert_close(detached, gradients(expected, [features.image])[0], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(whole, detached)


def test_terms_are_reported_unweighted_and_sum_up_to_the_total() -> None:
    features, teacher = batch_of(torch.float64)
    loss = loss_of(USUAL_TERMS)
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
    loss = loss_of(USUAL_TERMS, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        report = loss(halves, stored)
    expected = loss(Features(*(part.float() for part in halves[:3]), features.logit_scale), raised)
    assert report.total.dtype == torch.float32
    assert torch.equal(report.total, expected.total)


@pytest.mark.parametrize(
    "formula", ["jettclip", "1*siglip@long + 1*siglip@short", "clip-kd", "clip@short", "himo-clip"]
)
def test_the_loss_of_bfloat16_features_is_that_of_float32(formula: str) -> None:
    features, teacher = batch_of(torch.float32)
    loss = loss_of(formula, torch.float32)
    expected = loss(features, teacher).total
    halves = Features(*(part.detach().bfloat16() for part in features[:3]), *features[3:])
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(halves, TeacherFeatures(*(part.bfloat16() for part in teacher))).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=0)


def logged_dtypes(loss: Loss, features: Features, teacher: TeacherFeatures) -> set[torch.dtype]:
    """Returns the types of every matrix product, decomposition and exponential of a loss and its gradient."""
    seen = set()

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if any(name in str(func) for name in ("mm", "eigh", "exp.", "exp_.", "softmax")):
                seen.add((result[0] if isinstance(result, tuple | list) else result).dtype)
            return result

    with Listening():
        with torch.autocast("cpu", torch.bfloat16):
            total = loss(features, teacher).total
        total.backward()
    return seen


@pytest.mark.parametrize("tile", ["auto", "off"])
def test_similarities_and_components_of_bfloat16_features_are_in_float32(tile: str) -> None:
    features, teacher = batch_of(torch.float32)
    halves = Features(*(part.detach().bfloat16().requires_grad_() for part in features[:3]), features.logit_scale)
    assert logged_dtypes(loss_of(USUAL_TERMS, torch.float32, loss_tile=tile), halves, teacher) == {torch.float32}


def test_teachers_rows_are_scaled_to_unit_length_and_get_no_gradient() -> None:
    features, teacher = batch_of(torch.float64)
    loss = loss_of(USUAL_TERMS)
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


def test_a_recipe_names_its_captions_and_what_it_needs_of_the_teachers() -> None:
    assert views_of(Recipe("kd@long + clip@short")) == ("short", "long")
    assert views_of(Recipe("clip@long")) == ("long",)
    assert views_of(Recipe("clip@short", pca_side="text")) == ("long",)
    assert teacher_parts_of(Recipe("clip@long + clip@short")) == ()
    assert teacher_parts_of(Recipe("clip@short + mse@long")) == ("image", "long")
    assert teacher_parts_of(Recipe("kd@long + kd@short")) == ("image", "short", "long")
    assert teacher_parts_of(Recipe("kd@long + kd@short", pca_side="text")) == ("image", "long")
    assert {term for term in TEACHER_TERMS if not teacher_parts_of(Recipe(f"{term}@long"))} == set()


def test_components_of_texts_need_no_short_caption() -> None:
    features, teacher = batch_of(torch.float64)
    loss = loss_of(USUAL_TERMS, pca_side="text")
    lean = features._replace(short=None), teacher._replace(short=None)
    assert torch.equal(loss(*lean).total, loss(features, teacher).total)


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


def on_a_rank(formula: str, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Any]:
    loss = loss_of(formula, dtype, **settings)
    size = ROWS // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    features, teacher, identity = rows_of(mine, *batch_of(dtype), identity_of())
    features = Features(*(part.detach().requires_grad_() for part in features))
    total = loss(features, teacher, identity if loss.needs_identity else None).total
    return {"total": total.detach(), "gradients": gradients(total, inputs_of(loss, features))}


RANK_CASES: list[tuple[str, dict[str, Any]]] = [
    (USUAL_TERMS, {}),
    (USUAL_TERMS, {"pca_scope": "global", **OPTIONS}),
    (USUAL_TERMS, {"loss_tile": "off", **OPTIONS}),
    (USUAL_TERMS, {"pca_detach": True, "pca_variance": 0.6, "pca_components": None}),
    (USUAL_TERMS, {"pca_detach": True, "pca_scope": "global", "pca_side": "text"}),
    (USUAL_TERMS, {"pca_scope": "global", "pca_variance": 0.6, "pca_components": None}),
    (OTHER_TERMS, {"loss_tile": "3", **OPTIONS}),
    (OTHER_TERMS, {"pca_scope": "global"}),
    (OTHER_TERMS, {"pca_scope": "global", "pca_side": "text", "loss_tile": "3", **OPTIONS}),
    (USUAL_TERMS, {"pca_side": "text", "pca_variance": 0.6, "pca_components": None, **OPTIONS}),
    ("jettclip", {"pca_scope": "global"}),
    ("jettclip", {}),
    ("mobileclip-dr", {"pca_components": None, "distill_loss_weights": (0.25, 0.75)}),
    ("clip-kd", {}),
    ("siglip", {}),
]


@pytest.mark.parametrize(("formula", "settings"), RANK_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_average_to_the_single_process(
    world_size: int, dtype: torch.dtype, formula: str, settings: dict[str, Any]
) -> None:
    # fd@long weighs 2000 in clip-kd
    tolerance = {torch.float64: 1e-9, torch.float32: 3e-4 if formula == "clip-kd" else 2e-5}[dtype]
    results = run_ranks(world_size, on_a_rank, formula, dtype, settings)
    loss = loss_of(formula, **settings)
    features, teacher = batch_of(torch.float64)
    chunks = world_size if settings.get("pca_scope", "local") == "local" else 1
    identity, margin = identity_of() if loss.needs_identity else None, settings.get("clip_margin", 0.0)
    expected = dense(loss, features, teacher, identity, chunks=chunks, margin=margin)
    total = torch.stack([result["total"] for result in results]).mean()
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)
    inputs = inputs_of(loss, features)
    for index, theirs in enumerate(gradients(expected, inputs)):
        ours = [result["gradients"][index].double() for result in results]
        of_a_feature = index <= len(
            loss.views
        )  # it belongs to one rank; DistributedDataParallel divides by their number
        averaged = torch.cat(ours) / world_size if of_a_feature else torch.stack(ours).mean(dim=0)
        torch.testing.assert_close(averaged, theirs, rtol=tolerance, atol=tolerance)


def exchanges_on_a_rank(formula: str, settings: dict[str, Any]) -> list[int]:
    widths = []
    exchange = dist.all_gather_into_tensor

    def counted(everywhere: Tensor, rows: Tensor) -> None:
        widths.append(rows.shape[1])
        exchange(everywhere, rows)

    dist.all_gather_into_tensor = counted
    loss_of(formula, **settings)(*batch_of(torch.float64))
    return widths


TEACHER_WIDTHS = [teacher.width for teacher in TEACHERS]


@pytest.mark.parametrize(
    ("formula", "settings", "widths"),
    [
        # similarities are those of this rank's images, so that of others their texts will do
        (USUAL_TERMS, {}, [2 * WIDTH, *(2 * width for width in TEACHER_WIDTHS)]),
        (USUAL_TERMS, {"pca_scope": "global"}, [2 * WIDTH, *(2 * width for width in TEACHER_WIDTHS)]),
        (USUAL_TERMS, {"pca_components": 0}, [2 * WIDTH, *(2 * width for width in TEACHER_WIDTHS)]),
        ("clip@long + clip@short", {"pca_side": "text"}, [2 * WIDTH]),
        ("mse@long + fd@short", {}, []),
        ("icl@long", {}, [2 * width for width in TEACHER_WIDTHS]),
    ],
)
def test_what_terms_compare_with_is_exchanged_once(formula: str, settings: dict[str, Any], widths: list[int]) -> None:
    assert run_ranks(2, exchanges_on_a_rank, formula, settings) == [widths, widths]


def test_equal_captions_are_reported_as_the_floor_of_clip() -> None:
    features, _ = batch_of(torch.float64, 6)
    alike = torch.tensor([0, 1, 1, 2, 2, 2])
    identity = Identity(torch.arange(6), torch.arange(6), alike)
    report = loss_of("clip@long + clip@short + siglip@long")(features, None, identity)
    assert list(report.terms) == ["clip@long", "clip@short", "siglip@long", "floor@long", "floor@short", "bias@siglip"]
    torch.testing.assert_close(
        report.terms["floor@long"], (2 * torch.tensor(2.0).log() + 3 * torch.tensor(3.0).log()) / 6
    )
    assert report.terms["floor@short"] == 0
    # a model that tells apart all that can be told apart, at a large scale, comes down to the floor and no further
    rows = torch.eye(6, dtype=torch.float64)[alike]
    perfect = loss_of("clip@long")(Features(rows, None, rows, torch.tensor([100.0])), None, identity)
    torch.testing.assert_close(perfect.terms["clip@long"], perfect.terms["floor@long"].double(), rtol=1e-6, atol=0)
    positive = loss_of("clip@long", multi_positive=True)(features, None, identity)
    assert list(positive.terms) == ["clip@long"]
    assert list(loss_of("kd@long")(*batch_of(torch.float64, 6), identity).terms) == ["kd@long"]


def test_identities_change_nothing_unless_positives_are_asked_for() -> None:
    features, teacher = batch_of(torch.float64)
    for formula in (USUAL_TERMS, OTHER_TERMS):
        loss = loss_of(formula, clip_margin=0.3)
        assert torch.equal(loss(features, teacher, identity_of()).total, loss(features, teacher).total)
        told = loss_of(formula, clip_margin=0.3, multi_positive=True)(features, teacher, identity_of()).total
        assert not torch.isclose(told, loss(features, teacher).total)


def floor_on_a_rank() -> Tensor:
    alike = torch.tensor([0, 1, 2, 1, 2, 2]).chunk(2)[dist.get_rank()]
    features = Features(*batch_of(torch.float64, 3)[0])
    return loss_of("clip@long")(features, None, Identity(alike, None, alike)).terms["floor@long"]


def test_equal_captions_on_other_ranks_count() -> None:
    total = torch.stack(run_ranks(2, floor_on_a_rank)).mean()
    torch.testing.assert_close(total, (2 * torch.tensor(2.0).log() + 3 * torch.tensor(3.0).log()) / 6)


def floors_on_a_rank(settings: dict[str, Any]) -> list[str]:
    features = Features(*batch_of(torch.float64, 12)[0])
    report = loss_of("clip@long + clip@short", **settings)(features, None, identity_of(12))
    return [name for name in report.terms if name.startswith("floor")]


@pytest.mark.parametrize(
    ("settings", "world_size", "names"),
    [
        ({"pca_side": "text"}, 1, ["floor@long", "floor@short"]),
        ({"pca_side": "text"}, 2, ["floor@long"]),  # equal captions are rebuilt from other components on other ranks
        ({"pca_side": "text", "pca_scope": "global"}, 2, ["floor@long", "floor@short"]),
        ({"pca_components": 0}, 2, ["floor@long", "floor@short"]),
        ({}, 2, ["floor@long", "floor@short"]),
    ],
)
def test_captions_that_differ_from_rank_to_rank_have_no_floor(
    settings: dict[str, Any], world_size: int, names: list[str]
) -> None:
    assert run_ranks(world_size, floors_on_a_rank, settings) == [names] * world_size


def test_multi_positive_must_be_told_who_is_who() -> None:
    features, _ = batch_of(torch.float64)
    loss = loss_of("clip@long", multi_positive=True)
    assert loss.needs_identity
    assert not loss_of("clip@long").needs_identity
    with pytest.raises(ValueError, match="there is no identity of its rows"):
        loss(features)
    with pytest.raises(ValueError, match="the loss reads long captions, but which of them are the same is not known"):
        loss(features, None, identity_of()._replace(long=None))


def test_each_teacher_may_have_a_scale() -> None:
    with pytest.raises(
        ValueError, match="--teacher-scale 1 2 3 must be one for all or one for each of the 2 teachers, a"
    ):
        loss_of("kd@long", teacher_scale=(1.0, 2.0, 3.0))
    assert loss_of("kd@long").teachers.scales == [30.0, 50.0]
    assert loss_of("kd@long", teacher_scale=(7.0,)).teachers.scales == [7.0, 7.0]
    assert loss_of("kd@long", teacher_scale=(7.0, 8.0)).teachers.scales == [7.0, 8.0]


def test_a_loss_says_what_it_stands_for() -> None:
    assert loss_of("longclip").description == (
        "1*clip@long + 1*clip@short; label smoothing 0.1; logit scale from 100, no limit; "
        "the short view sees images through 4 principal components"
    )
    said = loss_of("openclip", clip_margin=0.3, multi_positive=True).description
    assert said.endswith("at most 100; clip margin 0.3; what shares an image or a caption is positive")
