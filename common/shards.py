"""The parquet shards that stages pass to each other, and the protocol by which a folder of them is committed.

A folder holds `part-00000.parquet`, …, and `_SUCCESS`, a JSON file that lists them. Each shard carries in its footer a
stamp: the identity it was made from and its number of rows, written last. So "done" means: the footer is readable, the
stamp is the one expected, and the rows are all there. `_SUCCESS` is written when every shard is done; the next stage
reads only what it lists. A stage may also add columns to the shards of another in place: such a layer has an identity
of its own in the footers and in `_SUCCESS`. Reading is here; writing is in `outputs`, layers are in `layers`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.columns import is_plain_vector, vector_array
from common.commit import fingerprint_files, is_temporary
from common.config import UserError, canonical_json
from common.parquet_footer import Footer, end_of_file, read_footer_bytes
from common.plain_vectors import read_plain_vectors
from common.threads import read_ahead

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SUCCESS = "_SUCCESS"
ROW_GROUP_ROWS = 8192
MAX_SHARD_ROWS = 1_000_000
# Rows that are held in memory at once while shards are streamed.
CHUNK_ROWS = 4 * ROW_GROUP_ROWS

STAMP_KEY = b"clustering.stamp"


def shard_name(index: int) -> str:
    """The file name of shard number `index`."""
    return f"part-{index:05d}.parquet"


# --- Stamps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stamp:
    """What a shard's footer says about it: identity and rows, and the layers that were added in place."""

    identity: dict[str, Any]
    fingerprint: str
    n_rows: int
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The stamp as it stands in the footer."""
        return canonical_json(
            {
                "identity": self.identity,
                "fingerprint": self.fingerprint,
                "n_rows": self.n_rows,
                "layers": self.layers,
            }
        )


def read_stamp(path: Path) -> Stamp | None:
    """The stamp of a parquet file, or None where it has none because another program wrote it.

    Raises UserError where the file is damaged.
    """
    parquet_metadata = read_footer(path)
    content = (parquet_metadata.metadata or {}).get(STAMP_KEY)
    if content is None:
        return None
    try:
        stamp = Stamp(**json.loads(content))
    except (ValueError, TypeError) as problem:
        raise damaged(path, problem) from None
    if stamp.n_rows != parquet_metadata.num_rows:
        raise UserError(
            f"shard {path} is damaged: it holds {parquet_metadata.num_rows} of {stamp.n_rows} rows; "
            f"delete it and run the stage that writes it again"
        )
    return stamp


def read_footer(path: Path) -> pq.FileMetaData:
    """The footer of a parquet file; raises UserError where the file is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing; run the stage that writes it again") from None
    except (pa.ArrowException, UnicodeDecodeError, OSError) as problem:
        raise damaged(path, problem) from None


def footer_crc32(path: Path) -> int:
    """CRC-32 of the footer of a parquet file, for which parquet has no checksum of its own as it has for pages."""
    with path.open("rb") as file:
        return zlib.crc32(end_of_file(read_footer_bytes(file)))


def damaged(path: Path, problem: BaseException) -> UserError:
    """The error for a parquet file that cannot be read."""
    reason = " ".join(str(problem).split())[:200]
    return UserError(
        f"shard {path} is damaged ({reason}); delete it and run the stage that writes it again, "
        f"or restore the file if it is your input"
    )


# --- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One parquet file of a stage's input."""

    path: Path
    n_rows: int

    def open(self, *, as_dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        """Open the file with page checksums verified; raises UserError where it is damaged.

        Columns of text in `as_dictionaries` come as dictionaries, as they lie in the file: each text is decoded once.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Pre-buffering would hold the columns of several row groups at a time, and wins on remote disks alone.
            return pq.ParquetFile(
                self.path, page_checksum_verification=True, pre_buffer=False, read_dictionary=list(as_dictionaries)
            )
        except FileNotFoundError:
            raise UserError(f"shard {self.path} is missing; run the stage that writes it again") from None
        except (pa.ArrowException, UnicodeDecodeError, OSError) as problem:
            raise damaged(self.path, problem) from None

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, with its metadata."""
        import pyarrow as pa

        with self.open() as file:
            try:
                return file.schema_arrow
            except (pa.ArrowException, UnicodeDecodeError) as problem:
                raise damaged(self.path, problem) from None

    def iter_tables(
        self, columns: Sequence[str] | None = None, *, n_rows: int = CHUNK_ROWS, as_dictionaries: Sequence[str] = ()
    ) -> Iterator[pa.Table]:
        """Yield the rows in order, at most `n_rows` at a time, with only the columns asked for; see `open`."""
        return read_ahead(self._decode(columns, n_rows, as_dictionaries))

    def _decode(self, columns: Sequence[str] | None, n_rows: int, as_dictionaries: Sequence[str]) -> Iterator[pa.Table]:
        import pyarrow as pa

        with self.open(as_dictionaries=as_dictionaries) as file:
            schema = file.schema_arrow if columns is None else pa.schema([file.schema_arrow.field(c) for c in columns])
            n_read = 0
            try:
                for table in _iter_row_groups(file, self.path, schema, n_rows):
                    n_read += table.num_rows
                    yield table
            except (pa.ArrowException, UnicodeDecodeError, ValueError, OSError) as problem:
                raise damaged(self.path, problem) from None
            # A page whose header names an unknown kind is passed over without an error, and its rows with it.
            if n_read != file.metadata.num_rows and schema.names:
                raise damaged(self.path, ValueError(f"{n_read} of {file.metadata.num_rows} rows could be read"))


def _iter_batches(file: pq.ParquetFile, schema: pa.Schema, n_rows: int) -> Iterator[pa.Table]:
    """Yield the rows as pyarrow decodes them, in as few tables as `n_rows` allows.

    Decoded batches end where a row group ends if columns come as dictionaries, of which each row group has its own.
    """
    import pyarrow as pa

    upcoming: list[pa.Table] = []
    for batch in file.iter_batches(batch_size=n_rows, columns=schema.names, use_threads=True):
        if sum(table.num_rows for table in upcoming) + batch.num_rows > n_rows:
            yield pa.concat_tables(upcoming)
            upcoming = []
        upcoming.append(pa.table([batch.column(name) for name in schema.names], schema=schema))
    if upcoming:
        yield pa.concat_tables(upcoming)


def _iter_row_groups(file: pq.ParquetFile, path: Path, schema: pa.Schema, n_rows: int) -> Iterator[pa.Table]:
    """Yield the rows of a shard of ours, with vectors read as they lie in its pages and the rest decoded."""
    import pyarrow as pa

    lengths = {field.name: field.type.list_size for field in schema if is_plain_vector(field.type)}
    if not lengths or STAMP_KEY not in (file.metadata.metadata or {}):
        yield from _iter_batches(file, schema, n_rows)
        return
    with path.open("rb") as pages:
        for index, group in enumerate(Footer(read_footer_bytes(pages)).groups):
            columns = {}
            for name, length in lengths.items():
                vectors = read_plain_vectors(pages, group, name, dimension=length)
                if vectors is not None:
                    columns[name] = vector_array(vectors)
            decoded = [name for name in schema.names if name not in columns]
            if decoded:
                table = file.read_row_group(index, columns=decoded)
                columns |= dict(zip(table.column_names, table.columns, strict=True))
            rows = pa.table([columns[name] for name in schema.names], schema=schema)
            for start in range(0, group.n_rows, n_rows):
                yield rows.slice(start, n_rows)


@dataclass(frozen=True)
class ShardSet:
    """The committed output of a stage, or a plain folder of parquet files, in a fixed order."""

    folder: Path
    shards: tuple[Shard, ...]
    success: dict[str, Any] | None  # None: a plain folder

    @property
    def n_rows(self) -> int:
        """Rows of all shards together."""
        return sum(shard.n_rows for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Bytes on disk of all shards together."""
        return sum(shard.path.stat().st_size for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """What the rows were made from; layers added in place have fingerprints of their own."""
        if self.success is not None:
            return str(self.success["fingerprint"])
        return fingerprint_files([shard.path for shard in self.shards])

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of the first shard."""
        return self.shards[0].schema

    def layer(self, name: str) -> dict[str, Any] | None:
        """What `_SUCCESS` says of a layer that was added in place, or None."""
        return (self.success or {}).get("layers", {}).get(name)

    def require_columns(self, *columns: str, written_by: dict[str, str] | None = None) -> None:
        """Raise UserError naming the columns that are there and the stage that writes the missing one."""
        for shard in self.shards:
            names = shard.schema.names
            missing = [column for column in columns if column not in names]
            if missing:
                writer = (written_by or {}).get(missing[0])
                mend = f"run {writer} first, or check the column name in the config" if writer else "check the config"
                raise UserError(f"{shard.path} has no column {missing[0]!r} (has: {', '.join(names)}); {mend}")

    def iter_tables(self, columns: Sequence[str], *, n_rows: int = CHUNK_ROWS) -> Iterator[pa.Table]:
        """Yield the rows of all shards in order, at most `n_rows` at a time."""
        for shard in self.shards:
            yield from shard.iter_tables(columns, n_rows=n_rows)


def open_shards(folder: str | Path, *, written_by: str) -> ShardSet:
    """Open the input of a stage: a committed folder of ours, or a plain folder of parquet files.

    Raises UserError where the folder is missing, empty, unfinished, or holds a shard of another configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"input folder {folder} {what}; run {written_by} first, or check the config")
    if (folder / SUCCESS).exists():
        return _open_committed(folder, written_by)
    paths = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith((".", "_")))
    # A temporary `_SUCCESS` proves nothing: a killed run may have left it in a plain folder, which is whole.
    unfinished = (path.name for path in folder.iterdir() if not path.name.startswith(f".{SUCCESS}."))
    if any(map(is_temporary, unfinished)) or any(read_stamp(path) for path in paths):
        raise UserError(
            f"input folder {folder} is unfinished (it has no {SUCCESS}); run {written_by} again to finish it"
        )
    if not paths:
        raise UserError(f"input folder {folder} holds no parquet files; run {written_by} first, or check the config")
    shards = tuple(Shard(path, read_footer(path).num_rows) for path in paths)
    return _refuse_empty(ShardSet(folder, shards, None))


def _open_committed(folder: Path, written_by: str) -> ShardSet:
    success = read_success(folder)
    shards = []
    for entry in success["shards"]:
        path = folder / entry["name"]
        stamp = read_stamp(path)
        n_rows = stamp.n_rows if stamp else read_footer(path).num_rows
        foreign = stamp is not None and stamp.fingerprint != success["fingerprint"]
        if foreign or n_rows != entry["n_rows"]:
            raise UserError(
                f"shard {path} is not the one that {folder / SUCCESS} lists: it comes from another run or "
                f"configuration; run {written_by} again with --overwrite"
            )
        if entry.get("footer_crc32") not in (None, footer_crc32(path)):
            raise damaged(path, ValueError(f"its footer is not the one that {SUCCESS} lists"))
        shards.append(Shard(path, n_rows))
    return _refuse_empty(ShardSet(folder, tuple(shards), success))


def _refuse_empty(shard_set: ShardSet) -> ShardSet:
    if shard_set.n_rows == 0:
        raise UserError(f"input folder {shard_set.folder} holds no rows; nothing to do for this stage")
    return shard_set


def read_success(folder: Path) -> dict[str, Any]:
    """The `_SUCCESS` file of a folder; raises UserError where it is damaged."""
    path = folder / SUCCESS
    try:
        success = json.loads(path.read_text(encoding="utf-8"))
        success["shards"], success["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; run the stage that writes {folder} again with --overwrite") from None
    return success
