from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor

from jettclip.losses.gather import gather_rows, row_offset
from jettclip.losses.pairwise import dense, tiled
from jettclip.losses.pairwise.block import Block, Margin, Positives
from support import run_ranks, unit_rows

ROWS, WIDTH = 12, 8


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    image, text = (unit_rows(ROWS, WIDTH, torch.float64).requires_grad_() for _ in range(2))
    return image, text, torch.tensor([20.0], dtype=torch.float64, requires_grad=True)


def assert_same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), rtol=0, atol=1e-12
    )


def test_clip_is_openclips() -> None:
    image, text, scale = inputs = leaves()
    assert_same(
        dense.softmax_terms(Block(image, text, scale), wanted=["clip"]).clip, ClipLoss()(image, text, scale), inputs
    )


def test_kd_of_one_teacher_is_crd_and_openclips_less_the_teachers_entropy() -> None:
    image, text, scale = inputs = leaves()
    teacher_image, teacher_text, teacher_scale = unit_rows(ROWS, 6).double(), unit_rows(ROWS, 6).double(), 30.0
    ours = dense.softmax_terms(
        Block(image, text, scale), [Block(teacher_image, teacher_text, teacher_scale)], wanted=["kd", "crd"]
    )
    torch.testing.assert_close(ours.kd, ours.crd, rtol=0, atol=1e-12)
    logits = teacher_scale * teacher_image @ teacher_text.T
    entropy = sum(-(F.softmax(q, 1) * F.log_softmax(q, 1)).sum(dim=1).mean() / 2 for q in (logits, logits.T))
    ours = dense.softmax_terms(
        Block(image, text, scale), [Block(teacher_image, teacher_text, teacher_scale)], wanted=["kd"]
    )
    _, theirs = DistillClipLoss()(image, text, scale, teacher_image, teacher_text, teacher_scale)
    assert_same(ours.kd, theirs - entropy, inputs)


def test_the_ensembles_average_is_no_farther_than_its_members_on_average() -> None:
    image, text, scale = leaves()
    teachers = [Block(unit_rows(ROWS, d).double(), unit_rows(ROWS, d).double(), 30.0) for d in (4, 6)]
    both = dense.softmax_terms(Block(image, text, scale), teachers, wanted=["kd", "crd"])
    each = [dense.softmax_terms(Block(image, text, scale), [teacher], wanted=["kd"]).kd for teacher in teachers]
    torch.testing.assert_close(both.crd, sum(each) / 2, rtol=0, atol=1e-12)
    assert both.kd < both.crd


def test_sigmoid_is_openclips() -> None:
    image, text, scale = leaves()
    bias = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
    ours = dense.sigmoid_term(Block(image, text, scale), bias)
    assert_same(ours, SigLipLoss()(image, text, scale, bias), (image, text, scale, bias))


def test_one_way_is_cross_entropy_of_rows() -> None:
    image, text, scale = inputs = leaves()
    expected = F.cross_entropy(scale * image @ text.T, torch.arange(ROWS))
    assert_same(dense.one_way(Block(image, text, scale)), expected, inputs)


def test_a_margin_raises_what_negatives_cost() -> None:
    image, text, scale = leaves()
    captions = unit_rows(ROWS, WIDTH, torch.float64)
    raised = dense.softmax_terms(Block(image, text, scale), wanted=["clip"], margin=Margin(0.3, captions, captions))
    assert raised.clip > dense.softmax_terms(Block(image, text, scale), wanted=["clip"]).clip


def test_twins_put_a_floor_under_the_loss() -> None:
    twins = leaves()[0].detach()[torch.arange(ROWS) // 2].requires_grad_()
    numbers = torch.arange(ROWS)[:, None] // 2
    for positives in (None, Positives(numbers, numbers)):
        loss = dense.softmax_terms(Block(twins, twins, 1e4), wanted=["clip"], positives=positives).clip
        torch.testing.assert_close(loss, torch.tensor(2.0, dtype=torch.float64).log(), rtol=0, atol=1e-12)


def on_a_rank(module: object, world_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text, captions = (
        F.normalize(torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64), dim=1) for _ in range(3)
    )
    scale = torch.tensor([20.0], dtype=torch.float64, requires_grad=True)
    ids = torch.arange(ROWS)[:, None] // 3
    count = ROWS // world_size
    own = slice(row_offset(count), row_offset(count) + count)
    image.requires_grad_()
    text.requires_grad_()
    columns = gather_rows({"text": text[own]})["text"]
    terms = module.softmax_terms(  # type: ignore[attr-defined]
        Block(image[own], columns, scale, own.start),
        [Block(captions[own], captions.flip(1), 30.0)],
        wanted=["clip", "kd"],
        positives=Positives(ids[own], ids),
        margin=Margin(0.3, captions[own], captions),
        label_smoothing=0.1,
    )
    gradients = torch.autograd.grad(terms.clip + 2 * terms.kd, (image, text, scale))
    return [terms.clip.detach(), terms.kd.detach(), *gradients]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_batch(world_size: int) -> None:
    whole = on_a_rank(dense, 1)
    for module in (dense, tiled):
        results = run_ranks(world_size, on_a_rank, module, world_size)
        means = [torch.stack(parts).mean(dim=0) for parts in zip(*results, strict=True)]
        torch.testing.assert_close(means, whole, rtol=0, atol=1e-12)
