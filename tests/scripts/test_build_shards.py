from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jettclip.prepare.settings import BuildSettings
from support import load_script, picture, sample, write_shard

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/build_shards.py"


@pytest.fixture
def script() -> ModuleType:
    return load_script("build_shards")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        rows.append(f"{number}.png,A thing {number}.\n")
    (tmp_path / "pairs.csv").write_text("image,text\n" + "".join(rows) + "gone.png,Nothing.\n")
    return tmp_path / "pairs.csv"


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr("sys.argv", ["build_shards.py", "--workers", "1", *flags])
    return int(script.main())


def test_it_says_what_was_written_and_dropped(
    script: ModuleType,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    flags = ["--input", str(pairs), "--output", str(tmp_path / "out"), "--shard-size", "2"]
    assert run(script, monkeypatch, *flags) == 0
    said = f"{tmp_path}/out: 4 samples in 2 shards, of which 0 were there; dropped missing file 1\n"
    said += f"to train on, or to evaluate: '{tmp_path}/out/{{000000..000001}}.tar'\n"
    assert capsys.readouterr().out == said
    assert run(script, monkeypatch, *flags) == 0
    assert "4 samples in 2 shards, of which 2 were there" in capsys.readouterr().out


def test_it_says_what_was_damaged(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = Path(write_shard(tmp_path / "in.tar", [sample(0, png=picture(0), txt="A thing.")]))
    data = source.read_bytes().rstrip(b"\0")
    source.write_bytes(data + bytes(-len(data) % 512))  # without the end of the archive
    assert run(script, monkeypatch, "--input", str(source), "--output", str(tmp_path / "out")) == 0
    assert "dropped none; damaged shard is cut short 1\n" in capsys.readouterr().out


def test_no_sample_at_all_is_a_failure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "pairs.csv").write_text("image,text\ngone.png,Nothing.\n")
    assert run(script, monkeypatch, "--input", str(tmp_path / "pairs.csv"), "--output", str(tmp_path / "out")) == 1
    assert "0 samples in 0 shards, of which 0 were there; dropped missing file 1" in capsys.readouterr().out


def test_every_setting_has_a_flag_and_the_same_default(script: ModuleType) -> None:
    parser = script.make_parser()
    plain = script.read_settings(parser.parse_args(["--input", "a.csv", "--output", "out"]), parser)
    assert plain == BuildSettings("a.csv", "out")
    flags = ["--input", "a.csv", "--output", "out", "--input-type", "table", "--image-root", "r", "--image-column", "i"]
    flags += ["--long-caption-column", "a", "b", "--short-caption-column", "c", "--separator", ";", "--join", "j"]
    flags += ["--join-key", "json:u", "--keep-keys", "k", "--drop-keys", "d", "--holdout", "7", "hash"]
    flags += ["--shard-size", "9", "--max-side", "8", "--min-side", "3", "--reencode", "--image-format", "webp"]
    flags += ["--quality", "50", "--background", "black", "--max-image-pixels", "5", "--workers", "2"]
    given = script.read_settings(parser.parse_args([*flags, "--caption-pattern", "x"]), parser)
    assert (given.long_caption_column, given.holdout, given.holdout_way) == (("a", "b"), 7, "hash")
    same = [name for name, value in dataclasses.asdict(given).items() if value == getattr(plain, name)]
    assert same == ["input", "output"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "data.xyz"], "--input 'data.xyz' does not tell what it is; add --input-type"),
        (["--input", "a.csv", "--holdout", "x", "first"], "--holdout x first must be a number of rows and a way"),
        (["--input", "a.csv", "--holdout", "3", "last"], "--holdout 3 last must be a number of rows and a way"),
        (["--input", "a.csv", "--shard-size", "0"], "--shard-size 0 must be positive"),
        (["--input", "a.csv", "--quality", "101"], "--quality 101 must be from 1 to 100"),
        (["--input", "a.csv", "--join", "b.tar"], "are for shards; leave them out"),
        (["--input", "a.csv", "--caption-pattern", "x"], "--caption-pattern is for folders; leave it out"),
        (["--input", "a.json", "--image-column", "x"], "are for tables; leave them out"),
        (["--input", "a.tar", "--join-key", "uid"], "--join-key 'uid' must name a value of the json member"),
        (["--input", "a.csv", "--max-sid", "3"], "unrecognized arguments: --max-sid 3"),
    ],
)
def test_mistaken_flags_are_refused(
    flags: list[str],
    message: str,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(script, monkeypatch, "--output", "out", *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.JSON", "conversations"), ("a.jsonl", "conversations"), ("a.tsv", "table"), ("a.parquet", "table"),
        ("s/{0..9}.tar", "shards"), ("s/0.tar::t/0.tar", "shards"), (".", "folder"), ("a.txt", ""),
        ("a.tar.gz", "shards"), ("a.tgz", "shards"), ("a.csv.gz", ""), ("a.json.gz", ""),
    ],
)  # fmt: skip
def test_the_name_of_the_input_tells_what_it_is(name: str, kind: str) -> None:
    assert BuildSettings(name, "out").kind == kind
    assert BuildSettings(name, "out", input_type="table").kind == "table"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "'.*pairs.csv' cannot be opened: No such file or directory; give a file that can be read"),
        ("image,alt\n", "no column for the caption, but image, alt"),
    ],
)
def test_an_input_that_cannot_be_read_is_said_in_one_line(
    content: str | None, message: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(SystemExit, match=rf"\Abuild_shards.py: .*{message}[^\n]*\Z"):
        run(script, monkeypatch, "--input", str(tmp_path / "pairs.csv"), "--output", str(tmp_path / "out"))


def test_it_runs_as_a_command_with_as_many_processes_as_there_are_cores(pairs: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--input", str(pairs), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 samples in 1 shards" in done.stdout
    assert json.loads((tmp_path / "out/report.json").read_text())["written"] == 4
