"""The adapter of LLM2CLIP over stored embeddings (arXiv 2411.04997), in the layout of its own code."""

from __future__ import annotations

from torch import Tensor

from foreign.layers import Maker, State, gelu, layer_norm, linear

PREFIX = "text.text_adaptor"


def adapter_state(width: int, embed_dim: int, depth: int = 4) -> State:
    """Returns random weights of the adapter alone."""
    make = Maker(seed=3)
    for block in range(depth):
        make.norm(f"{PREFIX}.{block}.ln", width)
        make.conv(f"{PREFIX}.{block}.fn.0", 2 * width, width)
        make.conv(f"{PREFIX}.{block}.fn.3", width, 2 * width)
    make.norm(f"{PREFIX}.{depth}", width)
    make.conv(f"{PREFIX}.{depth + 1}", embed_dim, width)
    return make.state


def adapt(state: State, embedding: Tensor, depth: int = 4) -> Tensor:
    x = embedding / embedding.square().sum(dim=1, keepdim=True).sqrt()
    for block in range(depth):
        hidden = gelu(linear(state, f"{PREFIX}.{block}.fn.0", layer_norm(state, f"{PREFIX}.{block}.ln", x)))
        x = x + linear(state, f"{PREFIX}.{block}.fn.3", hidden)
    return linear(state, f"{PREFIX}.{depth + 1}", layer_norm(state, f"{PREFIX}.{depth}", x))
