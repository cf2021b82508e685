"""Rows cut into cells of like rows, so that what lies near a row or near a point is sought in few of them.

    neighbors = cell_neighbors(vectors, 14, random_state=7)    # nearly all that exact_neighbors finds
    cells = cut_into_cells(points, random_state=7)
    for rows in cells.nearest_first(point): ...                # row numbers, cell by cell

There are about 4 sqrt(n) cells of at most sqrt(n) rows, and a search looks into a bounded number of them: n ** 1.5
products in all, where comparing all pairs takes n ** 2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.grouping import cluster_sums
from common.mapped import matrix_beside, pieces, put_rows, take_rows
from common.neighbors import (
    MARGIN,
    NeighborMetric,
    Neighbors,
    Tile,
    check_count,
    offer_tiles,
    prepare_points,
    rank_candidates,
    score_factors,
)

log = logging.getLogger(__name__)

# Cells are so many times the root of the rows, and hold at most so many times the mean.
_CELLS_PER_ROOT, _MOST_OF_MEAN = 4, 4
# Rows a cell by which the cells are found, and passes over them: cells need not be the best clusters.
_SAMPLED_PER_CELL, _N_PASSES = 16, 3
# Cells that a search looks into at first, and at most.
_FIRST_CELLS, _MOST_CELLS = 8, 128
# Share of the true neighbours that are to be found, and the rows by which it is measured.
_RECALL, _N_ASKED = 0.98, 256
# Pairs of cells that are dealt out to the threads at a time: as objects they take 200 bytes each.
_TILES_AT_ONCE = 1 << 14
# Cells whose distances to all others are sorted at a time.
_RANKED_CELLS = 256
# What float32 products of the same rows differ by.
_ROUNDING = 1e-5
# Products of the asked rows with others that are held at once, float32: 4 MB.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Cells:
    """Rows [n] in cells, none of which is empty or holds more than four times the mean."""

    order: np.ndarray  # [n] int64, row numbers, cell by cell
    bounds: np.ndarray  # [c + 1] int64, where each cell begins and ends in `order`
    means: np.ndarray  # [c, d] float32

    def __len__(self) -> int:
        return len(self.means)

    def nearest_first(self, point: np.ndarray) -> Iterator[np.ndarray]:
        """Row numbers of each cell, that whose rows have the highest mean product with a point [d] first."""
        for cell in np.argsort(-(self.means @ point), kind="stable").tolist():
            yield self.order[self.bounds[cell] : self.bounds[cell + 1]]


def cut_into_cells(points: np.ndarray, *, random_state: int = 0) -> Cells:
    """Cut rows [n, d] into cells by a few passes of k-means over a sample; n ** 1.5 time.

    What k-means cannot part, such as equal rows, is cut by row number where a cell would be too large.
    """
    from common.kmeans import assign, train_lloyd

    n_cells = _count_cells(len(points))
    rng = np.random.default_rng(random_state)
    sample = take_rows(points, np.sort(rng.permutation(len(points))[: _SAMPLED_PER_CELL * n_cells]))
    found = train_lloyd(
        lambda: [sample], n_clusters=n_cells, max_epochs=_N_PASSES, init="random", random_state=random_state
    )
    labels = np.concatenate([assign(part, found.centroids)[0] for part in pieces(points)])
    return _gather(points, labels, most=-(-_MOST_OF_MEAN * len(points) // n_cells))


def label_cells(points: np.ndarray, labels: np.ndarray, *, random_state: int = 0) -> Cells:
    """Take clusters of rows [n, d] as their cells: `labels` [n] integers.

    The rows of clusters of more than four times the mean, and those with a negative label, are cut anew; so are all
    rows where there are more clusters than cells would be cut, since a search goes through the means of all cells.
    """
    sizes = np.bincount(labels[labels >= 0])
    if len(sizes) > _count_cells(len(points)):
        return cut_into_cells(points, random_state=random_state)
    is_cell = np.append(sizes <= _MOST_OF_MEAN * len(labels) / max(len(sizes), 1), False)  # -1 takes the last
    codes = np.array(labels, np.int64)
    others = np.flatnonzero(~is_cell[np.maximum(labels, -1)])
    if len(others):
        cut = cut_into_cells(points[others], random_state=random_state)
        codes[others[cut.order]] = len(sizes) + np.repeat(np.arange(len(cut)), np.diff(cut.bounds))
    return _gather(points, codes, most=len(points))


def _count_cells(n_rows: int) -> int:
    return max(1, min(n_rows, round(_CELLS_PER_ROOT * n_rows**0.5)))


def cell_neighbors(
    vectors: np.ndarray,
    k: int,
    *,
    metric: NeighborMetric = "cosine",
    n_kept: int | None = None,
    random_state: int = 0,
) -> Neighbors:
    """Return the `k` nearest other rows of every row [n, d] among the rows of the cells near its own.

    Distances and their order are those of `exact_neighbors`; some of the rows may be others. How many are right is
    measured on 256 rows: where it is less than 98%, more cells are searched, up to 128; the share is logged, and less
    is a warning. With `n_kept` only so many of the k are returned. Raises UserError as `exact_neighbors` does.
    """
    check_count(k, n_rows=len(vectors))
    points = prepare_points(vectors, metric)
    cells = cut_into_cells(points, random_state=random_state)
    search = _Search(_take(points, cells.order), k, metric=metric, cells=cells, random_state=random_state)
    places = search.run()  # [n, m] of rows that stand in the order of the cells
    candidates = matrix_beside(points, places.shape, dtype=places.dtype)
    for rows, part in zip(pieces(cells.order), pieces(places), strict=True):
        put_rows(candidates, rows, cells.order[part])
    return rank_candidates(points, candidates, k if n_kept is None else min(n_kept, k), metric)


def _take(points: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The rows of `points` [n, d] in the order of `order` [n]; in a file, too, where they are in one.

    They are read as they stand and written where they belong: of rows that are read anywhere, the system maps those
    around them, too.
    """
    taken, places = matrix_beside(points, points.shape), np.argsort(order)
    for rows, part in zip(pieces(places), pieces(points), strict=True):
        put_rows(taken, rows, part)
    return taken


class _Search:
    """The search of one graph; its rows stand in the order of the cells, so that each cell is a part of them."""

    def __init__(self, points: np.ndarray, k: int, *, metric: NeighborMetric, cells: Cells, random_state: int) -> None:
        self._factors = score_factors(points, metric)
        self._n, self._k = len(points), k
        self._parts = [slice(*ends) for ends in zip(cells.bounds[:-1].tolist(), cells.bounds[1:].tolist(), strict=True)]
        self._near = list(_near_cells(cells, n_rows=self._n_candidates + 1))
        rng = np.random.default_rng((random_state, 1))
        self._asked = np.sort(rng.permutation(self._n)[:_N_ASKED])

    @property
    def _n_candidates(self) -> int:
        return min(self._k + MARGIN, self._n - 1)

    def run(self) -> np.ndarray:
        """Places [n, k + margin] of the nearest that were found."""
        from common.best_scores import empty_best

        ids, scores = empty_best(self._n, self._n_candidates, beside=self._factors[0])
        least = self._true_scores()
        n_cells, searched = _FIRST_CELLS, np.zeros(0, np.int64)
        while True:
            pairs = self._pairs(n_cells)
            for some in pieces(np.setdiff1d(pairs, searched, assume_unique=True), n_rows=_TILES_AT_ONCE):
                offer_tiles(self._tiles(some), *self._factors, ids, scores)
            searched = pairs
            recall = float((scores[self._asked, : self._k] >= least[:, None] - _ROUNDING).mean())
            if recall >= _RECALL or n_cells >= min(_MOST_CELLS, len(self._parts)):
                break
            n_cells *= 2
        self._log(recall, n_cells)
        return ids

    def _pairs(self, n_cells: int) -> np.ndarray:
        """Pairs of cells of which one is among the `n_cells` nearest of the other.

        [p] int64, ascending: one * c + other, where c is how many cells there are.
        """
        pairs = []
        for near in self._near:
            is_near = np.arange(near.cells.shape[1]) < np.maximum(n_cells, near.least)[:, None]
            one, other = np.broadcast_to(near.cells[:, :1], is_near.shape)[is_near], near.cells[is_near]
            pairs.append(np.minimum(one, other) * len(self._parts) + np.maximum(one, other))
        return np.unique(np.concatenate(pairs))

    def _tiles(self, pairs: np.ndarray) -> list[Tile]:
        """The parts of the rows of each pair of cells."""
        ones, others = np.divmod(pairs, len(self._parts))
        return [
            (self._parts[one], self._parts[other]) for one, other in zip(ones.tolist(), others.tolist(), strict=True)
        ]

    def _true_scores(self) -> np.ndarray:
        """The score of the true k-th neighbour of each row that is asked, [a] float32: by comparing it to all rows."""
        left, right = self._factors
        step = max(1, _BLOCK_ELEMENTS // self._n)
        least = []
        for start in range(0, len(self._asked), step):
            asked = self._asked[start : start + step]
            lefts = take_rows(left, asked)
            scores = np.concatenate([lefts @ part.T for part in pieces(right)], axis=1)
            scores[np.arange(len(asked)), asked] = -np.inf
            scores.partition(self._n - self._k, axis=1)
            least.append(scores[:, self._n - self._k].copy())  # a view would hold all scores
        return np.concatenate(least)

    def _log(self, recall: float, n_cells: int) -> None:
        level = logging.INFO if recall >= _RECALL else logging.WARNING
        n_searched = min(n_cells, len(self._parts))
        log.log(level, "neighbours: %.1f%% found, in %d of %d cells", 100 * recall, n_searched, len(self._parts))


def _gather(points: np.ndarray, labels: np.ndarray, *, most: int) -> Cells:
    """The cells of one label and at most `most` rows each; labels [n] are not negative."""
    order = np.argsort(labels, kind="stable")
    ranks = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])  # within the label
    bounds = np.append(np.flatnonzero(ranks % most == 0), len(labels))
    sizes = np.diff(bounds)
    codes = np.empty(len(labels), np.int64)
    codes[order] = np.repeat(np.arange(len(sizes)), sizes)
    return Cells(order, bounds, (cluster_sums(points, codes, len(sizes)) / sizes[:, None]).astype(np.float32))


class _NearCells(NamedTuple):
    """Of some cells [s], those near them."""

    cells: np.ndarray  # [s, w] int64, the nearest first, which is the cell itself
    least: np.ndarray  # [s] int64: how many of them have as many rows as are sought


def _near_cells(cells: Cells, *, n_rows: int) -> Iterator[_NearCells]:
    """Yield the cells near each, as far as they are ever searched, for some cells at a time.

    A table of all pairs would take 64 bytes a row: the cells are four times the root of the rows.
    """
    left, right = score_factors(cells.means, "euclidean")
    sizes = np.diff(cells.bounds)
    for start in range(0, len(cells), _RANKED_CELLS):
        scores = left[start : start + _RANKED_CELLS] @ right.T
        places = np.arange(len(scores))
        scores[places, start + places] = np.inf
        order = np.argsort(-scores, axis=1, kind="stable")
        least = (np.cumsum(sizes[order], axis=1) < n_rows).sum(axis=1) + 1
        yield _NearCells(order[:, : max(_MOST_CELLS, least.max())].copy(), least)
