from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from jettclip import openclip
from jettclip.models.checkpoints import (
    WEIGHTS,
    Description,
    Weights,
    check_description,
    describe,
    load_image_tower,
    load_weights,
    read_weights,
)
from jettclip.models.factory import create_model
from jettclip.models.positions import stretch_positions
from jettclip.models.two_towers import TwoTowers
from jettclip.settings import ModelSettings

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Adds the model "tiny" to OpenCLIP's own."""
    config = copy.deepcopy(TINY)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    return config


def published_state(custom_text: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = open_clip.create_model("tiny", force_custom_text=custom_text).state_dict()
    return state


def write(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        path.parent.mkdir(exist_ok=True)
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.stem != "legacy")
    return path


def long_model() -> TwoTowers:
    return create_model("tiny", force_context_length=248)


@pytest.mark.parametrize("custom_text", [True, False])
@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_a_77_token_checkpoint_is_stretched_by_the_closed_form(tmp_path: Path, custom_text: bool, file: str) -> None:
    state = published_state(custom_text)
    model = long_model()
    load_weights(model, write(tmp_path / file, state))
    table = state["text.positional_embedding" if custom_text else "positional_embedding"]
    loaded = model.state_dict()
    assert torch.equal(loaded.pop("text.positional_embedding"), stretch_positions(table, 248))
    assert loaded.pop("logit_scale").shape == (1,)
    for name, tensor in loaded.items():
        old_name = name if custom_text else name.removeprefix("text.")
        assert torch.equal(tensor, state[old_name]), name


def test_what_openclips_trainer_wraps_around_the_weights_is_unwrapped(tmp_path: Path) -> None:
    state = published_state(custom_text=True)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_3.pt")
    model = create_model("tiny", str(tmp_path / "epoch_3.pt"))
    assert torch.equal(model.text.positional_embedding, state["text.positional_embedding"])


def test_a_folder_of_ours_is_read_by_its_weights_file(tmp_path: Path) -> None:
    state = published_state(custom_text=True)
    write(tmp_path / "epoch_1" / WEIGHTS, state)
    assert read_weights(tmp_path / "epoch_1").state.keys() == state.keys()


def test_half_precision_weights_load_into_a_float32_model(tmp_path: Path) -> None:
    state = published_state(custom_text=True)
    model = long_model()
    load_weights(model, write(tmp_path / "half.pt", {name: tensor.half() for name, tensor in state.items()}))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    table = state["text.positional_embedding"].half().float()  # raised before it is stretched, not after
    assert torch.equal(model.text.positional_embedding, stretch_positions(table, 248))
    assert torch.equal(model.visual.proj, state["visual.proj"].half().float())


def test_misfits_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = published_state(custom_text=True)
    state["visual.proj"] = torch.zeros(5, 5)
    state["strange"] = torch.zeros(1)
    del state["text.ln_final.bias"]
    model = long_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_weights(model, write(tmp_path / "weights.pt", state))
    assert str(error.value).endswith(
        "weights.pt does not fit the model, 3 keys differ: missing text.ln_final.bias; unknown strange; "
        "visual.proj is [5, 5], the model's is [32, 16]"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "weights.pt", {"visual.strange": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"; and \d+ more$") as error:
        load_weights(long_model(), path)
    assert str(error.value).count("missing") == 20
    assert "\n" not in str(error.value)


def test_a_longer_context_is_not_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "weights.pt", long_model().state_dict())
    with pytest.raises(ValueError, match=r"positional_embedding is \[248, 32\], the model's is \[77, 32\]"):
        create_model("tiny", str(path))


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickle_is_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    content = {"state_dict": {"visual.a": torch.zeros(1)}, "x": Malicious(target)}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(target), protocol=2))
    for file in ("zip.pt", "legacy.pt", "plain.pt"):
        with pytest.raises(ValueError, match=f"{file} cannot be read as a checkpoint .*nothing is executed") as error:
            read_weights(tmp_path / file)
        assert "weights_only" not in str(error.value)  # torch would go on to advise what we refuse
        assert "\n" not in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize("file", ["good.pt", "legacy.pt", "good.safetensors"])
def test_damaged_files_are_told_in_one_line(tmp_path: Path, file: str) -> None:
    state = {"visual.a": torch.arange(100.0)}
    whole = write(tmp_path / file, state).read_bytes()
    for number, data in enumerate((b"", b"hello", whole[: len(whole) // 2], whole[:-20], b"\0" * 64 + whole[64:])):
        path = tmp_path / f"{number}-{file}"
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=f"{path.name} cannot be read as a checkpoint .*; give a .safetensors"
        ) as e:
            read_weights(path)
        assert "\n" not in str(e.value)
    assert torch.equal(read_weights(tmp_path / file).state["visual.a"], state["visual.a"])


@pytest.mark.parametrize(
    "content",
    [torch.zeros(2), [1], {}, {"epoch": 3, "visual.a": torch.zeros(1)}, {"state_dict": 3},
     {"state_dict": {}}, {"other": torch.zeros(1)}],
)  # fmt: skip
def test_a_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt cannot be read as a checkpoint .*; give a .safetensors file"):
        read_weights(tmp_path / "other.pt")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.pt cannot be read"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=f"{WEIGHTS} cannot be read"):
        read_weights(tmp_path)


def test_our_weights_load_into_openclip() -> None:
    model = create_model("tiny").eval()
    state = model.state_dict()
    state["logit_scale"] = state["logit_scale"].reshape(())  # as checkpoints have it
    reference = open_clip.create_model("tiny", force_custom_text=True).eval()
    reference.load_state_dict(state)
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 77))
    with torch.no_grad():
        expected = reference(image, ids)
        features = model(image, ids)
    torch.testing.assert_close(features.image, expected[0])
    torch.testing.assert_close(features.short, expected[1])
    torch.testing.assert_close(features.logit_scale, expected[2].reshape(1))


def test_deepspeeds_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    state = published_state(custom_text=True)
    torch.save({"module": {f"module.{k}": v for k, v in state.items()}, "dp_world_size": 1}, tmp_path / "states.pt")
    assert read_weights(tmp_path / "states.pt").state.keys() == state.keys()


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_our_checkpoints_describe_their_model(tmp_path: Path, quick_gelu: bool) -> None:
    options = {"force_image_size": (16, 48), "force_context_length": 30, "image_mean": (0.1, 0.2, 0.3)}
    model = create_model("tiny", force_quick_gelu=quick_gelu, **options)  # type: ignore[arg-type]
    save_file(model.state_dict(), tmp_path / WEIGHTS, describe(model))
    told = read_weights(tmp_path).described
    assert (told.model, told.quick_gelu, told.context_length) == ("tiny", quick_gelu, 30)
    again = create_model("tiny", str(tmp_path))
    assert json.dumps(again.preprocess_cfg) == json.dumps(model.preprocess_cfg)
    assert (again.context_length, again.quick_gelu, again.visual.image_size) == (30, quick_gelu, (16, 48))
    image, ids = torch.rand(2, 3, 16, 48).mul(255).byte(), torch.randint(1, 99, (2, 30))
    for ours, theirs in zip(again.eval()(image, ids)[:2], model.eval()(image, ids)[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    flags = create_model("tiny", str(tmp_path), force_context_length=77, image_mean=(0.5,) * 3)
    assert flags.context_length == 77  # flags have the last word
    assert flags.preprocess_cfg["mean"] == (0.5,) * 3
    check_description(again, tmp_path)
    with pytest.raises(ValueError, match="was trained on images prepared by .*give the same --force-image-size"):
        check_description(create_model("tiny", force_quick_gelu=quick_gelu), tmp_path)


def test_another_config_keeps_its_own_length_and_size(tiny: dict[str, Any], tmp_path: Path) -> None:
    model = create_model("tiny", image_mean=(0.1,) * 3)
    save_file(model.state_dict(), tmp_path / WEIGHTS, describe(model) | {"format": "pt"})
    model.name = "other"
    save_file(model.state_dict(), tmp_path / "other.safetensors", describe(model))
    tiny["text_cfg"]["context_length"] = 248
    assert create_model("tiny", str(tmp_path)).context_length == 77
    longer = create_model("tiny", str(tmp_path / "other.safetensors"))
    assert longer.context_length == 248
    assert longer.preprocess_cfg["mean"] == [0.1] * 3


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
def test_a_file_of_others_describes_nothing(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"visual.a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata)
    assert read_weights(tmp_path / "model.safetensors").described == Description()


@pytest.mark.parametrize("trained", [True, False])
def test_weights_of_another_activation_are_refused(trained: bool) -> None:
    model = create_model("tiny", force_quick_gelu=not trained)
    weights = Weights(Path("w.pt"), published_state(custom_text=True), Description(quick_gelu=trained))
    for load in (load_weights, load_image_tower):
        with pytest.raises(ValueError, match=f"quick_gelu={trained}, the model has quick_gelu={not trained}"):
            load(model, weights)
    load_weights(create_model("tiny", force_quick_gelu=trained), weights)


def image_state(width: int = 16) -> dict[str, Tensor]:
    """Returns a checkpoint of whose text tower nothing fits, and of whose projection only 16 columns do."""
    state = published_state(custom_text=False)
    state = {key: value + torch.randn_like(value) for key, value in state.items()}
    state["visual.proj"] = torch.randn(32, width)
    return {**state, "token_embedding.weight": torch.zeros(7, 7), "logit_scale": torch.tensor(9.0)}


@pytest.mark.parametrize("width", [16, 24])
def test_an_image_tower_is_taken_alone(tmp_path: Path, width: int) -> None:
    state = image_state(width)
    path = write(tmp_path / "image.pt", state)
    torch.manual_seed(5)
    before = create_model("tiny").state_dict()
    torch.manual_seed(5)
    model = create_model("tiny", settings=ModelSettings(pretrained_image_from=str(path)))
    for key, value in model.state_dict().items():
        starts_anew = not key.startswith("visual.") or (key == "visual.proj" and width == 24)
        assert torch.equal(value, before[key] if starts_anew else state[key]), key


def test_an_image_tower_replaces_that_of_pretrained_weights(tmp_path: Path) -> None:
    whole, image = published_state(custom_text=True), image_state()
    paths = [str(write(tmp_path / name, state)) for name, state in (("whole.pt", whole), ("image.pt", image))]
    model = create_model("tiny", paths[0], settings=ModelSettings(pretrained_image_from=paths[1]))
    assert torch.equal(model.visual.conv1.weight, image["visual.conv1.weight"])
    assert torch.equal(model.text.token_embedding.weight, whole["text.token_embedding.weight"])
    torch.testing.assert_close(model.logit_scale.detach(), whole["logit_scale"].reshape(1))


def test_image_positions_are_resized_as_openclip_does(tiny: dict[str, Any]) -> None:
    tiny["vision_cfg"]["image_size"] = 64
    reference = open_clip.create_model("tiny")
    model, state = create_model("tiny"), image_state()
    expected = {"visual.positional_embedding": state["visual.positional_embedding"]}
    open_clip.model.resize_pos_embed(expected, reference)
    load_image_tower(model, Weights(Path("image.pt"), state))
    assert model.visual.positional_embedding.shape == (17, 32)
    assert torch.equal(model.visual.positional_embedding, expected["visual.positional_embedding"])


def test_a_timm_image_tower_has_its_own_activation_and_projection() -> None:
    image = create_model("Nano-248").state_dict()
    for layer in ("weight", "bias"):
        image[f"visual.trunk.head.{layer}"] = image[f"visual.trunk.head.{layer}"][:24]
    model = create_model("Nano-248")
    head = model.visual.trunk.head.weight.detach().clone()
    load_image_tower(model, Weights(Path("image.pt"), image, Description(quick_gelu=True)))
    assert torch.equal(model.visual.trunk.head.weight, head)
    assert torch.equal(model.visual.trunk.stem[0].weight, image["visual.trunk.stem.0.weight"])


def test_misfits_of_an_image_tower_are_listed_and_nothing_is_loaded() -> None:
    state = image_state()
    state["visual.strange"], state["visual.conv1.weight"] = torch.zeros(1), torch.zeros(2)
    del state["visual.ln_post.bias"]
    model = create_model("tiny")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="image.pt does not fit the model") as error:
        load_image_tower(model, Weights(Path("image.pt"), state))
    assert str(error.value).endswith(
        "3 keys differ: missing visual.ln_post.bias; unknown visual.strange; "
        "visual.conv1.weight is [2], the model's is [32, 3, 16, 16]"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_image_tower_is_found_by_model_and_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = image_state()
    path = write(tmp_path / "image.pt", state)
    known = openclip.get_pretrained_cfg
    published = {("ViT-B-32", "mine"): {"quick_gelu": True}}
    monkeypatch.setattr(
        openclip, "get_pretrained_cfg", lambda model, tag: published.get((model, tag)) or known(model, tag)
    )
    monkeypatch.setattr(openclip, "download_pretrained", lambda cfg, cache_dir: str(path))
    settings = ModelSettings(pretrained_image_from="ViT-B-32:mine")
    model = create_model("tiny", settings=settings)
    assert torch.equal(model.visual.proj, state["visual.proj"])
    assert model.quick_gelu  # as its image tower was trained
    whole = write(tmp_path / "whole.pt", published_state(custom_text=True))
    with pytest.raises(ValueError, match="quick_gelu=True, the model has quick_gelu=False; choose a --model"):
        create_model("tiny", str(whole), settings=settings)


def test_an_image_tower_that_is_nowhere_is_told(tmp_path: Path) -> None:
    for source, said in (
        ("absent.pt", "neither a checkpoint nor MODEL:TAG"),
        ("ViT-B-32:absent", "'absent' is neither"),
    ):
        with pytest.raises(ValueError, match=said):
            create_model("tiny", settings=ModelSettings(pretrained_image_from=source))


@pytest.mark.parametrize(
    ("keep", "ratio", "tail"), [(20, None, "extrapolate"), (19, None, "interpolate"), (30, 5.0, "extrapolate")]
)
def test_settings_say_how_positions_are_stretched(tmp_path: Path, keep: int, ratio: float | None, tail: str) -> None:
    state = published_state(custom_text=True)
    settings = ModelSettings("", keep, ratio, tail, freeze_position_prefix=keep)
    path = str(write(tmp_path / "weights.pt", state))
    model = create_model("tiny", path, force_context_length=248, settings=settings)
    table, found = state["text.positional_embedding"], model.text.positional_embedding
    assert torch.equal(found, stretch_positions(table, 248, keep, ratio, tail))
    assert model.text.frozen_positions == keep
    step = ratio or 4
    torch.testing.assert_close(found[keep + round(2 * step)].detach(), table[keep + 2])
    assert torch.equal(found[-1], table[-1]) == (tail == "interpolate")


def test_siglips_positions_are_stretched_from_64_to_196(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["text_cfg"] |= {"context_length": 64, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    tiny |= {"init_logit_bias": -10.0, "init_logit_scale": 2.3, "custom_text": True}
    short = open_clip.create_model("tiny").eval()
    with torch.no_grad():
        for parameter in short.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = str(write(tmp_path / "siglip.pt", short.state_dict()))
    model = create_model("tiny", path, force_context_length=196).eval()
    table, found = short.state_dict()["text.positional_embedding"], model.text.positional_embedding.detach()
    assert torch.equal(found[:20], table[:20])
    torch.testing.assert_close(found[20::4], table[20:])
    torch.testing.assert_close(model.logit_bias.detach(), short.logit_bias.detach().reshape(1))
    tiny["text_cfg"]["context_length"] = 196
    reference = open_clip.create_model("tiny").eval()
    reference.load_state_dict({**short.state_dict(), "text.positional_embedding": found})
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 196))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), reference.encode_text(ids))
        torch.testing.assert_close(model.encode_image(image), reference.encode_image(image))


def test_options_of_stretching_that_change_nothing_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "long.pt", long_model().state_dict())
    load_weights(long_model(), path)
    assert caplog.text == ""
    load_weights(long_model(), path, ModelSettings(position_keep=5))
    assert "--position-keep, -ratio and -tail change nothing" in caplog.text


def test_an_empty_file_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match=r"empty.pt cannot be read as a checkpoint \(TypeError: it is empty\)"):
        read_weights(tmp_path / "empty.pt")
