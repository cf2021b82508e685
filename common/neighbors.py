"""Exact nearest neighbours of every row among the others, by blocked matrix products.

    neighbors = exact_neighbors(vectors, 15, metric="cosine")
    neighbors.indices, neighbors.distances          # [n, 15] int32, [n, 15] float32, nearest first

One graph at the largest k serves everything that asks for neighbours: UMAP, the cross ratio, local measures.
"""

from __future__ import annotations

import importlib.util
import itertools
import threading
from contextlib import nullcontext
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np

from common.config import UserError
from common.threads import share_tiles

NeighborMetric = Literal["cosine", "euclidean"]

# Rows and columns of a tile of scores, float32: 4 MB. Not a power of two, whose rows would share lines of the cache.
_TILE_ROWS = 1000
# Scores of one block of rows against all others on a device, float32: 64 MB.
_BLOCK_ELEMENTS = 1 << 24
# Vectors gathered for the exact distances of candidates: 4 MB stay in the cache of a core.
_RESCORE_ELEMENTS = 1 << 20
# Candidates beyond k, which make up for the rounding of float32 products.
_MARGIN = 4
# Directions in which products of many dimensions are bounded, and from how many rows on that pays.
_N_DIRECTIONS = 64
_MIN_ROWS_PER_DIMENSION = 16
# Added to the square of what lies beyond the directions: more than unit rows and their float32 products are off.
_BOUND_MARGIN = 1e-5
# Rows that are turned at a time: few megabytes.
_PIECE_ROWS = 4096
# Rows by which bounds are judged, and the share of pairs above which multiplying them one by one takes longer.
_N_ASKED = 32
_MAX_SHARE = 0.03
# Squares of longer rows are beyond float32.
_HUGE = 1e18
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
    `chunk` is the number of rows per block; on `device` "cuda" the products run with torch, or CuPy without torch.
    Raises UserError if k is not between 1 and n - 1, or if a value is not finite.
    """
    n = len(vectors)
    if not 1 <= k <= n - 1:
        raise UserError(f"{k} nearest neighbours are asked for among {n} rows; use a number from 1 to {max(n - 1, 1)}")
    points = _prepare(vectors, metric)
    n_candidates = min(k + _MARGIN, n - 1)
    factors = _score_factors(points, metric)
    if device == "cpu":
        candidates = _candidates_on_cpu(*factors, n_candidates, chunk or _TILE_ROWS)
    else:
        candidates = _candidates_on_gpu(*factors, n_candidates, chunk or max(16, _BLOCK_ELEMENTS // n), device)
    return _nearest(points, candidates, k, metric)


def _candidates_on_cpu(left: np.ndarray, right: np.ndarray, count: int, chunk: int) -> np.ndarray:
    """Indices [n, count] of the highest scores of each row, itself excluded; each pair is multiplied once.

    Scores are symmetric, so that a tile of them serves its rows and its columns; and a tile stays in the cache between
    the product and the selection.
    """
    from common.best_scores import empty_best, offer_tile

    n = len(left)
    ids, scores = empty_best(n, count)
    bounds = _find_bounds(left, count) if left is right else None
    rows = np.empty((0, 0), np.float32) if bounds is None else left
    starts = range(0, n, chunk)
    tiles = list(itertools.combinations_with_replacement(starts, 2))
    locks = {start: threading.Lock() for start in starts}

    def factor(of: np.ndarray, start: int) -> np.ndarray:
        part = of[start : start + chunk]
        return part if bounds is None else bounds.turn(part)

    def work(places: range) -> None:
        room = np.empty(min(chunk, n) ** 2, np.float32)
        for row, columns in itertools.groupby((tiles[place] for place in places), key=itemgetter(0)):
            lefts = factor(left, row)
            for _, column in columns:
                rights = factor(right, column)
                tile = room[: len(lefts) * len(rights)].reshape(len(lefts), len(rights))
                np.matmul(lefts, rights.T, out=tile)
                with locks[row], locks[column] if column != row else nullcontext():  # the lower first: no deadlock
                    offer_tile(tile, row, column, ids, scores, rows)

    share_tiles(work, n_rows=len(tiles), tile_rows=1)
    return ids


class _Bounds(NamedTuple):
    """The directions in which products of rows of length 1, or 0, are bounded from above.

    A row is turned to them, and what it has beyond them is taken by its length:
    x.y <= p(x).p(y) + |x - p(x)| |y - p(y)|, by Cauchy and Schwarz.
    """

    directions: np.ndarray  # [d, 64] float32

    def turn(self, rows: np.ndarray) -> np.ndarray:
        """Rows [r, 65] whose products with each other are never below those of `rows` [r, d], and close above most."""
        turned = np.empty((len(rows), _N_DIRECTIONS + 1), np.float32)
        inside = np.matmul(rows, self.directions, out=turned[:, :-1])
        turned[:, -1] = np.sqrt(np.maximum(1.0 - np.vecdot(inside, inside), 0.0) + _BOUND_MARGIN)
        return turned


def _find_bounds(rows: np.ndarray, count: int) -> _Bounds | None:
    """The 64 directions that hold most of `rows` [n, d], which are not kept turned: memory would grow with them.

    None where finding the directions would take longer than it saves, or where the rows have no such directions, so
    that too many bounds come near the best scores.
    """
    n, d = rows.shape
    if d < 2 * _N_DIRECTIONS or n < _MIN_ROWS_PER_DIMENSION * d:
        return None
    _, directions = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    bounds = _Bounds(np.ascontiguousarray(directions[:, -_N_DIRECTIONS:], np.float32))
    return bounds if _share_of_candidates(rows, bounds, count) <= _MAX_SHARE else None


def _share_of_candidates(rows: np.ndarray, bounds: _Bounds, count: int) -> float:
    """The share of all pairs whose bound reaches the `count` best scores of a row, estimated from a few rows."""
    n = len(rows)
    asked = rows[np.linspace(0, n - 1, _N_ASKED).astype(np.int64)]
    # One more than `count`: a row is its own best.
    least = np.array([np.partition(rows @ row, n - count - 1)[n - count - 1] for row in asked])
    asked_bounds = bounds.turn(asked)
    pieces = (bounds.turn(rows[start : start + _PIECE_ROWS]) for start in range(0, n, _PIECE_ROWS))
    return sum(int((piece @ asked_bounds.T >= least).sum()) for piece in pieces) / (n * len(asked))


def _candidates_on_gpu(left: np.ndarray, right: np.ndarray, count: int, chunk: int, device: str) -> np.ndarray:
    """Indices [n, count] of the highest scores of each row, by torch, or by CuPy, which cuML brings along."""
    if importlib.util.find_spec("torch"):
        return _candidates_by_torch(left, right, count, chunk, device)
    return _candidates_by_cupy(left, right, count, chunk)


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


def _candidates_by_cupy(left: np.ndarray, right: np.ndarray, count: int, chunk: int) -> np.ndarray:
    """The same with CuPy, on the GPU that cuML uses."""
    import cupy

    lefts, rights = cupy.asarray(left), cupy.asarray(right)
    ids = np.empty((len(left), count), np.int32)
    for start in range(0, len(left), chunk):
        scores = lefts[start : start + chunk] @ rights.T
        here = cupy.arange(len(scores))
        scores[here, here + start] = -np.inf
        best = cupy.argpartition(scores, len(left) - count, axis=1)[:, len(left) - count :]
        ids[start : start + chunk] = cupy.asnumpy(best)
    return ids


def _prepare(vectors: np.ndarray, metric: NeighborMetric) -> np.ndarray:
    """Rows as float32: of unit length for cosine, centred (less rounding) for euclidean."""
    if metric not in ("cosine", "euclidean"):
        raise UserError(f'metric "{metric}" is unknown here; use cosine or euclidean')
    points = np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", points, points, dtype=np.float64))
    is_usable = norms < (_HUGE if metric == "euclidean" else np.inf)  # NaN is not
    if not is_usable.all():
        bad = int(np.flatnonzero(~is_usable)[0])
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


def _nearest(points: np.ndarray, candidates: np.ndarray, k: int, metric: NeighborMetric) -> Neighbors:
    """The `k` nearest of the candidates [n, m] of all rows, a few rows at a time; equal distances go by index."""
    n, m = candidates.shape
    nearest = Neighbors(np.empty((n, k), np.int32), np.empty((n, k), np.float32))
    is_zero: np.ndarray = np.logical_not(points.any(axis=1))
    step = max(1, _RESCORE_ELEMENTS // (m * points.shape[1]))
    for start in range(0, n, step):
        part = slice(start, start + step)
        near = np.sort(candidates[part], axis=1)
        offsets = points[near]
        offsets -= points[part, None]
        squares = np.einsum("rmd,rmd->rm", offsets, offsets)  # exactly 0 for equal rows
        if metric == "euclidean":
            distances = np.sqrt(squares)
        else:  # |x - y|^2 / 2 = 1 - x.y for two unit rows; a zero row is at distance 1 from all
            distances = np.where(is_zero[part, None] | is_zero[near], np.float32(1.0), squares / 2)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        nearest.indices[part] = np.take_along_axis(near, order, axis=1)
        nearest.distances[part] = np.take_along_axis(distances, order, axis=1)
    return nearest
