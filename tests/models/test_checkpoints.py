from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from jettclip.models.checkpoints import WEIGHTS, load_weights, read_state
from jettclip.models.factory import create_model
from jettclip.models.positions import stretch_positions
from jettclip.models.two_towers import TwoTowers

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
        torch.save(state, path)
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
    assert read_state(tmp_path / "epoch_1").keys() == state.keys()


def test_half_precision_weights_load_into_a_float32_model(tmp_path: Path) -> None:
    state = published_state(custom_text=True)
    model = long_model()
    load_weights(model, write(tmp_path / "half.pt", {name: tensor.half() for name, tensor in state.items()}))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(
        model.text.positional_embedding[:20].detach(), state["text.positional_embedding"][:20], rtol=1e-3, atol=1e-5
    )


def test_misfits_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = published_state(custom_text=True)
    state["visual.proj"] = torch.zeros(5, 5)
    state["strange"] = torch.zeros(1)
    del state["text.ln_final.bias"]
    model = long_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not fit the model, 3 keys differ") as error:
        load_weights(model, write(tmp_path / "weights.pt", state))
    for misfit in ("missing text.ln_final.bias", "unknown strange", "visual.proj is [5, 5], the model's is [32, 16]"):
        assert misfit in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"and \d+ more"):
        load_weights(long_model(), write(tmp_path / "weights.pt", {"strange": torch.zeros(1)}))


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
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Malicious(target)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(target), protocol=2))
    for file in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match=f"{file} cannot be read as a checkpoint"):
            read_state(tmp_path / file)
    assert not target.exists()


def test_damaged_files_are_told_apart_from_bugs(tmp_path: Path) -> None:
    state = {"a": torch.arange(100.0)}
    for file in ("good.pt", "good.safetensors"):
        whole = write(tmp_path / file, state).read_bytes()
        for number, data in enumerate((b"", b"hello", whole[: len(whole) // 2], whole[:-20], b"\0" * 64 + whole[64:])):
            path = tmp_path / f"{number}-{file}"
            path.write_bytes(data)
            with pytest.raises(ValueError, match=f"{path.name} cannot be read as a checkpoint"):
                read_state(path)
        assert read_state(tmp_path / file).keys() == state.keys()


@pytest.mark.parametrize("content", [torch.zeros(2), [1], {}, {"epoch": 3, "a": torch.zeros(1)}, {"state_dict": 3}])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt cannot be read as a checkpoint .*; give a .safetensors file"):
        read_state(tmp_path / "other.pt")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.pt cannot be read"):
        read_state(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=f"{WEIGHTS} cannot be read"):
        read_state(tmp_path)


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
