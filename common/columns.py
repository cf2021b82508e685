"""Arrow columns to and from numpy: numbers and vectors without a copy, labels as text.

A vector column is `FixedSizeList<float32>` with non-null elements; a row that has no vector is null. Columns of
`List<float>` and `List<double>`, as other programs write them, are read too.

Arrays are made from buffers and read from them, because `pa.array`, `to_numpy` and Arrow's functions of an array and a
number ask pandas what they were given, and import it for that: a fifth of a second in every run of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import UserError

if TYPE_CHECKING:
    import pyarrow as pa


# They are written as int32, of which the largest stays free.
_MAX_CLUSTER_ID = 2**31 - 2


@dataclass(frozen=True)
class VectorColumn:
    """Vectors of some rows, and which of the rows have a usable one."""

    vectors: np.ndarray  # [n, d] float32; rows without a usable vector are zeros
    valid: np.ndarray  # [n] bool; false for absent vectors and for vectors with NaN or Inf
    absent: np.ndarray  # [n] bool: null, or an empty list


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)  # which combining would copy
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)


# --- Numbers and texts -----------------------------------------------------------------------------------------------


def numbers(column: pa.Array | pa.ChunkedArray, *, absent: float) -> np.ndarray:
    """Numbers or booleans of a column, [n]; `absent` where one is null."""
    import pyarrow as pa

    array = _one_array(column)
    dtype = array.type.to_pandas_dtype()
    if not len(array):
        return np.zeros(0, dtype)
    if pa.types.is_boolean(array.type):
        values = _bits(array.buffers()[1], array)
    else:
        values = np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]
    if not array.null_count:
        return values
    if values.dtype.kind in "iu":  # `absent` may not fit: -1 among unsigned ones, 128 in eight bits
        values = values.astype(np.promote_types(values.dtype, np.min_scalar_type(absent)), copy=False)
    return np.where(valid_rows(array), values, absent)


def read_numbers(column: pa.Array | pa.ChunkedArray, *, absent: float, where: str, what_to_do: str) -> np.ndarray:
    """Numbers of a column of whatever type, [n] float64; `absent` where one is null.

    Raises UserError (which begins with `where` and ends with `what_to_do`) where they are no numbers.
    """
    import pyarrow as pa

    try:
        return numbers(column.cast("float64"), absent=absent)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as problem:
        raise UserError(f"{where} holds {column.type}, not numbers; {what_to_do}") from problem


def read_ids(column: pa.Array | pa.ChunkedArray, *, where: str = "") -> np.ndarray:
    """Cluster ids of a column, [n] int64; -1 for null, NaN and negative ones, which are no cluster.

    Raises UserError (which begins with `where`) where they are no whole numbers, or larger than 2**31 - 2.
    """
    import pyarrow as pa

    array, where = _one_array(column), f"{where}: " if where else ""
    if pa.types.is_floating(array.type):  # as other programs write them where some are absent
        values = numbers(array, absent=np.nan)
        array = number_array(values, valid=~np.isnan(values))
    try:
        ids = numbers(array if pa.types.is_signed_integer(array.type) else array.cast("int64"), absent=-1)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as problem:
        raise UserError(f"{where}cluster ids must be whole numbers, not {column.type} ({problem})") from problem
    if len(ids) and ids.max() > _MAX_CLUSTER_ID:
        raise UserError(
            f"{where}cluster id {ids.max()} is too large; ids go up to {_MAX_CLUSTER_ID}, so number them anew"
        )
    ids = ids.astype(np.int64, copy=False)
    return np.maximum(ids, -1) if len(ids) and ids.min() < -1 else ids


def valid_rows(array: pa.Array) -> np.ndarray:
    """[n] bool: the row is not null."""
    if not array.null_count:
        return np.ones(len(array), bool)
    bitmap = array.buffers()[0]
    return np.zeros(len(array), bool) if bitmap is None else _bits(bitmap, array)  # none in a column of type null


def _bits(buffer: pa.Buffer, array: pa.Array) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")
    return bits[array.offset : array.offset + len(array)].view(bool)


def number_array(values: np.ndarray, *, valid: np.ndarray | None = None) -> pa.Array:
    """An Arrow column of numbers or booleans, [n]; rows where `valid` ([n] bool) is false become null."""
    import pyarrow as pa

    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))  # Arrow has no other order of bytes
    content = np.packbits(values, bitorder="little") if values.dtype == bool else values
    buffers = [_bitmap(valid), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)


def text_array(texts: Sequence[str | None]) -> pa.Array:
    """An Arrow column of texts; None becomes null."""
    import pyarrow as pa

    encoded = [(text or "").encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    present = np.array([text is not None for text in texts], bool)
    buffers = [pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)), _bitmap(present)]
    return pa.LargeStringArray.from_buffers(len(encoded), *buffers).cast(pa.string())


def _bitmap(valid: np.ndarray | None) -> pa.Buffer | None:
    import pyarrow as pa

    return None if valid is None or valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))


# --- Vectors ---------------------------------------------------------------------------------------------------------


def is_vector(arrow_type: pa.DataType) -> bool:
    """Whether an Arrow type is a list of numbers."""
    import pyarrow as pa

    is_list = (
        pa.types.is_fixed_size_list(arrow_type) or pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type)
    )
    return bool(is_list and (pa.types.is_floating(arrow_type.value_type) or pa.types.is_integer(arrow_type.value_type)))


def is_plain_vector(arrow_type: pa.DataType) -> bool:
    """Whether an Arrow type is that of the vectors which the stages write."""
    import pyarrow as pa

    return bool(pa.types.is_fixed_size_list(arrow_type) and arrow_type.equals(vector_type(arrow_type.list_size)))


def vector_type(dimension: int, dtype: str = "float32") -> pa.DataType:
    """The Arrow type of vectors of one dimension; `dtype` is float32 or float16."""
    import pyarrow as pa

    element = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    return pa.list_(pa.field("element", element, nullable=False), dimension)


def read_vectors(column: pa.ChunkedArray, *, where: str, dimension: int | None = None) -> VectorColumn:
    """Vectors of a column as one float32 matrix.

    Raises UserError (which begins with `where`) if the column is no list of numbers, if its vectors differ in length,
    or if their length is not `dimension`.
    """
    array = _one_array(column)
    if not is_vector(array.type):
        raise UserError(f"{where} holds {array.type}, not vectors (a list of numbers in each row)")
    present = _rows_with_elements(array)  # [n]
    elements = array.flatten()  # of the rows that are present
    length = _common_length(array, present, where)
    if dimension is not None and length not in (dimension, 0):
        raise UserError(
            f"{where} holds vectors of length {length}, expected {dimension}; were they made by another model?"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # what comes out as NaN or Inf is found and counted below
        vectors = _to_matrix(elements, present, dimension or length)
        finite = np.isfinite(np.vecdot(vectors, vectors))  # may overflow by itself: then every element is looked at
    if elements.null_count or not finite.all():
        finite = np.isfinite(vectors).all(axis=1)
        vectors = np.where(finite[:, None], vectors, np.float32(0))
    return VectorColumn(vectors, present & finite, ~present)


def _rows_with_elements(array: pa.Array) -> np.ndarray:
    """[n] bool: neither null nor, as other programs write a vector that they do not have, an empty list."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_fixed_size_list(array.type):
        return valid_rows(array)
    return numbers(pc.list_value_length(array), absent=0) > 0


def _common_length(array: pa.Array, present: np.ndarray, where: str) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_fixed_size_list(array.type):
        return int(array.type.list_size)
    lengths = numbers(pc.list_value_length(array), absent=0)[present]
    if not len(lengths):
        return 0
    if (lengths != lengths[0]).any():
        odd = int(np.flatnonzero(lengths != lengths[0])[0])
        raise UserError(
            f"{where} holds vectors of different length ({lengths[0]}, but {lengths[odd]} in row "
            f"{np.flatnonzero(present)[odd]} of its batch); make them with one model"
        )
    return int(lengths[0])


def _to_matrix(elements: pa.Array, present: np.ndarray, dimension: int) -> np.ndarray:
    # A null element becomes NaN, so that its row is found by the test for finite values.
    values = numbers(elements, absent=np.nan).astype(np.float32, copy=False)
    if present.all():
        return values.reshape(len(present), dimension)
    vectors = np.zeros((len(present), dimension), np.float32)  # [n, d]
    if present.any():
        vectors[present] = values.reshape(-1, dimension)
    return vectors


def no_rows(schema: pa.Schema) -> pa.Table:
    """A table of these columns without a row, as `Schema.empty_table` makes it, which imports pandas."""
    import pyarrow as pa

    return pa.table([pa.nulls(0, field.type) for field in schema], schema=schema)


def vector_array(vectors: np.ndarray, *, valid: np.ndarray | None = None, dtype: str = "float32") -> pa.Array:
    """An Arrow column of the rows of `vectors` ([n, d]); rows where `valid` ([n] bool) is false become null."""
    import pyarrow as pa

    elements = number_array(np.ascontiguousarray(vectors, dtype=dtype).reshape(-1))
    mask = None if valid is None or valid.all() else number_array(~valid)
    return pa.FixedSizeListArray.from_arrays(elements, type=vector_type(vectors.shape[1], dtype), mask=mask)


# --- Labels and texts ------------------------------------------------------------------------------------------------


def label_strings(column: pa.ChunkedArray) -> list[str | None]:
    """Labels as text, whatever their type: 3, "3" and 3.0 are one label; null and blank text are no label, None."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return [label_text(value) for value in column.to_pylist()]


def label_text(value: Any) -> str | None:
    """One label as text, as `label_strings` has it."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return text or None


def has_text(column: pa.ChunkedArray) -> np.ndarray:
    """[n] bool: the row holds a text that is more than white space; all false for a column of another type."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string_view(column.type):  # which the functions below do not take
        column = column.cast(pa.large_string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return np.zeros(len(column), bool)
    is_space = numbers(pc.utf8_is_space(column), absent=True)
    return ~is_space & (numbers(pc.binary_length(column), absent=0) > 0)


def replace_columns(
    table: pa.Table, columns: dict[str, pa.Array], *, field_metadata: dict[str, dict[str, str]] | None = None
) -> pa.Table:
    """The table with `columns` in it, each in its old place or at the end; `field_metadata` is by column name."""
    import pyarrow as pa

    for name, values in columns.items():
        field = pa.field(name, values.type, metadata=(field_metadata or {}).get(name))
        index = table.schema.get_field_index(name)
        table = table.set_column(index, field, values) if index >= 0 else table.append_column(field, values)
    return table


def merge_errors(column: pa.ChunkedArray | None, reasons: dict[int, str], n_rows: int) -> pa.Array:
    """The `error` column with more reasons in it, by row; a row's first reason stays."""
    import pyarrow as pa

    before = pa.nulls(n_rows, pa.string()) if column is None else _one_array(column.cast(pa.string()))
    if not reasons:
        return before
    errors = before.to_pylist()
    for row, reason in reasons.items():
        errors[row] = errors[row] or reason
    return text_array(errors)


def describe_errors(errors: Mapping[str, int]) -> str:
    """How many rows have an error, and how many of each kind: `3 (text is empty: 2, text is null: 1)`, or `0`."""
    kinds = ", ".join(f"{reason}: {count:,}" for reason, count in errors.items())
    total = f"{sum(errors.values()):,}"
    return f"{total} ({kinds})" if kinds else total
