from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foreign import clip, llm2clip, mobileclip
from foreign.layers import State, stretched, unread
from jettclip.checkpoint import Position, save_checkpoint
from jettclip.engine.base import Student
from jettclip.engine.ddp import DDPEngine
from jettclip.engine.optimizer import create_optimizer
from jettclip.losses.factory import create_loss
from jettclip.models.checkpoints import Description, Weights, describe, load_weights
from jettclip.models.factory import create_model
from jettclip.models.importers import format_of
from jettclip.models.two_towers import TwoTowers
from jettclip.openclip import QuickGELU
from jettclip.settings import LossSettings

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}
HEAD_WIDTH = 16


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Adds the model "tiny" to OpenCLIP's own; what a test changes in it counts."""
    config = copy.deepcopy(TINY)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    return config


@pytest.fixture(autouse=True)
def no_random_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts weights as NaN, which no checkpoint may leave in a model; that is faster, too."""
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, **__: self.fill_(torch.nan))


def captions(length: int, words: int = 12, vocabulary: int = 49408) -> Tensor:
    """Returns a padded caption and one that fills the length; 0, which also pads, is a token as well."""
    ids = torch.randint(0, vocabulary - 2, (2, length))
    ids[:, 0], ids[:, 3] = vocabulary - 2, 0
    ids[0, words + 1 :] = 0
    ids[0, words] = ids[1, -1] = vocabulary - 1
    return ids


def pixels(*shape: int) -> Tensor:
    return torch.randn(2, 3, *shape)


def assert_same(ours: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    """Compares rows of embeddings, which must tell their inputs apart, or the comparison means nothing."""
    assert (reference[0] - reference[-1]).norm() > 0.05 * reference.norm() or len(reference) == 1
    assert (ours - reference).norm() < tolerance * reference.norm()


@torch.no_grad()
def assert_same_as_clip(model: TwoTowers, state: State, image: Tensor, ids: Tensor, head_width: int) -> None:
    assert_same(model.encode_image(image), clip.encode_image(state, image, head_width))
    assert_same(model.encode_text(ids), clip.encode_text(state, ids, head_width))
    torch.testing.assert_close(model.logit_scale.detach(), state["logit_scale"].reshape(1))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def halved(state: State) -> State:
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def raised(state: State) -> State:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


class Holder(torch.nn.Module):
    """Holds tensors by name."""


def write_archive(state: State, path: Path) -> Path:
    """Writes a TorchScript archive with modules, parameters and buffers of these names."""
    root = Holder()
    for name, value in state.items():
        *parents, last = name.split(".")
        module: torch.nn.Module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, Holder())
            module = getattr(module, parent)
        if value.is_floating_point():
            module.register_parameter(last, torch.nn.Parameter(value))
        else:
            module.register_buffer(last, value)
    with pytest.warns(FutureWarning):  # torch gives TorchScript up, but OpenAI's files stay
        torch.jit.save(torch.jit.script(root), path)
    return path


@pytest.mark.parametrize("layout", ["text at the root", "two towers", "trainer", "folder"])
@torch.no_grad()
def test_openclip(tiny: dict[str, Any], tmp_path: Path, layout: str) -> None:
    reference = open_clip.create_model("tiny", force_custom_text=layout != "text at the root").eval()
    for parameter in reference.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    state, path = reference.state_dict(), tmp_path / "weights.pt"
    if layout == "folder":
        path = tmp_path
        save_file(state, path / "open_clip_model.safetensors")
    elif layout == "trainer":
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "name": "a", "state_dict": wrapped, "optimizer": {"state": {}, "x": [1.0]}}, path)
    else:
        torch.save(state, path)
    model = create_model("tiny", str(path)).eval()
    image, ids = pixels(32, 32), captions(77, vocabulary=100)
    assert_same(model.encode_image(image), reference.encode_image(image))
    assert_same(model.encode_text(ids), reference.encode_text(ids))
    torch.testing.assert_close(model.logit_scale, reference.logit_scale.reshape(1))


@pytest.mark.parametrize("container", ["state dict", "TorchScript"])
def test_openai(tmp_path: Path, container: str) -> None:
    state, path = halved(clip.clip_state()), tmp_path / "ViT.pt"
    if container == "TorchScript":
        mask = {"transformer.resblocks.0.attn_mask": torch.full((77, 77), -torch.inf).triu(1)}
        write_archive(state | mask, path)
    else:
        torch.save(state, path)
    model = create_model("tiny", str(path)).eval()
    assert model.quick_gelu
    assert_same_as_clip(model, raised(state), pixels(32, 32), captions(77, vocabulary=100), HEAD_WIDTH)


@pytest.mark.parametrize("half", [True, False])
def test_long_clip(tiny: dict[str, Any], tmp_path: Path, half: bool) -> None:
    tiny["text_cfg"]["context_length"] = 248
    state = clip.long_clip_state()
    state = halved(state) if half else state
    torch.save(state, tmp_path / "longclip.pt")
    model = create_model("tiny", str(tmp_path / "longclip.pt")).eval()
    assert model.quick_gelu
    assert_same_as_clip(model, raised(state), pixels(32, 32), captions(248, vocabulary=100), HEAD_WIDTH)


def test_long_clip_of_full_size() -> None:
    sizes = {"embed_dim": 512, "image_size": 224, "vision_width": 768, "text_width": 512, "layers": 12}
    state = clip.long_clip_state(**sizes, vocab_size=49408)
    model = create_model("ViT-B-16-248", force_quick_gelu=True).eval()
    load_weights(model, Weights(Path("longclip-B.pt"), state, Description(quick_gelu=True)))
    assert_same_as_clip(model, state, pixels(224, 224), captions(248), head_width=64)


def test_openai_stretched_to_248_tokens(tmp_path: Path) -> None:
    state = clip.clip_state()
    torch.save(state, tmp_path / "ViT.pt")
    model = create_model("tiny", str(tmp_path / "ViT.pt"), force_context_length=248).eval()
    state["positional_embedding"] = stretched(state["positional_embedding"])
    assert_same_as_clip(model, state, pixels(32, 32), captions(248, vocabulary=100), HEAD_WIDTH)


def assert_same_images(model: TwoTowers, state: State, image: Tensor) -> None:
    """Compares in float64: with random weights, fifty layers make much of float32's rounding."""
    precise = {key: value.double() for key, value in state.items() if key.startswith("image_encoder.")}
    ours = copy.deepcopy(model.visual).double()(image.double())
    assert_same(ours, mobileclip.encode_image(precise, image.double()), 1e-9)


@pytest.mark.parametrize("variant", ["S0", "S1", "S2", "B"])
@torch.no_grad()
def test_mobileclip(tmp_path: Path, variant: str) -> None:
    state, path = mobileclip.mobileclip_state(variant), tmp_path / "mobileclip.pt"
    torch.save(state, path)
    model = create_model(f"MobileCLIP-{variant}", str(path)).eval()
    if variant == "B":  # timm gives its layer norms an epsilon of 1e-6, Apple one of 1e-5
        image = pixels(224, 224)
        assert_same(model.encode_image(image), mobileclip.encode_image(state, image), 1e-4)
    else:
        assert_same_images(model, state, pixels(64, 96))
    ids = captions(77)  # padding is read, as published, but by B
    assert_same(model.encode_text(ids), mobileclip.encode_text(state, ids))
    torch.testing.assert_close(model.logit_scale.detach(), state["logit_scale"].reshape(1))

    longer = create_model(f"MobileCLIP-{variant}-248").eval()
    load_weights(longer, Weights(path, state))
    torch.testing.assert_close(dict(longer.visual.state_dict()), dict(model.visual.state_dict()), rtol=0, atol=0)
    ids = captions(248)
    positions = stretched(state["text_encoder.positional_embedding.pos_embed.pos_embed"][0, 0])
    assert_same(longer.encode_text(ids[1:]), mobileclip.encode_text(state, ids[1:], positions))
    alone = mobileclip.encode_text(state, ids[:1, :13], positions[:13])
    assert_same(longer.encode_text(ids)[:1], alone)  # padding is not read, whatever the length


@torch.no_grad()
def test_jettclip(tmp_path: Path) -> None:
    state, path = mobileclip.jettclip_state(), tmp_path / "jettclip.pt"
    torch.save(state, path)
    ids = captions(248)
    reference = mobileclip.encode_jettclip_text(state, ids)
    model = create_model("JettCLIP-S0", str(path)).eval()  # padding is read, as its code does
    assert_same(model.encode_text(ids), reference)
    assert_same_images(model, state, pixels(64, 96))
    masked = create_model("MobileCLIP-S0-248").eval()
    load_weights(masked, Weights(path, state))
    full, padded = masked.encode_text(ids[1:]), masked.encode_text(ids[:1])
    assert_same(full, reference[1:])
    assert (padded - reference[:1]).norm() > 0.01 * padded.norm()


@pytest.mark.parametrize("variant", ["S0", "B"])
def test_the_references_read_every_weight(variant: str) -> None:
    state = mobileclip.mobileclip_state(variant, vocabulary=100)
    image, ids = torch.randn(1, 3, *((224, 224) if variant == "B" else (64, 96))), captions(77, vocabulary=100)

    def embed(state: State) -> Tensor:
        return torch.cat([mobileclip.encode_image(state, image), mobileclip.encode_text(state, ids)])

    assert unread(state, embed) == ["logit_scale"]


def test_the_references_read_every_weight_of_clip() -> None:
    image, ids = pixels(32, 32), captions(77, vocabulary=100)

    def embed(state: State) -> Tensor:
        return torch.cat([clip.encode_image(state, image, HEAD_WIDTH), clip.encode_text(state, ids, HEAD_WIDTH)])

    assert unread(clip.clip_state(), embed) == ["logit_scale"]


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_ours(tiny: dict[str, Any], tmp_path: Path, quick_gelu: bool) -> None:
    trained = create_model("tiny", force_quick_gelu=quick_gelu).eval()
    for parameter in trained.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    student = Student(trained, create_loss(LossSettings(loss="1*clip@long"), 16, []))
    engine = DDPEngine(student, create_optimizer(student, "adamw", lr=1.0, weight_decay=0.0), torch.device("cpu"))
    path = save_checkpoint(tmp_path, engine, Position(1, 1), describe(trained))
    tiny["quick_gelu"] = not quick_gelu  # the checkpoint knows better
    model = create_model("tiny", str(path)).eval()
    assert model.quick_gelu == quick_gelu
    activations = [module for module in model.modules() if isinstance(module, QuickGELU)]
    assert len(activations) == (4 if quick_gelu else 0)
    image, ids = pixels(32, 32), captions(77, vocabulary=100)
    assert_same(model.encode_image(image), trained.encode_image(image), 1e-6)
    assert_same(model.encode_text(ids), trained.encode_text(ids), 1e-6)


@torch.no_grad()
def test_llm2clip(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"text_tower": "adapter", "text_cfg": {"width": 24}, "quick_gelu": True}
    state = clip.image_tower_state() | llm2clip.adapter_state(24, 16)
    torch.save(state, tmp_path / "llm2clip.pt")
    model = create_model("tiny", str(tmp_path / "llm2clip.pt")).eval()
    image, embeddings = pixels(32, 32), torch.randn(2, 24) * 5
    assert_same(model.encode_image(image), clip.encode_image(state, image, HEAD_WIDTH))
    assert_same(model.encode_text(embeddings), llm2clip.adapt(state, embeddings))


@pytest.mark.parametrize("checkpoint", [clip.clip_state, clip.long_clip_state])
def test_a_model_of_another_activation_is_built_with_the_checkpoints(checkpoint: Any, tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "weights.pt")
    model = create_model("tiny", str(tmp_path / "weights.pt"), force_context_length=248)
    assert model.quick_gelu
    assert sum(isinstance(module, QuickGELU) for module in model.modules()) == 4
    with pytest.raises(ValueError, match="was trained with quick_gelu=True, the model has quick_gelu=False"):
        load_weights(create_model("tiny", force_context_length=248), tmp_path / "weights.pt")


def foreign_state(name: str) -> tuple[State, str]:
    """Returns weights in a format, and the model they are of."""
    if name == "MobileCLIP":
        return mobileclip.mobileclip_state("S0", vocabulary=49408), "MobileCLIP-S0"
    if name == "JettCLIP":
        return mobileclip.jettclip_state(), "JettCLIP-S0"
    if name == "LLM2CLIP":
        return clip.image_tower_state() | llm2clip.adapter_state(24, 16), "adapter"
    if name == "Long-CLIP":
        return clip.long_clip_state(), "tiny"
    state = clip.clip_state()
    return state if name == "OpenAI CLIP" else open_clip.create_model("tiny").state_dict(), "tiny"


FORMATS = ("OpenAI CLIP", "OpenCLIP", "Long-CLIP", "MobileCLIP", "JettCLIP", "LLM2CLIP")
ELSEWHERE = {"OpenAI CLIP": "input_resolution context_length vocab_size", "OpenCLIP": "attn_mask"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_key_counts_and_a_misfit_leaves_the_model_as_it_is(name: str, tiny: dict[str, Any]) -> None:
    state, model_name = foreign_state(name)
    assert format_of(state).name == name
    options = {"force_quick_gelu": True} if name in ("OpenAI CLIP", "Long-CLIP") else {}
    if name == "Long-CLIP":
        options["force_context_length"] = 248
    if model_name == "adapter":
        tiny |= {"text_tower": "adapter", "text_cfg": {"width": 24}}
    model = create_model(model_name if "S0" in model_name else "tiny", **options)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    before = copy.deepcopy(model.state_dict())

    def refusal(changed: State) -> str:
        with pytest.raises(ValueError, match="weights.pt does not fit the model") as error:
            load_weights(model, Weights(Path("weights.pt"), changed))
        assert "\n" not in str(error.value)
        return str(error.value)

    keys = [key for key in state if key not in ELSEWHERE.get(name, "").split()]
    special = [key for key in keys if "positional" in key or key.count(".") == 0 or "patch_embed.0" in key]
    for key in {*keys[:: max(1, len(keys) // 30)], *special}:
        if not key.endswith("_res"):  # without which it is another format
            missing = refusal({other: value for other, value in state.items() if other != key})
            assert "missing" in missing, key
            assert missing.count(";") < 2, missing  # the key alone, or timm's bias that is made of it
        misshapen = refusal({**state, key: torch.zeros(300, 5)})
        shapes = ("is [300, 5]", "is [5, 300]", "logit_scale is [1500]", "_res [300, 5]")
        assert any(shape in misshapen for shape in shapes), misshapen
    twin = {"JettCLIP": "text_encoder.positional_embedding.pos_embed.pos_embed", "OpenCLIP": ""}.get(
        name, "text.ln_final.weight" if name != "LLM2CLIP" else "text.blocks.0.norm.weight"
    )
    if twin:  # what is there already, by its other name
        value = torch.zeros(1, 1, 77, 512) if name == "JettCLIP" else torch.zeros(32)
        assert "two keys of it mean the same weights" in refusal({**state, twin: value})
    apples = ("image_encoder.", "image_encoder.model.", "text_encoder.", "text_encoder.transformer.0.")
    for prefix in ("", "visual.", "text.", "transformer.", *(apples if "S0" in model_name else ())):
        extra = refusal({**state, f"{prefix}strange": torch.zeros(1)})
        assert "1 keys differ: unknown" in extra
        assert "strange" in extra
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@cache
def shapes_of(checkpoint: str) -> State:
    """Returns tensors of a checkpoint's names and shapes, without content."""
    large = {"embed_dim": 768, "image_size": 224, "patch_size": 14, "vision_width": 1024, "text_width": 768}
    makers = {
        "ViT-L": lambda: clip.clip_state(**large, layers=1),
        "Long-CLIP": clip.long_clip_state,
        "LLM2CLIP": lambda: clip.image_tower_state() | llm2clip.adapter_state(24, 16),
        "tiny": clip.clip_state,
    }
    make = makers.get(checkpoint, lambda: mobileclip.mobileclip_state(checkpoint, vocabulary=100))
    return {name: value.to("meta") for name, value in make().items()}


@pytest.mark.parametrize(
    ("checkpoint", "model_name"),
    [("S1", "MobileCLIP-S0"), ("S0", "MobileCLIP-S1"), ("S0", "MobileCLIP2-S0"), ("S0", "MobileCLIP-B"),
     ("B", "MobileCLIP-S0"), ("S0", "ViT-B-32"), ("B", "ViT-B-32"), ("S0", "tiny"), ("B", "Nano-248"),
     ("ViT-L", "ViT-B-16"), ("ViT-L", "MobileCLIP-S0"), ("ViT-L", "tiny"), ("Long-CLIP", "ViT-B-16-248"),
     ("LLM2CLIP", "tiny"), ("tiny", "LLM2CLIP-Nano"), ("tiny", "MobileCLIP-B")],
)  # fmt: skip
def test_another_architecture_is_refused_in_one_line(checkpoint: str, model_name: str) -> None:
    with torch.device("meta"):
        model = create_model(model_name, device="meta", force_quick_gelu=checkpoint in ("ViT-L", "Long-CLIP", "tiny"))
    with pytest.raises(ValueError, match="other.pt does not fit the model") as error:
        load_weights(model, Weights(Path("other.pt"), shapes_of(checkpoint)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys", [["text_model.embeddings.position_ids", "logit_scale"], ["model.layers.0.weight"], ["a"], ["textual.x"]]
)
def test_weights_of_another_kind_are_told(keys: list[str]) -> None:
    with pytest.raises(ValueError, match=f"its keys \\({keys[0]}.* are of no known format: JettCLIP, MobileCLIP, Long"):
        format_of({key: torch.zeros(1) for key in keys})


@pytest.mark.parametrize("rows", [(248, 77), (77, 248)])
def test_long_clips_tables_must_be_of_one_shape(tiny: dict[str, Any], rows: tuple[int, int]) -> None:
    state = clip.long_clip_state(context_length=rows[0])
    state["positional_embedding_res"] = torch.zeros(rows[1], 32)
    model = create_model("tiny", force_context_length=248)
    with pytest.raises(ValueError, match=r"_res \[\d+, 32\]; Long-CLIP's tables are of one shape"):
        load_weights(model, Weights(Path("x.pt"), state))
