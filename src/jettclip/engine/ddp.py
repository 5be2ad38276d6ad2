"""The engine for one process, or for many with a whole student each (DistributedDataParallel)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from jettclip import openclip
from jettclip.engine.base import Student


class DDPEngine:
    """Trains on a GPU or on the CPU, alone or in a process group.

    Args:
        student: what is trained, already on `device`.
        optimizer: over the student's parameters.
        device: of this rank.
        precision: ``fp32``, ``amp`` (float16, with a gradient scaler) or ``amp_bf16``.
        clip_norm: gradient norm to clip to.
        logit_scale_max: S = exp(logit_scale) is held between 1 and this after every step; 0 for no limit.
        static_graph: promise DistributedDataParallel the same graph in every step.
        sync_batch_norm: share batch statistics between ranks.
        compile_model: compile the model's forward.
    """

    def __init__(
        self,
        student: Student,
        optimizer: Optimizer,
        device: torch.device,
        *,
        precision: str = "fp32",
        clip_norm: float | None = None,
        logit_scale_max: float = 100.0,
        static_graph: bool = False,
        sync_batch_norm: bool = False,
        compile_model: bool = False,
    ) -> None:
        self.student, self.optimizer, self.device, self.clip_norm = student, optimizer, device, clip_norm
        self.log_scale_max = math.log(logit_scale_max) if logit_scale_max else None
        self._autocast = openclip.get_autocast(precision, device_type=device.type)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "amp")
        self.model: nn.Module = student
        self._synchronised: DistributedDataParallel | None = None
        if dist.is_initialized():
            if sync_batch_norm:
                convert_sync_batchnorm(student)  # timm's: torch's own would drop the activations of timm's norms
            device_ids = None if device.type == "cpu" else [device]
            self._synchronised = DistributedDataParallel(student, device_ids=device_ids, static_graph=static_graph)
            self.model = self._synchronised
        self._knows_graph = not static_graph
        if compile_model:
            self.model = torch.compile(self.model)  # type: ignore[assignment]

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the precision in which the model is to be called."""
        context: AbstractContextManager[Any] = self._autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a rank's mean loss; over ranks it becomes the gradient of the mean."""
        self.scaler.scale(loss).backward()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Returns a context in which forward and backward passes leave the gradient to this rank.

        A static graph is learnt from the first backward pass, which must be synchronised: of one that is not,
        DistributedDataParallel learns that no parameter is used, and drops their gradients. To average a part of the
        gradient early changes nothing in the end.
        """
        if self._synchronised is None or not self._knows_graph:
            self._knows_graph = True
            return nullcontext()
        context: AbstractContextManager[Any] = self._synchronised.no_sync()
        return context

    def step(self) -> float | None:
        """Updates the parameters and clears the gradients; returns the gradient norm if it is clipped."""
        norm = None
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            norm = float(nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.log_scale_max is not None:
            with torch.no_grad():
                self.student.towers.logit_scale.clamp_(0, self.log_scale_max)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of student, optimizer and scaler."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
