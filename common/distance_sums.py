"""Sums of euclidean distances from rows to groups of rows: the heart of a euclidean silhouette, compiled by numba.

Imported only where it is called: the import of numba takes a second, and the first call on a machine compiles.
"""

from __future__ import annotations

import numba
import numpy as np

from common.threads import share_tiles

# Float32 sums are handed over to float64 after this many distances.
_PARTIAL = 1024
# Rows that a thread takes at a time.
_BLOCK_ROWS = 256


def sum_distances(rows: np.ndarray, grouped: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sum the euclidean distances of each row to each group of rows: [n, k] float64.

    `rows` is [n, d]; `grouped` [m, d], which may be the same, is sorted by group: group j is
    grouped[bounds[j]:bounds[j + 1]], `bounds` [k + 1] integers. What is summed for a row and a group depends on nothing
    else. Distances are float32 from differences, so that equal rows are at exactly 0. O(n m d) time, O(n k) memory, on
    all cores.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    columns = np.ascontiguousarray(grouped.T, dtype=np.float32)  # [d, m]: neighbouring rows side by side
    totals = np.zeros((len(rows), len(bounds) - 1))
    bounds = np.ascontiguousarray(bounds, dtype=np.int64)

    def work(starts: range) -> None:
        for start in starts:
            _sum_block(rows, columns, bounds, start, min(start + _BLOCK_ROWS, len(rows)), totals)

    share_tiles(work, n_rows=len(rows), tile_rows=_BLOCK_ROWS)
    return totals


@numba.njit(cache=True, nogil=True, fastmath=True)
def _sum_block(
    rows: np.ndarray, columns: np.ndarray, bounds: np.ndarray, start: int, stop: int, totals: np.ndarray
) -> None:
    """Fill totals[start:stop]; `rows` is [n, d], `columns` [d, m], both float32."""
    n_dimensions = columns.shape[0]
    squares = np.empty(_PARTIAL, np.float32)
    for row in range(start, stop):
        for group in range(len(bounds) - 1):
            total = 0.0
            for first in range(bounds[group], bounds[group + 1], _PARTIAL):
                width = min(_PARTIAL, bounds[group + 1] - first)
                squares[:width] = 0
                for dimension in range(n_dimensions):
                    here = rows[row, dimension]
                    # A view, so that indices are plainly not negative.
                    there = columns[dimension, first : first + width]
                    for i in range(width):
                        offset = there[i] - here
                        squares[i] += offset * offset
                partial = np.float32(0)
                for i in range(width):
                    partial += np.sqrt(squares[i])
                total += float(partial)
            totals[row, group] = total
