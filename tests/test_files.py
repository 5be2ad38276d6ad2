from __future__ import annotations

from pathlib import Path

import pytest

from jettclip.files import whole_file


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path) as partial:
        Path(partial).write_text("new")
        assert path.read_text() == "old"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "new")]


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(partial: str) -> None:
        Path(partial).write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"), whole_file(path) as partial:
        fail(partial)
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass  # nothing was written
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]
