"""Vectors read from the pages as they lie there are those that pyarrow decodes, and damage is found as it finds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import plain_vectors
from common.columns import vector_array
from common.config import UserError
from common.parquet_footer import Footer, read_footer_bytes
from common.plain_vectors import read_plain_vectors
from common.shard_writer import write_shard
from common.shards import ROW_GROUP_ROWS, Shard, Stamp


def make_vectors(n_rows: int, dimension: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n_rows, dimension)).astype(np.float32)


def make_shard(folder: Path, array: pa.Array) -> Shard:
    table = pa.table({"id": np.arange(len(array)), "cls": array})
    write_shard(folder / "in.parquet", table.schema, [table], Stamp({"stage": "test"}, "abc", len(array)))
    return Shard(folder / "in.parquet", len(array))


def read_groups(shard: Shard, dimension: int) -> list[np.ndarray | None]:
    with shard.path.open("rb") as file:
        groups = Footer(read_footer_bytes(file)).groups
        return [read_plain_vectors(file, group, "cls", dimension=dimension) for group in groups]


@pytest.mark.parametrize("dimension", [2, 7, 384])
def test_rows_of_many_pages_and_groups(tmp_path, dimension):
    vectors = make_vectors(ROW_GROUP_ROWS + 5, dimension)
    shard = make_shard(tmp_path, vector_array(vectors))
    read = read_groups(shard, dimension)
    assert [len(group) for group in read] == [ROW_GROUP_ROWS, 5]
    assert np.array_equal(np.concatenate(read), vectors)
    assert pq.read_table(shard.path)["cls"].combine_chunks().flatten().to_numpy().tobytes() == vectors.tobytes()


def test_every_bit_of_a_float_comes_through(tmp_path):
    values = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, np.finfo(np.float32).max, 1 / 3]
    vectors = np.array(values, np.float32).reshape(4, 2)
    (read,) = read_groups(make_shard(tmp_path, vector_array(vectors)), 2)
    assert read.tobytes() == vectors.tobytes()


def test_what_is_not_plain_is_left_to_be_decoded(tmp_path):
    vectors = make_vectors(6, 2)
    valid = np.array([1, 1, 0, 1, 1, 1], bool)
    assert read_groups(make_shard(tmp_path, vector_array(vectors, valid=valid)), 2) == [None]
    assert read_groups(make_shard(tmp_path, vector_array(vectors)), 3) == [None]
    assert read_groups(make_shard(tmp_path, vector_array(vectors, dtype="float16")), 2) == [None]
    for options in ({"compression": "zstd"}, {"use_dictionary": True}, {"data_page_version": "2.0"}):
        plain = {"compression": "none", "use_dictionary": False}
        pq.write_table(pa.table({"cls": vector_array(vectors)}), tmp_path / "in.parquet", **(plain | options))
        if "data_page_version" in options:
            with pytest.raises(ValueError, match="no kind"):
                read_groups(Shard(tmp_path / "in.parquet", 6), 2)
        else:
            assert read_groups(Shard(tmp_path / "in.parquet", 6), 2) == [None]


@pytest.mark.parametrize("n_rows", [1, 100, 5000, ROW_GROUP_ROWS, 50_000])
def test_a_shard_gives_the_same_rows_either_way(tmp_path, monkeypatch, n_rows):
    """One row group without nulls and one with them, read plain and, for comparison, decoded."""
    valid = np.ones(ROW_GROUP_ROWS + 90, bool)
    valid[ROW_GROUP_ROWS + 3] = False
    shard = make_shard(tmp_path, vector_array(make_vectors(len(valid), 3), valid=valid))
    plain = list(shard.iter_tables(n_rows=n_rows))
    monkeypatch.setattr(plain_vectors, "_is_plain", lambda *_, **__: False)
    decoded = list(shard.iter_tables(n_rows=n_rows))
    assert pa.concat_tables(plain).equals(pa.concat_tables(decoded))
    assert max(table.num_rows for table in plain) <= n_rows
    assert plain[0]["cls"][0].as_py() == decoded[0]["cls"][0].as_py() != plain[-1]["cls"][-1].as_py()


def test_a_file_of_another_program_is_decoded(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("only what we wrote has lists of equal length by construction")

    monkeypatch.setattr("common.shards.read_plain_vectors", refuse)
    table = pa.table({"cls": vector_array(make_vectors(10, 2))})
    pq.write_table(table, tmp_path / "in.parquet", compression="none", use_dictionary=False)
    (read,) = Shard(tmp_path / "in.parquet", 10).iter_tables()
    assert read.equals(table)


def test_damage_in_the_vectors_is_told_with_the_name_of_the_shard(tmp_path):
    shard = make_shard(tmp_path, vector_array(make_vectors(600, 16)))
    whole = shard.path.read_bytes()
    start = pq.read_metadata(shard.path).row_group(0).column(1).data_page_offset
    expected = pa.concat_tables(shard.iter_tables(["cls"]))
    n_found = 0
    for place in range(start, start + 600 * 16 * 4, 97):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        shard.path.write_bytes(content)
        try:
            found = pa.concat_tables(shard.iter_tables(["cls"]))
        except UserError as problem:
            assert "in.parquet is damaged" in str(problem)
            n_found += 1
        else:
            assert found.equals(expected)
    assert n_found > 390  # of 396; the rest hit the statistics in the head of the page
    shard.path.write_bytes(whole[: start + 1000] + whole[start + 1100 :])
    with pytest.raises(UserError, match="in.parquet is damaged"):
        list(shard.iter_tables(["cls"]))
