"""Any table of the user as rows in a fixed order: parquet, CSV or JSON lines, plain, gzipped or zipped.

A path may be a file, a folder or a glob. Parquet is read where it lies, in ranges of rows. CSV and JSON lines are first
copied to parquet, in one pass with bounded memory, because a range of their rows cannot be found without reading all
rows before it. CSV has no types: every column is text, unchanged.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common.commit import atomic_file, fingerprint_files
from common.config import UserError
from common.shards import damaged

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
_COPY_ROWS = 16_384


@dataclass(frozen=True)
class Table:
    """Parquet files that together are one table; rows are numbered through all of them."""

    files: tuple[Path, ...]
    n_rows_of: tuple[int, ...]
    schema: pa.Schema

    @property
    def n_rows(self) -> int:
        """Rows of all files together."""
        return sum(self.n_rows_of)

    def require_columns(self, *columns: str, keys: Sequence[str] = ()) -> None:
        """Raise UserError naming the columns that are there; `keys` are the config keys that chose the columns."""
        for index, column in enumerate(columns):
            if column not in self.schema.names:
                key = f"; set {keys[index]}" if index < len(keys) else ""
                raise UserError(f"{self.files[0]} has no column {column!r} (has: {', '.join(self.schema.names)}){key}")

    def read_rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows `start` to `stop` (exclusive) as one Arrow table of the common schema."""
        import pyarrow as pa

        names = list(columns) if columns is not None else self.schema.names
        schema = pa.schema([self.schema.field(name) for name in names])
        pieces = [piece for piece in self._pieces(start, stop, names)]
        return pa.concat_tables([_cast(piece, schema) for piece in pieces]) if pieces else schema.empty_table()

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


def open_table(path: str, *, copy_folder: Path) -> Table:
    """Open an input as one table; `copy_folder` takes the parquet copies of CSV and JSON lines files.

    Columns are the union over all files. Raises UserError where a file is missing, empty, damaged or of unknown format.
    """
    files = [_as_parquet(file, index, copy_folder) for index, file in enumerate(find_files(path))]
    return _join(files, path)


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
    return Table(tuple(files), tuple(n_rows_of), _common_schema(schemas))


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


# --- CSV and JSON lines ----------------------------------------------------------------------------------------------


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in {".gz", ".zip"}:
        suffixes.pop()
    if not suffixes and path.suffix.lower() == ".zip":
        return "csv"
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _as_parquet(path: Path, index: int, copy_folder: Path) -> Path:
    table_format = _format_of(path)
    if table_format is None:
        known = ", ".join(sorted(_FORMATS))
        raise UserError(f"input {path} has an unknown format; known are {known}, also with .gz or .zip")
    if table_format == "parquet" and path.suffix.lower() != ".gz":
        return path
    copy = copy_folder / f"copy-{index:05d}.parquet"
    if copy.exists():
        return copy
    _copy_to_parquet(path, table_format, copy)
    return copy


def _copy_to_parquet(path: Path, table_format: str, copy: Path) -> None:
    import pyarrow.parquet as pq

    if table_format == "parquet":
        with _readable(path), gzip.open(path) as packed, atomic_file(copy) as file:
            while block := packed.read(2**22):
                file.write(block)
        return
    schema = _csv_schema(path, table_format) if table_format != "jsonl" else _jsonl_schema(path)
    # On an exception the writer closes a file that looks whole; `atomic_file` throws it away.
    with atomic_file(copy) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in _read_text_table(path, table_format, schema):
            writer.write_table(table)


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


def _csv_reader(file: IO[str], table_format: str) -> Any:
    csv.field_size_limit(sys.maxsize)
    return csv.reader(file, delimiter="\t" if table_format == "tsv" else ",")


def _csv_schema(path: Path, table_format: str) -> pa.Schema:
    import pyarrow as pa

    with _open_text(path) as file:
        header: list[str] = next(_csv_reader(file, table_format), [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or twice:
        what = f"names the column {twice[0]!r} twice" if twice else "is empty"
        raise UserError(f"input {path} {what}; the first line must name the columns, each once")
    return pa.schema([pa.field(name, pa.string()) for name in header])


def _read_text_table(path: Path, table_format: str, schema: pa.Schema) -> Iterator[pa.Table]:
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
