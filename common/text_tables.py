"""CSV and JSON lines, plain, gzipped or zipped, copied to parquet: in one pass with bounded memory.

CSV has no types: every column is text, unchanged. JSON lines keep theirs where a column has one.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common.commit import atomic_file
from common.config import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_COPY_ROWS = 16_384


def copy_to_parquet(path: Path, table_format: str, copy: Path) -> None:
    """Copy a table to parquet, atomically; `table_format` is csv, tsv, jsonl, or parquet for one that is gzipped.

    Raises UserError where the file is damaged, encrypted or no such table.
    """
    import pyarrow.parquet as pq

    if table_format == "parquet":
        with _readable(path), gzip.open(path) as packed, atomic_file(copy) as file:
            while block := packed.read(2**22):
                file.write(block)
        return
    schema = _csv_schema(path, table_format) if table_format != "jsonl" else _jsonl_schema(path)
    # On an exception the writer closes a file that looks whole; `atomic_file` throws it away.
    with atomic_file(copy) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in _read_tables(path, table_format, schema):
            writer.write_table(table)


def column_names(path: Path, table_format: str) -> Iterator[str]:
    """Names of columns as they come up: those of a CSV file's header, those of JSON lines row by row."""
    if table_format != "jsonl":
        yield from _csv_schema(path, table_format).names
        return
    for row in _jsonl_rows(path):
        yield from row


def _read_tables(path: Path, table_format: str, schema: pa.Schema) -> Iterator[pa.Table]:
    import pyarrow as pa

    rows = _csv_rows(path, table_format, schema.names) if table_format != "jsonl" else _jsonl_rows(path)
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _COPY_ROWS:
            yield pa.table([_column(batch, field) for field in schema], schema=schema)
            batch = []
    yield pa.table([_column(batch, field) for field in schema], schema=schema)


def _column(rows: list[dict[str, Any]], field: pa.Field) -> pa.Array:
    import pyarrow as pa

    values = [row.get(field.name) for row in rows]
    if pa.types.is_string(field.type):
        values = [value if value is None else _as_text(value) for value in values]
    return pa.array(values, field.type)


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if text.isascii():
        return text
    # JSON may spell half of a surrogate pair, which no UTF-8 can hold: it becomes U+FFFD.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# --- Opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what damaged, foreign and encrypted files raise into an error that says what to do."""
    broken = (UnicodeDecodeError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
    try:
        yield
    except broken as problem:
        raise UserError(f"input {path} cannot be read ({problem}); save it as UTF-8, or pack it again") from None


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    with _readable(path):
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                if len(members) != 1:
                    raise UserError(f"input {path} holds {len(members)} files; pack one table in one archive")
                if members[0].flag_bits & 1:
                    raise UserError(f"input {path} is encrypted; pack it again without a password")
                with archive.open(members[0]) as packed, io.TextIOWrapper(packed, "utf-8-sig", newline="") as file:
                    yield file
        elif path.suffix.lower() == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield file
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv_schema(path: Path, table_format: str) -> pa.Schema:
    import pyarrow as pa

    with _open_text(path) as file:
        header: list[str] = next(_csv_reader(file, table_format), [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or twice:
        what = f"names the column {twice[0]!r} twice" if twice else "is empty"
        raise UserError(f"input {path} {what}; the first line must name the columns, each once")
    return pa.schema([pa.field(name, pa.string()) for name in header])


def _csv_rows(path: Path, table_format: str, names: list[str]) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        reader = _csv_reader(file, table_format)
        next(reader)
        try:
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise UserError(
                        f"input {path}, line {reader.line_num}: {len(cells)} cells, but the header names {len(names)} "
                        f"columns; quote texts that hold a comma"
                    )
                yield {name: cell or None for name, cell in zip(names, cells, strict=True)}
        except csv.Error as problem:
            raise UserError(f"input {path}, line {reader.line_num}: {problem}; mend this line") from None


def _csv_reader(file: IO[str], table_format: str) -> Any:
    csv.field_size_limit(sys.maxsize)
    return csv.reader(file, delimiter="\t" if table_format == "tsv" else ",")


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _jsonl_schema(path: Path) -> pa.Schema:
    """One type a column: bool, int, float or text; mixed and nested values become text."""
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    for row in _jsonl_rows(path):
        for name, value in row.items():
            too_long = isinstance(value, int) and not -(2**63) <= value < 2**63
            kinds.setdefault(name, set()).add(str if too_long else type(value))
    if not kinds:
        raise UserError(f"input {path} holds no rows; check the path in the config")
    return pa.schema([pa.field(name, _json_type(found - {type(None)})) for name, found in kinds.items()])


def _json_type(kinds: set[type]) -> pa.DataType:
    import pyarrow as pa

    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    return pa.string()


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise UserError(
                    f"input {path}, line {number}: not JSON ({problem}); mend or remove this line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"input {path}, line {number}: not an object with column names; mend or remove this line"
                )
            yield row
