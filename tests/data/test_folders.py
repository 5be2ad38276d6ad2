from __future__ import annotations

import os
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest

from jettclip.data.folders import read_folder
from jettclip.data.rows import Lost, Row


def fill(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def read(root: Path, pattern: str | None = None) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns the captions by picture, and the reasons by lost file."""
    items = list(read_folder(root, pattern))
    rows = [item for item in items if isinstance(item, Row)]
    lost = [item for item in items if isinstance(item, Lost)]
    pairs = {os.path.relpath(row.image, root): row.captions["long"] for row in rows}
    assert len(pairs) == len(rows)
    return pairs, {item.where: item.reason for item in lost}


def test_pictures_of_any_suffix_at_any_depth_take_the_lines_of_their_text(tmp_path: Path) -> None:
    names = ["a.jpg", "b/c.PNG", "b/d/e.Jpeg", "f.webp", "g.bmp", "h.gif", "i.tif", "j.TIFF"]
    names += ["k.jfif", "l.jpe", "m.mpo", "n.apng"]
    texts = {f"{os.path.splitext(name)[0]}.txt": f"text of {name}\r\n\n second \n" for name in names}
    fill(tmp_path, dict.fromkeys(names, b"") | texts)
    pairs, lost = read(tmp_path)
    assert pairs == {name: [f"text of {name}", "second"] for name in sorted(names)}
    assert list(pairs) == sorted(names)
    assert not lost


def test_rows_say_what_they_were_made_of(tmp_path: Path) -> None:
    fill(tmp_path, {"x.y/a.b.jpg": b"", "x.y/a.b.txt": "\ufeffA tree."})
    extra = {"image": "x.y/a.b.jpg", "text": "x.y/a.b.txt"}
    image = str(tmp_path / "x.y/a.b.jpg")
    assert list(read_folder(tmp_path)) == [Row("x_y/a_b", image, {"long": ["A tree."]}, extra, "x.y/a.b.jpg")]


def test_every_file_is_accounted_for(tmp_path: Path) -> None:
    files = {
        "a.jpg": b"", "a.txt": "A tree.", "a.json": "{}", "b.jpg": b"", "c.txt": "alone", "d.png": b"", "d.txt": " \n ",
        "e.jpg": b"", "e.txt": b"caf\xe9", "README": "", ".png": b"", "f.jpg": b"", "f.JPG": b"", "f.png": b"",
        "f.txt": "kept", "g.txt": "first", "g.TXT": "again", "g.gif": b"",
    }  # fmt: skip
    pairs, lost = read(fill(tmp_path, files))
    assert pairs == {"a.jpg": ["A tree."], "f.JPG": ["kept"], "g.gif": ["again"]}
    assert lost == {
        "a.json": "not a picture or text",
        "b.jpg": "no text file",
        "c.txt": "no picture for the text",
        "d.txt": "empty caption",
        "e.txt": "caption is not UTF-8",
        "README": "not a picture or text",
        ".png": "not a picture or text",
        "f.jpg": "duplicate stem",
        "f.png": "duplicate stem",
        "g.txt": "duplicate stem",
    }
    assert 2 * (len(pairs) + 2) + len(lost) - 2 == len(files)  # the two pairs without a caption are lost as one


@pytest.mark.parametrize(
    ("files", "pairs", "lost"),
    [
        (["p/a.jpg", "t/a.txt"], {"p/a.jpg"}, {}),
        (["p/a.jpg", "t/a.txt", "u/a.txt"], set(), dict.fromkeys(["p/a.jpg", "t/a.txt", "u/a.txt"], "duplicate stem")),
        (["p/a.jpg", "q/a.jpg", "t/a.txt"], set(), dict.fromkeys(["p/a.jpg", "q/a.jpg", "t/a.txt"], "duplicate stem")),
        (["p/a.jpg", "p/a.txt", "q/a.jpg", "q/a.txt"], {"p/a.jpg", "q/a.jpg"}, {}),
        (["p/a.jpg", "p/a.txt", "q/a.jpg"], {"p/a.jpg"}, {"q/a.jpg": "duplicate stem"}),
        (["p/a.jpg", "p/a.txt", "q/a.txt"], {"p/a.jpg"}, {"q/a.txt": "duplicate stem"}),
        (
            ["p/a.jpg", "p/a.txt", "q/a.jpg", "t/a.txt"],
            {"p/a.jpg"},
            dict.fromkeys(["q/a.jpg", "t/a.txt"], "duplicate stem"),
        ),
        (["p/a.jpg", "p/a.png", "t/a.txt"], {"p/a.jpg"}, {"p/a.png": "duplicate stem"}),
        (["p/a.jpg", "p/a.png"], set(), dict.fromkeys(["p/a.jpg", "p/a.png"], "no text file")),
        (["x.y.jpg", "x.y.txt", "x_y.jpg", "x_y.txt"], {"x.y.jpg"}, {"x_y.jpg": "duplicate key"}),
    ],
)  # fmt: skip
def test_a_picture_takes_the_text_beside_it_or_the_only_one_of_its_stem(
    files: list[str], pairs: set[str], lost: dict[str, str], tmp_path: Path
) -> None:
    fill(tmp_path, {name: f"text in {name}" if name.endswith("txt") else b"" for name in files})
    found, missed = read(tmp_path)
    assert set(found) == pairs
    assert missed == lost
    for picture, captions in found.items():
        beside = os.path.splitext(picture)[0] + ".txt"
        assert captions == [f"text in {beside if beside in files else 't/a.txt'}"]


def test_a_pattern_chooses_lines_and_its_group_what_of_them_is_the_caption(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {"a.png": b"", "a.txt": "A tree.\nde.utf8=Ein Baum.\nzh_CN.utf8=一棵树\n", "b.png": b"", "b.txt": "B."},
    )
    assert read(tmp_path, r"^zh_CN\.utf8=(.*)") == ({"a.png": ["一棵树"]}, {"b.txt": "empty caption"})
    assert read(tmp_path, r"^(?!\S+\.utf8=)") == ({"a.png": ["A tree."], "b.png": ["B."]}, {})


def test_links_and_names_that_are_no_text_are_named(tmp_path: Path) -> None:
    fill(tmp_path, {"in/a.jpg": b"", "in/a.txt": "A tree."})
    (tmp_path / "again").symlink_to(tmp_path / "in")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "in/a.jpg")
    (tmp_path / "b.txt").write_text("linked")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
        pass
    pairs, lost = read(tmp_path)
    assert pairs == {"b.jpg": ["linked"], "in/a.jpg": ["A tree."]}
    assert lost == {
        "again": "link to a folder is not followed",
        "gone.jpg": "not a regular file",
        "caf\\xe9.jpg": "file name is not UTF-8",
    }


def test_a_folder_that_is_not_there_and_a_bad_pattern_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\A'.*gone' is no folder; give one"):
        list(read_folder(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"--caption-pattern '\(' is no regular expression: missing \)"):
        list(read_folder(tmp_path, "("))


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    peaks = []
    for count in (200, 1600):
        for number in range(count):
            fill(tmp_path, {f"{number % 16}/{number}.jpg": b"", f"{number % 16}/{number}.txt": "A tree."})
        tracemalloc.start()
        assert sum(isinstance(item, Row) for item in read_folder(tmp_path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 10_000


def test_texts_that_are_too_long_are_lost(tmp_path: Path) -> None:
    fill(tmp_path, {"a.jpg": b"", "a.txt": "x" * 150_000, "b.jpg": b"", "b.txt": b"word \n" * 2**22, "c.jpg": b""})
    fill(tmp_path, {"c.txt": "\n".join(["line " * 100] * 1000)})
    pairs, lost = read(tmp_path)
    assert list(pairs) == ["c.jpg"]
    assert lost == {"a.txt": "caption is absurdly long", "b.txt": "text is larger than 16 MiB"}


@pytest.mark.parametrize("skip", ["out", "in/../out", "link"])
def test_a_folder_may_be_skipped(skip: str, tmp_path: Path) -> None:
    fill(tmp_path, {"out/a.jpg": b"", "out/a.txt": "A.", "in/out/b.jpg": b"", "in/out/b.txt": "B."})
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    path = str(tmp_path / "elsewhere/out") if skip == "link" else str(tmp_path / skip)
    rows = [item for item in read_folder(tmp_path, None, path) if isinstance(item, Row)]
    assert [row.key for row in rows] == ["in/out/b"]
