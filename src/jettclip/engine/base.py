"""What an engine is, and the module it trains."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jettclip.losses.factory import Loss
from jettclip.models.two_towers import TwoTowers
from jettclip.types import Features


class Student(nn.Module):
    """Everything that is trained: the towers, and the parameters that belong to the loss.

    The loss is applied outside `forward`, but lives here, so that whoever wraps this module also synchronises, steps
    and saves the loss's parameters.
    """

    def __init__(self, towers: TwoTowers, loss: Loss) -> None:
        super().__init__()
        self.towers = towers
        self.loss = loss

    def forward(self, image: Tensor, short: Tensor | None, long: Tensor | None) -> Features:
        """Embeds a batch."""
        features: Features = self.towers(image, short, long)
        return features


class Engine(Protocol):
    """Steps a student. The trainer knows nothing of processes, precision or sharding beyond this."""

    model: nn.Module
    """Maps (image, short caption, long caption) to `Features`; call it under `autocast`."""

    device: torch.device
    """Where its inputs must lie."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the precision in which the model is to be called."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a rank's mean loss; over ranks it becomes the gradient of the mean."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Returns a context in which forward and backward passes may leave the gradient to this rank.

        The next `backward` outside it adds up what all ranks have gathered.
        """

    def step(self) -> float | None:
        """Updates the parameters and clears the gradients; returns the gradient norm if it is clipped."""

    def state_dict(self) -> dict[str, Any]:
        """Returns ``student``, ``optimizer`` and whatever else a later run needs; all ranks must call it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; all ranks must call it."""
