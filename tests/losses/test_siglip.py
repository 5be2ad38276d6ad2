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
    return Features(image, None, text, torch.tensor([10.0], dtype=dtype, requires_grad=True))


def compared(dtype: torch.dtype, tile: str, impl: str, rank: int, world_size: int) -> list[list[Tensor]]:
    """Returns value and gradients of our loss and of OpenCLIP's."""
    results = []
    size = ROWS // world_size
    for ours in (True, False):
        features = features_of(dtype, slice(rank * size, (rank + 1) * size))
        loss = create_loss(LossSettings("siglip", loss_tile=tile), WIDTH).to(dtype)
        bias = loss.terms["siglip"].bias
        inputs = [features.image, features.long, features.logit_scale, bias]
        if ours:
            value = loss(features).total
        else:
            openclips = SigLipLoss(rank=rank, world_size=world_size, dist_impl=impl)
            value = openclips(features.image, features.long, features.logit_scale, bias)
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


def test_the_bias_starts_where_siglips_does_and_is_saved() -> None:
    state = create_loss(LossSettings("siglip"), WIDTH).state_dict()
    assert list(state) == ["terms.siglip.bias"]
    assert state["terms.siglip.bias"].tolist() == [-10.0]
