"""Exact nearest neighbours of every row among the others, by blocked matrix products.

    neighbors = exact_neighbors(vectors, 15, metric="cosine")
    neighbors.indices, neighbors.distances          # [n, 15] int32, [n, 15] float32, nearest first

One graph at the largest k serves everything that asks for neighbours: UMAP, the cross ratio, local measures.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from common.config import UserError

NeighborMetric = Literal["cosine", "euclidean"]

# Scores of one block of rows against all others, float32: 64 MB.
_BLOCK_ELEMENTS = 1 << 24
# Vectors gathered for the exact distances of candidates: 64 MB.
_RESCORE_ELEMENTS = 1 << 24
# Candidates beyond k, which make up for the rounding of float32 products.
_MARGIN = 4
# Columns are first reduced to the maxima of groups of this many: k of k groups hold the k largest values.
_GROUP = 20


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
    is_zero: np.ndarray = np.logical_not(points.any(axis=1))
    n_candidates = min(k + _MARGIN, n - 1)
    select = _Selector(points, metric, n_candidates) if device == "cpu" else _TorchSelector(points, metric, device)
    chunk = chunk or max(16, min(1024, _BLOCK_ELEMENTS // n))
    indices, distances = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    for start in range(0, n, chunk):
        rows = np.arange(start, min(start + chunk, n))
        candidates = np.sort(select.candidates(rows, n_candidates), axis=1)  # equal distances go by index
        squares = _squared_distances(points, rows, candidates)
        if metric == "euclidean":
            exact = np.sqrt(squares)
        else:  # |x - y|^2 / 2 = 1 - x.y for two unit rows; a zero row is at distance 1 from all
            exact = np.where(is_zero[rows, None] | is_zero[candidates], np.float32(1.0), squares / 2)
        order = np.argsort(exact, axis=1, kind="stable")[:, :k]
        indices[rows] = np.take_along_axis(candidates, order, axis=1)
        distances[rows] = np.take_along_axis(exact, order, axis=1)
    return Neighbors(indices, distances)


class _Selector:
    """Picks the candidates of a block of rows with numpy."""

    def __init__(self, points: np.ndarray, metric: NeighborMetric, n_candidates: int) -> None:
        self._n = len(points)
        self._left, right = _score_factors(points, metric)
        n_groups = -(-self._n // _GROUP)
        self._grouped = n_groups > 4 * n_candidates
        padding = n_groups * _GROUP - self._n if self._grouped else 0
        self._right = np.vstack([right, np.zeros((padding, right.shape[1]), np.float32)]).T if padding else right.T

    def candidates(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Indices of the `count` highest scores of each row, itself excluded; in no order."""
        scores = self._left[rows] @ self._right  # [c, n + padding]
        scores[:, self._n :] = -np.inf
        scores[np.arange(len(rows)), rows] = -np.inf
        if not self._grouped:
            return _top(scores, count)
        by_group = scores.reshape(len(rows), _GROUP, -1)  # column j is in group j modulo the number of groups
        n_groups = by_group.shape[2]
        groups = _top(by_group.max(axis=1), count)
        columns = (groups[:, :, None] + np.arange(_GROUP) * n_groups).reshape(len(rows), -1)
        best = _top(np.take_along_axis(scores, columns, axis=1), count)
        return np.take_along_axis(columns, best, axis=1)


class _TorchSelector:
    """Picks the candidates of a block of rows with torch on a device."""

    def __init__(self, points: np.ndarray, metric: NeighborMetric, device: str) -> None:
        import torch

        left, right = _score_factors(points, metric)
        self._left, self._right = torch.from_numpy(left).to(device), torch.from_numpy(right).to(device)

    def candidates(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Indices of the `count` highest scores of each row, itself excluded."""
        import torch

        block = slice(int(rows[0]), int(rows[-1]) + 1)
        scores = self._left[block] @ self._right.T
        here = torch.arange(len(rows), device=scores.device)
        scores[here, here + block.start] = -torch.inf
        return torch.topk(scores, count, dim=1, sorted=False).indices.cpu().numpy()


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
    return points / np.where(norms > 0, norms, 1.0)[:, None].astype(np.float32)


def _score_factors(points: np.ndarray, metric: NeighborMetric) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices whose product ranks neighbours: cosines, or x.y - |y|^2 / 2 for euclidean distances."""
    if metric == "cosine":
        return points, points
    half_squares = np.einsum("nd,nd->n", points, points)[:, None] / 2
    ones = np.ones((len(points), 1), np.float32)
    return np.hstack([points, ones]), np.hstack([points, -half_squares])


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    if count >= scores.shape[1]:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    split = scores.shape[1] - count
    return np.argpartition(scores, split, axis=1)[:, split:]


def _squared_distances(points: np.ndarray, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Squared distances of rows [c] to their candidates [c, m], float32, from differences: exactly 0 for equal rows."""
    squares = np.empty(candidates.shape, np.float32)
    step = max(1, _RESCORE_ELEMENTS // (candidates.shape[1] * points.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        offsets = points[candidates[part]]
        offsets -= points[rows[part], None]
        squares[part] = np.einsum("cmd,cmd->cm", offsets, offsets)
    return squares
