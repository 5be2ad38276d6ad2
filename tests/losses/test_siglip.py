from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from open_clip.loss import SigLipLoss
from torch import Tensor

from jettclip.losses.factory import create_loss
from jettclip.settings import LossSettings
from jettclip.types import Features
from support import run_ranks, unit_rows

ROWS, WIDTH = 12, 8


def features_of(dtype: torch.dtype, mine: slice = slice(None)) -> Features:
    torch.manual_seed(1)
    image, text = (unit_rows(ROWS, WIDTH, dtype)[mine].clone().requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor([value], dtype=dtype, requires_grad=True) for value in (10.0, -10.0))
    return Features(image, None, text, scale, bias)


def compared(dtype: torch.dtype, tile: str, impl: str, rank: int, world_size: int) -> list[list[Tensor]]:
    """Returns value and gradients of our loss and of OpenCLIP's."""
    results = []
    size = ROWS // world_size
    for ours in (True, False):
        features = features_of(dtype, slice(rank * size, (rank + 1) * size))
        loss = create_loss(LossSettings("siglip", loss_tile=tile), WIDTH).to(dtype)
        inputs = [features.image, features.long, features.logit_scale, features.logit_bias]
        if ours:
            value = loss(features).total
        else:
            openclips = SigLipLoss(rank=rank, world_size=world_size, dist_impl=impl)
            value = openclips(*inputs)
        results.append([value.detach(), *torch.autograd.grad(value, inputs)])
    return results


@pytest.mark.parametrize("tile", ["auto", "5", "off"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradient_are_openclips(dtype: torch.dtype, tolerance: float, tile: str) -> None:
    ours, theirs = compared(dtype, tile, "gather", 0, 1)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def compared_on_a_rank(impl: str) -> list[list[Tensor]]:
    return compared(torch.float64, "auto", impl, dist.get_rank(), dist.get_world_size())


@pytest.mark.filterwarnings("ignore:torch.distributed.nn:FutureWarning")  # OpenCLIP's way to gather
@pytest.mark.parametrize("impl", ["bidir", "shift", "reduce", "gather"])
def test_on_every_rank_they_are_openclips_however_it_exchanges(impl: str) -> None:
    for ours, theirs in run_ranks(2, compared_on_a_rank, impl):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_bias_is_the_models_and_is_reported() -> None:
    loss, features = create_loss(LossSettings("siglip"), WIDTH), features_of(torch.float32)
    assert not list(loss.parameters())
    assert loss(features).terms["bias@siglip"] == -10
    with pytest.raises(ValueError, match="needs a model with a bias of the logits"):
        loss(features._replace(logit_bias=None))
