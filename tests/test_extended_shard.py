"""A shard made of another: equal to one that is decoded and written anew, and what stays is never decoded."""

from __future__ import annotations

import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from common import extended_shard
from common.columns import vector_array
from common.config import UserError
from common.extended_shard import Extension, write_extended_shard
from common.shard_writer import write_shard
from common.shards import ROW_GROUP_ROWS, Shard, Stamp, read_stamp

N_ROWS = 2 * ROW_GROUP_ROWS + 100  # two full row groups and a short one


def rows(n_rows: int = N_ROWS) -> pa.Table:
    """Rows of every kind of column that a shard may carry."""
    numbers = np.arange(n_rows)
    valid = numbers % 7 != 0
    vectors = np.sin(numbers[:, None] + np.arange(4)).astype(np.float32)
    classes = {"classes": '["a", "b"]'}
    schema = pa.schema([pa.field("probs", vector_array(vectors[:1, :2]).type, metadata=classes)])
    return pa.table(
        {
            "id": numbers,
            "text": pa.array([f"text {number % 50}" if number % 5 else None for number in numbers]),
            "error": pa.array([None if ok else "text is null" for ok in valid], pa.string()),
            "cls": vector_array(vectors, valid=valid),
            "kind": pa.array([f"kind {number % 3}" for number in numbers]).dictionary_encode(),
            "when": pa.array([datetime.datetime(2026, 1, 1) + datetime.timedelta(n) for n in range(n_rows)]),
            "tags": pa.array([["x"] * (number % 3) if number % 4 else None for number in numbers]),
            "pair": pa.array([{"a": int(number), "b": None} for number in numbers]),
            "price": pa.array([Decimal(number) / 4 for number in range(n_rows)]),
            "is_open": pa.array(valid),
        }
    ).append_column(schema.field(0), vector_array(np.abs(vectors[:, :2])))


def length_and_error(table: pa.Table, *, factor: float = 1.0) -> pa.Table:
    """A column that is new, with metadata, and one that stands there already."""
    squares = pc.list_value_length(table["cls"])
    field = pa.field("length", pa.float64(), metadata={"of": "cls"})
    new = pa.table([pc.multiply(squares.cast(pa.float64()), factor)], schema=pa.schema([field]))
    return new.append_column("error", pc.fill_null(table["error"], "none"))


def source_shard(folder: Path, table: pa.Table | None = None) -> Shard:
    table = rows() if table is None else table
    write_shard(folder / "in.parquet", table.schema, [table], stamp(table.num_rows))
    return Shard(folder / "in.parquet", table.num_rows)


def stamp(n_rows: int = N_ROWS) -> Stamp:
    return Stamp({"stage": "test"}, "abc", n_rows)


def extension(source: Shard, columns: list[str] | None = None, **options: int) -> Extension:
    return Extension(source, columns or source.schema.names, ["cls", "error"], length_and_error, **options)


def chunks(path: Path, name: str) -> list[bytes]:
    """The bytes of a column in each row group."""
    metadata, content, found = pq.read_metadata(path), path.read_bytes(), []
    for group in range(metadata.num_row_groups):
        for leaf in range(metadata.num_columns):
            column = metadata.row_group(group).column(leaf)
            if column.path_in_schema.split(".")[0] == name:
                start = column.dictionary_page_offset or column.data_page_offset
                found.append(content[start : start + column.total_compressed_size])
    return found


def is_rewritten(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which shards were decoded and written anew from now on."""
    written: list[Path] = []

    def note(path, *arguments):
        written.append(path)
        return write_shard(path, *arguments)

    monkeypatch.setattr(extended_shard, "write_shard", note)
    return written


@pytest.mark.parametrize("batch_size", [1000, 5000, ROW_GROUP_ROWS, 50_000])
@pytest.mark.parametrize("columns", [None, ["id", "probs"], ["tags", "error", "cls"]], ids=["all", "two", "three"])
def test_it_is_what_decoding_and_writing_anew_would_give(tmp_path, monkeypatch, columns, batch_size):
    made = extension(source_shard(tmp_path), columns, batch_size=batch_size)
    rewritten = is_rewritten(monkeypatch)
    write_extended_shard(tmp_path / "out.parquet", made, stamp())
    assert rewritten == []
    anew = extension(made.source, columns).whole_tables()
    write_shard(tmp_path / "anew.parquet", made.schema, anew, stamp())
    out, anew = (
        pq.ParquetFile(tmp_path / name, page_checksum_verification=True) for name in ("out.parquet", "anew.parquet")
    )
    assert out.schema_arrow.equals(anew.schema_arrow, check_metadata=True)
    assert out.metadata.metadata == anew.metadata.metadata
    assert out.read().equals(anew.read())
    assert [out.metadata.row_group(at).num_rows for at in range(3)] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 100]
    for at in range(3):
        assert out.metadata.row_group(at).total_byte_size == anew.metadata.row_group(at).total_byte_size
    by_statistics = pq.read_table(tmp_path / "out.parquet", filters=[("error", "==", "none")])
    assert by_statistics.num_rows == N_ROWS - pc.sum(pc.equal(out.read()["error"], "text is null")).as_py()
    assert read_stamp(tmp_path / "out.parquet") == stamp()


def test_values_by_hand_and_the_place_of_a_replaced_column(tmp_path):
    write_extended_shard(tmp_path / "out.parquet", extension(source_shard(tmp_path)), stamp())
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == [*rows(1).column_names, "length"]
    assert table["error"].slice(0, 3).to_pylist() == ["text is null", "none", "none"]
    assert table["length"].slice(0, 3).to_pylist() == [None, 4.0, 4.0]
    assert table.schema.field("length").metadata == {b"of": b"cls"}
    assert table.schema.field("probs").metadata == {b"classes": b'["a", "b"]'}


def test_what_stays_is_copied_byte_for_byte(tmp_path):
    source = source_shard(tmp_path)
    write_extended_shard(tmp_path / "out.parquet", extension(source), stamp())
    for name in ("text", "cls", "kind", "tags", "pair", "probs"):
        assert chunks(tmp_path / "out.parquet", name) == chunks(source.path, name) != []
    assert chunks(tmp_path / "out.parquet", "error") != chunks(source.path, "error")


def test_in_place_again_and_again_the_shard_does_not_grow(tmp_path):
    source = source_shard(tmp_path)
    sizes = []
    for factor in (1.0, 2.0, 3.0):
        compute = partial(length_and_error, factor=factor)
        made = Extension(source, source.schema.names, ["cls", "error"], compute)
        write_extended_shard(source.path, made, stamp())
        sizes.append(source.path.stat().st_size)
    assert max(sizes) - min(sizes) < 100  # compressed numbers differ by some bytes
    assert pq.read_table(source.path)["length"][1].as_py() == 12.0
    assert sorted(tmp_path.iterdir()) == [source.path]


# --- Other layouts ---------------------------------------------------------------------------------------------------


FOREIGN = {
    "long row groups": {"row_group_size": 10_000},
    "no rows": {},
    "statistics, page index, another codec": {
        "row_group_size": 5000,
        "write_page_index": True,
        "compression": "snappy",
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_program_becomes_the_same_shard(tmp_path, name):
    table = rows(0 if name == "no rows" else N_ROWS)
    pq.write_table(table, tmp_path / "in.parquet", **FOREIGN[name])
    made = extension(Shard(tmp_path / "in.parquet", table.num_rows))
    write_extended_shard(tmp_path / "out.parquet", made, stamp(table.num_rows))
    out = pq.ParquetFile(tmp_path / "out.parquet", page_checksum_verification=True)
    assert out.read().select(["id", "text", "cls"]).equals(table.select(["id", "text", "cls"]))
    assert all(out.metadata.row_group(at).num_rows <= ROW_GROUP_ROWS for at in range(out.metadata.num_row_groups))
    assert not any(out.metadata.row_group(at).column(0).has_column_index for at in range(out.metadata.num_row_groups))


def test_columns_that_are_declared_in_another_way_are_decoded(tmp_path, monkeypatch):
    table = rows().select(["id", "cls", "error"])
    table = table.set_column(1, "cls", table["cls"].cast(pa.list_(pa.float32())))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5000, use_compliant_nested_type=False)
    rewritten = is_rewritten(monkeypatch)
    write_extended_shard(tmp_path / "out.parquet", extension(Shard(tmp_path / "in.parquet", N_ROWS)), stamp())
    assert rewritten == [tmp_path / "out.parquet"]
    assert pq.read_table(tmp_path / "out.parquet")["cls"].equals(table["cls"])


# --- Damage ----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_of_a_column_is_found_or_changes_nothing(tmp_path):
    """The footer is left alone: it has a checksum in `_SUCCESS`, which is looked at before."""
    source = source_shard(tmp_path, rows(40).select(["id", "text", "error", "cls", "probs"]))
    whole = source.path.read_bytes()
    wanted = pa.concat_tables(extension(source).whole_tables())
    n_found = n_found_late = 0
    n_column_bytes = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for place in range(0, n_column_bytes, 13):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        source.path.write_bytes(content)
        try:
            write_extended_shard(tmp_path / "out.parquet", extension(source), stamp(40))
        except UserError:
            n_found += 1
            continue
        try:
            tables = list(Shard(tmp_path / "out.parquet", 40).iter_tables())
        except UserError:
            n_found_late += 1  # in the head of a page, which has no checksum
            continue
        assert pa.concat_tables(tables).equals(wanted), f"bit flip in byte {place} of {n_column_bytes} changed a value"
    assert n_found > n_column_bytes / 13 / 4
    assert n_found_late < n_found / 20


@pytest.mark.parametrize("name", ["text", "cls"])
def test_a_damaged_column_names_its_shard_and_leaves_the_old_output(tmp_path, name):
    source = source_shard(tmp_path)
    content = bytearray(source.path.read_bytes())
    damaged = content.index(chunks(source.path, name)[1]) + 60
    content[damaged] ^= 1
    source.path.write_bytes(content)
    (tmp_path / "out.parquet").write_bytes(b"as it was")
    with pytest.raises(UserError, match="in.parquet is damaged"):
        write_extended_shard(tmp_path / "out.parquet", extension(source), stamp())
    assert (tmp_path / "out.parquet").read_bytes() == b"as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_a_source_cut_short_or_gone(tmp_path):
    source = source_shard(tmp_path)
    content = source.path.read_bytes()
    for n_bytes in (0, 3, 11, len(content) // 2, len(content) - 1):
        source.path.write_bytes(content[:n_bytes])
        with pytest.raises(UserError, match="in.parquet is damaged"):
            write_extended_shard(tmp_path / "out.parquet", extension(source), stamp())
    source.path.unlink()
    with pytest.raises(UserError, match="in.parquet is missing"):
        write_extended_shard(tmp_path / "out.parquet", extension(source), stamp())


def test_another_number_of_rows_than_the_stamp_says_is_refused(tmp_path):
    source = source_shard(tmp_path)
    with pytest.raises(UserError, match=f"would hold {N_ROWS} of 7 rows"):
        write_extended_shard(tmp_path / "out.parquet", extension(source), stamp(7))
    assert not (tmp_path / "out.parquet").exists()
