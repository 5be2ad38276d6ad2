from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jettclip.losses.positives import Identities
from jettclip.types import Identity

IDENTITY = Identity(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 4]), torch.tensor([6, 6, 6]))


class Called(TorchDispatchMode):
    """Remembers which operators were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_view_compares_images_and_its_own_captions() -> None:
    identities = Identities(IDENTITY, ("short", "long"))
    for caption in ("short", "long"):
        expected = torch.stack([IDENTITY.image, getattr(IDENTITY, caption)], dim=1)
        for numbers in identities.positives(caption):
            assert torch.equal(numbers, expected)


def test_nothing_is_copied_from_the_host() -> None:
    with Called() as called:
        identities = Identities(IDENTITY, ("short", "long"))
        identities.positives("long")
        identities.floor("short")
    assert "stack" in called.names
    assert not called.names & {"index", "lift_fresh", "copy_", "_local_scalar_dense"}
