"""The text tower of LLM2CLIP: an adapter over the stored caption embeddings of a large language model.

The language model has read every caption once, and its embeddings stand in the shards or in a feature store; only this
adapter and the image tower are trained (arXiv 2411.04997).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jettclip.models.two_towers import unit_rows

_UPSTREAM = "text.text_adaptor."


@dataclass(frozen=True)
class AdapterOptions:
    """The ``text_cfg`` of a model whose text tower is an adapter.

    Raises:
        ValueError: for a value that makes no adapter.
    """

    width: int  # of the stored embeddings, and of every block
    depth: int = 4  # residual blocks; 0 leaves a plain linear layer
    expansion: float = 2.0  # hidden width of a block, as a multiple of its width
    dropout: float = 0.0
    normalize_input: bool = True  # embeddings are scaled to unit length first

    def __post_init__(self) -> None:
        rules = [
            (self.width < 1, f"width {self.width} must be that of the stored embeddings, such as 4096"),
            (self.depth < 0, f"depth {self.depth} must be positive, or 0 for a plain linear layer"),
            (self.width * self.expansion < 1, f"expansion {self.expansion} leaves a block no width; try 2"),
            (not 0 <= self.dropout < 1, f"dropout {self.dropout} must be at least 0 and below 1"),
        ]
        problems = [message for broken, message in rules if broken]
        if problems:
            raise ValueError(f"text_cfg of an adapter: {'; '.join(problems)}")


class AdapterBlock(nn.Module):
    """A residual MLP, normalised first: ``x + contract(dropout(gelu(expand(norm(x)))))``, [b, width] to the same."""

    def __init__(self, width: int, hidden_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden_width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the MLP makes of each row."""
        hidden = self.dropout(F.gelu(self.expand(self.norm(x))))
        return x + self.contract(hidden)


class EmbeddingAdapter(nn.Module):
    """Maps stored caption embeddings to the embedding space of the image tower (arXiv 2411.04997).

    Args:
        options: width, depth and the like.
        embed_dim: D, width of the output.
    """

    def __init__(self, options: AdapterOptions, embed_dim: int) -> None:
        super().__init__()
        self.embedding_width = options.width
        self.normalize_input = options.normalize_input
        self.grad_checkpointing = False
        hidden_width = int(options.width * options.expansion)
        self.blocks = nn.ModuleList(
            AdapterBlock(options.width, hidden_width, options.dropout) for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(options.width) if options.depth else nn.Identity()
        self.projection = nn.Linear(options.width, embed_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """Maps embeddings, float [b, embedding_width] of any precision, to [b, D].

        Raises:
            ValueError: for token ids, or embeddings of another width.
        """
        if not embedding.is_floating_point() or embedding.ndim != 2 or embedding.shape[1] != self.embedding_width:
            raise ValueError(
                f"an adapter reads float embeddings [b, {self.embedding_width}], not {embedding.dtype} "
                f"{list(embedding.shape)}; give it embeddings of its width, or choose the model for theirs"
            )
        if self.normalize_input:
            embedding = unit_rows(embedding)
        x = embedding.to(self.projection.weight.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return self.projection(self.norm(x))

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Stops training the adapter, but for its last layers, counted as OpenCLIP counts those of a text transformer.

        The last is the projection, the one before it the last block with the final layer norm. Layer norms are locked
        like other weights, whatever `freeze_layer_norm` says, as in `TextTower`.
        """
        groups: list[list[nn.Module]] = [[block] for block in self.blocks]
        if groups:
            groups[-1].append(self.norm)
        groups.append([self.projection])
        first_unlocked = max(0, len(groups) - unlocked_layers)
        for index, group in enumerate(groups):
            for module in group:
                module.requires_grad_(index >= first_unlocked)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades memory for a second forward pass of the blocks."""
        self.grad_checkpointing = enable


def build_adapter(config: Mapping[str, Any], embed_dim: int) -> EmbeddingAdapter:
    """Builds an adapter from the ``text_cfg`` of a model config.

    Raises:
        ValueError: for a key or value that an adapter does not have.
    """
    known = AdapterOptions.__dataclass_fields__
    unknown = sorted(set(config) - set(known))
    if unknown or "width" not in config:
        raise ValueError(
            f"text_cfg of an adapter: {', '.join(unknown) + ' unknown' if unknown else 'width is missing'}; "
            f"it takes {', '.join(known)}"
        )
    return EmbeddingAdapter(AdapterOptions(**config), embed_dim)


def convert_upstream_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the adapter's weights in a checkpoint of LLM2CLIP's own code to ours; other keys stay as they are."""
    depth = sum(key.startswith(_UPSTREAM) and key.endswith(".fn.0.weight") for key in state)
    ours = {f"{depth}": "norm", f"{depth + 1}": "projection"}
    for n in range(depth):
        ours |= {f"{n}.ln": f"blocks.{n}.norm", f"{n}.fn.0": f"blocks.{n}.expand", f"{n}.fn.3": f"blocks.{n}.contract"}

    def renamed(key: str) -> str:
        module, _, parameter = key.removeprefix(_UPSTREAM).rpartition(".")
        return f"text.{ours[module]}.{parameter}" if key.startswith(_UPSTREAM) and module in ours else key

    return {renamed(key): value for key, value in state.items()}
