"""The footer of a parquet file, taken apart so far that column chunks can be moved from file to file.

A chunk holds one column of one row group. Whatever a footer says beyond what is named here is carried along unread.
Source: the format's definition, parquet.thrift, from which the numbers of the fields are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

from common import thrift

MAGIC = b"PAR1"

LeafPath = tuple[bytes, ...]  # (b"cls", b"list", b"element")

# Fields of FileMetaData, SchemaElement, RowGroup, ColumnChunk, ColumnMetaData, PageHeader and DataPageHeader.
_SCHEMA, _FILE_ROWS, _ROW_GROUPS = 2, 3, 4
_ELEMENT_NAME, _ELEMENT_CHILDREN = 4, 5
_CHUNKS, _GROUP_BYTES, _GROUP_ROWS, _GROUP_START, _GROUP_COMPRESSED = 1, 2, 3, 5, 6
_CHUNK_FILE, _CHUNK_START, _CHUNK_METADATA, _CHUNK_ENCRYPTION = 1, 2, 3, 8
_PATH, _BYTES, _COMPRESSED, _DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _BLOOM, _BLOOM_BYTES = 3, 6, 7, 9, 10, 11, 14, 15
_PAGE_KIND, _PAGE_COMPRESSED, _PAGE_CRC32, _PAGE_DATA_HEADER = 1, 3, 4, 5
_DATA_ENCODING = 2
# Kinds of pages.
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
# An encoding.
_PLAIN = 0


@dataclass(frozen=True)
class Chunk:
    """One column of one row group, and where it lies."""

    metadata: thrift.Struct

    @property
    def path(self) -> LeafPath:
        """The names that lead to the column."""
        return tuple(self.metadata[_PATH][1][1])

    @property
    def start(self) -> int:
        """Its first byte in the file; the dictionary, where there is one, comes before the values."""
        pages = (self.metadata[number][1] for number in (_DICTIONARY_PAGE, _DATA_PAGE) if number in self.metadata)
        return int(min(pages))

    @property
    def n_bytes(self) -> int:
        """Its bytes in the file."""
        return int(self.metadata[_COMPRESSED][1])

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.n_bytes

    @property
    def n_bytes_decompressed(self) -> int:
        """Its bytes without compression."""
        return int(self.metadata[_BYTES][1])

    def moved(self, offset: int) -> Chunk:
        """The same chunk `offset` bytes further on; an index that lies elsewhere in its file is left behind."""
        places = {_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE}
        kept = {number: field for number, field in self.metadata.items() if number not in (_BLOOM, _BLOOM_BYTES)}
        moved = {number: (kind, value + offset) for number, (kind, value) in kept.items() if number in places}
        return Chunk(kept | moved)


@dataclass(frozen=True)
class RowGroup:
    """The chunks of some consecutive rows, by column."""

    n_rows: int
    chunks: dict[LeafPath, Chunk]


@dataclass(frozen=True)
class PageHeader:
    """What stands before a page."""

    kind: int
    n_bytes: int  # of the page, without this header
    crc32: int | None  # of those bytes
    is_plain: bool  # a data page of the first version whose values are encoded plainly


class Footer:
    """What a parquet file says of itself; raises ValueError where `content` is no such thing."""

    def __init__(self, content: bytes) -> None:
        self._struct, _ = thrift.read_struct(content)
        self.groups = [_read_group(group) for group in self._struct[_ROW_GROUPS][1][1]]

    @property
    def leaf_paths(self) -> list[LeafPath]:
        """The columns that have chunks, in their order."""
        return [path for group in self.groups[:1] for path in group.chunks]

    def column(self, name: str) -> list[thrift.Struct]:
        """How a column is declared: its part of the schema, with all below it; empty where there is none."""
        elements = self._struct[_SCHEMA][1][1]
        at = 1  # the first is the table itself
        while at < len(elements):
            end = _end_of_subtree(elements, at)
            if elements[at][_ELEMENT_NAME][1] == name.encode():
                return list(elements[at:end])
            at = end
        return []

    def with_groups(self, groups: list[RowGroup]) -> bytes:
        """The footer of a file with the same columns and these rows."""
        n_rows = sum(group.n_rows for group in groups)
        content = [_write_group(group, self.leaf_paths) for group in groups]
        changed = {_FILE_ROWS: (thrift.I64, n_rows), _ROW_GROUPS: (thrift.LIST, (thrift.STRUCT, content))}
        return thrift.write_struct(self._struct | changed)


def read_footer_bytes(file: IO[bytes]) -> bytes:
    """The footer of an open parquet file, as it lies there; raises ValueError where the file is cut short."""
    n_bytes = file.seek(0, 2)
    file.seek(max(n_bytes - 8, 0))
    length = int.from_bytes(file.read(4), "little")
    if file.read(4) != MAGIC or length > n_bytes - 8:
        raise ValueError("it has no parquet footer")
    file.seek(n_bytes - 8 - length)
    return file.read(length)


def end_of_file(footer: bytes) -> bytes:
    """What closes a parquet file."""
    return footer + len(footer).to_bytes(4, "little") + MAGIC


def page_checksums(chunk: memoryview) -> list[tuple[int, memoryview]]:
    """The pages of a chunk that carry a CRC-32, each with it; raises ValueError where there are no pages."""
    pages = []
    at = 0
    while at < len(chunk):
        page, start = read_page_header(chunk, at)
        if page.kind not in (_DATA, _DATA_V2) and not (page.kind == _DICTIONARY and at == 0):
            raise ValueError("a page is of no kind that belongs there")
        at = start + page.n_bytes
        if page.crc32 is not None:
            pages.append((page.crc32, chunk[start:at]))
    if at != len(chunk):
        raise ValueError("a page ends beyond its column")
    return pages


def read_page_header(content: bytes | memoryview, start: int = 0) -> tuple[PageHeader, int]:
    """The header of the page that begins at `start`, and where its bytes begin; raises ValueError where it is none."""
    header, end = thrift.read_struct(content, start)
    data_header = header.get(_PAGE_DATA_HEADER, (thrift.STRUCT, {}))[1]
    kind, n_bytes = integer(header, _PAGE_KIND), integer(header, _PAGE_COMPRESSED)
    if n_bytes < 0:
        raise ValueError("a page is shorter than nothing")
    return PageHeader(
        kind,
        n_bytes,
        crc32=integer(header, _PAGE_CRC32) & 0xFFFFFFFF if _PAGE_CRC32 in header else None,
        is_plain=kind == _DATA and integer(data_header, _DATA_ENCODING) == _PLAIN,
    ), end


def integer(struct: thrift.Struct, number: int) -> int:
    """The field `number`, which is to be a whole number; raises ValueError where it is not."""
    kind, value = struct.get(number, (thrift.BINARY, b""))
    if kind not in (thrift.I32, thrift.I64):
        raise ValueError(f"field {number} is no number")
    return int(value)


def _end_of_subtree(elements: list[thrift.Struct], at: int) -> int:
    end = at + 1
    for _ in range(elements[at].get(_ELEMENT_CHILDREN, (thrift.I32, 0))[1]):
        end = _end_of_subtree(elements, end)
    return end


def _read_group(group: thrift.Struct) -> RowGroup:
    chunks = [_read_chunk(chunk) for chunk in group[_CHUNKS][1][1]]
    return RowGroup(group[_GROUP_ROWS][1], {chunk.path: chunk for chunk in chunks})


def _read_chunk(chunk: thrift.Struct) -> Chunk:
    if _CHUNK_FILE in chunk or _CHUNK_ENCRYPTION in chunk or _CHUNK_METADATA not in chunk:
        raise ValueError("a column lies in another file, or is encrypted")
    return Chunk(chunk[_CHUNK_METADATA][1])


def _write_group(group: RowGroup, order: list[LeafPath]) -> thrift.Struct:
    chunks = [group.chunks[path] for path in order]
    return {
        _CHUNKS: (thrift.LIST, (thrift.STRUCT, [_write_chunk(chunk) for chunk in chunks])),
        _GROUP_BYTES: (thrift.I64, sum(chunk.n_bytes_decompressed for chunk in chunks)),
        _GROUP_ROWS: (thrift.I64, group.n_rows),
        _GROUP_START: (thrift.I64, min(chunk.start for chunk in chunks)),
        _GROUP_COMPRESSED: (thrift.I64, sum(chunk.n_bytes for chunk in chunks)),
    }


def _write_chunk(chunk: Chunk) -> thrift.Struct:
    return {_CHUNK_START: (thrift.I64, 0), _CHUNK_METADATA: (thrift.STRUCT, chunk.metadata)}
