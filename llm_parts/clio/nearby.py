"""What lies nearest in many rows: outsiders of a cluster, its siblings, the parents it may have.

    for rows in nearest_rows(vectors, centroids, 50, own=labels): ...    # outsiders of each cluster
    nearest_others(centroids, 4)                                         # [k, 4] siblings of each cluster

Up to MAX_COMPARED pairs all are compared with all. Of more, rows are sought in the cells nearest by, which finds nearly
all of them, so that where clusters are a share of the rows nothing takes time with the square of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from common.grouping import cluster_members

# Rows times directions up to which all rows are compared with all directions.
MAX_COMPARED = 1 << 25
# Products of one block of directions with all rows, float32: 64 MB.
_BLOCK_ELEMENTS = 1 << 24
# Cells in which rows are sought at least, and how many rows there are to be for each one that is wanted.
_LEAST_CELLS, _SOUGHT = 24, 16


def nearest_rows(
    vectors: np.ndarray, directions: np.ndarray, n: int, *, own: np.ndarray | None = None, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield, for each of `directions` [q, d], the numbers of the `n` rows nearest to it, nearest first.

    Near is what has a high product: for `vectors` [m, d] of unit length a high cosine. Rows whose number in `own` [m]
    is that of the direction are left out; equal products go by row number.
    """
    if len(vectors) * len(directions) <= MAX_COMPARED:
        return _among_all(vectors, directions, n, own)
    return _nearby(vectors, directions, n, own, seed)


def nearest_others(points: np.ndarray, n: int, *, rows: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """The `n` points [k, d] nearest to each point, or to those of `rows` [r], never itself: [r, n], nearest first.

    There are fewer columns where there are fewer other points.
    """
    rows = np.arange(len(points)) if rows is None else rows
    own = np.full(len(points), -1, np.int64)
    own[rows] = np.arange(len(rows))
    found = np.empty((len(rows), max(0, min(n, len(points) - 1))), np.int64)
    for place, others in enumerate(nearest_rows(points, points[rows], n, own=own, seed=seed)):
        found[place] = others
    return found


def nearest_outside(
    groups: Sequence[np.ndarray], vectors: np.ndarray, n: int, *, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield, for each group of rows, the `n` rows of the other groups that are nearest to its mean, nearest first.

    `groups` hold the numbers of all rows of `vectors` [m, d].
    """
    own = np.empty(len(vectors), np.int64)
    for number, rows in enumerate(groups):
        own[rows] = number
    means = np.stack([vectors[rows].mean(axis=0) for rows in groups])
    return nearest_rows(vectors, means, n, own=own, seed=seed)


def _among_all(vectors: np.ndarray, directions: np.ndarray, n: int, own: np.ndarray | None) -> Iterator[np.ndarray]:
    """By comparing all, block by block."""
    left_out = None if own is None else dict(cluster_members(own, len(directions)))
    step = max(1, _BLOCK_ELEMENTS // max(len(vectors), 1))
    for first in range(0, len(directions), step):
        for number, products in enumerate(directions[first : first + step] @ vectors.T, start=first):
            if left_out is not None:
                products[left_out[number]] = -np.inf
            yield _highest(products, n)


def _nearby(
    vectors: np.ndarray, directions: np.ndarray, n: int, own: np.ndarray | None, seed: int
) -> Iterator[np.ndarray]:
    """By looking into the nearest cells, of which so many are asked that few nearer rows are missed."""
    from common.cells import cut_into_cells, label_cells

    if own is None:
        cells = cut_into_cells(vectors, random_state=seed)
    else:
        cells = label_cells(vectors, own, random_state=seed)
    for number, direction in enumerate(directions):
        found: list[np.ndarray] = []
        n_found = 0
        for rows in cells.nearest_first(direction):
            found.append(rows if own is None else rows[own[rows] != number])
            n_found += len(found[-1])
            if len(found) >= _LEAST_CELLS and n_found >= _SOUGHT * n:
                break
        sought = np.sort(np.concatenate(found))
        yield sought[_highest(vectors[sought] @ direction, n)]


def _highest(values: np.ndarray, n: int) -> np.ndarray:
    """Places of the `n` highest values, highest first, equal ones in their order; minus infinity is none of them."""
    n = min(n, int(np.isfinite(values).sum()))
    if n <= 0:
        return np.zeros(0, np.int64)
    least = np.partition(values, len(values) - n)[len(values) - n]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:n]
