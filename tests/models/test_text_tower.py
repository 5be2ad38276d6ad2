from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor

from jettclip.engine.base import Student
from jettclip.engine.optimizer import create_optimizer
from jettclip.losses.factory import create_loss
from jettclip.models.config import FOLDER, get_model_config
from jettclip.models.mct import build_mct
from jettclip.models.text_tower import TextTower, build_text_tower, truncate_captions
from jettclip.settings import LossSettings
from support import tiny_towers

CONFIGS = sorted(path.stem for path in FOLDER.glob("*.json") if not get_model_config(path.stem).text_tower)
SMALL = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
# "!" inside a run of punctuation is token 0, which is also what pads
CAPTIONS = ["", "a dog", "wow !?!?!?!?! a !?.! cat !;!", "a red car near a big house by the river. " * 5]
TOO_LONG = "a red car near a big house by the river. " * 50
SOT, EOT = 49406, 49407

tokenizer = open_clip.SimpleTokenizer()


@lru_cache(maxsize=2)  # many configs have the same text tower
def tower_of(text_cfg: str, embed_dim: int, quick_gelu: bool, mask_padding: bool) -> TextTower:
    return build_text_tower(json.loads(text_cfg), embed_dim, quick_gelu, mask_padding).eval()


@torch.no_grad()
def move(tower: TextTower) -> None:
    """Moves a tower further than OpenCLIP starts it, so that a mistake cannot hide behind the end token's own."""
    for parameter in tower.eval().parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)


def small_tower(mask_padding: bool = True, causal: bool = False, quick_gelu: bool = False, **options: Any) -> TextTower:
    tower = build_text_tower({**SMALL, "no_causal_mask": not causal, **options}, 16, quick_gelu, mask_padding)
    move(tower)
    return tower


@torch.no_grad()
def embed(tower: torch.nn.Module, ids: Tensor) -> Tensor:
    features: Tensor = tower(ids)
    return features


def assert_same(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_length_changes_no_embedding(name: str) -> None:
    config = get_model_config(name)
    text_cfg = json.dumps(config.text_cfg, sort_keys=True)
    tower = tower_of(text_cfg, config.embed_dim, config.quick_gelu, config.mask_padding)
    assert tower.context_length == 248
    assert tower.ignores_padding
    ids = tokenizer(CAPTIONS, 248)
    longest = int(ids.argmax(dim=1).max()) + 1
    assert longest <= 64
    full = embed(tower, ids)
    assert bool(torch.isfinite(full).all())
    assert_same(embed(tower, ids[:, :64]), full)
    assert_same(embed(tower, ids[:, :longest]), full)


@pytest.mark.parametrize("causal", [True, False])
def test_a_caption_longer_than_the_context_leaves_its_neighbours_alone(causal: bool) -> None:
    tower = small_tower(causal=causal)
    ids = tokenizer([*CAPTIONS, TOO_LONG], 77)
    assert int(ids[-1, -1]) == EOT
    assert_same(embed(tower, ids)[:-1], embed(tower, ids[:-1, :60]))
    assert_same(embed(tower, ids)[-1:], embed(tower, ids[-1:]))


@pytest.mark.parametrize("build", [build_text_tower, build_mct])
def test_token_0_is_read_where_it_is_no_padding(build: Any) -> None:
    ids = tokenizer([CAPTIONS[2]], 77)
    inside = (ids[0, : ids[0].argmax()] == 0).nonzero().flatten()
    assert len(inside) > 0
    changed = ids.clone()
    changed[0, inside] = 1
    tower = build({**SMALL, "no_causal_mask": True}, 16, quick_gelu=False, mask_padding=True)
    move(tower)
    assert (embed(tower, ids) - embed(tower, changed)).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_what_follows_the_end_token_is_not_read(causal: bool) -> None:
    tower = small_tower(causal=causal)
    ids = tokenizer(CAPTIONS, 77)
    behind = torch.arange(77) > ids.argmax(dim=1, keepdim=True)
    assert_same(embed(tower, torch.where(behind, 5000, ids)), embed(tower, ids))


def test_without_the_mask_a_bidirectional_tower_depends_on_padding() -> None:
    tower = small_tower(mask_padding=False)
    assert not tower.ignores_padding
    ids = tokenizer(CAPTIONS, 77)
    assert (embed(tower, ids) - embed(tower, ids[:, :60])).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"quick_gelu": True}, {"mlp_ratio": 2.0, "ls_init_value": 0.5}])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_openclips_tower_where_there_is_no_padding(causal: bool, options: dict[str, Any]) -> None:
    tower = small_tower(causal=causal, **options)
    own = {name: value for name, value in options.items() if name != "quick_gelu"}
    activation = QuickGELU if options.get("quick_gelu") else torch.nn.GELU
    reference = TextTransformer(**SMALL, **own, output_dim=16, no_causal_mask=not causal, act_layer=activation).eval()
    reference.load_state_dict(tower.state_dict())
    assert_same(embed(tower, tokenizer(TOO_LONG)), embed(reference, tokenizer(TOO_LONG)), 0 if causal else 1e-5)
    if causal:
        assert torch.equal(embed(tower, tokenizer(CAPTIONS)), embed(reference, tokenizer(CAPTIONS)))


def test_equals_openclips_own_padding_mask_where_that_is_right() -> None:
    # OpenCLIP takes every token 0 for padding; ours and its mask agree on captions without one
    tower = small_tower()
    reference = TextTransformer(**SMALL, output_dim=16, no_causal_mask=True, use_pad_mask=True).eval()
    reference.load_state_dict(tower.state_dict())
    ids = tokenizer([CAPTIONS[0], CAPTIONS[1], CAPTIONS[3]])
    assert_same(embed(tower, ids), embed(reference, ids))


def test_gradients_reach_every_parameter_and_no_padding() -> None:
    tower = small_tower().train()
    ids = tokenizer(CAPTIONS)
    tower(ids).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert parameter.grad.abs().sum() > 0, name
    longest = int(ids.argmax(dim=1).max()) + 1
    assert tower.positional_embedding.grad[longest:].abs().sum() == 0


@pytest.mark.parametrize("causal", [True, False])
def test_trains_in_bfloat16(causal: bool) -> None:
    tower = small_tower(causal=causal)
    ids = tokenizer(CAPTIONS)
    exact = embed(tower, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tower(ids)
    rounded.float().square().sum().backward()
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in tower.parameters())


def test_evaluation_training_and_gradient_checkpointing_agree() -> None:
    # torch's attention takes a fast path of its own in evaluation without gradients
    tower = small_tower()
    ids = tokenizer(CAPTIONS)
    fast = embed(tower, ids)
    assert_same(fast, tower(ids).detach())
    tower.train()
    assert_same(fast, tower(ids).detach())
    tower.set_grad_checkpointing()
    checkpointed = tower(ids)
    checkpointed.sum().backward()
    assert_same(fast, checkpointed.detach())


def test_a_causal_tower_needs_no_mask() -> None:
    assert not small_tower(causal=True, mask_padding=True).mask_padding
    assert not small_tower(causal=True, pool_type="last").ignores_padding


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pool_type": "last"}, "pool_type 'argmax'"), ({"embed_cls": True}, "argmax"), ({"qk_norm": True}, "default")],
)
def test_refuses_to_mask_padding_where_it_cannot(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_tower(**options)
    small_tower(mask_padding=False, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_refuses_captions_longer_than_its_context(causal: bool) -> None:
    with pytest.raises(ValueError, match="captions of 78 tokens are longer than the tower's context of 77"):
        small_tower(causal=causal)(torch.zeros(1, 78, dtype=torch.long))


@pytest.mark.parametrize("freeze_layer_norm", [True, False])
def test_locks_all_but_the_last_layers(freeze_layer_norm: bool) -> None:
    tower = small_tower()
    tower.lock(0, freeze_layer_norm)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    tower = small_tower()
    tower.lock(2, freeze_layer_norm)
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    last = {name for name in tower.state_dict() if name.startswith(("ln_final", "transformer.resblocks.1."))}
    assert trained == {*last, "text_projection"}


@pytest.mark.parametrize("optimizer", ["adamw", "timm/lamb"])
@pytest.mark.parametrize("causal", [True, False])
def test_frozen_positions_stay_as_they_are_whatever_the_weight_decay(causal: bool, optimizer: str) -> None:
    towers = tiny_towers(causal=causal)
    towers.freeze_position_prefix(20)
    student = Student(towers, create_loss(LossSettings(loss="1*clip@long"), 16, []))
    optimizer = create_optimizer(student, optimizer, lr=0.1, weight_decay=0.5)
    before = towers.text.positional_embedding.detach().clone()
    ids = torch.randint(1, 400, (4, 32))
    ids[:, -1] = EOT
    for _ in range(3):
        optimizer.zero_grad()
        towers(torch.randn(4, 3, 16, 16), None, ids).long[:, 0].sum().backward()
        optimizer.step()
    after = towers.text.positional_embedding.detach()
    assert torch.equal(after[:20], before[:20])
    assert (after[20:] != before[20:]).all(dim=1).all()


@pytest.mark.parametrize("rows", [0, 1, 20, 77])
def test_freezing_positions_changes_no_embedding_and_no_other_gradient(rows: int) -> None:
    tower, ids = small_tower().train(), tokenizer(TOO_LONG, 77)
    gradients, embeddings = [], []
    for frozen in (0, rows):
        tower.freeze_position_prefix(frozen)
        tower.zero_grad()
        embeddings.append(tower(ids))
        embeddings[-1].square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in tower.named_parameters()})
    assert torch.equal(*embeddings)
    whole, cut = (gradient.pop("positional_embedding") for gradient in gradients)
    assert torch.equal(cut[rows:], whole[rows:])
    assert not cut[:rows].any()
    assert whole.abs().sum(dim=1).gt(0).all()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("rows", [-1, 78])
def test_only_positions_that_are_there_can_be_frozen(rows: int) -> None:
    with pytest.raises(ValueError, match=f"--freeze-position-prefix {rows} must be a number of the tower's 77 pos"):
        small_tower().freeze_position_prefix(rows)


@pytest.mark.parametrize("length", [3, 10, 64, 77, 248])
def test_truncated_captions_are_what_the_tokenizer_would_have_made(length: int) -> None:
    captions = [*CAPTIONS, TOO_LONG]
    ids = tokenizer(captions, 248)
    before = ids.clone()
    assert torch.equal(truncate_captions(ids, length), tokenizer(captions, length))
    assert torch.equal(ids, before)


def test_short_captions_are_not_truncated() -> None:
    ids = tokenizer(CAPTIONS, 64)
    assert truncate_captions(ids, 77) is ids


def test_a_tower_with_a_class_embedding_freezes_no_positions() -> None:
    tower = small_tower(mask_padding=False, embed_cls=True)
    with pytest.raises(ValueError, match="--freeze-position-prefix 20: a tower with a class embedding cannot"):
        tower.freeze_position_prefix(20)
