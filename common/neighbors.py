"""Exact nearest neighbours of every row among the others, by blocked matrix products.

    neighbors = exact_neighbors(vectors, 15, metric="cosine")
    neighbors.indices, neighbors.distances          # [n, 15] int32, [n, 15] float32, nearest first

One graph at the largest k serves everything that asks for neighbours: UMAP, the cross ratio, local measures. Rows are
gone through part by part, so that a matrix that lies in a file (`common.mapped`) is never in memory as a whole.
"""

from __future__ import annotations

import importlib.util
import itertools
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np

from common.config import UserError
from common.mapped import matrix_beside, pieces, release, take_rows
from common.threads import share_tiles

NeighborMetric = Literal["cosine", "euclidean"]

# Rows and columns of a tile of scores, float32: 4 MB. Not a power of two, whose rows would share lines of the cache.
_TILE_ROWS = 1000
# Tiles after which the memory of what they were made of is given back.
_TILES_HELD = 4
# Scores of one block of rows against all others on a device, float32: 64 MB.
_BLOCK_ELEMENTS = 1 << 24
# Rows whose candidates are looked at together, in the order of the candidates: these rows stay, the others pass by.
_RESCORE_ROWS = 4096
# Vectors gathered for the exact distances of candidates: 2 MB stay in the cache of a core.
_RESCORE_ELEMENTS = 1 << 19
# Candidates beyond k, which make up for the rounding of float32 products.
MARGIN = 4
# Directions in which products of many dimensions are bounded, and from how many rows on that pays.
_N_DIRECTIONS = 64
_MIN_ROWS_PER_DIMENSION = 16
# Added to the square of what lies beyond the directions: more than unit rows and their float32 products are off.
_BOUND_MARGIN = 1e-5
# Rows by which bounds are judged, and the share of pairs above which multiplying them one by one takes longer.
_N_ASKED = 32
_MAX_SHARE = 0.03
# Squares of longer rows are beyond float32.
_HUGE = 1e18
# What float32 leaves of a length of 1.
_UNIT_TOLERANCE = 1e-6


Tile = tuple[slice, slice]


class Neighbors(NamedTuple):
    """The nearest other rows of each row, nearest first."""

    indices: np.ndarray  # [n, k] int32
    distances: np.ndarray  # [n, k] float32


def exact_neighbors(
    vectors: np.ndarray,
    k: int,
    *,
    metric: NeighborMetric = "cosine",
    n_kept: int | None = None,
    chunk: int | None = None,
    device: str = "cpu",
) -> Neighbors:
    """Return the `k` nearest other rows of every row; a row is never its own neighbour, however many equal it.

    Cosine distance is 1 - cosine, and 1 for a zero row, as in scikit-learn. Distances come from differences of rows,
    so that duplicates are at exactly 0, and equal distances are ordered by index. Which of more than k + 4 rows at the
    same distance are listed depends on rounding, but is the same on every run on one machine. With `n_kept` only so
    many of the k are returned, bit for bit the first columns, and the others never take memory as neighbours.
    `chunk` is the number of rows per block; on `device` "cuda" the products run with torch, or CuPy without torch.
    Raises UserError if k is not between 1 and n - 1, or if a value is not finite.
    """
    n = len(vectors)
    check_count(k, n_rows=n)
    points = prepare_points(vectors, metric)
    n_candidates = min(k + MARGIN, n - 1)
    factors = score_factors(points, metric)
    if device == "cpu":
        candidates = _candidates_on_cpu(*factors, n_candidates, chunk or _TILE_ROWS)
    else:
        candidates = _candidates_on_gpu(*factors, n_candidates, chunk or max(16, _BLOCK_ELEMENTS // n), device)
    return rank_candidates(points, candidates, k if n_kept is None else min(n_kept, k), metric)


def _candidates_on_cpu(left: np.ndarray, right: np.ndarray, count: int, chunk: int) -> np.ndarray:
    """Indices [n, count] of the highest scores of each row, itself excluded; each pair is multiplied once.

    Scores are symmetric, so that a tile of them serves its rows and its columns; and a tile stays in the cache between
    the product and the selection.
    """
    from common.best_scores import empty_best

    n = len(left)
    ids, scores = empty_best(n, count, beside=left)
    parts = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    tiles = list(itertools.combinations_with_replacement(parts, 2))
    offer_tiles(tiles, left, right, ids, scores, bounds=_find_bounds(left, count) if left is right else None)
    return ids


def offer_tiles(
    tiles: Sequence[Tile],
    left: np.ndarray,
    right: np.ndarray,
    ids: np.ndarray,
    scores: np.ndarray,
    *,
    bounds: _Bounds | None = None,
) -> None:
    """Multiply pairs of parts of the rows, and keep the best products of either side's rows in `ids` and `scores`.

    The first part of a pair is the second one, or lies before it; pairs of one first part stand together. `ids` and
    `scores` [n, count] are those of `empty_best`, and do not depend on the order of the tiles. With `bounds` the tiles
    are made of turned rows, and only what these leave open is multiplied in full.
    """
    from common.best_scores import offer_tile

    rows = np.empty((0, 0), np.float32) if bounds is None else left
    locks = {part.start: threading.Lock() for tile in tiles for part in tile}
    largest = max((_length(one) * _length(other) for one, other in tiles), default=0)

    def factor(of: np.ndarray, part: slice) -> np.ndarray:
        return of[part] if bounds is None else bounds.turn(of[part])

    def work(places: range) -> None:
        room = np.empty(largest, np.float32)
        for row, pairs in itertools.groupby((tiles[place] for place in places), key=itemgetter(0)):
            lefts = factor(left, row)
            for number, (_, column) in enumerate(pairs):
                rights = factor(right, column)
                tile = room[: len(lefts) * len(rights)].reshape(len(lefts), len(rights))
                np.matmul(lefts, rights.T, out=tile)
                one, other = locks[row.start], locks[column.start]
                with one, other if other is not one else nullcontext():  # the lower first: no deadlock
                    offer_tile(tile, row.start, column.start, ids, scores, rows)
                if number % _TILES_HELD == 0:
                    for used in (left, right, ids, scores):
                        release(used)  # whole, as pages come with others around them

    share_tiles(work, n_rows=len(tiles), tile_rows=1)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


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
    gram = np.zeros((d, d))
    for part in pieces(rows):
        gram += part.T @ part
    _, directions = np.linalg.eigh(gram)
    bounds = _Bounds(np.ascontiguousarray(directions[:, -_N_DIRECTIONS:], np.float32))
    return bounds if _share_of_candidates(rows, bounds, count) <= _MAX_SHARE else None


def _share_of_candidates(rows: np.ndarray, bounds: _Bounds, count: int) -> float:
    """The share of all pairs whose bound reaches the `count` best scores of a row, estimated from a few rows."""
    n = len(rows)
    asked = take_rows(rows, np.linspace(0, n - 1, _N_ASKED).astype(np.int64))
    # One more than `count`: a row is its own best.
    best = np.full((count + 1, len(asked)), -np.inf, np.float32)  # the lowest first
    for part in pieces(rows):
        best = np.partition(np.vstack([best, part @ asked.T]), -count - 1, axis=0)[-count - 1 :]
    least = best[0]
    asked_bounds = bounds.turn(asked)
    return sum(int((bounds.turn(part) @ asked_bounds.T >= least).sum()) for part in pieces(rows)) / (n * len(asked))


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


def check_count(k: int, *, n_rows: int) -> None:
    """Raise UserError unless a row can have `k` neighbours among the others."""
    if not 1 <= k <= n_rows - 1:
        most = max(n_rows - 1, 1)
        raise UserError(f"{k} nearest neighbours are asked for among {n_rows} rows; use a number from 1 to {most}")


def prepare_points(vectors: np.ndarray, metric: NeighborMetric) -> np.ndarray:
    """Rows as float32: of unit length for cosine, centred (less rounding) for euclidean."""
    if metric not in ("cosine", "euclidean"):
        raise UserError(f'metric "{metric}" is unknown here; use cosine or euclidean')
    points = np.ascontiguousarray(vectors, dtype=np.float32)
    squares = [np.einsum("nd,nd->n", part, part, dtype=np.float64) for part in pieces(points)]
    norms = np.sqrt(np.concatenate(squares))
    is_usable = norms < (_HUGE if metric == "euclidean" else np.inf)  # NaN is not
    if not is_usable.all():
        bad = int(np.flatnonzero(~is_usable)[0])
        raise UserError(f"row {bad} of the vectors has NaN, infinite or huge values; drop such rows first")
    if metric == "euclidean":
        center = points.mean(axis=0, dtype=np.float64).astype(np.float32)
        release(points)
        centered = matrix_beside(points, points.shape)
        for part, to in zip(pieces(points), pieces(centered), strict=True):
            np.subtract(part, center, out=to)
        return centered
    if len(norms) and np.abs(norms - 1).max() <= _UNIT_TOLERANCE:
        return points  # no second matrix for features that are of unit length already
    lengths = np.where(norms > 0, norms, 1.0).astype(np.float32)
    units = matrix_beside(points, points.shape)
    for part, of, to in zip(pieces(points), pieces(lengths), pieces(units), strict=True):
        np.divide(part, of[:, None], out=to)
    return units


def score_factors(points: np.ndarray, metric: NeighborMetric) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices whose product is a symmetric score: cosines, or -|x - y|^2 / 2 for euclidean distances.

    They lie in files where the points do.
    """
    if metric == "cosine":
        return points, points
    n, d = points.shape
    left, right = matrix_beside(points, (n, d + 2)), matrix_beside(points, (n, d + 2))
    for rows, of_left, of_right in zip(pieces(points), pieces(left), pieces(right), strict=True):
        half_squares = np.einsum("nd,nd->n", rows, rows) / 2
        of_left[:, :d] = of_right[:, :d] = rows
        of_left[:, d], of_left[:, d + 1] = 1, half_squares
        of_right[:, d], of_right[:, d + 1] = -half_squares, -1
    return left, right


def rank_candidates(points: np.ndarray, candidates: np.ndarray, k: int, metric: NeighborMetric) -> Neighbors:
    """The `k` nearest of the candidates [n, m] of all rows, some rows at a time; equal distances go by index."""
    n = len(candidates)
    nearest = Neighbors(matrix_beside(points, (n, k), dtype=np.int32), matrix_beside(points, (n, k)))
    is_zero = np.concatenate([np.logical_not(part.any(axis=1)) for part in pieces(points)])
    for start in range(0, n, _RESCORE_ROWS):
        part = slice(start, start + _RESCORE_ROWS)
        near = np.sort(candidates[part], axis=1)
        squares = _squared_distances(points, near, start)
        if metric == "euclidean":
            distances = np.sqrt(squares)
        else:  # |x - y|^2 / 2 = 1 - x.y for two unit rows; a zero row is at distance 1 from all
            distances = np.where(is_zero[part, None] | is_zero[near], np.float32(1.0), squares / 2)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        nearest.indices[part] = np.take_along_axis(near, order, axis=1)
        nearest.distances[part] = np.take_along_axis(distances, order, axis=1)
        for used in (candidates, *nearest):
            release(used[part])
    return nearest


def _squared_distances(points: np.ndarray, near: np.ndarray, first_row: int) -> np.ndarray:
    """Squared distances [r, m] float32 of the rows from `first_row` on to the rows `near` [r, m]; 0 for equal rows."""
    r, m = near.shape
    squares = np.empty(r * m, np.float32)
    by_candidate = np.argsort(near, axis=None)  # so that `points` is gone through once, from its first row to its last
    step = max(1, _RESCORE_ELEMENTS // points.shape[1])
    ends = np.searchsorted(near.reshape(-1)[by_candidate], np.arange(0, len(points), _RESCORE_ROWS))
    cuts = np.union1d(np.arange(0, r * m, step), [*ends, r * m])
    for start, end in itertools.pairwise(cuts.tolist()):
        pairs = by_candidate[start:end]
        others = near.reshape(-1)[pairs]
        offsets = points[others]
        offsets -= points[first_row + pairs // m]
        squares[pairs] = np.einsum("pd,pd->p", offsets, offsets)
        release(points[others[0] : others[-1] + 1])
    release(points[first_row : first_row + r])
    return squares.reshape(r, m)
