from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jettclip.detectors import COLLAPSED, LONG, PATIENCE, Detectors, spread
from jettclip.types import Features, LossReport
from support import tiny_towers, unit_rows

BATCH = 1000
EVERY = 100
POINT = torch.ones(8, 16) / 4
STUCK = "clip@long is stuck at ln(global batch)"
UPPER = "logit scale at its upper limit"


def step(loss: float = 1.0, image: Tensor | None = None, scale: float = 14.0) -> tuple[LossReport, Features]:
    image = unit_rows(8, 16) if image is None else image
    value = torch.tensor(loss)
    report = LossReport(value, {"clip@long": value, "kd@long": torch.tensor(math.log(BATCH))})
    return report, Features(image, None, unit_rows(8, 16), torch.tensor([scale]))


def run(detectors: Detectors, steps: int, *, first: int = 0, **values: object) -> list[str]:
    """Takes steps that are all alike, and returns what is told of them; a look every 100."""
    messages = []
    for number in range(first + 1, first + steps + 1):
        detectors.update(*step(**values))  # type: ignore[arg-type]
        if number % EVERY == 0:
            messages += detectors.look(number)
    return messages


def test_spread_is_the_mean_of_one_minus_cosine_over_pairs() -> None:
    rows = unit_rows(20, 16, torch.float64)
    assert float(spread(rows)) == pytest.approx(float((1 - rows @ rows.T).mean()), rel=1e-12)
    assert float(spread(POINT)) == 0
    assert float(spread(torch.eye(4) - 0.25)) == pytest.approx(1)
    rounded = torch.randn(512).expand(64, 512) * (1 + 1e-3 * torch.rand(64, 512))
    half = torch.nn.functional.normalize(rounded).bfloat16()
    assert 0 < float(spread(half)) < COLLAPSED / 10
    assert torch.equal(spread(half), spread(half.float()))


def test_collapsed_features_are_told_once_with_value_rule_and_remedy() -> None:
    detectors = Detectors(BATCH)
    assert run(detectors, PATIENCE - EVERY, image=POINT) == []
    (message,) = run(detectors, 10 * EVERY, first=PATIENCE - EVERY, image=POINT)
    assert message.startswith(f"step {PATIENCE}: image features collapsed to a point. For {PATIENCE} steps now, the ")
    assert f"0.0e+00, below {COLLAPSED:g}. Go back to a checkpoint" in message
    assert detectors.found == {"image features collapsed to a point": 1}
    assert detectors.figures.keys() == {"spread@image", "spread@long"}
    assert detectors.figures["spread@image"] == 0
    assert detectors.figures["spread@long"] > 0.5


@pytest.mark.parametrize(("view", "position"), [("short", 1), ("long", 2)])
def test_collapsed_captions_are_told_by_view(view: str, position: int) -> None:
    detectors = Detectors(BATCH)
    for _ in range(PATIENCE):
        report, features = step()
        detectors.update(report, Features(*(POINT if i == position else part for i, part in enumerate(features))))  # type: ignore[arg-type]
    (message,) = detectors.look(PATIENCE)
    assert f"features of {view} captions collapsed to a point" in message
    assert "same caption" in message


def test_a_rank_with_one_row_is_not_taken_for_collapsed() -> None:
    detectors = Detectors(BATCH)
    report, features = step(image=POINT[:1])
    for _ in range(PATIENCE):
        detectors.update(report, features._replace(long=POINT[:1]))
    assert detectors.look(PATIENCE) == []


@pytest.mark.parametrize("offset", [0.0, 0.0098, -0.0098])
def test_a_loss_that_stays_at_that_of_a_guess_is_told(offset: float) -> None:
    detectors = Detectors(BATCH)
    (message,) = run(detectors, PATIENCE, loss=math.log(BATCH) * (1 + offset))
    assert f"{STUCK}. For {PATIENCE} steps now, it has kept {abs(offset) * math.log(BATCH):.1e} from " in message
    assert "ln 1000 = 6.9078 on average, closer than 1% of that" in message
    assert detectors.found == {STUCK: 1}


@pytest.mark.parametrize("offset", [0.0102, -0.0102])
def test_a_loss_that_is_farther_from_a_guess_is_not(offset: float) -> None:
    assert run(Detectors(BATCH), 2 * PATIENCE, loss=math.log(BATCH) * (1 + offset)) == []


def test_a_loss_that_swings_around_that_of_a_guess_is_not_taken_for_stuck() -> None:
    detectors = Detectors(BATCH)
    for number in range(2 * PATIENCE):
        detectors.update(*step(loss=math.log(BATCH) + (-1) ** number))
    assert detectors.look(2 * PATIENCE) == []


def test_a_loss_that_leaves_its_start_within_warmup_is_not_taken_for_stuck() -> None:
    detectors = Detectors(BATCH, warmup=2000)
    assert run(detectors, 2400, loss=math.log(BATCH)) == []
    assert run(detectors, 1000, first=2400, loss=6.0) == []
    assert not detectors.found


def test_the_interval_in_which_warmup_ends_does_not_count() -> None:
    detectors = Detectors(BATCH, warmup=150)
    (message,) = run(detectors, 2000, loss=math.log(BATCH))
    assert message.startswith(f"step {200 + PATIENCE}: {STUCK}. For {PATIENCE} ")


def test_collapse_counts_in_warmup_too() -> None:
    detectors = Detectors(BATCH, warmup=10 * PATIENCE)
    (message,) = run(detectors, 2 * LONG, image=POINT, loss=math.log(BATCH), scale=100.0)
    assert message.startswith(f"step {PATIENCE}: image features collapsed to a point")


def test_what_comes_back_is_told_again_and_what_pauses_is_counted_anew() -> None:
    detectors = Detectors(BATCH)
    stuck = math.log(BATCH)
    assert len(run(detectors, 2 * PATIENCE, loss=stuck)) == 1
    assert run(detectors, EVERY, first=1000, loss=5.0) == []
    assert run(detectors, PATIENCE - EVERY, first=1100, loss=stuck) == []
    assert run(detectors, EVERY, first=1500, loss=5.0) == []
    assert run(detectors, PATIENCE - EVERY, first=1600, loss=stuck) == []
    assert len(run(detectors, EVERY, first=2000, loss=stuck)) == 1
    assert detectors.found == {STUCK: 2}


@pytest.mark.parametrize(("scale", "name"), [(100.0, UPPER), (99.95, UPPER), (1.0, "logit scale at its lower limit")])
def test_a_scale_that_stays_at_a_limit_is_told(scale: float, name: str) -> None:
    detectors = Detectors(BATCH)
    assert run(detectors, LONG - EVERY, scale=scale) == []
    (message,) = run(detectors, EVERY, first=LONG - EVERY, scale=scale)
    assert f"{name}. For {LONG} steps now, it has been {scale:.4g} on average" in message
    assert detectors.found == {name: 1}


def test_a_scale_without_limits_or_between_them_is_not() -> None:
    assert run(Detectors(BATCH, scale_limits=None), 2 * LONG, scale=100.0) == []
    assert run(Detectors(BATCH, scale_limits=(1.0, 200.0)), 2 * LONG, scale=100.0) == []


def test_a_batch_of_one_and_no_steps_are_nothing_to_tell() -> None:
    assert Detectors(BATCH).look(0) == []
    assert run(Detectors(1), 2 * PATIENCE, loss=0.0) == []


def test_nothing_is_read_between_two_looks() -> None:
    with torch.device("meta"):  # of which nothing can be read
        report = LossReport(torch.zeros(()), {"clip@long": torch.zeros(())})
        features = Features(torch.zeros(4, 2), None, torch.zeros(4, 2), torch.zeros(1))
    detectors = Detectors(BATCH)
    for _ in range(3):
        detectors.update(report, features)


def test_no_graph_is_kept() -> None:
    detectors = Detectors(BATCH)
    report, features = step(image=unit_rows(8, 16).requires_grad_())
    detectors.update(report, features)
    assert not any(value.requires_grad for value in detectors._sums.values())


def trained(monkeypatch: pytest.MonkeyPatch, steps: int, *, lr: float, is_matched: bool = True) -> list[str]:
    """Trains tiny towers on images whose colour is that of their caption; returns what is told with little patience."""
    monkeypatch.setattr("jettclip.detectors.PATIENCE", 30)
    torch.manual_seed(0)
    model = tiny_towers()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    detectors, messages = Detectors(8, warmup=30), []
    for number in range(1, steps + 1):
        colours = torch.randint(0, 8, (8, 3)) if not is_matched else torch.arange(8).unsqueeze(1).expand(8, 3)
        pixels = (colours * 30).to(torch.uint8).view(8, 3, 1, 1).expand(8, 3, 16, 16).contiguous()
        ids = torch.stack([torch.full([8], 49406), 1 + torch.arange(8), torch.full([8], 49407)], dim=1)
        features: Features = model(pixels, None, ids)
        assert features.long is not None
        logits = features.logit_scale * features.image @ features.long.T
        loss = (cross_entropy(logits, torch.arange(8)) + cross_entropy(logits.T, torch.arange(8))) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, number / 30)
        optimizer.step()
        detectors.update(LossReport(loss, {"clip@long": loss.detach()}), features)
        if number % 10 == 0:
            messages += detectors.look(number)
    return messages


def test_a_healthy_run_gives_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(monkeypatch, 150, lr=1e-3) == []


def test_captions_that_belong_to_other_images_are_told_as_a_stuck_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = trained(monkeypatch, 150, lr=1e-3, is_matched=False)
    assert STUCK in message


def test_a_rate_that_spoils_the_towers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = " ".join(trained(monkeypatch, 150, lr=1.0))
    assert "collapsed to a point" in messages
    assert STUCK in messages
