from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from support import load_script, sample, write_shard, write_shards


@pytest.fixture
def script() -> ModuleType:
    return load_script("check_shards")


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, url: str, *flags: str) -> int:
    monkeypatch.setattr("sys.argv", ["check_shards.py", "--data", url, "--workers", "1", *flags])
    return int(script.main())


def test_it_says_by_its_status_whether_anything_is_wrong(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_shards(tmp_path / "good", [3])
    bad = write_shard(tmp_path / "bad/0.tar", [sample(0), sample(1, png=b"x", short_caption="s", long_caption="l")])
    assert run(script, monkeypatch, good) == 0
    assert "1 shards, 3 samples, of which 0 cannot be used" in capsys.readouterr().out
    assert not list((tmp_path / "good").glob("*.json"))  # nothing is written unless it is asked for
    fixed = tmp_path / "fixed"
    assert run(script, monkeypatch, bad, "--json", str(tmp_path / "r.json"), "--fix", str(fixed)) == 1
    assert f"1 samples in 1 shards written to {fixed}" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["clean"], report["problems"]) == (False, {"image cannot be decoded": 1})
    assert report["fixed"] == {"shards": 1, "samples": 1}
    assert run(script, monkeypatch, str(fixed / "0.tar")) == 0


def test_manifests_are_written_and_what_has_none_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, cut = write_shards(tmp_path, [3, 2]).split("::")
    assert run(script, monkeypatch, good, "--write-manifests") == 0
    Path(cut).write_bytes(Path(cut).read_bytes()[:-9000])
    assert run(script, monkeypatch, f"{good}::{cut}", "--write-manifests") == 1
    assert f"{cut} gets no manifest: shard is cut short 1" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.json")] == ["000000.manifest.json"]


def test_the_caption_flags_of_the_trainer_are_heeded(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = write_shard(tmp_path / "0.tar", [sample(0) | {"long_caption": b"\xff", "txt": "a dog"}])
    assert run(script, monkeypatch, url) == 1
    assert run(script, monkeypatch, url, "--long-caption-field", "txt") == 0
    assert run(script, monkeypatch, url, "--views", "short") == 0
    assert run(script, monkeypatch, url, "--views", "short", "--max-image-pixels", "100") == 1


def test_missing_stores_are_wrong(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = write_shards(tmp_path, [1])
    assert run(script, monkeypatch, url, "--features", "t,u", "--json", str(tmp_path / "r.json")) == 1
    stores = json.loads((tmp_path / "r.json").read_text())["stores"]
    assert stores["u"]["problems"] == {"feature store is missing": 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--features-dir", "x"], "--features-dir x is of no use alone"),
        (["--max-image-pixels", "0"], "--max-image-pixels 0 must be positive"),
        (["--batch-size", "3"], "unrecognized arguments: --batch-size 3"),
    ],
)
def test_mistakes_in_the_flags_are_shown(
    flags: list[str],
    message: str,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, "0.tar", *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--fix", "/proc/none"], ["--json", "/proc/none/r.json"]])
def test_what_cannot_be_read_or_written_is_one_line(
    flags: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = write_shards(tmp_path, [1]) if flags else str(tmp_path / "gone.tar")
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, url, *flags)
    assert str(stopped.value.code).startswith("check_shards.py: ")
    assert "\n" not in str(stopped.value.code)
