from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from jettclip.losses.factory import Loss, create_loss
from jettclip.settings import LossSettings
from jettclip.types import Features, TeacherFeatures, TeacherInfo
from support import run_ranks, unit_rows

ROWS, WIDTH, COMPONENTS = 24, 10, 4


def features_of(rows: int = ROWS) -> Features:
    torch.manual_seed(3)
    return Features(*(unit_rows(rows, WIDTH) for _ in range(3)), torch.tensor([20.0]))


def loss_of(formula: str = "clip@long + clip@short", **settings: Any) -> Loss:
    asked = LossSettings(formula, **{"pca_components": COMPONENTS, **settings})
    return create_loss(asked, WIDTH, [TeacherInfo("a", WIDTH, 30.0)])


@pytest.mark.parametrize(("rows", "components"), [(5, 4), (ROWS, WIDTH)])
@pytest.mark.parametrize(("side", "kind"), [("image", "image"), ("text", "long caption")])
def test_too_small_a_batch_is_reported_once(
    rows: int, components: int, side: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    formula, features = "clip@short + kd@short", features_of(rows)
    teacher = TeacherFeatures(*features[:3])  # whose components are no more than the student's
    loss = loss_of(formula, pca_components=components, pca_side=side)
    with caplog.at_level(logging.WARNING):
        values = [loss(features, teacher).total for _ in range(2)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"--pca-components {components} keeps everything of {rows} {kind} features" in caplog.text
    assert "--batch-size" in caplog.text
    whole = loss_of("clip@long + kd@long") if side == "text" else loss_of(formula, pca_components=0)
    expected = whole(features, teacher).total
    torch.testing.assert_close(values, [expected, expected])


def test_a_large_enough_batch_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    for loss, rows in ((loss_of(), COMPONENTS + 2), (loss_of(pca_components=None, pca_variance=0.9), ROWS)):
        for _ in range(2):
            loss(features_of(rows))
    assert caplog.records == []


def repeated(features: Features, distinct: int) -> Features:
    return features._replace(image=features.image[torch.arange(len(features.image)) % distinct])


@pytest.mark.parametrize(("distinct", "warned"), [(COMPONENTS + 1, True), (COMPONENTS + 2, False)])
def test_a_batch_of_duplicates_is_reported_whenever_it_comes(
    distinct: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loss, features = loss_of(), features_of()
    loss(features)
    assert caplog.records == []
    for _ in range(3):
        loss(repeated(features, distinct))
    assert len(caplog.records) == warned
    assert (f"whose rank is {COMPONENTS}, so the short view sees whole image features" in caplog.text) == warned


class Read(TorchDispatchMode):
    """Counts the numbers that are read from the device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_its_rank_but_reports_that_of_the_step_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loss = loss_of()
    for features, warnings, numbers in (
        (repeated(features_of(), 2), 0, 0),
        (features_of(), 1, 2),
        (features_of(), 1, 0),
    ):
        with Read() as read:
            loss(features)
        assert len(caplog.records) == warnings
        assert read.count == numbers  # both are of the rank of the copy
    assert "keeps everything of 24 image features of width 10, whose rank is 1" in caplog.text


def test_two_images_are_whole_in_any_share_of_the_variance(caplog: pytest.LogCaptureFixture) -> None:
    loss = loss_of(pca_components=None, pca_variance=0.9)
    for _ in range(2):
        loss(repeated(features_of(), 2))
    assert "--pca-variance 0.9 keeps everything of 24 image features of width 10, whose rank is 1" in caplog.text


def warnings_on_a_rank(caplog: pytest.LogCaptureFixture, scope: str) -> list[str]:
    loss = loss_of(pca_scope=scope)
    for _ in range(2):
        loss(repeated(features_of(), 2))
    return caplog.messages


def test_only_the_first_rank_reports(caplog: pytest.LogCaptureFixture) -> None:
    first, *others = run_ranks(2, warnings_on_a_rank, caplog, "local")
    assert len(first) == 1
    assert "keeps everything of 24 image features" in first[0]
    assert "--pca-scope global" in first[0]
    assert others == [[]]
    first, *others = run_ranks(2, warnings_on_a_rank, caplog, "global")
    assert "keeps everything of 48 image features" in first[0]
    assert "--pca-scope" not in first[0]
    assert others == [[]]


def with_a_bad_rank(scope: str) -> bool:
    features = features_of()
    image = (features.image * (torch.nan if dist.get_rank() == 1 else 1)).requires_grad_()
    total = loss_of("clip@short", pca_scope=scope)(features._replace(image=image)).total
    total.backward()
    return bool(total.isnan())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_rank_that_is_not_finite_neither_hangs_nor_hides_from_the_others(scope: str) -> None:
    assert run_ranks(2, with_a_bad_rank, scope) == [True, True]
