"""A shard made of another one: most columns stay as they are, a few are computed.

What stays is not decoded. Its column chunks are copied as they lie, the computed columns are encoded behind them in the
same row groups, and one footer names both. Vectors are most of a shard, so this is most of what a stage that adds
columns would have to do. A shard that another program laid out in its own way is decoded and written anew.
"""

from __future__ import annotations

import io
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

from common.columns import no_rows, replace_columns
from common.commit import atomic_file
from common.config import UserError
from common.parquet_footer import (
    MAGIC,
    Chunk,
    Footer,
    LeafPath,
    RowGroup,
    end_of_file,
    page_checksums,
    read_footer_bytes,
)
from common.shard_writer import parquet_options, write_shard
from common.shards import ROW_GROUP_ROWS, STAMP_KEY, Shard, Stamp, damaged
from common.threads import map_ahead

if TYPE_CHECKING:
    import pyarrow as pa


_PIECE_BYTES = 2**18


@dataclass(frozen=True)
class Extension:
    """What a shard is made of: rows and columns of `source`, and what `compute` makes of some of them."""

    source: Shard
    columns: Sequence[str]  # those of the source that stay, unless `compute` returns others by their names
    reads: Sequence[str]  # those of the source that `compute` needs
    compute: Callable[[pa.Table], pa.Table]  # from a table of `reads` to the new columns alone, row by row
    batch_size: int = ROW_GROUP_ROWS  # rows that are computed at a time

    @cached_property
    def new_schema(self) -> pa.Schema:
        """The schema of the computed columns."""
        return self.compute(no_rows(self.source.schema).select(list(self.reads))).schema

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of the shard to be written."""
        return self._extend(no_rows(self.source.schema)).schema

    @property
    def copied(self) -> list[str]:
        """The columns that stay as they are."""
        return [name for name in self.schema.names if name not in self.new_schema.names]

    def new_tables(self) -> Iterator[pa.Table]:
        """The computed columns of all rows, in their order."""
        return map_ahead(self.compute, self.source.iter_tables(self.reads, n_rows=self.batch_size))

    def whole_tables(self) -> Iterator[pa.Table]:
        """All columns of all rows, in their order."""
        return map_ahead(self._extend, self.source.iter_tables(n_rows=self.batch_size))

    def _extend(self, table: pa.Table) -> pa.Table:
        new = self.compute(table.select(list(self.reads)))
        columns = dict(zip(new.column_names, new.columns, strict=True))
        metadata = {field.name: field.metadata for field in new.schema if field.metadata}
        return replace_columns(table.select(list(self.columns)), columns, field_metadata=metadata)


def write_extended_shard(path: Path, extension: Extension, stamp: Stamp) -> None:
    """Write one shard atomically; it may replace the one that it is made of.

    Raises UserError where the source is damaged, or where it holds another number of rows than the stamp says.
    """
    with extension.source.path.open("rb") as source:
        before = _read_footer(extension.source, source)
        footer = _footer_of_no_rows(extension.schema, stamp)
        if before is None or not _is_laid_out_alike(before, footer, extension.copied):
            write_shard(path, extension.schema, extension.whole_tables(), stamp)
            return
        _refuse_other_rows(path, before, stamp)
        moved = _place_chunks(source, before.groups, extension)
        with atomic_file(path) as file, ThreadPoolExecutor(1, thread_name_prefix="copy") as copier:
            file.write(MAGIC)
            copying = copier.submit(_copy_chunks, source, before.groups, moved, Path(file.name), extension)
            file.seek(max((chunk.end for chunks in moved for chunk in chunks.values()), default=len(MAGIC)))
            sizes = [group.n_rows for group in before.groups]
            new = _write_chunks(extension.new_tables(), extension.new_schema, sizes, file)
            copying.result()
            groups = [RowGroup(n_rows, moved[at] | new[at]) for at, n_rows in enumerate(sizes)]
            file.write(end_of_file(footer.with_groups(groups)))


# --- Footers ---------------------------------------------------------------------------------------------------------


def _read_footer(shard: Shard, file: IO[bytes]) -> Footer | None:
    """The footer of the source, None where only pyarrow can tell what it says or what is wrong with it."""
    try:
        return Footer(read_footer_bytes(file))
    except (ValueError, KeyError, TypeError, IndexError):  # a damaged footer may hold anything
        return None


def _footer_of_no_rows(schema: pa.Schema, stamp: Stamp) -> Footer:
    """What pyarrow says of these columns in a file without rows: all that the shard's footer needs beside its rows."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    with pq.ParquetWriter(file, schema, **parquet_options(schema)) as writer:
        writer.write_table(no_rows(schema))
        writer.add_key_value_metadata({STAMP_KEY.decode(): stamp.to_json()})
    return Footer(read_footer_bytes(file))


def _is_laid_out_alike(before: Footer, footer: Footer, columns: Sequence[str]) -> bool:
    """Whether the source declares the columns as we do, has them all, and has row groups no larger than ours."""
    names = {name.encode() for name in columns}
    paths = [path for path in footer.leaf_paths if path[0] in names]
    return (
        bool(before.groups)
        and all(0 < group.n_rows <= ROW_GROUP_ROWS for group in before.groups)
        and all(path in group.chunks for group in before.groups for path in paths)
        and all(before.column(name) == footer.column(name) for name in columns)
    )


def _refuse_other_rows(path: Path, before: Footer, stamp: Stamp) -> None:
    n_rows = sum(group.n_rows for group in before.groups)
    if n_rows != stamp.n_rows:
        raise UserError(f"{path} would hold {n_rows} of {stamp.n_rows} rows; the input changed during the run")


# --- Chunks ----------------------------------------------------------------------------------------------------------


def _place_chunks(source: IO[bytes], groups: Sequence[RowGroup], extension: Extension) -> list[dict[LeafPath, Chunk]]:
    """Where the chunks of the columns that stay will lie, by row group: one behind the other from the file's begin.

    Raises UserError where the footer of the source names bytes that are not there.
    """
    names = {name.encode() for name in extension.copied}
    n_bytes = source.seek(0, 2)
    end = len(MAGIC)
    moved: list[dict[LeafPath, Chunk]] = []
    for group in groups:
        moved.append({})
        chunks = [chunk for chunk in group.chunks.values() if chunk.path[0] in names]
        for chunk in sorted(chunks, key=lambda chunk: chunk.start):
            if not 0 <= chunk.start <= chunk.end <= n_bytes:
                raise damaged(extension.source.path, ValueError("its footer names a column that lies outside of it"))
            moved[-1][chunk.path] = chunk.moved(end - chunk.start)
            end += chunk.n_bytes
    return moved


def _copy_chunks(
    source: IO[bytes],
    groups: Sequence[RowGroup],
    moved: Sequence[dict[LeafPath, Chunk]],
    path: Path,
    extension: Extension,
) -> None:
    """Copy chunks to their new places in a file that is being written behind them, and see them onto the disk."""
    decoded = {name.encode() for name in extension.reads}  # who decodes them looks at their checksums
    with path.open("r+b") as file:
        for group, chunks in zip(groups, moved, strict=True):
            for leaf, chunk in chunks.items():
                source.seek(group.chunks[leaf].start)
                file.seek(chunk.start)
                if leaf[0] in decoded:
                    _copy_bytes(source, file, chunk.n_bytes, extension.source)
                else:
                    file.write(_verified(source.read(chunk.n_bytes), extension.source))
        file.flush()
        os.fdatasync(file.fileno())


def _copy_bytes(source: IO[bytes], file: IO[bytes], n_bytes: int, shard: Shard) -> None:
    """Copy by pieces that stay in the processor's cache; raises UserError where the source ends early."""
    while n_bytes > 0:
        piece = source.read(min(n_bytes, _PIECE_BYTES))
        if not piece:
            raise damaged(shard.path, ValueError("it ends in the middle of a column"))
        file.write(piece)
        n_bytes -= len(piece)


def _verified(chunk: bytes, shard: Shard) -> bytes:
    """The same bytes; raises UserError where a page is not what its checksum says, as decoding it would."""
    try:
        pages = page_checksums(memoryview(chunk))
    except ValueError as problem:
        raise damaged(shard.path, problem) from None
    if any(zlib.crc32(page) != checksum for checksum, page in pages):
        raise damaged(shard.path, ValueError("a page is not what its checksum says"))
    return chunk


def _write_chunks(
    tables: Iterable[pa.Table], schema: pa.Schema, sizes: Sequence[int], file: IO[bytes]
) -> list[dict[LeafPath, Chunk]]:
    """Encode the computed columns in row groups of `sizes`; returns their chunks by row group."""
    import pyarrow.parquet as pq

    start = file.tell()
    footers: list[pq.FileMetaData] = []
    # This writes a whole file, with a footer that stays behind, unread: some kilobytes for each shard.
    with pq.ParquetWriter(file, schema, metadata_collector=footers, **parquet_options(schema)) as writer:
        for table in _by_row_group(tables, sizes):
            writer.write_table(table, row_group_size=table.num_rows)
    content = io.BytesIO()
    footers[0].write_metadata_file(content)
    groups = Footer(read_footer_bytes(content)).groups
    return [{path: chunk.moved(start) for path, chunk in group.chunks.items()} for group in groups]


def _by_row_group(tables: Iterable[pa.Table], sizes: Sequence[int]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of `sizes`, which add up to their number."""
    import pyarrow as pa

    upcoming = deque(sizes)
    rows: pa.Table | None = None
    for table in tables:
        rows = table if rows is None else pa.concat_tables([rows, table])
        while upcoming and rows.num_rows >= upcoming[0]:
            size = upcoming.popleft()
            yield rows.slice(0, size)
            rows = rows.slice(size)
