"""Writing one parquet shard: atomically, in a layout that reads fast, with a stamp of what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.columns import is_vector
from common.commit import atomic_file
from common.config import UserError
from common.shards import MAX_SHARD_ROWS, ROW_GROUP_ROWS, STAMP_KEY, Stamp, footer_crc32, read_footer

if TYPE_CHECKING:
    import pyarrow as pa


def write_shard(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], stamp: Stamp) -> int:
    """Write one shard atomically, in row groups of 8192 rows, with `stamp` in the footer; returns its bytes.

    Raises UserError where the tables hold another number of rows than the stamp says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    n_rows = 0
    with atomic_file(path) as file:
        # On an exception this `with` closes a file that looks whole; it is safe because `atomic_file` throws it away.
        with pq.ParquetWriter(file, schema, **parquet_options(schema)) as writer:
            for table in tables:
                writer.write_table(pa.table(table.columns, schema=schema), row_group_size=ROW_GROUP_ROWS)
                n_rows += table.num_rows
            if n_rows != stamp.n_rows:
                raise UserError(f"{path} would hold {n_rows} of {stamp.n_rows} rows; the input changed during the run")
            writer.add_key_value_metadata({STAMP_KEY.decode(): stamp.to_json()})
        return file.tell()


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How the columns of a shard are encoded, as the keyword arguments of pyarrow's writer."""
    return {
        "compression": dict(_column_codecs(schema)),
        "use_dictionary": [field.name for field in schema if _is_compressible(field.type)],
        "write_statistics": [field.name for field in schema if not is_vector(field.type)],
        "write_page_checksum": True,
    }


def _is_compressible(arrow_type: pa.DataType) -> bool:
    import pyarrow as pa

    return not (pa.types.is_nested(arrow_type) or pa.types.is_floating(arrow_type))


def _column_codecs(schema: pa.Schema) -> Iterator[tuple[str, str]]:
    """Vectors stay uncompressed: their bytes do not shrink, and they are most of what is read and written."""
    import pyarrow as pa

    for column in schema:
        if is_vector(column.type):
            yield f"{column.name}.list.element", "none"
        elif not pa.types.is_nested(column.type):
            yield column.name, "zstd"


def split_rows(n_rows: int, n_shards: int) -> list[tuple[int, int]]:
    """Cut rows into `n_shards` ranges of nearly equal size, more where a shard would hold over a million rows."""
    n_shards = min(max(n_shards, -(-n_rows // MAX_SHARD_ROWS)), max(n_rows, 1))
    edges = [n_rows * index // n_shards for index in range(n_shards + 1)]
    return list(pairwise(edges))


@dataclass(frozen=True)
class ShardTask:
    """One shard to be written: where, and with which stamp. Small enough to send to another process."""

    path: Path
    stamp: Stamp

    @property
    def name(self) -> str:
        """The shard's file name."""
        return self.path.name

    @property
    def n_rows(self) -> int:
        """Rows that the shard will hold."""
        return self.stamp.n_rows

    def write(self, schema: pa.Schema, tables: Iterable[pa.Table]) -> dict[str, Any]:
        """Write the shard; returns its name, rows and bytes for `_SUCCESS`."""
        n_bytes = write_shard(self.path, schema, tables, self.stamp)
        return {"name": self.path.name, "n_rows": self.stamp.n_rows, "n_bytes": n_bytes}


def shard_entry(path: Path) -> dict[str, Any]:
    """What `_SUCCESS` says of one shard."""
    n_rows, n_bytes = read_footer(path).num_rows, path.stat().st_size
    return {"name": path.name, "n_rows": n_rows, "n_bytes": n_bytes, "footer_crc32": footer_crc32(path)}
