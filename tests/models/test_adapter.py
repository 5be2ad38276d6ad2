from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from jettclip.models.adapter import EmbeddingAdapter, build_adapter, convert_upstream_keys
from jettclip.models.config import FOLDER, get_model_config
from jettclip.models.factory import create_model

WIDTH, DIM = 12, 6
CONFIGS = sorted(path.stem for path in FOLDER.glob("LLM2CLIP-*.json"))
LARGE = [name for name in CONFIGS if name != "LLM2CLIP-Nano"]


def small_adapter(**options: Any) -> EmbeddingAdapter:
    adapter = build_adapter({"width": WIDTH, **options}, DIM)
    randomize(adapter)
    return adapter.eval()


def randomize(module: nn.Module) -> None:
    with torch.no_grad():  # layer norms too, so that one at the wrong place cannot pass
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, device="meta")


def formula(weights: dict[str, Tensor], x: Tensor, depth: int, normalize: bool) -> Tensor:
    """The adapter of arXiv 2411.04997 in float64."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        unit = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    if normalize:
        x = x / x.square().sum(dim=1, keepdim=True).sqrt()
    for block in (f"blocks.{n}" for n in range(depth)):
        hidden = linear(norm(x, f"{block}.norm"), f"{block}.expand")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{block}.contract")
    return linear(norm(x, "norm") if depth else x, "projection")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("depth", "expansion"), [(4, 2), (1, 0.5), (0, 2)])
def test_it_computes_what_the_paper_says(depth: int, expansion: float, normalize: bool) -> None:
    adapter = small_adapter(depth=depth, expansion=expansion, normalize_input=normalize).double()
    x = torch.randn(5, WIDTH, dtype=torch.float64) * 30
    weights = dict(adapter.state_dict())
    torch.testing.assert_close(adapter(x), formula(weights, x, depth, normalize), rtol=1e-10, atol=1e-10)
    if depth:
        assert weights["blocks.0.expand.weight"].shape == (WIDTH * expansion, WIDTH)
    else:
        assert set(weights) == {"projection.weight", "projection.bias"}


@pytest.mark.parametrize(
    ("text_cfg", "parameters"),
    [({"width": 4096}, 273_769_728), ({"width": 2048}, 69_776_640), ({"width": 4096, "depth": 0}, 5_244_160)],
)
def test_it_has_as_many_parameters_as_the_published_one(text_cfg: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        adapter = build_adapter(text_cfg, 1280)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == parameters


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-5)])
def test_embeddings_of_any_precision_are_normalised_without_overflow(dtype: torch.dtype, tolerance: float) -> None:
    adapter = small_adapter()
    x = torch.empty(3, WIDTH).uniform_(-6e4, 6e4)  # of a length that float16 does not hold
    out = adapter(x.to(dtype))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, adapter(x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(adapter(x / 7), adapter(x))


def test_dropout_is_for_training_only() -> None:
    adapter, x = small_adapter(dropout=0.5), torch.randn(3, WIDTH)
    assert torch.equal(adapter(x), adapter(x))
    adapter.train()
    assert not torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.ones(2, 77, dtype=torch.long), r"torch.int64 \[2, 77\]"),
        (torch.ones(2, WIDTH, dtype=torch.long), "torch.int64"),
        (torch.ones(2, 8), r"torch.float32 \[2, 8\]"),
        (torch.ones(2, 3, WIDTH), r"torch.float32 \[2, 3, 12\]"),
    ],
)
def test_what_it_cannot_read_is_refused_with_both_widths(wrong: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=rf"float embeddings \[b, {WIDTH}\], not {said}"):
        small_adapter()(wrong)


@pytest.mark.parametrize(
    ("text_cfg", "said"),
    [
        ({"width": 8, "context_length": 77}, "context_length unknown; it takes width, depth"),
        ({"depth": 2}, "width is missing"),
        ({"width": 0}, "width 0"),
        ({"width": 8, "depth": -1}, "depth -1"),
        ({"width": 8, "expansion": 0}, "expansion 0"),
        ({"width": 8, "dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_a_wrong_text_cfg_is_refused(text_cfg: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"text_cfg of an adapter: .*{said}"):
        build_adapter(text_cfg, DIM)


@pytest.mark.parametrize("unlocked", range(6))
def test_its_layers_are_unlocked_as_openclip_counts_them(unlocked: int) -> None:
    tower = open_clip.transformer.TextTransformer(
        context_length=8, vocab_size=10, width=8, heads=2, layers=4, output_dim=4
    )
    tower.lock(unlocked)
    ours = {"transformer.resblocks": "blocks", "ln_final": "norm", "text_projection": "projection"}
    expected = set()
    for name, parameter in tower.named_parameters():
        for theirs, module in ours.items():
            if parameter.requires_grad and name.startswith(theirs):
                number = name.removeprefix(theirs).split(".")[1] if module == "blocks" else ""
                expected.add((module, number))
    adapter = small_adapter()
    adapter.lock(unlocked, freeze_layer_norm=False)
    trained = [name.split(".") for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    assert {(parts[0], parts[1] if parts[0] == "blocks" else "") for parts in trained} == expected
    frozen = {name.split(".")[0] for name, parameter in adapter.named_parameters() if not parameter.requires_grad}
    assert bool(frozen) == (unlocked < 5)  # four blocks and the projection


def test_a_linear_adapter_can_be_locked() -> None:
    adapter = small_adapter(depth=0)
    adapter.lock()
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    adapter.lock(1)
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_gradient_checkpointing_runs_the_blocks_again_and_changes_no_gradient() -> None:
    gradients, calls = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        adapter = small_adapter(dropout=0.2).train()
        adapter.set_grad_checkpointing(checkpointed)
        calls.append(0)
        for block in adapter.blocks:
            block.expand.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        adapter(torch.randn(4, WIDTH)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in adapter.named_parameters()})
    assert calls == [4, 8]
    torch.testing.assert_close(gradients[0], gradients[1])


class UpstreamBlock(nn.Module):
    """A block with the names of its weights in upstream's checkpoints."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0), nn.Linear(2 * width, width))
        self.ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.ln(x))


@pytest.mark.parametrize("depth", [4, 2])
def test_upstreams_weights_give_upstreams_output(depth: int) -> None:
    blocks = [UpstreamBlock(WIDTH) for _ in range(depth)]
    upstream = nn.Sequential(*blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, DIM))
    randomize(upstream)
    others = {
        "logit_scale": torch.ones([]),
        "visual.proj": torch.ones(2, 2),
        "text.text_adaptor.0.gamma": torch.ones(1),
    }
    state = {f"text.text_adaptor.{key}": value for key, value in upstream.state_dict().items()}
    converted = convert_upstream_keys({**state, **others})
    assert {key: converted.pop(key) for key in others} == others  # what it does not know is left for others to judge
    adapter = small_adapter(depth=depth)
    adapter.load_state_dict({key.removeprefix("text."): value for key, value in converted.items()})
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(adapter(x), upstream(x / x.norm(dim=1, keepdim=True)))


@pytest.mark.parametrize("name", LARGE)
def test_the_image_tower_is_openclips_but_for_the_width_of_its_projection(name: str) -> None:
    tower = name.removeprefix("LLM2CLIP-").removesuffix("-2048")
    openai = tower.startswith("ViT")
    with torch.device("meta"):
        reference = open_clip.create_model(f"{tower}-quickgelu" if openai else tower, embed_dim=1280, device="meta")
    ours, theirs = (
        {key: value.shape for key, value in model.visual.state_dict().items()} for model in (on_meta(name), reference)
    )
    assert ours == theirs
    kinds = [[type(module) for module in model.visual.modules()] for model in (on_meta(name), reference)]
    assert kinds[0] == kinds[1]
    assert (open_clip.transformer.QuickGELU in kinds[0]) == openai


@pytest.mark.parametrize("name", LARGE)
def test_the_configs_say_what_the_published_models_are(name: str) -> None:
    config = get_model_config(name)
    tower, tag = name.removeprefix("LLM2CLIP-").removesuffix("-2048"), "openai"
    if tower.startswith("EVA02"):
        tag = "merged2b_s6b_b61k"
    published = open_clip.get_pretrained_cfg(tower, tag)
    assert {key: published[key] for key in config.preprocess_cfg} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.preprocess_cfg.items()
    }
    assert set(config.preprocess_cfg) == {"mean", "std", "interpolation", "resize_mode"}
    model = on_meta(name)
    assert model.embedding_width == (2048 if name.endswith("-2048") else 4096)
    assert model.embed_dim == 1280
    assert len(model.text.blocks) == 4


def test_there_are_configs_for_every_tower_and_width() -> None:
    towers = ("EVA02-L-14-336", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
    assert {f"LLM2CLIP-{tower}{width}" for tower in towers for width in ("", "-2048")} == set(LARGE)


def test_the_small_model_embeds_images_and_stored_embeddings() -> None:
    model = create_model("LLM2CLIP-Nano").eval()
    assert model.embedding_width == 384
    assert on_meta("Nano-248").embedding_width is None
    image = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    features = model(image, torch.randn(2, 384), torch.randn(2, 384))
    for rows in features[:3]:
        assert rows.shape == (2, 192)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    assert not model.ignores_padding
    assert not model.end_token_is_largest
    assert "logit_scale" in model.no_weight_decay()
