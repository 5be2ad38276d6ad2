from __future__ import annotations

import timm
import torch

from jettclip.models.factory import create_model


def test_the_tower_is_in_timms_registry_and_small() -> None:
    tower = timm.create_model("convmixer_nano", num_classes=10)
    assert tower(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in tower.parameters()) < 200_000


def test_the_head_sees_where_things_are() -> None:
    tower = timm.create_model("convmixer_nano", num_classes=10).eval()
    maps = torch.zeros(2, 128, 8, 8)
    maps[0, :, 0, 0] = maps[1, :, 7, 7] = 1  # the same thing in two corners: equal on average
    corners = tower.forward_head(maps)
    assert not torch.allclose(corners[0], corners[1], atol=1e-3)


def test_the_model_learns_to_tell_two_pairs_apart() -> None:
    model = create_model("Nano-248").train()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    ids = torch.tensor([[49406, 320, 1929, 49407], [49406, 320, 2368, 49407]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        features = model(image, ids)
        logits = features.logit_scale * features.image @ features.short.T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 < losses[0]
