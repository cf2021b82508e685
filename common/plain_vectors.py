"""Vectors read from a shard's pages as they lie there: nothing is decoded, and each value is copied once.

Uncompressed, plainly encoded vectors are the bytes of a matrix, cut into pages; before each page's part stand the
levels, which say where lists begin and what is null. Where the footer says that nothing is null, levels tell no more
than the schema does, and reading is several times as quick as by a decoder that has to expect anything.
Source: the format's definition, parquet.thrift.
"""

from __future__ import annotations

import zlib
from typing import IO

import numpy as np

from common import thrift
from common.parquet_footer import Chunk, RowGroup, integer, read_page_header

# Fields of ColumnMetaData and of SizeStatistics.
_TYPE, _CODEC, _DICTIONARY_PAGE, _SIZES = 1, 4, 11, 16
_N_BY_REPETITION, _N_BY_DEFINITION = 2, 3
# A type and a codec.
_FLOAT, _UNCOMPRESSED = 4, 0

_LONGEST_HEADER = 512


def read_plain_vectors(file: IO[bytes], group: RowGroup, name: str, *, dimension: int) -> np.ndarray | None:
    """The vectors of one row group, [n, dimension] float32; None where they have to be decoded.

    The column must be one of lists that all are `dimension` long. Raises ValueError where a page is damaged.
    """
    chunk = group.chunks.get((name.encode(), b"list", b"element"))
    if chunk is None or not _is_plain(chunk, n_rows=group.n_rows, dimension=dimension):
        return None
    vectors = np.empty((group.n_rows, dimension), np.float32)
    unread = vectors.reshape(-1).view(np.uint8).data
    file.seek(chunk.start)
    while len(unread):
        unread = unread[_read_page(file, unread) :]
    return vectors


def _is_plain(chunk: Chunk, *, n_rows: int, dimension: int) -> bool:
    """Whether the pages are plain, and as many lists begin and elements are there as rows without nulls have."""
    metadata = chunk.metadata
    sizes = metadata.get(_SIZES, (thrift.STRUCT, {}))[1]
    return (
        integer(metadata, _TYPE) == _FLOAT
        and integer(metadata, _CODEC) == _UNCOMPRESSED
        and _DICTIONARY_PAGE not in metadata
        and _histogram(sizes, _N_BY_REPETITION) == [n_rows, n_rows * (dimension - 1)]
        and _histogram(sizes, _N_BY_DEFINITION) == [0, 0, n_rows * dimension]
    )


def _histogram(sizes: thrift.Struct, number: int) -> list[int]:
    """How many values there are of each level, empty where the writer did not count them."""
    return list(sizes[number][1][1]) if number in sizes else []


def _read_page(file: IO[bytes], values: memoryview) -> int:
    """Read the values of the next page into the first bytes of `values`; returns how many they are."""
    start = file.tell()
    page, length = read_page_header(file.read(_LONGEST_HEADER))
    if not page.is_plain:
        raise ValueError("a page is of no kind that belongs there")
    file.seek(start + length)
    levels = _read_levels(file) + _read_levels(file)
    n_bytes = page.n_bytes - len(levels)
    if not 0 < n_bytes <= len(values) or file.readinto(values[:n_bytes]) != n_bytes:  # type: ignore[attr-defined]
        raise ValueError("a page is longer or shorter than its column")
    if zlib.crc32(values[:n_bytes], zlib.crc32(levels)) != page.crc32:
        raise ValueError("a page is not what its checksum says")
    return n_bytes


def _read_levels(file: IO[bytes]) -> bytes:
    """The levels of one kind, with the four bytes that say how long they are."""
    length = file.read(4)
    return length + file.read(int.from_bytes(length, "little"))
