"""Optimizers, with weight decay where it belongs."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
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
        beta1, beta2, eps, momentum: None keeps the optimizer's default.

    Raises:
        ValueError: for an optimizer that does not exist, or an option that it does not have.
    """
    options = optimizer_options(name, beta1=beta1, beta2=beta2, eps=eps, momentum=momentum)
    groups = parameter_groups(student, weight_decay)
    if name.lower() == "adamw":
        return torch.optim.AdamW(groups, lr=lr, **options)
    return create_optimizer_v2(groups, name.removeprefix("timm/"), lr=lr, weight_decay=weight_decay, **options)


def optimizer_options(
    name: str,
    *,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
    momentum: float | None = None,
) -> dict[str, Any]:
    """Returns the options that are given as the optimizer's own arguments; timm would drop unknown ones unsaid.

    Raises:
        ValueError: for an optimizer that does not exist, or an option that it does not have.
    """
    known = _options_of(name)
    options: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": eps, "momentum": momentum}
    options = {option: value for option, value in options.items() if value is not None}
    unknown = [f"--{option}" for option in options if option not in known]
    if unknown:
        raise ValueError(f"--opt {name} has no {' and no '.join(unknown)}; leave out what it does not have")
    if (beta1 is None) != (beta2 is None):
        raise ValueError(f"--beta1 {beta1} and --beta2 {beta2} go together; give both, or leave both out")
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    return options


def _options_of(name: str) -> set[str]:
    if name.lower() == "adamw":
        return {"beta1", "beta2", "eps"}
    if not name.startswith("timm/"):
        raise ValueError(f"--opt {name!r} is not known; give adamw, or timm/NAME such as timm/{name}")
    try:
        info = get_optimizer_info(name.lower().removeprefix("timm/").removeprefix("lookahead_"))
    except ValueError as error:
        raise ValueError(
            f"--opt {name}: {error}; use adamw, or timm/ with one of timm.optim.list_optimizers()"
        ) from error
    betas = ("beta1", "beta2") if info.has_betas and info.num_betas == 2 else ()  # Adan has three
    return {*betas, *(["eps"] if info.has_eps else []), *(["momentum"] if info.has_momentum else [])}


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
