from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from open_clip import SimpleTokenizer
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from jettclip.data.counts import DataError
from jettclip.data.pipeline import Loader, get_wds_dataset
from jettclip.evaluate.retrieval import retrieval_metrics
from jettclip.evaluate.runner import Evaluator, in_words
from jettclip.models.text_tower import truncate_captions
from jettclip.models.two_towers import TwoTowers
from jettclip.settings import DataSettings
from support import run_ranks, sample, tiny_towers, write_shard, write_shards

CPU = torch.device("cpu")
tokenizer = SimpleTokenizer(context_length=32)


@cache
def model() -> TwoTowers:
    torch.manual_seed(0)
    return tiny_towers().eval()


def uint8(image: Image.Image) -> Tensor:
    return pil_to_tensor(image.convert("RGB"))


def loader_of(urls: str, *, rank: int = 0, world_size: int = 1, **options: Any) -> Loader:
    settings = options.pop("settings", DataSettings())
    return get_wds_dataset(
        settings, urls, uint8, tokenizer, is_train=False, batch_size=4, rank=rank, world_size=world_size, **options
    )


def evaluate(urls: str, truncate: tuple[int, ...] = (), **options: Any) -> dict[str, Any]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    val = loader_of(urls, rank=rank, world_size=ranks, **options)
    return Evaluator(CPU, nullcontext, val=val, truncate=truncate).run(model())


@torch.no_grad()
def expected_metrics(urls: str, truncate: tuple[int, ...] = ()) -> dict[str, Any]:
    batches = list(loader_of(urls))
    image = model().encode_image(torch.cat([batch.image for batch in batches]), normalize=True)
    captions = {view: torch.cat([getattr(batch, f"{view}_caption") for batch in batches]) for view in ("short", "long")}
    captions |= {f"long@{n}": truncate_captions(captions["long"], n) for n in truncate}
    return {
        f"{view}/{name}": value
        for view, ids in captions.items()
        for name, value in retrieval_metrics(image, model().encode_text(ids, normalize=True)).items()
    }


def recalls(metrics: dict[str, Any], view: str = "") -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "R@" in name and name.startswith(view)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_report_what_one_process_finds(tmp_path: Path, ranks: int) -> None:
    urls = write_shards(tmp_path, [5, 1, 8])
    expected = expected_metrics(urls, (5,))
    assert {name.split("/")[0] for name in expected} == {"short", "long", "long@5"}
    for metrics in [evaluate(urls, (5,)), *run_ranks(ranks, evaluate, urls, (5,))]:
        assert recalls(metrics) == pytest.approx(expected)
        assert (metrics["samples"], metrics["dropped"], metrics["dropped_by_reason"]) == (14, 0, {})


def test_cropped_batches_give_the_same_metrics(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [9])
    whole, cropped = (recalls(evaluate(urls, (5, 77), crop_captions=crop)) for crop in (False, True))
    assert cropped == pytest.approx(whole)


def test_captions_are_not_truncated_to_more_than_they_have(tmp_path: Path) -> None:
    metrics = evaluate(write_shards(tmp_path, [12]), (5, 77))
    assert list(recalls(metrics, "long@77/").values()) == list(recalls(metrics, "long/").values())
    assert list(recalls(metrics, "long@5/").values()) != list(recalls(metrics, "long/").values())


def test_a_data_set_of_one_view_is_evaluated_on_it(tmp_path: Path) -> None:
    metrics = evaluate(write_shards(tmp_path, [4]), (5,), views=("short",))
    assert {name.split("/")[0] for name in metrics if "/" in name} == {"short"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_dropped_samples_are_counted_over_all_ranks(tmp_path: Path, ranks: int) -> None:
    samples = [sample(number) for number in range(10)]
    samples[2]["png"] = samples[7]["png"] = b"broken"
    url = write_shard(tmp_path / "0.tar", samples)
    for metrics in run_ranks(ranks, lambda: evaluate(url, settings=DataSettings(max_drop_rate=0.5))):
        assert metrics["samples"] == 8
        assert metrics["dropped"] == 2
        assert sum(metrics["dropped_by_reason"].values()) == 2


def test_too_many_dropped_samples_are_an_error(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(10)]
    samples[2]["png"] = b"broken"
    with pytest.raises(DataError, match="1 of 10 samples were dropped"):
        evaluate(write_shard(tmp_path / "0.tar", samples))


def zero_shot(model: TwoTowers) -> dict[str, float]:
    assert not model.training
    return {"top1": 0.5}


@pytest.mark.parametrize(
    ("frequencies", "epoch", "expected"),
    [
        ((1, 1), 1, {"val", "top1"}),
        ((2, 3), 1, set()),
        ((2, 3), 2, {"val"}),
        ((2, 3), 3, {"top1"}),
        ((2, 3), 6, {"val", "top1"}),
        ((4, 0), 7, {"val"}),  # the last epoch is always evaluated
        ((0, 4), 7, {"top1"}),
        ((0, 0), 7, set()),
        ((0, 0), None, {"val", "top1"}),  # evaluation alone
    ],
)
def test_evaluations_run_when_they_are_due(
    frequencies: tuple[int, int],
    epoch: int | None,
    expected: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Evaluator, "_retrieval", lambda self, model, loader: {"val": 0.25})
    val = loader_of(write_shards(tmp_path, [2]))
    evaluator = Evaluator(
        CPU, nullcontext, val, frequencies[0], zero_shot=zero_shot, zero_shot_frequency=frequencies[1]
    )
    assert set(evaluator.run(model(), epoch, epochs=7)) == expected


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training: bool) -> None:
    towers = tiny_towers().train(training)
    Evaluator(CPU, nullcontext, zero_shot=zero_shot).run(towers)
    assert towers.training == training


def test_an_evaluator_of_nothing_finds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert Evaluator(CPU, nullcontext).run(model()) == {}
    assert caplog.text == ""


def test_half_precision_is_near_the_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[Tensor] = []

    def recorded(image: Tensor, text: Tensor) -> dict[str, float]:
        ranked.append(torch.stack([image, text]))
        return retrieval_metrics(image, text)

    monkeypatch.setattr("jettclip.evaluate.runner.retrieval_metrics", recorded)
    val = loader_of(write_shards(tmp_path, [8]), views=("long",))
    for autocast in (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)):
        assert Evaluator(CPU, autocast, val).run(model())["samples"] == 8
    full, half = ranked
    assert half.dtype == torch.float32  # similarities are not rounded
    assert 0 < float((half - full).abs().max()) < 0.02


def test_metrics_are_put_into_words() -> None:
    metrics = {"samples": 8, "dropped": 2, "dropped_by_reason": {"bad image": 2}, "damaged": {}}
    words = in_words({**metrics, "long/image_to_text_R@1": 0.5, "long/image_to_text_R@5": 0.75, "top1": 0.25}).split(
        "\n"
    )
    assert words[0] == "8 samples, dropped bad image 2"
    assert words[1].split() == ["long", "captions,", "image", "to", "text", "R@1", "0.5000", "R@5", "0.7500"]
    assert words[2].split() == ["top1", "0.2500"]
