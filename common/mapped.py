"""Matrices that lie in a file and not in memory: a page is there while it is used, and is given back after it.

    vectors = mapped_matrix((n, d), folder=cache_dir)      # a file without a name, gone with the array
    for start in range(0, n, 4096):
        use(vectors[start : start + 4096])
        release(vectors[start : start + 4096])             # its content stays, its memory goes

The array is like any other. What is given back comes again from the page cache of the system, which is memory that
other programs get when they need it, or from the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import logging
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.commit import make_folder

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

log = logging.getLogger(__name__)

# Smaller matrices are not worth a file.
_LEAST_BYTES = 1 << 20
# Linux maps pages in groups of so many bytes, where they are in its cache.
_MAPPED_ALONG = 1 << 16
# Rows from anywhere are used by parts of so many bytes. A page may come with all that was written with it.
_NEARBY_BYTES = 1 << 23


class _Room(mmap.mmap):
    """A mapping made here. What others map may be private, and lose what was written to it when it is given back."""

    folder: Path  # in which its file lies


def mapped_matrix(shape: tuple[int, ...], *, folder: Path, dtype: DTypeLike = np.float32) -> np.ndarray:
    """An array of zeros that lies in a file without a name in `folder`, on its disk.

    It lies in memory where it is small, where the system cannot reserve the space (a full disk must be told now, not in
    the midst of writing to the array), and where there is no way to give pages back.
    """
    n_bytes = np.dtype(dtype).itemsize * math.prod(shape)
    if n_bytes < _LEAST_BYTES or not hasattr(os, "posix_fallocate") or not hasattr(mmap, "MADV_DONTNEED"):
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=make_folder(folder)) as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            room = _Room(file.fileno(), n_bytes)
    except OSError as problem:
        log.info("a matrix is kept in memory, as %s has no room for it: %s", folder, problem.strerror)
        return np.zeros(shape, dtype)
    room.folder = folder
    return np.frombuffer(room, dtype).reshape(shape)


def matrix_beside(other: np.ndarray, shape: tuple[int, ...], *, dtype: DTypeLike = np.float32) -> np.ndarray:
    """An array of zeros for what is made of `other` row by row: mapped where that is, else in memory."""
    room = _mapping_of(other)
    return np.zeros(shape, dtype) if room is None else mapped_matrix(shape, folder=room.folder, dtype=dtype)


def release(rows: np.ndarray) -> None:
    """Give the memory of some rows of a mapped matrix back to the system; nothing for other arrays.

    The rows keep their values and can be used as before. `rows` is a contiguous part, such as `vectors[a:b]`.
    """
    room = _mapping_of(rows)
    if room is None or not rows.nbytes:
        return
    start = rows.ctypes.data - np.frombuffer(room, np.uint8).ctypes.data
    # With the pages around them that the system maps along; whoever uses those gets them again.
    first = start // _MAPPED_ALONG * _MAPPED_ALONG
    end = min(-(-(start + rows.nbytes) // _MAPPED_ALONG) * _MAPPED_ALONG, len(room))
    room.madvise(mmap.MADV_DONTNEED, first, end - first)


def pieces(rows: np.ndarray, *, n_rows: int = 4096) -> Iterator[np.ndarray]:
    """All rows, `n_rows` at a time, whose memory is given back after them."""
    for start in range(0, len(rows), n_rows):
        part = rows[start : start + n_rows]
        yield part
        release(part)


def take_rows(matrix: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A copy of rows from anywhere in a matrix, `numbers` [m] integers."""
    taken = np.empty((len(numbers), *matrix.shape[1:]), matrix.dtype)
    for some in _nearby(matrix, numbers):
        taken[some] = matrix[numbers[some]]
    return taken


def put_rows(matrix: np.ndarray, numbers: np.ndarray, rows: np.ndarray) -> None:
    """Write `rows` [m, …] to anywhere in a matrix, `numbers` [m] integers."""
    for some in _nearby(matrix, numbers):
        matrix[numbers[some]] = rows[some]


def _nearby(matrix: np.ndarray, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Places in `numbers` [m] of rows that lie near each other, from the first rows to the last.

    The memory of each part is given back after it: rows in any order would bring nearly all of the matrix to memory, as
    pages are mapped with those around them.
    """
    order = np.argsort(numbers, kind="stable")
    step = max(1, _NEARBY_BYTES // max(matrix[:1].nbytes, 1))
    bounds = np.searchsorted(numbers[order], np.arange(0, len(matrix) + step, step)).tolist()
    for part, (first, last) in enumerate(itertools.pairwise(bounds)):
        if first < last:
            yield order[first:last]
            release(matrix[part * step : (part + 1) * step])


def return_freed_memory() -> None:
    """Give back what Arrow and the C library keep of memory that was freed, for what might be asked for next."""
    gc.collect(1)  # what the step left; all that lives would take a tenth of a second to go through
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # another C library than that of Linux
        ctypes.CDLL(None).malloc_trim(0)


def _mapping_of(array: np.ndarray) -> _Room | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, _Room) else None
