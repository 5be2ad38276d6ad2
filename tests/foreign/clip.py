"""OpenAI's CLIP with a vision transformer (arXiv 2103.00020), and Long-CLIP (arXiv 2403.15378)."""

from __future__ import annotations

import torch
from torch import Tensor

from foreign.layers import Maker, State, at_end_token, attend, layer_norm, linear, quick_gelu


def clip_state(
    embed_dim: int = 16,
    image_size: int = 32,
    patch_size: int = 16,
    vision_width: int = 32,
    layers: int = 2,
    context_length: int = 77,
    vocab_size: int = 100,
    text_width: int = 32,
    seed: int = 0,
) -> State:
    """Returns weights under OpenAI's names, with the numbers that stand among them."""
    make = Maker(seed)
    patches = (image_size // patch_size) ** 2
    make.normal("positional_embedding", context_length, text_width, std=0.5)
    make.normal("text_projection", text_width, embed_dim, std=text_width**-0.5)
    make.normal("visual.class_embedding", vision_width)
    make.normal("visual.positional_embedding", patches + 1, vision_width, std=0.5)
    make.normal("visual.proj", vision_width, embed_dim, std=vision_width**-0.5)
    make.conv("visual.conv1", vision_width, 3, patch_size, patch_size, bias=False)
    for prefix, width in (("visual.", vision_width), ("", text_width)):
        for layer in range(layers):
            name = f"{prefix}transformer.resblocks.{layer}"
            make.conv(f"{name}.attn.in_proj", 3 * width, width, parameter="_weight")
            make.conv(f"{name}.attn.out_proj", width, width)
            make.norm(f"{name}.ln_1", width)
            make.conv(f"{name}.mlp.c_fc", 4 * width, width)
            make.conv(f"{name}.mlp.c_proj", width, 4 * width)
            make.norm(f"{name}.ln_2", width)
    for name in ("visual.ln_pre", "visual.ln_post"):
        make.norm(name, vision_width)
    make.norm("ln_final", text_width)
    make.normal("token_embedding.weight", vocab_size, text_width, std=0.5)
    make.state["logit_scale"] = torch.tensor(4.25)
    numbers = {"input_resolution": image_size, "context_length": context_length, "vocab_size": vocab_size}
    return make.state | {name: torch.tensor(number) for name, number in numbers.items()}


def long_clip_state(context_length: int = 248, **sizes: int) -> State:
    """Returns weights under Long-CLIP's names: OpenAI's, with two whole tables of positions."""
    state = clip_state(context_length=context_length, **sizes)
    for number in ("input_resolution", "context_length", "vocab_size"):
        del state[number]
    return state | {"positional_embedding_res": torch.randn_like(state["positional_embedding"]) * 0.5}


def image_tower_state(**sizes: int) -> State:
    """Returns the weights of OpenAI's image tower alone, and the logit scale."""
    return {key: value for key, value in clip_state(**sizes).items() if key.startswith(("visual.", "logit_scale"))}


def _blocks(state: State, prefix: str, x: Tensor, head_width: int, causal: bool) -> Tensor:
    layer = 0
    while f"{prefix}transformer.resblocks.{layer}.ln_1.weight" in state:
        name = f"{prefix}transformer.resblocks.{layer}"
        normal = layer_norm(state, f"{name}.ln_1", x)
        qkv = normal @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]
        x = x + linear(state, f"{name}.attn.out_proj", attend(qkv, x.shape[2] // head_width, causal))
        hidden = quick_gelu(linear(state, f"{name}.mlp.c_fc", layer_norm(state, f"{name}.ln_2", x)))
        x = x + linear(state, f"{name}.mlp.c_proj", hidden)
        layer += 1
    return x


def encode_image(state: State, image: Tensor, head_width: int = 64) -> Tensor:
    kernel = state["visual.conv1.weight"]
    size = kernel.shape[2]
    patches = image.unfold(2, size, size).unfold(3, size, size)  # [b, 3, rows, columns, size, size]
    x = torch.einsum("bcijuv,wcuv->bijw", patches, kernel).flatten(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = layer_norm(state, "visual.ln_pre", x + state["visual.positional_embedding"])
    x = _blocks(state, "visual.", x, head_width, causal=False)
    return layer_norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]


def encode_text(state: State, ids: Tensor, head_width: int = 64) -> Tensor:
    positions = state["positional_embedding"]
    if "positional_embedding_res" in state:  # Long-CLIP: one table for the first 20 rows, the other for the rest
        first = (torch.arange(len(positions)) < 20).float().unsqueeze(1)
        positions = positions * first + state["positional_embedding_res"] * (1 - first)
    x = state["token_embedding.weight"][ids] + positions[: ids.shape[1]]
    x = layer_norm(state, "ln_final", _blocks(state, "", x, head_width, causal=True))
    return at_end_token(x, ids) @ state["text_projection"]
