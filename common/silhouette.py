"""The silhouette of a clustering, exact: from sums of clusters for cosine and squared distances, else in blocks.

    silhouette_score(vectors, labels, metric="cosine")    # O(rows x dimensions x clusters), no matrix of all pairs

`vectors` is [n, d] float, `labels` is [n] integers, and rows with a negative label (noise) are left out.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from common.grouping import CHUNK_ROWS, cluster_codes, cluster_sums

Metric = Literal["cosine", "euclidean", "sqeuclidean"]

# Elements of one block of distances, float64: 4 MB stay in the cache of a core.
_BLOCK_ELEMENTS = 1 << 19
# Distances of one part of the rows to all clusters, float64: 64 MB.
_CHUNK_ELEMENTS = 1 << 23
# Up to here differences, compiled, are quicker than products and their square roots in numpy.
MAX_COMPILED_DIMENSIONS = 32
# Mean distances below this share of the scale are rounding of float64, not distance.
_ROUNDING = 1e-12


def silhouette_samples(vectors: np.ndarray, labels: np.ndarray, *, metric: Metric = "cosine") -> np.ndarray:
    """Return the silhouette of each row, [n] float64, NaN for noise; all NaN with fewer than two clusters.

    Cosine and squared euclidean distances follow exactly from the sums of the clusters: the mean distance from a unit
    row x to a cluster C is 1 - x . sum(C) / |C|. Euclidean distances are computed in blocks, O(n^2 d) time.
    Rows alone in their cluster have silhouette 0. Source: P. Rousseeuw, Silhouettes, J. Comp. Appl. Math. 20 (1987).
    """
    if metric not in _BY_METRIC:
        raise ValueError(f'metric "{metric}" is not one of {", ".join(_BY_METRIC)}')
    ids, codes = cluster_codes(vectors, labels)
    result = np.full(len(codes), np.nan)
    if len(ids) < 2:
        return result
    inside = np.flatnonzero(codes >= 0)
    rows, own = vectors[inside] if len(inside) < len(codes) else vectors, codes[inside]
    result[inside] = _BY_METRIC[metric](rows, own)
    return result


def silhouette_score(
    vectors: np.ndarray,
    labels: np.ndarray,
    *,
    metric: Metric = "cosine",
    sample_size: int | None = None,
    random_state: int = 0,
) -> float:
    """Return the mean silhouette; of `sample_size` rows drawn without noise, where that is fewer than there are.

    A sample stands for the whole: distances are taken within it. NaN with fewer than two clusters.
    """
    if sample_size is not None:
        inside = np.flatnonzero(np.asarray(labels) >= 0)
        if sample_size < len(inside):
            chosen = np.random.default_rng(random_state).choice(inside, size=sample_size, replace=False)
            chosen.sort()
            vectors, labels = vectors[chosen], np.asarray(labels)[chosen]
    samples = silhouette_samples(vectors, labels, metric=metric)
    clustered = samples[~np.isnan(samples)]
    return float(clustered.mean()) if len(clustered) else math.nan


def silhouettes_of_rows(vectors: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the silhouettes by cosine of some `rows` [r] alone, none of them noise, against all clusters: [r] float64.

    O(n d + r d k): for very many rows and clusters, of which a sample by `silhouette_score` would leave a row or two
    each. All NaN with fewer than two clusters.
    """
    ids, codes = cluster_codes(vectors, labels)
    if len(ids) < 2:
        return np.full(len(rows), np.nan)
    inside = np.flatnonzero(codes >= 0)
    places = np.searchsorted(inside, rows)
    if len(inside) < len(codes):
        vectors, codes = vectors[inside], codes[inside]
    return _cosine_silhouette(vectors, codes, places)


def _cosine_silhouette(vectors: np.ndarray, own: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Of some `rows` [r], or of all: part by part, smaller ones where there are many clusters."""
    counts = np.bincount(own)
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    inverse = np.divide(1.0, norms, out=np.zeros(len(norms)), where=norms > 0)
    sums = cluster_sums(vectors, own, len(counts), weights=inverse)  # of the rows at unit length
    result = np.empty(len(own) if rows is None else len(rows))
    step = min(CHUNK_ROWS, max(1, _CHUNK_ELEMENTS // len(counts)))
    for start in range(0, len(result), step):
        chunk = slice(start, start + step)
        part = chunk if rows is None else rows[chunk]
        totals = counts - (vectors[part].astype(np.float64) @ sums.T) * inverse[part, None]  # [c, k]
        # The distance of a row to itself is 0 by definition, also for a zero row, whose formula gives 1.
        totals[np.arange(len(totals)), own[part]] -= inverse[part] == 0
        totals[totals < _ROUNDING * counts] = 0.0
        result[chunk] = silhouettes_from_sums(totals, own[part], counts)
    return result


def _sqeuclidean_silhouette(vectors: np.ndarray, own: np.ndarray) -> np.ndarray:
    counts = np.bincount(own)
    center = vectors.mean(axis=0, dtype=np.float64)  # smaller norms, less cancellation
    chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, len(own), CHUNK_ROWS)]
    norms = np.concatenate([np.sum((vectors[chunk] - center) ** 2, axis=1) for chunk in chunks])
    sums = cluster_sums(vectors, own, len(counts)) - counts[:, None] * center
    squares = np.bincount(own, weights=norms)
    result = np.empty(len(own))
    for chunk in chunks:
        dots = (vectors[chunk] - center) @ sums.T  # [c, k]
        totals = norms[chunk, None] * counts + squares - 2.0 * dots
        totals[totals < _ROUNDING * norms.mean() * counts] = 0.0
        result[chunk] = silhouettes_from_sums(totals, own[chunk], counts)
    return result


def _euclidean_silhouette(vectors: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Sum the distances of each row to each cluster, rows sorted by cluster: in few dimensions from differences."""
    if vectors.shape[1] > MAX_COMPILED_DIMENSIONS:
        return _euclidean_silhouette_by_products(vectors, own)
    from common.distance_sums import sum_distances

    order = np.argsort(own, kind="stable")
    counts = np.bincount(own)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    result = np.empty(len(own))
    rows = vectors[order]
    result[order] = silhouettes_from_sums(sum_distances(rows, rows, bounds), own[order], counts)
    return result


def _euclidean_silhouette_by_products(vectors: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Sum the distances of each row to each cluster in blocks, from products of rows: for many dimensions."""
    order = np.argsort(own, kind="stable")
    counts = np.bincount(own)
    rows = vectors[order].astype(np.float64)
    rows -= rows.mean(axis=0)  # smaller norms, less cancellation
    norms = np.einsum("nd,nd->n", rows, rows)[:, None]
    # |x - y|^2 as one product: (x, |x|^2, 1) . (-2y, 1, |y|^2)
    ones = np.ones_like(norms)
    left, right = np.hstack([rows, norms, ones]), np.ascontiguousarray(np.hstack([-2.0 * rows, ones, norms]).T)
    starts = np.concatenate([[0], np.cumsum(counts)])
    step = max(1, _BLOCK_ELEMENTS // max(len(rows), 1))
    scale = math.sqrt(float(norms.mean()))
    result = np.empty(len(own))
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        block = left[chunk] @ right  # [c, n]
        np.sqrt(np.abs(block, out=block), out=block)  # below zero is rounding only
        totals = np.add.reduceat(block, starts[:-1], axis=1)  # [c, k]
        totals[totals < 1e-7 * scale * counts] = 0.0  # rounding, not distance
        result[order[chunk]] = silhouettes_from_sums(totals, own[order[chunk]], counts)
    return result


def silhouettes_from_sums(totals: np.ndarray, own: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(b - a) / max(a, b) from the sums of distances [c, k] of rows to clusters; 0 for rows alone in theirs."""
    rows = np.arange(len(own))
    within = totals[rows, own] / np.maximum(counts[own] - 1, 1)
    means = totals / counts
    means[rows, own] = np.inf
    nearest = means.min(axis=1)
    largest = np.maximum(within, nearest)
    scores = np.divide(nearest - within, largest, out=np.zeros(len(own)), where=largest > 0)
    scores[counts[own] == 1] = 0.0
    return scores


_BY_METRIC = {
    "cosine": _cosine_silhouette,
    "euclidean": _euclidean_silhouette,
    "sqeuclidean": _sqeuclidean_silhouette,
}
