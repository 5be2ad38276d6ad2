from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from jettclip.models.factory import Transform
from jettclip.models.two_towers import TwoTowers
from jettclip.openclip import PreprocessCfg, image_transform_v2
from support import tiny_towers, write_shard, write_shards

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/extract_features.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a tiny model in place of whatever is asked for."""
    spec = importlib.util.spec_from_file_location("extract_features", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def create(*_: object, **__: object) -> tuple[TwoTowers, None, Transform]:
        return tiny_towers(), None, image_transform_v2(PreprocessCfg(size=16), is_train=False)

    monkeypatch.setattr(module, "create_model_and_transforms", create)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, url: str, *flags: str) -> int:
    needed = ["--data", url, "--model", "Nano-248", "--pretrained", "x", "--store", "t", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["extract_features.py", *needed, "--workers", "1", *flags])
    return int(script.main())


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
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, url)
    assert str(stopped.value.code).startswith("extract_features.py: none of the first 100 samples is usable")
    assert "\n" not in str(stopped.value.code)
