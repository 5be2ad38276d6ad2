from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jettclip.data.counts import DataError, Tally
from jettclip.data.manifest import manifest_path
from jettclip.data.shards import expand_urls
from jettclip.data.streams import read_shard
from jettclip.prepare.build import build_shards
from jettclip.prepare.output import prepared, urls_of
from jettclip.prepare.settings import BuildSettings

MEMBERS = frozenset({"jpg", "png", "txt", "json"})


def jpeg(seed: int, width: int = 24, height: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_list(folder: Path, count: int, name: str = "pairs.csv", first: int = 0) -> Path:
    """Writes pictures and a table of them."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"pictures/{number}.jpg").write_bytes(jpeg(number))
    rows = [f"pictures/{number}.jpg,A thing {number}." for number in range(first, first + count)]
    (folder / name).write_text("\n".join(["image_path,text", *rows]) + "\n")
    return folder / name


def settings(source: Path, output: Path, **changes: Any) -> BuildSettings:
    return BuildSettings(str(source), str(output), **{"workers": 1, "shard_size": 4} | changes)


def build(source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Builds shards, and returns the report."""
    build_shards(settings(source, output, **changes))
    return json.loads((output / "report.json").read_text())


def samples_of(folder: Path, wanted: frozenset[str] = MEMBERS) -> list[dict[str, Any]]:
    tally = Tally()
    shards = sorted(folder.glob("*.tar"))
    groups = [group for shard in shards for group in read_shard(str(shard), wanted, tally)]
    assert not tally.damaged
    assert not tally.dropped
    return groups


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def drops(report: dict[str, Any]) -> dict[str, int]:
    assert report["read"] == report["written"] + sum(entry["count"] for entry in report["dropped"].values())
    for split in report["splits"].values():
        assert split["read"] == split["written"] + sum(entry["count"] for entry in split["dropped"].values())
    return {reason: entry["count"] for reason, entry in report["dropped"].items()}


def test_a_table_becomes_shards_that_say_all_the_table_says(tmp_path: Path) -> None:
    source = write_list(tmp_path, 10)
    report = build(source, tmp_path / "out")
    assert (report["read"], report["written"], drops(report)) == (10, 10, {})
    groups = samples_of(tmp_path / "out")
    assert [group["__key__"] for group in groups] == [f"{number:09d}" for number in range(10)]
    assert [set(group) - {"__key__", "__shard__"} for group in groups] == [{"jpg", "txt", "json"}] * 10
    assert [group["jpg"] for group in groups] == [jpeg(number) for number in range(10)]  # the very bytes
    assert groups[3]["txt"] == b"A thing 3."
    assert json.loads(groups[3]["json"]) == {
        "image_path": "pictures/3.jpg", "text": "A thing 3.", "long_caption": "A thing 3.", "width": 24, "height": 16,
    }  # fmt: skip
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {
        "000000.tar": 4, "000001.tar": 4, "000002.tar": 2,
    }  # fmt: skip
    assert all(Path(manifest_path(str(shard))).exists() for shard in (tmp_path / "out").glob("*.tar"))


def test_members_have_no_owner_and_no_date(tmp_path: Path) -> None:
    build(write_list(tmp_path, 2), tmp_path / "out")
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        marks = {(member.uid, member.gid, member.uname, member.gname, member.mode, member.mtime) for member in tar}
    assert marks == {(0, 0, "", "", 0o644, 0)}


def test_several_captions_a_view_are_lists(tmp_path: Path) -> None:
    write_list(tmp_path, 1)
    (tmp_path / "a.csv").write_text("image,raw_caption,longSV_captions,longLLA_captions\npictures/0.jpg,raw,one,two\n")
    build(tmp_path / "a.csv", tmp_path / "out")
    (group,) = samples_of(tmp_path / "out")
    description = json.loads(group["json"])
    assert (description["long_caption"], description["short_caption"]) == (["one", "two"], "raw")
    assert group["txt"] == b"one"


def test_every_row_that_is_not_written_is_counted_by_reason_with_examples(tmp_path: Path) -> None:
    source = write_list(tmp_path, 8)
    pictures = tmp_path / "pictures"
    (pictures / "1.jpg").unlink()
    (pictures / "2.jpg").write_bytes(jpeg(2, 200, 200)[:-2000])  # a whole header, and half a picture
    (pictures / "3.jpg").write_bytes(b"")
    (pictures / "4.jpg").unlink()
    os.mkfifo(pictures / "4.jpg")
    (pictures / "5.jpg").write_bytes(jpeg(5, 300, 300))
    with source.open("ab") as stream:
        stream.write(b"pictures/0.jpg, \nragged\npictures/6.jpg,caf\xe9\n")
    report = build(source, tmp_path / "out", max_image_pixels=80_000)
    assert drops(report) == {
        "missing file": 1, "image cannot be decoded": 1, "image is empty": 1, "image is not a regular file": 1,
        "image has too many pixels": 1, "empty caption": 1, "row has another number of columns": 1,
        "row is not UTF-8": 1,
    }  # fmt: skip
    assert report["written"] == 3
    (example,) = report["dropped"]["missing file"]["examples"]
    assert example.startswith("pairs.csv, row 1 (missing file: ")
    assert [group["__key__"] for group in samples_of(tmp_path / "out")] == ["000000000", "000000006", "000000007"]


def test_shards_are_runs_of_rows_so_that_a_loss_moves_no_other_sample(tmp_path: Path) -> None:
    source = write_list(tmp_path, 9)
    (tmp_path / "pictures/1.jpg").unlink()
    build(source, tmp_path / "out")
    sizes = json.loads((tmp_path / "out/sizes.json").read_text())
    assert sizes == {"000000.tar": 3, "000001.tar": 4, "000002.tar": 1}


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    source = write_list(tmp_path, 30)
    (tmp_path / "pictures/7.jpg").write_bytes(b"no picture")
    build(source, tmp_path / "one", workers=1)
    build(source, tmp_path / "three", workers=3)
    assert contents_of(tmp_path / "one") == contents_of(tmp_path / "three")


def test_a_second_run_keeps_what_is_there(tmp_path: Path) -> None:
    source = write_list(tmp_path, 10)
    build(source, tmp_path / "out")
    before = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert build_shards(settings(source, tmp_path / "out")).kept == 3
    assert {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")} == before


@pytest.mark.parametrize("change", ["caption", "picture", "setting", "tar", "part"])
def test_only_shards_whose_rows_or_pictures_or_settings_changed_are_made_anew(change: str, tmp_path: Path) -> None:
    source = write_list(tmp_path, 12)
    build(source, tmp_path / "out")
    changed: dict[str, Any] = {}
    if change == "caption":
        source.write_text(source.read_text().replace("A thing 5.", "Another thing."))
    elif change == "picture":
        (tmp_path / "pictures/5.jpg").write_bytes(jpeg(99, 30, 30))
    elif change == "setting":
        changed = {"max_side": 20}
    elif change == "tar":
        (tmp_path / "out/000001.tar").write_bytes(b"")
    else:
        (tmp_path / "out/000001.report.json").write_text("{")
    built = build_shards(settings(source, tmp_path / "out", **changed))
    assert built.kept == (0 if change == "setting" else 2)
    build(source, tmp_path / "fresh", **changed)
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "fresh")


def test_a_missing_picture_that_came_later_is_taken_in(tmp_path: Path) -> None:
    source = write_list(tmp_path, 4)
    (tmp_path / "pictures/2.jpg").unlink()
    assert build(source, tmp_path / "out")["written"] == 3
    (tmp_path / "pictures/2.jpg").write_bytes(jpeg(2))
    assert build(source, tmp_path / "out")["written"] == 4


def test_shards_beyond_the_end_of_a_shorter_input_are_removed(tmp_path: Path) -> None:
    source = write_list(tmp_path, 12)
    build(source, tmp_path / "out")
    write_list(tmp_path, 5)
    build(source, tmp_path / "out")
    write_list(tmp_path / "again", 5)
    build(tmp_path / "again/pairs.csv", tmp_path / "fresh")
    assert {name for name in contents_of(tmp_path / "out") if name.endswith(".tar")} == {"000000.tar", "000001.tar"}
    assert contents_of(tmp_path / "out").keys() == contents_of(tmp_path / "fresh").keys()
    build(source, tmp_path / "out", holdout=1)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert len(samples_of(tmp_path / "out/train")) == 4


def test_a_run_without_samples_writes_no_shard(tmp_path: Path) -> None:
    source = write_list(tmp_path, 8)
    for number in range(4):
        (tmp_path / f"pictures/{number}.jpg").unlink()
    report = build(source, tmp_path / "out")
    assert (report["written"], drops(report)) == (4, {"missing file": 4})
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["000001.tar"]
    assert build_shards(settings(source, tmp_path / "out")).written == 4


def test_the_first_rows_are_held_out(tmp_path: Path) -> None:
    report = build(write_list(tmp_path, 10), tmp_path / "out", holdout=3)
    assert {split: figures["written"] for split, figures in report["splits"].items()} == {"holdout": 3, "train": 7}
    drops(report)
    assert [group["txt"] for group in samples_of(tmp_path / "out/holdout")] == [b"A thing %d." % n for n in range(3)]
    assert [group["txt"] for group in samples_of(tmp_path / "out/train")] == [b"A thing %d." % n for n in range(3, 10)]


@pytest.mark.parametrize("way", ["first", "hash"])
def test_no_picture_of_the_held_out_split_is_trained_on(way: str, tmp_path: Path) -> None:
    source = write_list(tmp_path, 12)
    for number in range(6, 12):  # other paths, the same pictures
        (tmp_path / f"pictures/{number}.jpg").write_bytes(jpeg(number - 6))
    with source.open("a") as stream:
        stream.writelines(f"./pictures/{number}.jpg,Again {number}.\n" for number in range(12))
    report = build(source, tmp_path / "out", holdout=3, holdout_way=way)
    held = {group["jpg"] for group in samples_of(tmp_path / "out/holdout")}
    trained = {group["jpg"] for group in samples_of(tmp_path / "out/train")}
    assert held
    assert not held & trained
    assert len(held | trained) == 6
    assert drops(report) == {"duplicate image digest across splits": 24 - report["written"]}
    if way == "hash":  # all rows of a picture's path, and of so many paths
        paths = [json.loads(group["json"])["image_path"] for group in samples_of(tmp_path / "out/holdout")]
        assert len(paths) == 6
        assert len({os.path.normpath(path) for path in paths}) == 3


def test_a_change_of_the_held_out_split_reaches_the_other(tmp_path: Path) -> None:
    source = write_list(tmp_path, 8)
    assert build(source, tmp_path / "out", holdout=1)["written"] == 8
    (tmp_path / "pictures/0.jpg").write_bytes(jpeg(7))
    assert drops(build(source, tmp_path / "out", holdout=1)) == {"duplicate image digest across splits": 1}


def test_conversations_and_folders_are_built_the_same_way(tmp_path: Path) -> None:
    write_list(tmp_path, 3)
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A long text."}]
    items = [{"id": f"i{n}", "image": f"pictures/{n}.jpg", "conversations": turns} for n in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(items))
    build(tmp_path / "a.json", tmp_path / "json")
    assert [json.loads(group["json"])["id"] for group in samples_of(tmp_path / "json")] == ["i0", "i1", "i2"]
    for number in range(2):
        (tmp_path / f"pictures/{number}.txt").write_text("one\ntwo\n")
    report = build(tmp_path / "pictures", tmp_path / "folder")
    assert drops(report) == {"no text file": 1}
    groups = samples_of(tmp_path / "folder")
    assert [group["__key__"] for group in groups] == ["0", "1"]
    assert json.loads(groups[0]["json"])["long_caption"] == ["one", "two"]


SCRIPT = Path(__file__).resolve().parents[2] / "scripts/build_shards.py"


def command(source: Path, output: Path, *flags: str) -> list[str]:
    wanted = ["--input", str(source), "--output", str(output), "--shard-size", "4", "--workers", "2", *flags]
    return [sys.executable, str(SCRIPT), *wanted]


def test_a_killed_run_leaves_whole_shards_and_no_process_and_goes_on(tmp_path: Path) -> None:
    source = write_list(tmp_path, 60)
    build(source, tmp_path / "whole")
    blocker = (
        "import runpy, signal, sys\n"
        "from jettclip.prepare import samples\n"
        "read = samples.read_picture\n"
        "def wait_there(path):\n"
        "    if path.endswith('/40.jpg'):\n"
        "        print('there', flush=True)\n"
        "        signal.pause()\n"
        "    return read(path)\n"
        "samples.read_picture = wait_there\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = [sys.executable, "-c", blocker, *command(source, tmp_path / "out")[1:]]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert process.stdout.read() == ""  # which ends when the last of its processes does
    done = {path.name for path in (tmp_path / "out").glob("*.tar")}
    assert "000010.tar" not in done
    assert {f"{number:06d}.tar" for number in range(8)} <= done
    assert not (tmp_path / "out/report.json").exists()
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in done)
    assert build_shards(settings(source, tmp_path / "out")).kept >= 8
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "whole")


def test_a_full_disk_ends_the_run_with_one_line_and_no_half_shard(tmp_path: Path) -> None:
    source = write_list(tmp_path, 12)
    (tmp_path / "pictures/9.jpg").write_bytes(jpeg(9, 300, 300))  # larger than the limit, as the shard it is in
    limited = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({40_000}, {40_000})); "
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [sys.executable, "-c", limited, *command(source, tmp_path / "out")[1:]]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "out/000002.tar cannot be written: File too large; make room or choose another --output" in line
    names = set(contents_of(tmp_path / "out"))
    assert names <= {
        "build.json",
        "build.lock",
        *(f"00000{n}.{suffix}" for n in (0, 1) for suffix in ("tar", "manifest.json", "report.json")),
    }
    build(source, tmp_path / "out")
    build(source, tmp_path / "fresh")
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "fresh")


@pytest.mark.parametrize("place", ["/dev/full/out", "/proc/out", "{file}"])
def test_an_output_that_cannot_be_written_is_said_in_one_line(place: str, tmp_path: Path) -> None:
    source = write_list(tmp_path, 1)
    with pytest.raises(DataError, match=r"cannot be written: .*; make room or choose another --output"):
        build_shards(replace(settings(source, tmp_path), output=place.format(file=source)))


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path: Path) -> None:
    source = write_list(tmp_path, 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/000000.tar.1234.partial").write_bytes(b"half")
    build(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))


def test_shards_of_others_are_not_replaced(tmp_path: Path) -> None:
    source, other = write_list(tmp_path, 4), write_list(tmp_path / "b", 4)
    build(source, tmp_path / "out")
    before = contents_of(tmp_path / "out")
    with pytest.raises(
        DataError, match="holds the shards of another input, .*pairs.csv.*; delete them, or name another"
    ):
        build(other, tmp_path / "out")
    assert contents_of(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/000000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="of another program; name another folder"):
        build(source, tmp_path / "mine")
    assert (tmp_path / "mine/000000.tar").read_bytes() == b"precious"


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    peaks = []
    for count in (250, 250, 2000):  # the first warms up
        (tmp_path / "a.csv").write_text("image,text\n" + f"a.jpg,{'A thing. ' * 20}\n" * count)
        tracemalloc.start()
        report = build(tmp_path / "a.csv", tmp_path / f"out{len(peaks)}", shard_size=50, holdout=10, holdout_way="hash")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report["written"] == count
    assert peaks[2] < 1.2 * peaks[1] + 20_000


def test_an_empty_cell_hides_no_policy_of_the_trainer(tmp_path: Path) -> None:
    write_list(tmp_path, 2)
    rows = "image,long_caption,short_caption,width\npictures/0.jpg,A long one. Really.,,640\npictures/1.jpg,B.,b,24\n"
    (tmp_path / "a.csv").write_text(rows)
    build(tmp_path / "a.csv", tmp_path / "out")
    empty, full = [json.loads(group["json"]) for group in samples_of(tmp_path / "out")]
    assert "short_caption" not in empty
    assert (empty["width"], empty["width_column"]) == (24, "640")
    assert (full["short_caption"], "width_column" in full) == ("b", False)
    checker = SCRIPT.with_name("check_shards.py")
    arguments = [sys.executable, str(checker), "--data", str(tmp_path / "out/000000.tar"), "--workers", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_txt_is_never_a_short_caption(tmp_path: Path) -> None:
    write_list(tmp_path, 1)
    (tmp_path / "a.csv").write_text("image,short_caption,text\npictures/0.jpg,brief,\n")
    build(tmp_path / "a.csv", tmp_path / "out")
    (group,) = samples_of(tmp_path / "out")
    assert "txt" not in group
    assert json.loads(group["json"])["short_caption"] == "brief"


def test_a_caption_that_no_trainer_could_use_is_lost(tmp_path: Path) -> None:
    source = write_list(tmp_path, 2)
    source.write_text(source.read_text().replace("A thing 1.", "x" * 110_000))
    report = build(source, tmp_path / "out")
    assert drops(report) == {"caption is absurdly long": 1}


def test_the_urls_leave_out_shards_that_are_not_there(tmp_path: Path) -> None:
    source = write_list(tmp_path, 16)
    for number in range(8, 12):
        (tmp_path / f"pictures/{number}.jpg").unlink()
    built = build_shards(settings(source, tmp_path / "out"))
    assert built.urls == [f"{tmp_path}/out/{{000000..000001}}.tar::{tmp_path}/out/000003.tar"]
    shards = [url for url, _ in expand_urls(built.urls[0])]
    assert shards == [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    built = build_shards(settings(source, tmp_path / "out", holdout=4))
    assert built.urls == [
        f"{tmp_path}/out/holdout/000000.tar", f"{tmp_path}/out/train/000000.tar::{tmp_path}/out/train/000002.tar"
    ]  # fmt: skip


def test_numbers_of_another_length_are_in_braces_of_their_own() -> None:
    names = ["999998.tar", "1000000.tar", "999999.tar", "1000001.tar"]
    assert urls_of("out", names) == "out/{999998..999999}.tar::out/{1000000..1000001}.tar"


def test_two_builds_do_not_write_to_one_folder(tmp_path: Path) -> None:
    source = write_list(tmp_path, 4)
    with prepared(settings(source, tmp_path / "out")):
        (tmp_path / "out/000000.tar.1.partial").write_bytes(b"half")
        done = subprocess.run(command(source, tmp_path / "out"), capture_output=True, text=True, timeout=120)
        assert (tmp_path / "out/000000.tar.1.partial").exists()
    assert done.returncode == 1
    assert re.fullmatch(r"build_shards.py: another build is writing here, to .*; wait for it, .*\n", done.stderr)
    assert build(source, tmp_path / "out")["written"] == 4


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    source = write_list(tmp_path, 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/download.partial").write_bytes(b"half")
    build(source, tmp_path / "out")
    assert (tmp_path / "out/download.partial").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/report.json").write_text("precious")
    with pytest.raises(DataError, match=r"mine/report.json', of another program; name another folder"):
        build(source, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["report.json"]


def test_a_mistaken_input_does_not_keep_the_output_for_itself(tmp_path: Path) -> None:
    source = write_list(tmp_path, 4)
    with pytest.raises(ValueError, match="cannot be opened"):
        build(tmp_path / "gone.csv", tmp_path / "out")
    (tmp_path / "lost.csv").write_text("image,text\ngone.jpg,Nothing.\n")
    assert build(tmp_path / "lost.csv", tmp_path / "out")["written"] == 0
    assert build(source, tmp_path / "out")["written"] == 4


def test_no_sizes_are_left_of_shards_that_are_removed(tmp_path: Path) -> None:
    source = write_list(tmp_path, 4)
    build(source, tmp_path / "out", holdout=1)
    build(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/*"))
    build(source, tmp_path / "out", holdout=1)
    assert not (tmp_path / "out/sizes.json").exists()
    assert (tmp_path / "out/train/sizes.json").exists()


def test_an_output_in_the_folder_that_is_read_is_not_read(tmp_path: Path) -> None:
    write_list(tmp_path, 2)
    (tmp_path / "pictures/0.txt").write_text("A.")
    for _ in range(2):
        report = build(tmp_path / "pictures", tmp_path / "pictures/out")
        assert (report["written"], drops(report)) == (1, {"no text file": 1})
    with pytest.raises(DataError, match="is the folder that is read; name another one"):
        build(tmp_path / "pictures", tmp_path / "pictures")


def test_digests_are_kept_of_the_held_out_pictures_only(tmp_path: Path) -> None:
    build(write_list(tmp_path, 4), tmp_path / "out", holdout=1)
    parts = [json.loads((tmp_path / f"out/{split}/000000.report.json").read_text()) for split in ("holdout", "train")]
    assert ["digests" in part for part in parts] == [True, False]
