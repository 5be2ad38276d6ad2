from __future__ import annotations

import csv
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from jettclip.data.counts import DataError
from jettclip.data.rows import Lost, Row
from jettclip.data.tables import read_table


def table(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path, *arguments: Any, **options: Any) -> list[Row]:
    items = list(read_table(path, *arguments, **options))
    assert not [item for item in items if isinstance(item, Lost)]
    return [item for item in items if isinstance(item, Row)]


def test_a_chinese_clip_table_is_read_with_its_quoted_captions(tmp_path: Path) -> None:
    path = table(tmp_path / "pairs.csv", 'text,image_path\n"一棵树, 很高\n和一条河",a.jpg\nA tree.,b.jpg\n')
    first, second = rows_of(path)
    assert first.captions == {"long": ["一棵树, 很高\n和一条河"]}
    assert first.image == str(tmp_path / "a.jpg")
    assert (first.key, second.key) == ("000000000", "000000001")
    assert second.extra == {"text": "A tree.", "image_path": "b.jpg"}


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.csv"])
def test_a_tab_in_the_first_line_separates_whatever_the_suffix(name: str, tmp_path: Path) -> None:
    path = table(tmp_path / name, "filepath\ttitle\na.jpg\tA tree, and a house.\n")  # OpenCLIP's default layout
    assert rows_of(path)[0].captions == {"long": ["A tree, and a house."]}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = table(tmp_path / "pairs.csv", b"\xef\xbb\xbf" + "image,caption\na.jpg,Ein Baum für dich.\n".encode())
    assert rows_of(path)[0].extra == {"image": "a.jpg", "caption": "Ein Baum für dich."}


def test_the_lists_of_dreamlip_have_several_captions_a_view(tmp_path: Path) -> None:
    names = ["Image Path", "raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions", "longSV_captions"]
    path = table(tmp_path / "cc3m.csv", ",".join(names) + "\na.jpg,raw,short 1,long 1,short 2,long 2\n")
    assert rows_of(path)[0].captions == {"short": ["raw", "short 1", "short 2"], "long": ["long 1", "long 2"]}


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "url,where,en,de,brief\nx,a.jpg,A tree.,Ein Baum.,tree\n")
    row = rows_of(path, "/data", "where", {"long": ["en", "de"], "short": ["brief"]})[0]
    assert (row.image, row.captions) == ("/data/a.jpg", {"long": ["A tree.", "Ein Baum."], "short": ["tree"]})


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (
            "url,caption",
            {},
            "no column for the image path, but url, caption; .*--csv-img-key .* with --image-column",
        ),
        ("image,alt", {}, "no column for the caption, but image, alt;"),
        ("image,caption", {"image_column": "path"}, "no column 'path', but image, caption;"),
        ("image,caption", {"captions": {"long": ["x"]}}, "no column 'x', but image, caption;"),
    ],
)
def test_a_missing_column_is_an_error_that_lists_the_columns(
    header: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_table(table(tmp_path / "a.csv", header + "\n1,2\n"), **options))


def test_of_several_columns_that_will_do_openclips_are_taken(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "text,image_path,Title,filepath\na text,no.jpg,a title,a.jpg\n")
    row = rows_of(path)[0]
    assert (row.image, row.captions) == (str(tmp_path / "a.jpg"), {"long": ["a title"]})


def test_of_many_or_long_columns_not_all_is_listed(tmp_path: Path) -> None:
    header = ",".join(["x" * 500, *map(str, range(500))])
    with pytest.raises(DataError, match=f"but {'x' * 80}[.]{{3}}, 0, 1, .*, 78, [.]{{3}}; name those"):
        list(read_table(table(tmp_path / "a.csv", header + "\n")))


@pytest.mark.parametrize(
    "content", [tarfile.TarInfo("0.jpg").tobuf(), b"\xff\xd8\xff\xe0 JFIF" * 99, "a,b".encode("utf-16")]
)
def test_what_is_no_table_is_not_quoted_at_length(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.csv is no table, since it begins with '.*'; give a Parquet file, or"
    ) as error:
        list(read_table(table(tmp_path / "a.csv", content)))
    assert len(str(error.value)) < 700  # of which 80 characters at most were read, each written as up to 6


def test_a_header_without_an_end_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv is no table: value is absurdly long; give a CSV"):
        list(read_table(table(tmp_path / "a.csv", b"x" * (csv.field_size_limit() + 1))))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_folder_is_no_table_whatever_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="cannot be opened: Is a directory; give a file that can be read"):
        list(read_table(tmp_path / name))


def test_damaged_rows_are_lost_and_the_others_are_read(tmp_path: Path) -> None:
    path = table(
        tmp_path / "a.csv",
        b"image,caption\na.jpg,first\nb.jpg\nc.jpg,caf\xe9\n\nd.jpg,one,too many\ne.jpg, \n,no picture\nf.jpg,last\n",
    )
    assert [item.captions["long"][0] if isinstance(item, Row) else item for item in read_table(path)] == [
        "first",
        Lost("row has another number of columns", "a.csv, row 1"),
        Lost("row is not UTF-8", "a.csv, row 2"),
        Lost("row has another number of columns", "a.csv, row 3"),  # a blank line is none
        Lost("empty caption", "a.csv, row 4"),
        Lost("no image in the row", "a.csv, row 5"),
        "last",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_long_captions_are_read_and_absurdly_long_ones_are_lost(name: str, tmp_path: Path) -> None:
    long, between = "tree " * 19_000, "x" * 120_000
    lines = ["image,caption", f"a.jpg,{long}", f"b.jpg,{between}", f"c.jpg,{'x' * 200_000}", "d.jpg,last"]
    text = "\n".join(lines).replace(",", "\t" if name == "a.tsv" else ",")
    first, *lost, last = read_table(table(tmp_path / name, text))
    assert isinstance(first, Row)
    assert first.captions == {"long": [long.strip()]}
    assert lost == [
        Lost("caption is absurdly long", f"{name}, row 1"),
        Lost("value is absurdly long", f"{name}, row 2"),
    ]
    assert isinstance(last, Row)


@pytest.mark.parametrize("size", [10, 300])
def test_a_quote_that_is_not_closed_costs_its_own_row_only(size: int, tmp_path: Path) -> None:
    rows = [f"{number}.jpg,{'word ' * size}" for number in range(1000)]
    rows[3] = '3.jpg,"Hello he said'
    rows[7] = '7.jpg,"Hello" he said'
    rows[8] = '8.jpg,"two\nlines, and ""quotes"""'
    items = list(read_table(table(tmp_path / "a.csv", "\n".join(["image,caption", *rows]))))
    assert [item for item in items if isinstance(item, Lost)] == [
        Lost("row is not CSV", "a.csv, row 3"),
        Lost("row is not CSV", "a.csv, row 7"),
    ]
    assert len(items) == 1000
    assert isinstance(items[8], Row)
    assert items[8].captions == {"long": ['two\nlines, and "quotes"']}


def test_quotes_are_characters_in_a_table_of_tabs_unless_the_whole_line_is_quoted_by_the_rules(tmp_path: Path) -> None:
    captions = [
        '"Hello he said',
        '"Hello" he said',
        'a "b" c',
        'ends "here"',
        '"He said ""hello""."',
        '12" and 3"',
        "A.",
    ]
    lines = [f"{number}.jpg\t{caption}" for number, caption in enumerate(captions)]
    text = "\n".join(["filepath\ttitle", *lines, '"7.jpg\t8 inches"'])
    read = [row.captions["long"][0] for row in rows_of(table(tmp_path / "a.tsv", text))]
    assert read == ['"Hello he said', '"Hello" he said', 'a "b" c', 'ends "here"', 'He said "hello".', '12" and 3"',
                    "A.", '8 inches"']  # fmt: skip


def test_a_column_that_is_named_for_its_view_comes_first_and_the_other_is_kept(tmp_path: Path) -> None:
    (row,) = rows_of(table(tmp_path / "a.csv", "image_path,text,long_caption\na.jpg,short,A long one.\n"))
    assert row.captions == {"long": ["A long one."]}
    assert row.extra["text"] == "short"


def test_each_view_has_its_columns_found_unless_they_are_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "image,text,short_caption,brief\na.jpg,long,short,tree\n")
    assert rows_of(path, captions={"short": ["brief"]})[0].captions == {"long": ["long"], "short": ["tree"]}
    assert rows_of(path, captions={"long": ["brief"]})[0].captions == {"long": ["tree"], "short": ["short"]}
    assert rows_of(path, captions={"short": ["text"]})[0].captions == {"short": ["long"]}


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has several columns 'text'; give each a name of its own"):
        list(read_table(table(tmp_path / "a.csv", "image,text,text\na.jpg,one,two\n")))


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_table_is_an_error(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty; its first line must name the columns"):
        list(read_table(table(tmp_path / "a.csv", content)))


def test_parquet_is_read_with_lists_of_captions_and_without_columns_of_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "image_path": ["a.jpg", "b.jpg", None],
        "caption": [["A tree.", "Trees."], [], ["lost"]],
        "score": [0.5, float("nan"), 1.0],
        "bytes": [b"1", b"2", b"3"],
        "nested": [[{"bytes": b"1", "path": "x"}]] * 3,
        "map": pyarrow.array([[("k", b"v")]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.binary())),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first, *lost = read_table(tmp_path / "a.parquet")
    assert isinstance(first, Row)
    assert first.captions == {"long": ["A tree.", "Trees."]}
    assert first.extra == {"image_path": "a.jpg", "caption": ["A tree.", "Trees."], "score": 0.5}
    assert lost == [Lost("empty caption", "a.parquet, row 1"), Lost("no image in the row", "a.parquet, row 2")]


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(read_table(table(tmp_path / "a.parquet", b"PAR1 no more")))


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        list(read_table(table(tmp_path / "a.parquet", b"")))
