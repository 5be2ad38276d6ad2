"""Apple's MobileCLIP before reparameterisation (arXiv 2311.17049, 2303.14189, 2206.04040), and JettCLIP-S0."""

from __future__ import annotations

import torch
from torch import Tensor

from foreign.layers import (
    Maker,
    State,
    at_end_token,
    attend,
    batch_norm,
    convolve,
    gelu,
    layer_norm,
    linear,
)

WIDTH, VOCABULARY, DIM = 512, 49408, 512
STAGES = {  # blocks and channels of the image towers
    "S0": ((2, 6, 10, 2), (64, 128, 256, 512)),
    "S1": ((4, 12, 20, 4), (64, 128, 256, 512)),
    "S2": ((4, 12, 24, 4), (80, 160, 320, 640)),
}


def mobileclip_state(variant: str, vocabulary: int = VOCABULARY, seed: int = 0) -> State:
    """Returns weights of S0, S1, S2 or B under Apple's names."""
    make = Maker(seed)
    if variant == "B":
        _make_vision_transformer(make)
    else:
        _make_fast_vit(make, *STAGES[variant])
    _make_text(make, vocabulary, mixers=variant == "S0", layers=4 if variant == "S0" else 12)
    make.state["logit_scale"] = torch.tensor(4.25)
    return make.state


def jettclip_state() -> State:
    """Returns MobileCLIP-S0's weights with Long-CLIP's two tables of positions."""
    state = mobileclip_state("S0", seed=1)
    del state["text_encoder.positional_embedding.pos_embed.pos_embed"]
    for name in ("positional_embedding", "positional_embedding_res"):
        state[f"text_encoder.{name}"] = torch.randn(248, WIDTH) * 0.5
    return state


def _make_branch(make: Maker, name: str, channels: int, *kernel: int) -> None:
    make.conv(f"{name}.conv", channels, *kernel, bias=False)
    make.batch_norm(f"{name}.bn", channels)


def _make_mobile_one(
    make: Maker, name: str, into: int, out: int, kernel: int, stride: int = 1, groups: int = 1
) -> None:
    if into == out and stride == 1:
        make.batch_norm(f"{name}.rbr_skip", out)
    _make_branch(make, f"{name}.rbr_conv.0", out, into // groups, kernel, kernel)
    if kernel > 1:
        _make_branch(make, f"{name}.rbr_scale", out, into // groups, 1, 1)


def _make_feed_forward(make: Maker, name: str, channels: int, ratio: int, *kernel: int) -> None:
    _make_branch(make, f"{name}.conv", channels, 1, *kernel)
    make.conv(f"{name}.fc1", ratio * channels, channels, 1, 1)
    make.conv(f"{name}.fc2", channels, ratio * channels, 1, 1)


def _make_scale(make: Maker, name: str, channels: int) -> None:
    make.uniform(name, channels, 1, 1, low=0.1, high=0.5)


def _make_fast_vit(make: Maker, blocks: tuple[int, ...], channels: tuple[int, ...]) -> None:
    prefix = "image_encoder.model"
    first = channels[0]
    _make_mobile_one(make, f"{prefix}.patch_embed.0", 3, first, 3, stride=2)
    _make_mobile_one(make, f"{prefix}.patch_embed.1", first, first, 3, stride=2, groups=first)
    _make_mobile_one(make, f"{prefix}.patch_embed.2", first, first, 1)
    for stage, index in enumerate((0, 2, 4, 7)):  # between them stand downsampling layers, and at 6 the positions
        width = channels[stage]
        for block in range(blocks[stage]):
            name = f"{prefix}.network.{index}.{block}"
            if stage < 3:
                make.batch_norm(f"{name}.token_mixer.norm.rbr_skip", width)
                _make_mobile_one(make, f"{name}.token_mixer.mixer", width, width, 3, groups=width)
                _make_scale(make, f"{name}.token_mixer.layer_scale", width)
                _make_scale(make, f"{name}.layer_scale", width)
            else:
                make.batch_norm(f"{name}.norm", width)
                make.conv(f"{name}.token_mixer.qkv", 3 * width, width, bias=False)
                make.conv(f"{name}.token_mixer.proj", width, width)
                _make_scale(make, f"{name}.layer_scale_1", width)
                _make_scale(make, f"{name}.layer_scale_2", width)
            _make_feed_forward(make, f"{name}.convffn", width, 3, 7, 7)
        if stage < 3:
            name, wider = f"{prefix}.network.{index + 1}.proj", channels[stage + 1]
            _make_branch(make, f"{name}.0.lkb_origin", wider, 1, 7, 7)
            _make_branch(make, f"{name}.0.small_conv", wider, 1, 3, 3)
            if stage > 0:
                make.conv(f"{name}.0.se.fc1", wider // 4, wider, 1, 1)
                make.conv(f"{name}.0.se.fc2", wider, wider // 4, 1, 1)
            _make_mobile_one(make, f"{name}.1", wider, wider, 1)
    last = channels[3]
    make.conv(f"{prefix}.network.6.pe", last, 1, 7, 7)
    _make_mobile_one(make, f"{prefix}.conv_exp", last, 2 * last, 3, groups=last)
    make.conv(f"{prefix}.conv_exp.se.reduce", last // 8, 2 * last, 1, 1)
    make.conv(f"{prefix}.conv_exp.se.expand", 2 * last, last // 8, 1, 1)
    make.normal(f"{prefix}.head.proj", 2 * last, DIM, std=(2 * last) ** -0.5)


def _make_attention_block(make: Maker, name: str, width: int) -> None:
    make.norm(f"{name}.pre_norm_mha.0", width)
    make.conv(f"{name}.pre_norm_mha.1.qkv_proj", 3 * width, width)
    make.conv(f"{name}.pre_norm_mha.1.out_proj", width, width)
    make.norm(f"{name}.pre_norm_ffn.0", width)
    make.conv(f"{name}.pre_norm_ffn.1", 4 * width, width)
    make.conv(f"{name}.pre_norm_ffn.4", width, 4 * width)


def _make_vision_transformer(make: Maker, width: int = 768, layers: int = 12) -> None:
    prefix, stem = "image_encoder.model", width // 4
    make.conv(f"{prefix}.patch_emb.0.block.conv", stem, 3, 4, 4, bias=False)
    make.batch_norm(f"{prefix}.patch_emb.0.block.norm", stem)
    make.conv(f"{prefix}.patch_emb.1.block.conv", stem, stem, 2, 2, bias=False)
    make.batch_norm(f"{prefix}.patch_emb.1.block.norm", stem)
    make.conv(f"{prefix}.patch_emb.2.block.conv", width, stem, 2, 2)
    make.normal(f"{prefix}.cls_token", 1, 1, width)
    make.normal(f"{prefix}.pos_embed.pos_embed.pos_embed", 1, 1, 196, width, std=0.5)
    for layer in range(layers):
        _make_attention_block(make, f"{prefix}.transformer.{layer}", width)
    make.norm(f"{prefix}.post_transformer_norm", width)
    make.normal(f"{prefix}.classifier.proj", width, DIM, std=width**-0.5)


def _make_text(make: Maker, vocabulary: int, mixers: bool, layers: int) -> None:
    prefix = "text_encoder"
    make.normal(f"{prefix}.embedding_layer.weight", vocabulary, WIDTH, std=0.5)
    make.normal(f"{prefix}.positional_embedding.pos_embed.pos_embed", 1, 1, 77, WIDTH, std=0.5)
    for layer in range(layers):
        _make_attention_block(make, f"{prefix}.transformer.{layer + mixers}", WIDTH)
    for layer in (0, layers + 1) if mixers else ():
        name = f"{prefix}.transformer.{layer}"
        make.batch_norm(f"{name}.token_mixer.norm.rbr_skip", WIDTH)
        make.batch_norm(f"{name}.token_mixer.mixer.rbr_skip", WIDTH)
        _make_branch(make, f"{name}.token_mixer.mixer.rbr_conv.0", WIDTH, 1, 1, 11)
        _make_scale(make, f"{name}.token_mixer.layer_scale", WIDTH)
        _make_feed_forward(make, f"{name}.convffn", WIDTH, 4, 1, 11)
        _make_scale(make, f"{name}.layer_scale", WIDTH)
    make.norm(f"{prefix}.final_layer_norm", WIDTH)
    make.normal(f"{prefix}.projection_layer", WIDTH, DIM, std=WIDTH**-0.5)


def _branch(state: State, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    return batch_norm(state, f"{name}.bn", convolve(state, f"{name}.conv", x, stride, groups))


def _excite(state: State, reduce: str, expand: str, x: Tensor) -> Tensor:
    """Weighs the channels of [b, C, H, W] by what a small network makes of their means."""
    weight = convolve(state, reduce, x.mean((2, 3), keepdim=True)).clamp(min=0)
    return x * torch.sigmoid(convolve(state, expand, weight))


def _mobile_one(state: State, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """Sums the branches that a block of MobileOne has (arXiv 2206.04040, figure 3)."""
    total = _branch(state, f"{name}.rbr_conv.0", x, stride, groups)
    if f"{name}.rbr_scale.conv.weight" in state:
        total = total + _branch(state, f"{name}.rbr_scale", x, stride, groups)
    if f"{name}.rbr_skip.weight" in state:
        total = total + batch_norm(state, f"{name}.rbr_skip", x)
    return total


def _mix_tokens(state: State, name: str, x: Tensor) -> Tensor:
    """Mixes neighbours and adds the difference to the input (arXiv 2303.14189, section 3.1)."""
    mixed = _mobile_one(state, f"{name}.mixer", x, groups=x.shape[1]) - batch_norm(state, f"{name}.norm.rbr_skip", x)
    return x + state[f"{name}.layer_scale"] * mixed


def _feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    x = _branch(state, f"{name}.conv", x, groups=x.shape[1])
    return convolve(state, f"{name}.fc2", gelu(convolve(state, f"{name}.fc1", x)))


def _mixer_block(state: State, name: str, x: Tensor) -> Tensor:
    x = _mix_tokens(state, f"{name}.token_mixer", x)
    return x + state[f"{name}.layer_scale"] * _feed_forward(state, f"{name}.convffn", x)


def _pixel_attention_block(state: State, name: str, x: Tensor) -> Tensor:
    pixels = batch_norm(state, f"{name}.norm", x).flatten(2).transpose(1, 2)
    mixed = attend(pixels @ state[f"{name}.token_mixer.qkv.weight"].T, heads=x.shape[1] // 32)
    mixed = linear(state, f"{name}.token_mixer.proj", mixed).transpose(1, 2).reshape(x.shape)
    x = x + state[f"{name}.layer_scale_1"] * mixed
    return x + state[f"{name}.layer_scale_2"] * _feed_forward(state, f"{name}.convffn", x)


def _fast_vit(state: State, x: Tensor) -> Tensor:
    prefix = "image_encoder.model"
    x = gelu(_mobile_one(state, f"{prefix}.patch_embed.0", x, stride=2))
    x = gelu(_mobile_one(state, f"{prefix}.patch_embed.1", x, stride=2, groups=x.shape[1]))
    x = gelu(_mobile_one(state, f"{prefix}.patch_embed.2", x))
    for index in range(8):
        name = f"{prefix}.network.{index}"
        if index in (1, 3, 5):
            large, small = (
                _branch(state, f"{name}.proj.0.{part}", x, stride=2, groups=x.shape[1])
                for part in ("lkb_origin", "small_conv")
            )
            x = large + small
            if index > 1:
                x = _excite(state, f"{name}.proj.0.se.fc1", f"{name}.proj.0.se.fc2", x)
            x = gelu(_mobile_one(state, f"{name}.proj.1", gelu(x)))
        elif index == 6:
            x = x + convolve(state, f"{name}.pe", x, groups=x.shape[1])
        else:
            for block in range(len({key.split(".")[4] for key in state if key.startswith(f"{name}.")})):
                x = (_pixel_attention_block if index == 7 else _mixer_block)(state, f"{name}.{block}", x)
    x = _mobile_one(state, f"{prefix}.conv_exp", x, groups=x.shape[1])
    x = gelu(_excite(state, f"{prefix}.conv_exp.se.reduce", f"{prefix}.conv_exp.se.expand", x))
    return x.mean((2, 3)) @ state[f"{prefix}.head.proj"]


def _attention_block(state: State, name: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    qkv = linear(state, f"{name}.pre_norm_mha.1.qkv_proj", layer_norm(state, f"{name}.pre_norm_mha.0", x))
    x = x + linear(state, f"{name}.pre_norm_mha.1.out_proj", attend(qkv, heads, causal))
    hidden = gelu(linear(state, f"{name}.pre_norm_ffn.1", layer_norm(state, f"{name}.pre_norm_ffn.0", x)))
    return x + linear(state, f"{name}.pre_norm_ffn.4", hidden)


def _patches(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolves [b, C, H, W] with a kernel that moves by its own size."""
    size = kernel.shape[2]
    return torch.einsum("bcijuv,wcuv->bwij", x.unfold(2, size, size).unfold(3, size, size), kernel)


def _vision_transformer(state: State, x: Tensor) -> Tensor:
    prefix = "image_encoder.model"
    for layer in (0, 1):
        name = f"{prefix}.patch_emb.{layer}.block"
        x = gelu(batch_norm(state, f"{name}.norm", _patches(x, state[f"{name}.conv.weight"])))
    name = f"{prefix}.patch_emb.2.block.conv"
    x = _patches(x, state[f"{name}.weight"]).flatten(2).transpose(1, 2) + state[f"{name}.bias"]
    x = x + state[f"{prefix}.pos_embed.pos_embed.pos_embed"].squeeze(0)  # the class token has none
    x = torch.cat([state[f"{prefix}.cls_token"].expand(len(x), -1, -1), x], dim=1)
    for layer in range(12):
        x = _attention_block(state, f"{prefix}.transformer.{layer}", x, heads=12, causal=False)
    return layer_norm(state, f"{prefix}.post_transformer_norm", x)[:, 0] @ state[f"{prefix}.classifier.proj"]


def encode_image(state: State, image: Tensor) -> Tensor:
    fast = "image_encoder.model.network.6.pe.weight" in state
    return (_fast_vit if fast else _vision_transformer)(state, image)


def encode_text(state: State, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Embeds captions with `positions` [L, C], or else with the checkpoint's own; padding is read like any token."""
    if positions is None:
        positions = state["text_encoder.positional_embedding.pos_embed.pos_embed"][0, 0]
    causal = "image_encoder.model.cls_token" in state  # B only
    x = state["text_encoder.embedding_layer.weight"][ids] + positions
    layer = 0
    while any(key.startswith(f"text_encoder.transformer.{layer}.") for key in state):
        name = f"text_encoder.transformer.{layer}"
        if f"{name}.layer_scale" in state:
            x = _mixer_block(state, name, x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        else:
            x = _attention_block(state, name, x, heads=8, causal=causal)
        layer += 1
    x = layer_norm(state, "text_encoder.final_layer_norm", x)
    return at_end_token(x, ids) @ state["text_encoder.projection_layer"]


def encode_jettclip_text(state: State, ids: Tensor) -> Tensor:
    """Embeds captions padded to 248 tokens: 20 rows of one table, the rest of the other."""
    first = (torch.arange(248) < 20).float().unsqueeze(1)
    tables = state["text_encoder.positional_embedding"], state["text_encoder.positional_embedding_res"]
    return encode_text(state, ids, tables[0] * first + tables[1] * (1 - first))
