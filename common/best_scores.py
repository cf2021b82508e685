"""The highest scores of each row, kept while tiles of a symmetric table of scores come in any order; compiled by numba.

Imported only where it is called: the import of numba takes a second, and the first call on a machine compiles.
"""

from __future__ import annotations

import numba
import numpy as np

from common.mapped import matrix_beside, pieces

# Columns that are looked at together: a strip without a hit, nearly all of them, costs one pass of vector instructions.
_STRIP = 64


def empty_best(n: int, count: int, *, beside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table of the `count` best of `n` rows: ids [n, count] int32 and scores [n, count] float32, still empty.

    It lies in a file where the rows that are compared do, `beside`.
    """
    ids, scores = matrix_beside(beside, (n, count), dtype=np.int32), matrix_beside(beside, (n, count))
    for table, nothing in ((ids, np.iinfo(np.int32).max), (scores, -np.inf)):
        for part in pieces(table):
            part.fill(nothing)
    return ids, scores


@numba.njit(cache=True, nogil=True)
def offer_tile(
    tile: np.ndarray, first_row: int, first_column: int, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray
) -> None:
    """Offer the scores [r, c] of the rows from `first_row` on with those from `first_column` on, to both of them.

    Where `rows` is [n, d] the tile holds upper bounds, and the score of a pair whose bound is high enough is the
    product of its two rows; [0, 0] where the tile holds the scores. The lines of `ids` and `scores` [n, count] are
    sorted, the highest score first and equal scores by id, so that their end does not depend on the order of the tiles.
    A tile on the diagonal holds each pair twice, and a row's own score, which does not count.
    """
    n_rows, n_columns = tile.shape
    is_diagonal = first_row == first_column
    column_least = np.full(n_columns, np.float32(np.inf))  # on the diagonal a row is offered the pair, its column not
    if not is_diagonal:
        column_least[:] = scores[first_column : first_column + n_columns, -1]
    for line in range(n_rows):
        row = first_row + line
        for start in range(0, n_columns, _STRIP):
            strip, least = tile[line, start : start + _STRIP], column_least[start : start + _STRIP]
            row_least = scores[row, -1]
            n_hits = 0
            for place in range(len(strip)):
                n_hits += (strip[place] >= row_least) | (strip[place] >= least[place])
            if n_hits:
                _offer_strip(strip, least, row, first_column + start, ids, scores, rows)


@numba.njit(cache=True, nogil=True)
def _offer_strip(
    strip: np.ndarray,
    column_least: np.ndarray,
    row: int,
    first_column: int,
    ids: np.ndarray,
    scores: np.ndarray,
    rows: np.ndarray,
) -> None:
    for place in range(len(strip)):
        column, score = first_column + place, strip[place]
        if column == row or not (score >= scores[row, -1] or score >= column_least[place]):
            continue
        if len(rows):
            score = _dot(rows[row], rows[column])
        if score >= scores[row, -1]:
            _insert(ids[row], scores[row], column, score)
        if score >= column_least[place]:
            _insert(ids[column], scores[column], row, score)
            column_least[place] = scores[column, -1]


@numba.njit(cache=True, nogil=True, fastmath=True)
def _dot(left: np.ndarray, right: np.ndarray) -> np.float32:
    total = np.float32(0)
    for i in range(len(left)):
        total += left[i] * right[i]
    return total


@numba.njit(cache=True, nogil=True)
def _insert(ids: np.ndarray, scores: np.ndarray, new_id: int, score: np.float32) -> None:
    """Put an id where it belongs in a sorted line, whose last falls out; that may be the new one."""
    place = len(ids)
    while place > 0 and (scores[place - 1] < score or (scores[place - 1] == score and ids[place - 1] > new_id)):
        place -= 1
        if place + 1 < len(ids):
            ids[place + 1], scores[place + 1] = ids[place], scores[place]
    if place < len(ids):
        ids[place], scores[place] = new_id, score
