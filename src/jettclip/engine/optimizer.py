"""Optimizers, with weight decay where it belongs."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch.optim import Optimizer

from jettclip.engine.base import Student


def create_optimizer(
    student: Student,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
    momentum: float | None = None,
) -> Optimizer:
    """Builds AdamW, or ``timm/NAME``, any optimizer of timm's.

    Args:
        student: what is trained; its frozen parameters are left out.
        name: ``adamw`` or ``timm/NAME``.
        lr: learning rate.
        weight_decay: of the parameters that decay, see `parameter_groups`.
        beta1, beta2, eps, momentum: None keeps the optimizer's default; it is not given what it does not have.

    Raises:
        ValueError: for a name or an option that timm refuses.
    """
    groups = parameter_groups(student, weight_decay)
    options: dict[str, Any] = {"lr": lr, "eps": eps, "momentum": momentum}
    if beta1 is not None and beta2 is not None:
        options["betas"] = (beta1, beta2)
    options = {key: value for key, value in options.items() if value is not None}
    if name == "adamw":
        options.pop("momentum", None)
        return torch.optim.AdamW(groups, **options)
    try:
        return create_optimizer_v2(groups, name.removeprefix("timm/"), weight_decay=weight_decay, **options)
    except ValueError as error:
        raise ValueError(
            f"--opt {name}: {error}; use adamw, or timm/ with one of timm.optim.list_optimizers()"
        ) from error


def parameter_groups(student: Student, weight_decay: float) -> list[dict[str, Any]]:
    """Divides the trainable parameters into those that never decay and those that do.

    Spared is what has fewer than two axes, as biases, norms and the logit scale; layer scales (``gamma``, which is
    [C, 1, 1] in FastViT and would pass for a matrix); and what a tower itself names, such as its position embeddings.
    """
    spared = {f"towers.{name}" for name in student.towers.no_weight_decay()}
    decayed, undecayed = [], []
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name.endswith(".gamma") or name in spared:
            undecayed.append(parameter)
        else:
            decayed.append(parameter)
    return [{"params": undecayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
