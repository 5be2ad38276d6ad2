"""Random weights that hide no mistake, and the layers they stand for, as functions of a state dict."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Maker:
    """Collects random weights by name; norms, statistics and scales are far from where training starts them."""

    def __init__(self, seed: int) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, std: float = 1.0) -> None:
        self.state[name] = torch.randn(shape, generator=self.generator) * std

    def uniform(self, name: str, *shape: int, low: float, high: float) -> None:
        self.state[name] = low + (high - low) * torch.rand(shape, generator=self.generator)

    def conv(self, name: str, out: int, *kernel: int, bias: bool = True, parameter: str = ".weight") -> None:
        """Makes a linear layer [out, in] or a convolution [out, in, ...] whose output is as large as its input."""
        self.normal(f"{name}{parameter}", out, *kernel, std=math.prod(kernel) ** -0.5)
        if bias:
            self.normal(f"{name}{parameter.replace('weight', 'bias')}", out, std=0.1)

    def norm(self, name: str, width: int) -> None:
        self.uniform(f"{name}.weight", width, low=0.5, high=1.5)
        self.normal(f"{name}.bias", width, std=0.2)

    def batch_norm(self, name: str, width: int) -> None:
        self.norm(name, width)
        self.normal(f"{name}.running_mean", width, std=0.3)
        self.uniform(f"{name}.running_var", width, low=0.5, high=2)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(1234)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit * state[f"{name}.weight"] + state[f"{name}.bias"]


def batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Normalises [b, C, ...] by the statistics that were gathered in training."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"].view(-1, *[1] * (x.dim() - 2))
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def convolve(state: State, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """Convolves [b, C, H, W], or tokens [b, C, 1, L] with a kernel of one row, padded to keep the size at stride 1."""
    weight = state[f"{name}.weight"]
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding, groups=groups)


def attend(qkv: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Mixes [b, L, 3 C], whose columns are all queries, all keys, all values, each head after head, to [b, L, C]."""
    rows, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    query, key, value = (part.view(rows, length, heads, -1).transpose(1, 2) for part in qkv.split(width, dim=2))
    scores = query @ key.transpose(2, 3) / math.sqrt(width // heads)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(rows, length, width)


def at_end_token(x: Tensor, ids: Tensor) -> Tensor:
    """Returns row [b, C] of [b, L, C] at the largest id, the end token."""
    return torch.stack([row[int(tokens.argmax())] for row, tokens in zip(x, ids, strict=True)])


def stretched(table: Tensor) -> Tensor:
    """Stretches positions 77 -> 248: after 20 rows, three new ones behind each, on the line to the next one."""
    slopes = torch.cat([table[21:] - table[20:-1], table[-1:] - table[-2:-1]])
    quarters = torch.arange(4).view(1, 4, 1) / 4
    return torch.cat([table[:20], (table[20:, None] + quarters * slopes[:, None]).flatten(0, 1)])


def unread(state: State, embed: Callable[[State], Tensor]) -> list[str]:
    """Returns the names of the weights on which what `embed` makes of a state does not depend."""
    tracked = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in state.items()}
    embed(tracked).square().sum().backward()
    return [
        name
        for name, value in tracked.items()
        if value.is_floating_point() and (value.grad is None or not value.grad.any())
    ]
