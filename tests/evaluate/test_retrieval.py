from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jettclip.evaluate.retrieval import RANKS, gather_uneven, recall, retrieval_metrics
from support import run_ranks


def unit(rows: int, width: int = 8, seed: int = 0) -> Tensor:
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features, dim=1)


def noisy_pairs(rows: int) -> tuple[Tensor, Tensor]:
    image = unit(rows)
    return image, torch.nn.functional.normalize(image + 0.5 * unit(rows, seed=1), dim=1)


def recall_by_sorting(queries: Tensor, gallery: Tensor) -> list[float]:
    """Returns the mean recalls, averaged over all orders of equal scores."""
    hits = [0.0] * len(RANKS)
    for query, row in enumerate((queries @ gallery.T).tolist()):
        order = sorted(row, reverse=True)
        places = [place for place, score in enumerate(order, start=1) if score == row[query]]
        for index, k in enumerate(RANKS):
            hits[index] += sum(place <= k for place in places) / len(places)
    return [hit / len(queries) for hit in hits]


@pytest.mark.parametrize("rows", [1, 4, 37, 200])
def test_equals_brute_force(rows: int) -> None:
    image, text = noisy_pairs(rows)
    expected = recall_by_sorting(image, text) + recall_by_sorting(text, image)
    names = [f"{way}_R@{k}" for way, k in itertools.product(("image_to_text", "text_to_image"), (1, 5, 10))]
    assert retrieval_metrics(image, text) == pytest.approx(dict(zip(names, expected, strict=True)))


def test_both_ways_are_told_apart() -> None:
    image = torch.eye(3)
    text = torch.stack([image[0], image[0], image[2]])  # the second caption is the first one's
    metrics = retrieval_metrics(image, text)
    assert metrics["image_to_text_R@1"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert metrics["text_to_image_R@1"] == pytest.approx((1 + 0 + 1) / 3)


@pytest.mark.parametrize("rows", [3, 10, 250])
@pytest.mark.parametrize("point", [torch.zeros(1, 16), torch.full((1, 16), torch.nan), unit(1, 300)])
def test_collapsed_features_score_chance(rows: int, point: Tensor) -> None:
    same = point.repeat(rows, 1)
    assert (recall(same, same) / rows).tolist() == pytest.approx([min(k / rows, 1) for k in RANKS])


def test_duplicates_share_their_places() -> None:
    image, text = noisy_pairs(30)
    image[10:20], text[10:20] = image[:10], text[:10]
    assert (recall(image, text) / 30).tolist() == pytest.approx(recall_by_sorting(image, text))
    assert float(recall(image, text)[0]) < float(recall(*noisy_pairs(30))[0])


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_the_chunk_changes_nothing(chunk: int) -> None:
    image, text = noisy_pairs(50)
    assert torch.equal(recall(image, text, chunk=chunk), recall(image, text))


@pytest.mark.parametrize("step", [1, 3, 60])
def test_shares_of_the_queries_add_up(step: int) -> None:
    image, text = noisy_pairs(50)
    shares = [recall(image, text, first, step) for first in range(step)]
    torch.testing.assert_close(torch.stack(shares).sum(dim=0), recall(image, text))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_gives_the_same(ranks: int) -> None:
    image, text = noisy_pairs(20)
    alone = retrieval_metrics(image, text)
    for metrics in run_ranks(ranks, retrieval_metrics, image, text):
        assert metrics == pytest.approx(alone)


@pytest.mark.parametrize("counts", [(4,), (2, 5), (3, 0, 1), (0, 0, 2)])
def test_ranks_with_uneven_rows_are_gathered_in_order(counts: tuple[int, ...]) -> None:
    everything = unit(sum(counts))
    parts = everything.split(counts)

    def gather() -> Any:
        return gather_uneven(parts[dist.get_rank()])

    for gathered in run_ranks(len(counts), gather):
        assert torch.equal(gathered, everything)


def test_without_a_process_group_rows_stay_as_they_are() -> None:
    rows = unit(3)
    assert gather_uneven(rows) is rows
