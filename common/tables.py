"""Any table of the user as rows in a fixed order: parquet, CSV or JSON lines, plain, gzipped or zipped.

A path may be a file, a folder or a glob. Parquet is read where it lies, in ranges of rows. CSV and JSON lines are first
copied to parquet, because a range of their rows cannot be found without reading all rows before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.columns import no_rows
from common.commit import fingerprint_files
from common.config import UserError
from common.shards import damaged
from common.text_tables import column_names, copy_to_parquet

if TYPE_CHECKING:
    import pyarrow as pa

_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


@dataclass(frozen=True)
class Table:
    """Parquet files that together are one table; rows are numbered through all of them."""

    files: tuple[Path, ...]  # of CSV and JSON lines files the copies
    n_rows_of: tuple[int, ...]
    schema: pa.Schema
    given: str  # the input as its user names it

    @property
    def n_rows(self) -> int:
        """Rows of all files together."""
        return sum(self.n_rows_of)

    def require_columns(self, *columns: str, keys: Sequence[str] = ()) -> None:
        """Raise UserError naming the columns that are there; `keys` are the config keys that chose the columns."""
        for index, column in enumerate(columns):
            if column not in self.schema.names:
                raise _no_column(self.given, column, self.schema.names, key="".join(keys[index : index + 1]))

    def read_rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows `start` to `stop` (exclusive) as one Arrow table of the common schema."""
        import pyarrow as pa

        names = list(columns) if columns is not None else self.schema.names
        schema = pa.schema([self.schema.field(name) for name in names])
        pieces = [piece for piece in self._pieces(start, stop, names)]
        return pa.concat_tables([_cast(piece, schema) for piece in pieces]) if pieces else no_rows(schema)

    def _pieces(self, start: int, stop: int, names: list[str]) -> Iterator[pa.Table]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        first = 0
        for path, n_rows in zip(self.files, self.n_rows_of, strict=True):
            low, high = max(start - first, 0), min(stop - first, n_rows)
            first += n_rows
            if low >= high:
                continue
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    yield _read_range(file, low, high, [name for name in names if name in file.schema_arrow.names])
            except (pa.ArrowException, UnicodeDecodeError, OSError) as problem:
                raise damaged(path, problem) from None


def _no_column(path: str | Path, column: str, names: Iterable[str], *, key: str) -> UserError:
    to_do = f"; set {key}" if key else ""
    return UserError(f"{path} has no column {column!r} (has: {', '.join(names)}){to_do}")


def _read_range(file: Any, low: int, high: int, names: list[str]) -> pa.Table:
    groups, first, before = [], 0, 0
    for group in range(file.metadata.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        if first < high and first + n_rows > low:
            groups.append(group)
        elif first + n_rows <= low:
            before = first + n_rows
        first += n_rows
    table = file.read_row_groups(groups, columns=names).slice(low - before, high - low)
    if table.num_rows != high - low:
        raise OSError(f"{table.num_rows} of {high - low} rows could be read")
    return table


def find_files(path: str) -> list[Path]:
    """The files of a path, folder or glob, sorted by name; raises UserError where there is none of a known format."""
    given = Path(path)
    if given.is_file():
        return [given]
    if given.is_dir():
        found = [p for p in sorted(given.iterdir()) if p.is_file() and not p.name.startswith((".", "_"))]
        found = [p for p in found if _format_of(p)]
    else:
        anchor = Path(given.anchor or ".")
        pattern = str(given.relative_to(anchor)) if given.anchor else path
        found = sorted(p for p in anchor.glob(pattern) if p.is_file()) if pattern else []
    if not found:
        what = "holds no parquet, CSV or JSONL files" if given.is_dir() else "does not exist"
        raise UserError(f"input {path} {what}; check the path in the config")
    return found


def fingerprint_input(path: str) -> str:
    """What identifies the content of an input; see `commit.fingerprint_files`."""
    return fingerprint_files(find_files(path))


def require_column(path: str, column: str, *, key: str) -> None:
    """Raise UserError where an input of CSV or JSON lines lacks a column; nothing is copied, and reading stops there.

    Where there is parquet among its files, nothing is looked at.
    """
    files = {file: _known_format(file) for file in find_files(path)}
    if "parquet" in files.values():
        return
    seen: dict[str, None] = {}
    for file, table_format in files.items():
        for name in column_names(file, table_format):
            if name == column:
                return
            seen[name] = None
    raise _no_column(next(iter(files)), column, seen, key=key)


def open_table(path: str, *, copy_folder: Path) -> Table:
    """Open an input as one table; `copy_folder` takes the parquet copies of CSV and JSON lines files.

    Columns are the union over all files. Raises UserError where a file is missing, empty, damaged or of unknown format.
    """
    files = [_as_parquet(file, index, copy_folder) for index, file in enumerate(find_files(path))]
    return _join(files, path)


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in {".gz", ".zip"}:
        suffixes.pop()
    if not suffixes and path.suffix.lower() == ".zip":
        return "csv"
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _known_format(path: Path) -> str:
    table_format = _format_of(path)
    if table_format is None:
        known = ", ".join(sorted(_FORMATS))
        raise UserError(f"input {path} has an unknown format; known are {known}, also with .gz or .zip")
    return table_format


def _as_parquet(path: Path, index: int, copy_folder: Path) -> Path:
    table_format = _known_format(path)
    if table_format == "parquet" and path.suffix.lower() != ".gz":
        return path
    copy = copy_folder / f"copy-{index:05d}.parquet"
    if copy.exists():
        return copy
    copy_to_parquet(path, table_format, copy)
    return copy


def _join(files: list[Path], path: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas, n_rows_of = [], []
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                schemas.append(opened.schema_arrow)
                n_rows_of.append(opened.metadata.num_rows)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as problem:
            raise damaged(file, problem) from None
    if sum(n_rows_of) == 0:
        raise UserError(f"input {path} holds no rows; check the path in the config")
    return Table(tuple(files), tuple(n_rows_of), _common_schema(schemas), path)


def _common_schema(schemas: list[pa.Schema]) -> pa.Schema:
    """The union of the columns; one whose types in different files do not unify becomes text."""
    import pyarrow as pa

    types: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            types[field.name] = _common_type(types.get(field.name), field.type)
    return pa.schema([pa.field(name, arrow_type) for name, arrow_type in types.items()])


def _common_type(first: pa.DataType | None, second: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_dictionary(second):
        second = second.value_type
    if first is None or first == second or pa.types.is_null(first):
        return second
    if pa.types.is_null(second):
        return first
    if pa.types.is_integer(first) and pa.types.is_integer(second):
        return pa.int64()
    if pa.types.is_floating(first) and pa.types.is_floating(second):
        return pa.float64()
    return pa.string()


def _cast(piece: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name not in piece.schema.names:
            columns.append(pa.nulls(piece.num_rows, field.type))
            continue
        column = piece.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowNotImplementedError:
            texts = [
                None if value is None else json.dumps(value, ensure_ascii=False, default=str)
                for value in column.to_pylist()
            ]
            columns.append(pa.chunked_array([pa.array(texts, pa.string())]))
    return pa.table(columns, schema=schema)
