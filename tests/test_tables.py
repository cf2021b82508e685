"""Any table of the user as rows in order: CSV, TSV, JSON lines and parquet, packed or not, one file or many."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config import UserError
from common.tables import Table, find_files, open_table
from tests.stage_runner import write_parquet


def read(path: Path | str, tmp_path: Path) -> pa.Table:
    table = open_table(str(path), copy_folder=tmp_path / ".copies")
    return table.read_rows(0, table.n_rows)


def rows(path: Path | str, tmp_path: Path) -> list[dict]:
    return read(path, tmp_path).to_pylist()


def refused(path: Path | str, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path, tmp_path)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


CSV = 'id,text,label\n007,"one, two",a\n008,"line 1\nline 2",\n009,"said ""hi""",b\n'
CSV_ROWS = [
    {"id": "007", "text": "one, two", "label": "a"},
    {"id": "008", "text": "line 1\nline 2", "label": None},
    {"id": "009", "text": 'said "hi"', "label": "b"},
]


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def test_csv_cells_are_text_unchanged_and_empty_cells_null(tmp_path):
    assert rows(write(tmp_path / "in.csv", CSV), tmp_path) == CSV_ROWS


def test_csv_of_windows_with_byte_order_mark(tmp_path):
    content = b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()
    found = rows(write(tmp_path / "in.csv", content), tmp_path)
    assert [row["id"] for row in found] == ["007", "008", "009"]
    assert found[1]["text"] == "line 1\r\nline 2"


def test_tsv_keeps_commas(tmp_path):
    path = write(tmp_path / "in.tsv", "text\tlabel\nhello, world\ta\n\tb\n")
    assert rows(path, tmp_path) == [{"text": "hello, world", "label": "a"}, {"text": None, "label": "b"}]


@pytest.mark.parametrize(("line", "n_cells"), [("c,d,e", 3), ("only", 1)])
def test_ragged_csv_line_is_named(tmp_path, line, n_cells):
    path = write(tmp_path / "in.csv", f'text,label\n"a\nb",x\n{line}\n')
    said = refused(path, tmp_path)
    assert f"in.csv, line 4: {n_cells} cells, but the header names 2 columns" in said


def test_csv_text_with_nul_emoji_and_marks(tmp_path):
    text = "a\0b \U0001f4b3 \u202eabc <script>"
    assert rows(write(tmp_path / "in.csv", f'text,n\n"{text}",1\n'), tmp_path) == [{"text": text, "n": "1"}]


def test_csv_cell_of_a_megabyte(tmp_path):
    text = "long " * 200_000
    assert rows(write(tmp_path / "in.csv", f"text,n\n{text},1\n"), tmp_path)[0]["text"] == text


def test_csv_header_that_names_a_column_twice(tmp_path):
    assert "names the column 'a' twice" in refused(write(tmp_path / "in.csv", "a,b,a\n1,2,3\n"), tmp_path)


def test_csv_rows_beyond_one_batch_keep_their_order(tmp_path):
    n_rows = 40_000
    path = write(tmp_path / "in.csv", "i\n" + "\n".join(str(i) for i in range(n_rows)))
    table = open_table(str(path), copy_folder=tmp_path / ".copies")
    assert table.n_rows == n_rows
    assert table.read_rows(16_380, 16_390)["i"].to_pylist() == [str(i) for i in range(16_380, 16_390)]


# --- JSON lines ------------------------------------------------------------------------------------------------------


def test_jsonl_types(tmp_path):
    lines = [
        {"text": "a", "n": 1, "x": 1, "ok": True, "mixed": 3, "nested": {"b": [1]}, "none": None},
        {"text": "б", "n": 2, "x": 0.5, "ok": False, "mixed": "three", "nested": [2], "none": None},
        {"text": None},
    ]
    path = write(tmp_path / "in.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    found = read(path, tmp_path)
    assert [str(field.type) for field in found.schema] == [
        "string", "int64", "double", "bool", "string", "string", "string",
    ]  # fmt: skip
    assert found.to_pylist() == [
        {"text": "a", "n": 1, "x": 1.0, "ok": True, "mixed": "3", "nested": '{"b": [1]}', "none": None},
        {"text": "б", "n": 2, "x": 0.5, "ok": False, "mixed": "three", "nested": "[2]", "none": None},
        dict.fromkeys(["text", "n", "x", "ok", "mixed", "nested", "none"]),
    ]


def test_jsonl_column_that_begins_late(tmp_path):
    path = write(tmp_path / "in.jsonl", '{"text": "a"}\n{"text": "b", "label": "x"}\n')
    assert rows(path, tmp_path) == [{"text": "a", "label": None}, {"text": "b", "label": "x"}]


def test_jsonl_whole_numbers_too_long_for_a_column_stay_as_text(tmp_path):
    path = write(tmp_path / "in.jsonl", '{"id": 1}\n{"id": 18446744073709551616}\n')
    assert rows(path, tmp_path) == [{"id": "1"}, {"id": "18446744073709551616"}]


def test_jsonl_half_of_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path = write(tmp_path / "in.jsonl", '{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert rows(path, tmp_path) == [{"text": "cut \ufffd"}, {"text": "whole \U0001f600"}]


@pytest.mark.parametrize(
    ("line", "said"), [('{"text": ', "line 2: not JSON"), ("[1, 2]", "line 2: not an object with column names")]
)
def test_jsonl_bad_line_is_named(tmp_path, line, said):
    assert said in refused(write(tmp_path / "in.jsonl", f'{{"text": "a"}}\n{line}\n'), tmp_path)


# --- Packed ----------------------------------------------------------------------------------------------------------


def test_gzip_of_each_format(tmp_path):
    write(tmp_path / "in.csv.gz", gzip.compress(CSV.encode()))
    write(tmp_path / "in.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))
    plain = write_parquet(tmp_path / "plain.parquet", {"text": ["a", "b"]})
    write(tmp_path / "in.parquet.gz", gzip.compress(plain.read_bytes()))
    assert rows(tmp_path / "in.csv.gz", tmp_path / "1") == CSV_ROWS
    assert rows(tmp_path / "in.jsonl.gz", tmp_path / "2") == [{"text": "a"}]
    assert rows(tmp_path / "in.parquet.gz", tmp_path / "3") == [{"text": "a"}, {"text": "b"}]


def zipped(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return path


def test_zip_of_one_table(tmp_path):
    assert rows(zipped(tmp_path / "in.csv.zip", in_csv=CSV), tmp_path / "1") == CSV_ROWS
    assert rows(zipped(tmp_path / "in.zip", in_csv=CSV), tmp_path / "2") == CSV_ROWS
    assert rows(zipped(tmp_path / "in.jsonl.zip", in_jsonl='{"a": 1}'), tmp_path / "3") == [{"a": 1}]


def test_zip_of_two_tables_is_refused(tmp_path):
    assert "holds 2 files; pack one table" in refused(zipped(tmp_path / "in.csv.zip", a_csv=CSV, b_csv=CSV), tmp_path)


def damaged(content: bytes) -> bytes:
    """The same with a byte changed in the middle of the packed data."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.gz", ".parquet.gz"])
@pytest.mark.parametrize("break_it", [damaged, lambda content: content[:-20], lambda content: b"no gzip at all"])
def test_broken_gzip_is_an_error_that_names_the_file(tmp_path, suffix, break_it):
    content = "text,n\n" + "".join(f"{i * 7919 % 1000},{i}\n" for i in range(3000))
    if suffix == ".jsonl.gz":
        content = "".join(f'{{"n": {i * 7919 % 1000}}}\n' for i in range(3000))
    path = write(tmp_path / f"in{suffix}", break_it(gzip.compress(content.encode())))
    said = refused(path, tmp_path)
    assert f"in{suffix}" in said or "copy-00000.parquet is damaged" in said


def test_broken_zip_is_an_error_that_names_the_file(tmp_path):
    path = zipped(tmp_path / "in.csv.zip", in_csv="text\n" + "".join(f"{i * 7919 % 1000}\n" for i in range(3000)))
    path.write_bytes(damaged(path.read_bytes()))
    assert "in.csv.zip cannot be read" in refused(path, tmp_path)
    path.write_bytes(b"no zip at all")
    assert "in.csv.zip cannot be read" in refused(path, tmp_path)


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.jsonl"])
def test_not_utf8_is_an_error_that_names_the_file(tmp_path, name):
    content = '{"text": "café"}\n' if name == "in.jsonl" else "text\ncafé\n"
    path = write(tmp_path / name, content.encode("latin-1"))
    assert f"{name} cannot be read" in refused(path, tmp_path)
    assert "save it as UTF-8" in refused(path, tmp_path)


# --- Many files ------------------------------------------------------------------------------------------------------


def test_folder_takes_known_formats_in_the_order_of_names(tmp_path):
    folder = tmp_path / "in"
    write(folder / "b.csv", "text\nsecond\n")
    write_parquet(folder / "a.parquet", {"text": ["first"]})
    write(folder / "c.jsonl", '{"text": "third"}\n')
    write(folder / "notes.md", "not a table")
    write(folder / "_SUCCESS", "{}")
    write(folder / ".hidden.csv", "text\nno\n")
    assert [row["text"] for row in rows(folder, tmp_path)] == ["first", "second", "third"]


def test_glob(tmp_path):
    for name in ("2025/x.csv", "2026/a.csv", "2026/b.csv"):
        write(tmp_path / name, f"text\n{name}\n")
    assert [row["text"] for row in rows(tmp_path / "2026" / "*.csv", tmp_path / "1")] == ["2026/a.csv", "2026/b.csv"]
    assert len(rows(tmp_path / "**" / "*.csv", tmp_path / "2")) == 3


def test_relative_glob(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.csv", "text\nx\n")
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in find_files("in/*.csv")] == ["in/a.csv"]


def test_columns_are_the_union_of_all_files(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", {"text": ["x"], "id": [1]})
    write_parquet(tmp_path / "in" / "b.parquet", {"id": [2], "label": ["l"], "text": ["y"]})
    write_parquet(tmp_path / "in" / "c.parquet", {"other": [0.5]})
    assert rows(tmp_path / "in", tmp_path) == [
        {"text": "x", "id": 1, "label": None, "other": None},
        {"text": "y", "id": 2, "label": "l", "other": None},
        {"text": None, "id": None, "label": None, "other": 0.5},
    ]
    table = open_table(str(tmp_path / "in"), copy_folder=tmp_path)
    assert table.read_rows(0, 3, ["label"]).to_pylist() == [{"label": None}, {"label": "l"}, {"label": None}]


def test_labels_of_mixed_types_become_text(tmp_path):
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", {"label": pa.array([1, 2], pa.int32())})
    write_parquet(folder / "b.parquet", {"label": pa.array(["x", None])})
    write_parquet(folder / "c.parquet", {"label": pa.array([None, None], pa.null())})
    write_parquet(folder / "d.parquet", {"label": pa.array(["y", "y"]).dictionary_encode()})
    found = read(folder, tmp_path)
    assert found.schema.field("label").type == pa.string()
    assert found["label"].to_pylist() == ["1", "2", "x", None, None, None, "y", "y"]


def test_numbers_of_different_width_stay_numbers(tmp_path):
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", {"n": pa.array([1], pa.int8()), "x": pa.array([0.5], pa.float32())})
    write_parquet(folder / "b.parquet", {"n": pa.array([2**40]), "x": pa.array([0.25])})
    assert rows(folder, tmp_path) == [{"n": 1, "x": 0.5}, {"n": 2**40, "x": 0.25}]


def test_nested_against_text_becomes_json(tmp_path):
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", {"meta": [{"k": 1}, None]})
    write_parquet(folder / "b.parquet", {"meta": ["plain"]})
    assert read(folder, tmp_path)["meta"].to_pylist() == ['{"k": 1}', None, "plain"]


def test_every_range_of_rows_across_files_and_row_groups(tmp_path):
    folder, start = tmp_path / "in", 0
    for name, n_rows, group in (("a", 7, 3), ("b", 0, 3), ("c", 5, 2), ("d", 1, 1)):
        numbers = pa.array(range(start, start + n_rows), pa.int64())
        write_parquet(folder / f"{name}.parquet", {"i": numbers}, row_group_size=group)
        start += n_rows
    table = open_table(str(folder), copy_folder=tmp_path)
    assert table.n_rows == 13
    for low in range(14):
        for high in range(low, 14):
            assert table.read_rows(low, high)["i"].to_pylist() == list(range(low, high)), (low, high)


# --- What is no input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [("in.csv", "text,label\n"), ("in.jsonl", ""), ("in.jsonl", "\n\n"), ("in.csv", ""), ("in.tsv", "\n")],
)
def test_empty_input(tmp_path, name, content):
    said = refused(write(tmp_path / name, content), tmp_path)
    assert "holds no rows" in said or "is empty" in said


def test_empty_parquet_and_empty_folder(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", {"text": pa.array([], pa.string())})
    assert "holds no rows" in refused(path, tmp_path)
    (tmp_path / "nothing").mkdir()
    assert "holds no parquet, CSV or JSONL files" in refused(tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize("path", ["absent.parquet", "absent/*.csv", "no/such/folder"])
def test_missing_input(tmp_path, path):
    assert "does not exist; check the path in the config" in refused(tmp_path / path, tmp_path)


@pytest.mark.parametrize("name", ["in.xlsx", "in.json", "in", "in.gz"])
def test_unknown_format_names_the_known(tmp_path, name):
    said = refused(write(tmp_path / name, "text\nx\n"), tmp_path)
    assert "has an unknown format; known are .csv, .jsonl, .ndjson, .parquet, .pq, .tsv" in said


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all"])
def test_damaged_parquet(tmp_path, content):
    assert "in.parquet is damaged" in refused(write(tmp_path / "in.parquet", content), tmp_path)


def test_missing_column_names_those_that_are_there_and_the_key(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", {"utterance": ["a"], "intent": ["b"]})
    table = open_table(str(path), copy_folder=tmp_path)
    with pytest.raises(UserError, match=r"no column 'text' \(has: utterance, intent\); set supervise\.text_column"):
        table.require_columns("text", keys=["supervise.text_column"])


def test_damaged_page_is_found_when_its_rows_are_read(tmp_path):
    path = write_parquet(
        tmp_path / "in.parquet", {"i": list(range(1000))}, compression="none", write_page_checksum=True
    )
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    table: Table = open_table(str(path), copy_folder=tmp_path)
    with pytest.raises(UserError, match=r"in\.parquet is damaged"):
        table.read_rows(0, 1000)


def test_copies_are_made_once(tmp_path):
    path = write(tmp_path / "in.csv", "text\na\n")
    read(path, tmp_path)
    (copy,) = (tmp_path / ".copies").iterdir()
    before = copy.stat().st_mtime_ns
    assert rows(path, tmp_path) == [{"text": "a"}]
    assert copy.stat().st_mtime_ns == before
    assert pq.read_table(copy).num_rows == 1
