"""The map of all facets: UMAP in two dimensions, from a handful of rows to hundreds of thousands."""

from __future__ import annotations

import numpy as np

from llm_parts.clio.algorithms import MIN_ROWS_OF_UMAP, Space

# Clio's own, but for min_dist, whose 0 puts facets that are much alike onto one place.
_N_NEIGHBORS, _MIN_DIST = 15, 0.1
# Distance of equal facets as a share of the map, and the angle from one to the next.
_SPREAD, _GOLDEN_ANGLE = 0.001, np.pi * (3 - 5**0.5)


def place_on_map(vectors: np.ndarray, *, seed: int) -> np.ndarray:
    """Place unit vectors [n, d] on a map, [n, 2] float32; equal seeds give equal maps.

    Up to 10,000 rows neighbours are exact, above they are sought in cells, so that time is well below the square of the
    rows. Fewer than five rows that differ are laid out by their two main directions; equal rows lie side by side. Rows
    without a direction (nothing was extracted) lie below the others in one place.

    Raises UserError for values that are not finite.
    """
    space = Space(vectors, seed=seed)
    places = np.zeros((len(space.vectors), 2), np.float32)
    if not len(space.rows):
        return places
    if space.n_distinct >= MIN_ROWS_OF_UMAP:
        laid = space.embed(n_neighbors=_N_NEIGHBORS, n_components=2, min_dist=_MIN_DIST)
    else:
        laid = _by_main_directions(space.directed)
    laid = laid + _spread(space.places, scale=_SPREAD * max(float(np.ptp(laid, axis=0).max()), 1.0))
    places[space.rows] = laid
    places[np.setdiff1d(np.arange(len(places)), space.rows)] = _below(laid)
    return places


def _spread(same: np.ndarray, *, scale: float) -> np.ndarray:
    """Offsets [n, 2] float32 that lay rows of one number in `same` [n] out as the seeds of a sunflower, not in a heap.

    Source: H. Vogel, A better way to construct the sunflower head, Math. Biosciences 44 (1979).
    """
    order = np.argsort(same, kind="stable")
    starts = np.searchsorted(same[order], same[order])
    rank = np.empty(len(same), np.int64)
    rank[order] = np.arange(len(same)) - starts  # 0 for the first of equal rows, which stays where it is
    angle, radius = rank * _GOLDEN_ANGLE, scale * np.sqrt(rank)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)


def _by_main_directions(vectors: np.ndarray) -> np.ndarray:
    """The two components of the largest variance, [n, 2]; zeros where all rows are equal."""
    offsets = (vectors - vectors.mean(axis=0)).astype(np.float64)
    left, lengths, _ = np.linalg.svd(offsets, full_matrices=False)
    components = left[:, :2] * lengths[:2]
    components *= np.where(components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])] < 0, -1, 1)
    return np.pad(components, ((0, 0), (0, 2 - components.shape[1]))).astype(np.float32)


def _below(laid: np.ndarray) -> np.ndarray:
    """A place under a map, a tenth of its height away from it."""
    low, high = laid.min(axis=0), laid.max(axis=0)
    return np.array([(low[0] + high[0]) / 2, low[1] - max(0.1 * (high[1] - low[1]), 1.0)], np.float32)
