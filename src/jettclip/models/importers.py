"""Brings checkpoints of other projects to our key names, which are those of OpenCLIP's ``CustomTextCLIP``.

A checkpoint's format is told by its keys. Every key of it goes on, under a new name or its old one, so that loading it
strictly finds what no longer belongs anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from jettclip import openclip
from jettclip.models.adapter import convert_upstream_keys
from jettclip.models.positions import KEEP
from jettclip.models.two_towers import TwoTowers

State = dict[str, Tensor]
C = TypeVar("C", bound=Collection[Any])


class Format(NamedTuple):
    """A layout of checkpoint keys."""

    name: str
    mark: str  # a regular expression that some key matches in this format, and in none below it
    convert: Callable[[State, TwoTowers], State]  # to the keys of a model of ours
    quick_gelu: bool | None = None  # whether all its models have QuickGELU; None if that differs


def format_of(state: State) -> Format:
    """Tells the format of a checkpoint by its keys.

    Raises:
        ValueError: if it is none that we know.
    """
    for known in FORMATS:
        if any(re.match(known.mark, key) for key in state):
            return known
    raise ValueError(
        f"its keys ({', '.join(list(state)[:3])}, ...) are of no known format: "
        f"{', '.join(dict.fromkeys(known.name for known in FORMATS))}"
    )


def _keep(state: State, model: TwoTowers) -> State:
    return state


def _from_openai(state: State, model: TwoTowers) -> State:
    # no weights: three numbers, and the causal mask that each text block of an archive may hold as an attribute
    others = r"(input_resolution|context_length|vocab_size|transformer\.resblocks\.\d+\.attn_mask)$"
    return _from_text_at_root({key: value for key, value in state.items() if not re.match(others, key)}, model)


def _from_text_at_root(state: State, model: TwoTowers) -> State:
    _require(state, "text_projection")  # by which OpenCLIP tells this layout
    return _all_of(state, openclip.convert_to_custom_text_state_dict(state))


def _from_long_clip(state: State, model: TwoTowers) -> State:
    return _from_openai(_merge_positions(state, "positional_embedding"), model)


def _from_mobileclip(state: State, model: TwoTowers) -> State:
    _require(state, "logit_scale", _VIT_MARK if any(".patch_emb." in key for key in state) else _FASTVIT_MARK)
    try:
        converted = openclip.convert_state_dict(model, state)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:  # OpenCLIP and timm expect their own towers
        raise ValueError(f"it is a checkpoint of MobileCLIP's, of another architecture ({error})") from error
    for tower, name in (("image_encoder.", "visual."), ("text_encoder.", "text.")):
        _all_of([key for key in state if key.startswith(tower)], [key for key in converted if key.startswith(name)])
    left_over = {key: value for key, value in state.items() if not re.match(_CONVERTED, key)}
    renamed = [*(_name_mct(key, value) for key, value in converted.items()), *left_over.items()]
    return _all_of(renamed, dict(renamed))


def _from_jettclip(state: State, model: TwoTowers) -> State:
    return _from_mobileclip(_merge_positions(state, "text_encoder.positional_embedding"), model)


def _from_llm2clip(state: State, model: TwoTowers) -> State:
    return _all_of(state, convert_upstream_keys(state))


def _merge_positions(state: State, name: str) -> State:
    """Merges Long-CLIP's tables: rows it froze from one, rows it trained from the other (arXiv 2403.15378)."""
    _require(state, name)
    state = dict(state)
    frozen, trained = state[name], state.pop(f"{name}_res")
    if frozen.shape != trained.shape:
        raise ValueError(
            f"{name} is {list(frozen.shape)} and {name}_res {list(trained.shape)}; Long-CLIP's tables are of one shape"
        )
    state[name] = torch.cat([frozen[:KEEP], trained[KEEP:]])
    return state


def _all_of(before: Collection[Any], after: C) -> C:
    """Returns `after`, unless it has fewer keys than there were before: two of them then came to one name."""
    if len(after) < len(before):
        raise ValueError("two keys of it mean the same weights, once under another project's name and once under ours")
    return after


def _require(state: State, *keys: str) -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")


_FASTVIT_MARK = "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"
_VIT_MARK = "image_encoder.model.patch_emb.0.block.conv.weight"
"""Keys by which OpenCLIP tells MobileCLIP's checkpoints."""

_CONVERTED = r"(image_encoder\.model|text_encoder)\.|logit_scale$"
"""What OpenCLIP renames of MobileCLIP's keys; it ignores others."""

_MCT_NAMES = (
    (r"token_mixer\.norm\.rbr_skip\.", "token_mixer.norm."),
    (r"token_mixer\.mixer\.rbr_skip\.", "token_mixer.identity."),
    (r"token_mixer\.mixer\.rbr_conv\.0\.conv\.", "token_mixer.conv."),
    (r"token_mixer\.mixer\.rbr_conv\.0\.bn\.", "token_mixer.conv_norm."),
    (r"convffn\.conv\.conv\.", "mlp.conv."),
    (r"convffn\.conv\.bn\.", "mlp.norm."),
    (r"convffn\.", "mlp."),
    (r"layer_scale$", "scale"),
)
"""Names in Apple's MCt blocks, and ours."""


def _name_mct(key: str, value: Tensor) -> tuple[str, Tensor]:
    """Renames what stands in a convolutional block of MCt, and drops the axes of pixels that its tensors have."""
    if not re.match(r"text\.transformer\.resblocks\.\d+\.(token_mixer|convffn|layer_scale)", key):
        return key, value
    for pattern, name in _MCT_NAMES:
        key = re.sub(pattern, name, key)
    if key.endswith("scale"):
        return key, value.flatten()
    return key, value.squeeze(2) if value.dim() > 2 else value


FORMATS = (
    Format("JettCLIP", r"text_encoder\.positional_embedding_res$", _from_jettclip, quick_gelu=False),
    Format("MobileCLIP", r"(image|text)_encoder\.", _from_mobileclip, quick_gelu=False),
    Format("Long-CLIP", r"positional_embedding_res$", _from_long_clip, quick_gelu=True),
    Format("OpenAI CLIP", r"input_resolution$", _from_openai, quick_gelu=True),
    Format("LLM2CLIP", r"text\.text_adaptor\.", _from_llm2clip),
    Format("OpenCLIP", r"(token_embedding|transformer|positional_embedding|text_projection)\b", _from_text_at_root),
    Format("OpenCLIP", r"(visual|text)\.", _keep),
)
