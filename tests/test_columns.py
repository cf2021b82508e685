"""Vector columns as any program writes them, to numpy and back; labels as text."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.columns import (
    has_text,
    is_vector,
    label_strings,
    merge_errors,
    number_array,
    numbers,
    read_vectors,
    replace_columns,
    text_array,
    vector_array,
    vector_type,
)
from common.config import UserError
from common.quality import Contingency
from tests.text_pipeline import ROOT, STAGES, TextPipeline

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


@pytest.mark.parametrize(
    ("values", "arrow_type", "absent"),
    [
        ([3, None, -4, 5], pa.int32(), -1),
        ([3, None, 4, 5], pa.uint8(), 0),
        ([0.5, None, float("inf"), -2.0], pa.float64(), float("inf")),
        ([True, None, False, True], pa.bool_(), False),
        ([None, None, None, None], pa.int64(), 7),
    ],
)
def test_numbers_as_arrow_itself_converts_them(values, arrow_type, absent):
    array = pa.array(values, arrow_type)
    expected = [absent if value is None else value for value in values]
    assert numbers(array, absent=absent).tolist() == expected
    assert numbers(array.slice(1, 2), absent=absent).tolist() == expected[1:3]
    assert numbers(pa.chunked_array([array.slice(2), array]), absent=absent).tolist() == expected[2:] + expected
    whole = array.drop_null()
    assert numbers(whole, absent=absent).tolist() == whole.to_pylist()
    assert numbers(pa.chunked_array([], arrow_type), absent=absent).tolist() == []


@pytest.mark.parametrize("dtype", ["int8", "int64", "float16", "float32", "bool"])
def test_number_arrays_as_arrow_itself_makes_them(dtype):
    values = np.array([0, 1, 2, 3, 0, 5, 6, 7, 1, 0]).astype(dtype)[::2]  # neither of whole bytes nor contiguous
    valid = np.array([True, False, True, True, False])
    for made, expected in (
        (number_array(values), pa.array(values)),
        (number_array(values, valid=valid), pa.array(values, mask=~valid)),
        (number_array(values[:0]), pa.array(values[:0])),
    ):
        made.validate(full=True)
        assert made.equals(expected) and made.type == expected.type


def test_text_arrays_as_arrow_itself_makes_them():
    for texts in (["a", None, "", "\u0416\u20ac\U0001f4b3", "nul \0"], ["a"], [None], []):
        made = text_array(texts)
        made.validate(full=True)
        assert made.equals(pa.array(texts, pa.string()))


def test_texts_that_say_something():
    texts = [None, "", " ", "\t\n\u3000", "a", " a ", "\0"]
    for arrow_type in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        read = has_text(pa.chunked_array([pa.array(texts, arrow_type)]))
        assert read.tolist() == [False] * 4 + [True] * 3


NO_PANDAS = """
import json, sys
from tests.stage_server import call_main
for script, argv in json.load(sys.stdin):
    assert call_main(script, argv) == 0
    assert "pandas" not in sys.modules, script + " imports pandas"
"""


def test_stages_do_without_pandas(pipeline: TextPipeline) -> None:
    """It takes longer to import than some of them take. (Training imports scikit-learn, which imports it.)"""
    stages = [STAGES[stage] for stage in ("pca", "predict", "purity", "dataset")]
    calls = [(script, ["--config", str(pipeline.config), *own, "--overwrite"]) for script, own in stages]
    process = subprocess.run(
        [sys.executable, "-c", NO_PANDAS], input=json.dumps(calls), cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(("index", "n_values"), [(pa.int8(), 128), (pa.uint8(), 256)])
def test_what_stands_for_null_fits_where_indices_are_full(index, n_values):
    """128 is no number of eight bits: it came out as -128, the label that is 128 places before the end."""
    indices = pa.array([0, None, n_values - 1], index)
    assert numbers(indices, absent=n_values).tolist() == [0, n_values, n_values - 1]
    assert numbers(pa.array([1, None], pa.uint8()), absent=-1).tolist() == [1, -1]


def test_labels_of_full_small_dictionaries_stay_absent_where_they_are_null():
    names = [f"L{number:03}" for number in range(128)]
    labels = pa.DictionaryArray.from_arrays(pa.array([1, None, None, 127], pa.int8()), names)
    counts = Contingency()
    counts.update(np.zeros(4, np.int32), labels)
    assert counts.agreement().n_scored == 2


def test_numbers_of_the_other_byte_order_keep_their_values():
    assert number_array(np.array([0, 1, 70000], ">i4")).to_pylist() == [0, 1, 70000]
