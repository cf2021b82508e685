"""Exact nearest neighbours of every row among the others, by blocked matrix products.

    neighbors = exact_neighbors(vectors, 15, metric="cosine")
    neighbors.indices, neighbors.distances          # [n, 15] int32, [n, 15] float32, nearest first

One graph at the largest k serves everything that asks for neighbours: UMAP, the cross ratio, local measures.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

from common.config import UserError

NeighborMetric = Literal["cosine", "euclidean"]

# Scores of one block of rows against all others, float32: 64 MB.
_BLOCK_ELEMENTS = 1 << 24
# Vectors gathered for the exact distances of candidates: 4 MB stay in the cache of a core.
_RESCORE_ELEMENTS = 1 << 20
# Candidates beyond k, which make up for the rounding of float32 products.
_MARGIN = 4
# Columns are first reduced to the maxima of groups of this many: k of k groups hold the k largest values.
_GROUP = 20
# What float32 leaves of a length of 1.
_UNIT_TOLERANCE = 1e-6


class Neighbors(NamedTuple):
    """The nearest other rows of each row, nearest first."""

    indices: np.ndarray  # [n, k] int32
    distances: np.ndarray  # [n, k] float32


def exact_neighbors(
    vectors: np.ndarray,
    k: int,
    *,
    metric: NeighborMetric = "cosine",
    chunk: int | None = None,
    device: str = "cpu",
) -> Neighbors:
    """Return the `k` nearest other rows of every row; a row is never its own neighbour, however many equal it.

    Cosine distance is 1 - cosine, and 1 for a zero row, as in scikit-learn. Distances come from differences of rows,
    so that duplicates are at exactly 0, and equal distances are ordered by index. Which of more than k + 4 rows at the
    same distance are listed depends on rounding, but is the same on every run on one machine.
    `chunk` is the number of rows per block; on `device` "cuda" the products run with torch.
    Raises UserError if k is not between 1 and n - 1, or if a value is not finite.
    """
    n = len(vectors)
    if not 1 <= k <= n - 1:
        raise UserError(f"{k} nearest neighbours are asked for among {n} rows; use a number from 1 to {max(n - 1, 1)}")
    points = _prepare(vectors, metric)
    n_candidates = min(k + _MARGIN, n - 1)
    chunk = chunk or max(16, min(1024, _BLOCK_ELEMENTS // n))
    if device == "cpu":
        candidates = _candidates_on_cpu(*_score_factors(points, metric), n_candidates, chunk)
    else:
        candidates = _candidates_by_torch(*_score_factors(points, metric), n_candidates, chunk, device)
    candidates.sort(axis=1)  # equal distances go by index
    exact = _distances(points, candidates, metric)
    order = np.argsort(exact, axis=1, kind="stable")[:, :k]
    return Neighbors(np.take_along_axis(candidates, order, axis=1), np.take_along_axis(exact, order, axis=1))


class _Best:
    """The best scores seen so far of every row, and whose they are."""

    def __init__(self, n: int, count: int) -> None:
        self.ids = np.zeros((n, count), np.int32)
        self._scores = np.full((n, count), -np.inf, np.float32)
        self._least = np.full(n, -np.inf, np.float32)

    def merge(self, rows: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> None:
        """Offer each row [m] candidates [m, w]."""
        all_ids = np.hstack([self.ids[rows], ids])
        all_scores = np.hstack([self._scores[rows], scores])
        kept = _top(all_scores, self.ids.shape[1])
        self.ids[rows] = np.take_along_axis(all_ids, kept, axis=1)
        self._scores[rows] = np.take_along_axis(all_scores, kept, axis=1)
        self._least[rows] = self._scores[rows].min(axis=1)

    def merge_columns(self, scores: np.ndarray, first_id: int, first_row: int) -> None:
        """Offer the rows from `first_row` on, one for each column of `scores`, the ids from `first_id` on.

        Few scores beat what a row has once it has seen some blocks, so that only those are looked at.
        """
        width = scores.shape[1]
        is_hit = scores > self._least[first_row:]
        n_hits = np.count_nonzero(is_hit)  # counted before they are listed: of the first block all are
        if n_hits > 4 * self.ids.shape[1] * width:  # the first block, or nearer rows come late
            columns, values = _top_grouped(np.ascontiguousarray(scores.T), self.ids.shape[1])
            self.merge(np.arange(first_row, first_row + width), columns + first_id, values)
        elif n_hits:
            lines, columns = np.divmod(np.flatnonzero(is_hit), width)
            self._merge_hits(columns + first_row, lines + first_id, scores[lines, columns])

    def _merge_hits(self, rows: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> None:
        order = np.argsort(rows, kind="stable")
        unique_rows, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
        line = np.repeat(np.arange(len(unique_rows)), counts)
        place = np.arange(len(rows)) - np.repeat(starts, counts)
        table_ids = np.zeros((len(unique_rows), int(counts.max())), np.int32)
        table_scores = np.full(table_ids.shape, -np.inf, np.float32)
        table_ids[line, place], table_scores[line, place] = ids[order], scores[order]
        self.merge(unique_rows, table_ids, table_scores)


def _candidates_on_cpu(left: np.ndarray, right: np.ndarray, count: int, chunk: int) -> np.ndarray:
    """Indices [n, count] of the highest scores of each row, itself excluded; each pair is multiplied once."""
    n = len(left)
    best = _Best(n, count)
    for start, scores, (columns, values) in _score_blocks(left, right, count, chunk):
        rows = np.arange(start, start + len(scores))
        best.merge(rows, columns + start, values)
        if len(rows) < n - start:
            best.merge_columns(scores[:, len(rows) :], start, start + len(rows))
    return best.ids


def _score_blocks(
    left: np.ndarray, right: np.ndarray, count: int, chunk: int
) -> Iterator[tuple[int, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """First row, scores [c, n - first] against itself and all later rows, and their best, block by block.

    Blocks are computed by threads ahead of the merging, one core each: the product alone would use all cores, but the
    selection between two products only one. They come in order, so that the result does not depend on the timing.
    """

    def score(start: int) -> tuple[int, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        scores = left[start : start + chunk] @ right[start:].T
        np.fill_diagonal(scores, -np.inf)  # a row is not its own neighbour
        return start, scores, _top_grouped(scores, count)

    starts = range(0, len(left), chunk)
    n_threads = min(len(starts), _n_cores())
    if n_threads == 1:
        yield from map(score, starts)
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(n_threads) as executor:
        pending: deque[Future[tuple[int, np.ndarray, tuple[np.ndarray, np.ndarray]]]] = deque()
        for start in starts:
            pending.append(executor.submit(score, start))
            if len(pending) > n_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _candidates_by_torch(left: np.ndarray, right: np.ndarray, count: int, chunk: int, device: str) -> np.ndarray:
    """Indices [n, count] of the highest scores of each row, itself excluded, with torch on a device."""
    import torch

    lefts, rights = torch.from_numpy(left).to(device), torch.from_numpy(right).to(device)
    ids = np.empty((len(left), count), np.int32)
    for start in range(0, len(left), chunk):
        scores = lefts[start : start + chunk] @ rights.T
        here = torch.arange(len(scores), device=scores.device)
        scores[here, here + start] = -torch.inf
        ids[start : start + chunk] = torch.topk(scores, count, dim=1, sorted=False).indices.cpu().numpy()
    return ids


def _prepare(vectors: np.ndarray, metric: NeighborMetric) -> np.ndarray:
    """Rows as float32: of unit length for cosine, centred (less rounding) for euclidean."""
    if metric not in ("cosine", "euclidean"):
        raise UserError(f'metric "{metric}" is unknown here; use cosine or euclidean')
    points = np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", points, points, dtype=np.float64))
    if not np.isfinite(norms).all():
        bad = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise UserError(f"row {bad} of the vectors has NaN, infinite or huge values; drop such rows first")
    if metric == "euclidean":
        return points - points.mean(axis=0, dtype=np.float64).astype(np.float32)
    if len(norms) and np.abs(norms - 1).max() <= _UNIT_TOLERANCE:
        return points  # no second matrix for features that are of unit length already
    return points / np.where(norms > 0, norms, 1.0)[:, None].astype(np.float32)


def _score_factors(points: np.ndarray, metric: NeighborMetric) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices whose product is a symmetric score: cosines, or -|x - y|^2 / 2 for euclidean distances."""
    if metric == "cosine":
        return points, points
    half_squares = np.einsum("nd,nd->n", points, points)[:, None] / 2
    ones = np.ones_like(half_squares)
    return np.hstack([points, ones, half_squares]), np.hstack([points, -half_squares, -ones])


def _top_grouped(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values [c, count] of the largest scores of each row [c, n], in no order; all if there are fewer."""
    n_groups = scores.shape[1] // _GROUP
    if n_groups <= 4 * count:
        columns = _top(scores, count)
        return columns, np.take_along_axis(scores, columns, axis=1)
    grouped = n_groups * _GROUP  # column j is in group j modulo the number of groups; a few are left over
    groups = _top(scores[:, :grouped].reshape(len(scores), _GROUP, n_groups).max(axis=1), count)
    columns = (groups[:, :, None] + np.arange(_GROUP) * n_groups).reshape(len(scores), -1)
    rest = np.broadcast_to(np.arange(grouped, scores.shape[1]), (len(scores), scores.shape[1] - grouped))
    columns = np.hstack([columns, rest])
    values = np.take_along_axis(scores, columns, axis=1)
    best = _top(values, count)
    return np.take_along_axis(columns, best, axis=1), np.take_along_axis(values, best, axis=1)


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    if count >= scores.shape[1]:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    split = scores.shape[1] - count
    return np.argpartition(scores, split, axis=1)[:, split:]


def _distances(points: np.ndarray, candidates: np.ndarray, metric: NeighborMetric) -> np.ndarray:
    """Distances [n, m] of all rows to their candidates, float32, from differences: exactly 0 for equal rows."""
    squares = np.empty(candidates.shape, np.float32)
    step = max(1, _RESCORE_ELEMENTS // (candidates.shape[1] * points.shape[1]))
    for start in range(0, len(points), step):
        part = slice(start, start + step)
        offsets = points[candidates[part]]
        offsets -= points[part, None]
        squares[part] = np.einsum("cmd,cmd->cm", offsets, offsets)
    if metric == "euclidean":
        return np.sqrt(squares)
    # |x - y|^2 / 2 = 1 - x.y for two unit rows; a zero row is at distance 1 from all.
    zero: np.ndarray = np.logical_not(points.any(axis=1))
    return np.where(zero[:, None] | zero[candidates], np.float32(1.0), squares / 2)
