from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettclip.models.config import get_model_config
from jettclip.models.factory import create_model
from jettclip.models.mct import ConvBlock, ConvFeedForward, MCt, TokenMixer, build_mct, fold
from jettclip.models.two_towers import unit_rows

SMALL = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2, "no_causal_mask": True}
# "!" inside a run of punctuation is token 0, which is also what pads
CAPTIONS = ["", "a dog", "wow !?!?!?!?! a !?.! cat !;!", "a red car near a big house by the river. " * 5]

tokenizer = open_clip.SimpleTokenizer()


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Moves weights, statistics and scales away from where they start; behind scales of 1e-5 any mistake hides."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2)
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_(std=0.2)
        if isinstance(part, nn.Conv1d):
            part.weight.normal_(std=part.weight[0].numel() ** -0.5)
    for name, parameter in module.named_parameters():
        if name.endswith("scale"):
            parameter.uniform_(0.1, 0.5)
        elif "conv" not in name and "norm" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def small_tower(mask_padding: bool = True, **options: Any) -> MCt:
    tower = build_mct({**SMALL, **options}, 16, False, mask_padding)
    randomize(tower)
    return tower.eval()


@torch.no_grad()
def embed(tower: nn.Module, ids: Tensor) -> Tensor:
    features: Tensor = tower(ids)
    return features


def padding_of(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]) > ids.argmax(dim=1, keepdim=True)


def test_padded_length_changes_no_embedding() -> None:
    config = get_model_config("MobileCLIP-S0-248")
    tower = build_mct(config.text_cfg, config.embed_dim, config.quick_gelu, config.mask_padding)
    randomize(tower)
    tower.eval()
    assert tower.ignores_padding
    ids = tokenizer(CAPTIONS, 248)
    longest = int(ids.argmax(dim=1).max()) + 1
    full = unit_rows(embed(tower, ids))
    for length in (longest, 64, 77):
        torch.testing.assert_close(unit_rows(embed(tower, ids[:, :length])), full, rtol=0, atol=1e-5)
    for row, caption in enumerate(CAPTIONS):  # alone, without any padding
        alone = unit_rows(embed(tower, tokenizer([caption], 248)[:, : int(ids[row].argmax()) + 1]))
        torch.testing.assert_close(alone, full[row : row + 1], rtol=0, atol=1e-5)
    changed = torch.where(padding_of(ids), 5000, ids)
    torch.testing.assert_close(unit_rows(embed(tower, changed)), full, rtol=0, atol=1e-5)


def test_as_published_it_reads_padding() -> None:
    tower = small_tower(mask_padding=False)
    assert not tower.ignores_padding
    ids = tokenizer(CAPTIONS, 77)
    assert (embed(tower, ids) - embed(tower, ids[:, :60])).abs().max() > 1e-2
    masked = small_tower()
    masked.load_state_dict(tower.state_dict())
    full = tokenizer(CAPTIONS[3] * 9, 77)
    assert int(full.argmax()) == 76
    torch.testing.assert_close(embed(masked, full), embed(tower, full), rtol=0, atol=1e-5)
    assert (embed(masked, ids) - embed(tower, ids)).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "length"), [("MobileCLIP-S0", 77), ("MobileCLIP-S0-248", 248)])
def test_it_has_as_many_parameters_as_published(name: str, length: int) -> None:
    with torch.device("meta"):
        model = create_model(name, device="meta")
    image, text = (sum(parameter.numel() for parameter in tower.parameters()) for tower in (model.visual, model.text))
    assert round(image / 1e6, 2) == 11.41
    assert round((text - (length - 77) * 512) / 1e6, 2) == 42.44
    assert [type(block).__name__ for block in model.text.transformer.resblocks][::5] == ["ConvBlock", "ConvBlock"]
    assert len(model.text.transformer.resblocks) == 6
    assert model.text.transformer.resblocks[0].token_mixer.conv.kernel_size == (11,)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Convolves [C, L] channel by channel, zeros around it, in a loop over the taps."""
    reach = weight.shape[2] // 2
    wide = F.pad(x, (reach, reach))
    return sum(weight[:, 0, tap, None] * wide[:, tap : tap + x.shape[1]] for tap in range(weight.shape[2]))  # type: ignore[return-value]


def block_formula(block: ConvBlock, captions: list[Tensor], training: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The block over captions [L, C] of their own lengths, in float64, and the statistics of each of its norms."""
    weights = {name: value.double() for name, value in block.state_dict().items()}
    scales = [weights[name].unsqueeze(1) for name in ("token_mixer.scale", "scale")]
    statistics = {}

    def norm(rows: list[Tensor], name: str) -> list[Tensor]:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        if training:
            tokens = torch.cat(rows, dim=1)
            mean, variance = tokens.mean(dim=1), tokens.var(dim=1, unbiased=False)
            statistics[f"{name}.running_mean"] = 0.9 * weights[f"{name}.running_mean"] + 0.1 * mean
            unbiased = tokens.var(dim=1, unbiased=True)
            statistics[f"{name}.running_var"] = 0.9 * weights[f"{name}.running_var"] + 0.1 * unbiased
        scale = (weights[f"{name}.weight"] / (variance + 1e-5).sqrt()).unsqueeze(1)
        return [(row - mean.unsqueeze(1)) * scale + weights[f"{name}.bias"].unsqueeze(1) for row in rows]

    def taps(rows: list[Tensor], name: str) -> list[Tensor]:
        return [convolved(row, weights[f"{name}.weight"]) for row in rows]

    rows = [caption.double().T for caption in captions]
    branches = zip(
        rows,
        norm(taps(rows, "token_mixer.conv"), "token_mixer.conv_norm"),
        norm(rows, "token_mixer.identity"),
        norm(rows, "token_mixer.norm"),
        strict=True,
    )
    rows = [x + scales[0] * (mixed + same - taken) for x, mixed, same, taken in branches]
    hidden = norm(taps(rows, "mlp.conv"), "mlp.norm")
    for layer in ("fc1", "fc2"):
        weight, bias = weights[f"mlp.{layer}.weight"].squeeze(2), weights[f"mlp.{layer}.bias"].unsqueeze(1)
        hidden = [weight @ row + bias for row in hidden]
        hidden = [F.gelu(row) for row in hidden] if layer == "fc1" else hidden
    return [(x + scales[1] * more).T for x, more in zip(rows, hidden, strict=True)], statistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [14, 30])
def test_a_block_computes_what_the_papers_say_over_real_tokens_alone(training: bool, padded: int) -> None:
    block = ConvBlock(6, 2.0)
    randomize(block)
    block.train(training)
    captions = [torch.randn(length, 6) for length in (14, 3, 9)]
    expected, statistics = block_formula(block, captions, training)
    x = torch.stack([F.pad(caption, (0, 0, 0, padded - len(caption)), value=50.0) for caption in captions])
    padding = torch.tensor([[place >= len(caption) for place in range(padded)] for caption in captions])
    found = block(x, attn_mask=padding)
    for row, rows in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(rows)].double(), rows, rtol=0, atol=1e-5)
    after = block.state_dict()
    for name, value in statistics.items():
        torch.testing.assert_close(after[name].double(), value, rtol=1e-5, atol=1e-6)
    assert len(statistics) == (8 if training else 0)
    assert int(after["mlp.norm.num_batches_tracked"]) == training


def test_without_a_mask_a_block_reads_every_place() -> None:
    block = ConvBlock(6, 2.0)
    randomize(block)
    captions = list(torch.randn(3, 9, 6))
    expected, _ = block_formula(block, captions, training=True)
    torch.testing.assert_close(block(torch.stack(captions)).double(), torch.stack(expected), rtol=0, atol=1e-5)


def test_training_does_not_depend_on_padding() -> None:
    ids = tokenizer(CAPTIONS, 77)
    gradients, statistics, embeddings = [], [], []
    for length in (77, int(ids.argmax(dim=1).max()) + 1):
        torch.manual_seed(0)
        tower = small_tower().train()
        embeddings.append(tower(ids[:, :length]))
        (embeddings[-1] * torch.linspace(-1, 1, 16)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
        statistics.append(dict(tower.named_buffers()))
    torch.testing.assert_close(*embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(*statistics, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients[0].items():
        assert bool(torch.isfinite(gradient).all()), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("part", [lambda: TokenMixer(12), lambda: ConvFeedForward(12, 30)])
@pytest.mark.parametrize("padding", [None, torch.arange(20) > torch.tensor([[19], [4], [11]])])
def test_folded_branches_compute_the_same(part: Any, padding: Tensor | None) -> None:
    module = part()
    randomize(module)
    module.eval()
    x = torch.randn(3, 12, 20)
    kept = torch.ones(3, 1, 20) if padding is None else (~padding).float().unsqueeze(1)
    with torch.no_grad():
        expected = module(x, padding) * kept
        module.reparameterize()
        folded = module(x, padding) * kept
        names = set(module.state_dict())
        torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5)
        module.reparameterize()
        assert torch.equal(module(x, padding) * kept, folded)
    assert set(module.state_dict()) == names
    assert not any(isinstance(child, nn.BatchNorm1d) for child in module.modules())
    assert "conv.bias" in names


def test_a_folded_norm_equals_the_convolution_and_the_norm() -> None:
    conv, norm = nn.Conv1d(6, 6, 3, groups=6, bias=False), nn.BatchNorm1d(6)
    randomize(nn.ModuleList([conv, norm]))
    x = torch.randn(2, 6, 9)
    weight, bias = fold(conv.weight, norm)
    torch.testing.assert_close(F.conv1d(x, weight, bias, groups=6), norm.eval()(conv(x)), rtol=0, atol=1e-5)


def test_gradient_checkpointing_runs_the_blocks_again_and_changes_nothing() -> None:
    ids = tokenizer(CAPTIONS, 77)
    gradients, calls = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        tower = small_tower().train()
        tower.set_grad_checkpointing(checkpointed)
        calls.append(0)
        for block in tower.transformer.resblocks:
            if isinstance(block, ConvBlock):
                block.mlp.fc1.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        tower(ids).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
    assert calls == [2, 4]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("unlocked", "trained"),
    [
        (0, ()),
        (1, ("text_projection",)),
        (2, ("text_projection", "ln_final", "transformer.resblocks.3.")),
        (3, ("text_projection", "ln_final", "transformer.resblocks.3.", "transformer.resblocks.2.")),
        (9, ("",)),
    ],
)
def test_it_can_be_locked_but_for_its_last_layers(unlocked: int, trained: tuple[str, ...]) -> None:
    tower = small_tower()
    tower.lock(unlocked)
    found = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert found == {name for name, _ in tower.named_parameters() if name.startswith(trained or "none")}


def test_a_locked_block_keeps_its_statistics() -> None:
    tower = small_tower()
    tower.lock(2)  # the last block trains, the first does not
    tower.train()
    before = {name: value.clone() for name, value in tower.named_buffers()}
    first, last = tower.transformer.resblocks[0], tower.transformer.resblocks[-1]
    assert not any(module.training for module in first.modules())
    assert all(module.training for module in last.modules())
    tower(tokenizer(CAPTIONS, 77)).sum().backward()
    for name, value in tower.named_buffers():
        assert torch.equal(value, before[name]) == name.startswith("transformer.resblocks.0."), name
    assert all(parameter.grad is None for parameter in first.parameters())


@pytest.mark.parametrize("mask_padding", [True, False])
def test_trains_in_bfloat16(mask_padding: bool) -> None:
    tower, ids = small_tower(mask_padding), tokenizer(CAPTIONS, 77)
    exact = embed(tower, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tower(ids)
        torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))
        tower.train()
        trained = tower(ids)
    trained.float().square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_a_causal_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="text_tower 'mct' reads in both directions.*no_causal_mask to true"):
        small_tower(no_causal_mask=False)


def test_it_refuses_captions_longer_than_its_context() -> None:
    with pytest.raises(ValueError, match="captions of 78 tokens are longer than the tower's context of 77"):
        small_tower()(torch.zeros(1, 78, dtype=torch.long))


def test_it_starts_as_published() -> None:
    tower = build_mct(SMALL, 16, False, mask_padding=True)
    for block in (tower.transformer.resblocks[0], tower.transformer.resblocks[-1]):
        for scale in (block.scale, block.token_mixer.scale):
            torch.testing.assert_close(scale, torch.full_like(scale, 1e-5))
        for layer in (block.mlp.conv, block.mlp.fc1, block.mlp.fc2):
            assert 0.01 < float(layer.weight.detach().std()) < 0.03
