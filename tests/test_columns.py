"""Vector columns as any program writes them, to numpy and back; labels as text."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.columns import (
    is_vector,
    label_strings,
    merge_errors,
    read_vectors,
    replace_columns,
    vector_array,
    vector_type,
)
from common.config import UserError

ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
TYPES = {
    "fixed float": pa.list_(pa.float32(), 2),
    "fixed double": pa.list_(pa.float64(), 2),
    "fixed half": pa.list_(pa.float16(), 2),
    "list of float": pa.list_(pa.float32()),
    "list of double": pa.list_(pa.float64()),
    "large list": pa.large_list(pa.float32()),
    "list of int": pa.list_(pa.int64()),
    "ours": vector_type(2),
}


def column(values: list, arrow_type: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, arrow_type)])


@pytest.mark.parametrize("arrow_type", TYPES.values(), ids=TYPES)
def test_every_kind_of_list_is_the_same_matrix(arrow_type):
    read = read_vectors(column(ROWS, arrow_type), where="x")
    assert read.vectors.dtype == np.float32
    assert read.vectors.tolist() == ROWS
    assert read.valid.all() and not read.absent.any()


@pytest.mark.parametrize("name", sorted(set(TYPES) - {"ours"}))
def test_null_rows_are_zeros_and_not_valid(name):
    read = read_vectors(column([ROWS[0], None, ROWS[2], None], TYPES[name]), where="x")
    assert read.vectors.tolist() == [ROWS[0], [0, 0], ROWS[2], [0, 0]]
    assert read.valid.tolist() == [True, False, True, False]
    assert read.absent.tolist() == [False, True, False, True]


@pytest.mark.parametrize("name", ["list of float", "list of double", "large list"])
def test_empty_lists_are_absent_vectors(name):
    read = read_vectors(column([[], ROWS[0], None, ROWS[1]], TYPES[name]), where="x", dimension=2)
    assert read.vectors.tolist() == [[0, 0], ROWS[0], [0, 0], ROWS[1]]
    assert read.absent.tolist() == [True, False, True, False]


@pytest.mark.parametrize("arrow_type", [pa.list_(pa.float32(), 2), pa.list_(pa.float64()), pa.large_list(pa.float32())])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_rows_are_zeros_and_not_valid(arrow_type, bad):
    read = read_vectors(column([ROWS[0], [1.0, bad], ROWS[1]], arrow_type), where="x")
    assert read.vectors.tolist() == [ROWS[0], [0, 0], ROWS[1]]
    assert read.valid.tolist() == [True, False, True]
    assert not read.absent.any()


def test_inf_and_its_opposite_do_not_cancel():
    read = read_vectors(column([[np.inf, -np.inf], [3e38, 3e38]], pa.list_(pa.float32(), 2)), where="x")
    assert read.valid.tolist() == [False, True]


def test_null_inside_a_vector_makes_it_not_finite():
    read = read_vectors(column([[1.0, None], ROWS[0]], pa.list_(pa.float32(), 2)), where="x")
    assert read.valid.tolist() == [False, True]
    assert read.vectors.tolist() == [[0, 0], ROWS[0]]


def test_double_beyond_float_is_not_finite():
    with np.errstate(all="raise"):
        read = read_vectors(column([[1e300, 0.0], ROWS[0]], pa.list_(pa.float64())), where="x")
    assert read.valid.tolist() == [False, True]


@pytest.mark.parametrize("name", TYPES)
def test_slices_and_chunks_are_read_where_they_begin(name):
    if name == "ours":
        whole = vector_array(np.arange(20, dtype=np.float32).reshape(10, 2))
    else:
        whole = pa.array([[2 * i, 2 * i + 1] if i != 5 else None for i in range(10)], TYPES[name])
    pieces = pa.chunked_array([whole.slice(1, 3), whole.slice(4, 0), whole.slice(4, 4)])
    expected = [[2.0 * i, 2.0 * i + 1] for i in range(1, 8)]
    if name != "ours":
        expected[4] = [0.0, 0.0]
    assert read_vectors(pieces, where="x").vectors.tolist() == expected
    assert read_vectors(whole.slice(2, 2), where="x").vectors.tolist() == expected[1:3]


def test_vectors_of_different_length_name_the_row():
    with pytest.raises(UserError, match=r"s\.parquet holds vectors of different length \(2, but 1 in row 2 of its"):
        read_vectors(column([[1.0, 2.0], None, [1.0]], pa.list_(pa.float32())), where="s.parquet")


@pytest.mark.parametrize("arrow_type", [pa.list_(pa.float32(), 2), pa.list_(pa.float32())])
def test_other_dimension_names_both(arrow_type):
    with pytest.raises(UserError, match=r"^s\.parquet holds vectors of length 2, expected 3"):
        read_vectors(column(ROWS, arrow_type), where="s.parquet", dimension=3)


@pytest.mark.parametrize("values", [["a", "b"], [1, 2], [["a"], ["b"]], [{"a": 1}, None]])
def test_no_vectors_at_all(values):
    with pytest.raises(UserError, match=r"^s\.parquet holds .*, not vectors"):
        read_vectors(pa.chunked_array([pa.array(values)]), where="s.parquet")


def test_no_rows_and_only_null_rows():
    assert read_vectors(column([], pa.list_(pa.float32(), 2)), where="x").vectors.shape == (0, 2)
    assert read_vectors(column([], pa.list_(pa.float32())), where="x", dimension=3).vectors.shape == (0, 3)
    assert read_vectors(pa.chunked_array([], pa.list_(pa.float32(), 4)), where="x").vectors.shape == (0, 4)
    nulls = read_vectors(column([None, None], pa.list_(pa.float32())), where="x", dimension=3)
    assert nulls.vectors.tolist() == [[0, 0, 0], [0, 0, 0]] and not nulls.valid.any()


def test_our_own_vectors_are_read_without_a_copy():
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    read = read_vectors(vector_array(vectors), where="x")
    assert np.shares_memory(read.vectors, vectors)


def test_written_vectors_have_elements_that_cannot_be_null(tmp_path):
    array = vector_array(np.array(ROWS), valid=np.array([True, False, True]))
    assert array.type == vector_type(2) and not array.type.value_field.nullable
    pq.write_table(pa.table({"cls": array}), tmp_path / "x.parquet")
    again = read_vectors(pq.read_table(tmp_path / "x.parquet")["cls"], where="x")
    assert again.vectors.tolist() == [ROWS[0], [0, 0], ROWS[2]]
    assert again.valid.tolist() == [True, False, True]
    assert vector_array(np.array(ROWS), dtype="float16").type.value_type == pa.float16()


def test_what_is_a_vector():
    assert all(is_vector(arrow_type) for arrow_type in TYPES.values())
    assert not any(map(is_vector, [pa.string(), pa.list_(pa.string()), pa.float32(), pa.struct([])]))


# --- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["a", " a ", "", "  ", None]), ["a", "a", None, None, None]),
        (pa.array([3, None, -1]), ["3", None, "-1"]),
        (pa.array([3.0, float("nan"), None, 2.5]), ["3", None, None, "2.5"]),
        (pa.array([True, False]), ["True", "False"]),
        (pa.array(["007", "7"]), ["007", "7"]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (pa.array([datetime.date(2026, 1, 2)]), ["2026-01-02"]),
        (pa.array([None, None]), [None, None]),
    ],
)
def test_labels_as_text(values, expected):
    assert label_strings(pa.chunked_array([values])) == expected


# --- Tables ----------------------------------------------------------------------------------------------------------


def test_replaced_columns_keep_their_place_and_new_ones_go_to_the_end():
    table = pa.table({"a": [1, 2], "b": [3, 4]})
    found = replace_columns(table, {"c": pa.array([7, 8]), "a": pa.array(["x", "y"])}, field_metadata={"c": {"k": "v"}})
    assert found.to_pydict() == {"a": ["x", "y"], "b": [3, 4], "c": [7, 8]}
    assert found.schema.names == ["a", "b", "c"]
    assert found.schema.field("c").metadata == {b"k": b"v"}
    assert table.schema.names == ["a", "b"]


def test_first_reason_of_a_row_stays():
    column = pa.chunked_array([pa.array(["text is null", None, None])])
    assert merge_errors(column, {0: "cls is null", 2: "zero"}, 3).to_pylist() == ["text is null", None, "zero"]
    assert merge_errors(None, {1: "zero"}, 2).to_pylist() == [None, "zero"]
    assert merge_errors(pa.chunked_array([[5, None]]), {1: "zero"}, 2).to_pylist() == ["5", "zero"]
