"""The silhouette of a clustering, exact: from sums of clusters for cosine and squared distances, else in blocks.

    silhouette_score(vectors, labels, metric="cosine")    # O(rows x dimensions x clusters), no matrix of all pairs

`vectors` is [n, d] float, `labels` is [n] integers, and rows with a negative label (noise) are left out.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from common.grouping import CHUNK_ROWS, cluster_codes, cluster_sums, unit_rows

Metric = Literal["cosine", "euclidean", "sqeuclidean"]

# Elements of one block of distances, float64: 4 MB stay in the cache of a core.
_BLOCK_ELEMENTS = 1 << 19


def silhouette_samples(vectors: np.ndarray, labels: np.ndarray, *, metric: Metric = "cosine") -> np.ndarray:
    """Return the silhouette of each row, [n] float64, NaN for noise; all NaN with fewer than two clusters.

    Cosine and squared euclidean distances follow exactly from the sums of the clusters: the mean distance from a unit
    row x to a cluster C is 1 - x . sum(C) / |C|. Euclidean distances are computed in blocks, O(n^2 d) time.
    Rows alone in their cluster have silhouette 0. Source: P. Rousseeuw, Silhouettes, J. Comp. Appl. Math. 20 (1987).
    """
    ids, codes = cluster_codes(vectors, labels)
    result = np.full(len(codes), np.nan)
    if len(ids) < 2:
        return result
    inside = np.flatnonzero(codes >= 0)
    rows, own = vectors[inside] if len(inside) < len(codes) else vectors, codes[inside]
    if metric == "euclidean":
        result[inside] = _euclidean_silhouette(rows, own)
    elif metric in ("cosine", "sqeuclidean"):
        result[inside] = _silhouette_from_sums(rows, own, metric)
    else:
        raise ValueError(f'metric "{metric}" is not one of cosine, euclidean, sqeuclidean')
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


def _silhouette_from_sums(vectors: np.ndarray, own: np.ndarray, metric: Metric) -> np.ndarray:
    counts = np.bincount(own)
    center = np.zeros(vectors.shape[1]) if metric == "cosine" else vectors.mean(axis=0, dtype=np.float64)
    chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, len(own), CHUNK_ROWS)]
    sums, squares = np.zeros((len(counts), vectors.shape[1])), np.zeros(len(counts))

    def prepare(chunk: slice) -> np.ndarray:
        rows = vectors[chunk].astype(np.float64)
        return unit_rows(rows) if metric == "cosine" else rows - center

    for chunk in chunks:
        rows = prepare(chunk)
        sums += cluster_sums(rows, own[chunk], len(counts))
        squares += np.bincount(own[chunk], np.einsum("nd,nd->n", rows, rows), len(counts))
    result = np.empty(len(own))
    for chunk in chunks:
        rows, mine = prepare(chunk), own[chunk]
        norms, dots = np.einsum("nd,nd->n", rows, rows), rows @ sums.T  # [c], [c, k]
        if metric == "cosine":
            totals = counts - dots
            # The distance of a row to itself is 0 by definition, also for a zero vector, whose formula gives 1.
            totals[np.arange(len(mine)), mine] -= 1.0 - norms
            scale = 1.0
        else:
            totals = norms[:, None] * counts + squares - 2.0 * dots
            scale = float(squares.sum()) / len(own)
        totals[totals < 1e-12 * scale * counts] = 0.0  # rounding, not distance
        result[chunk] = _silhouettes(totals, mine, counts)
    return result


def _euclidean_silhouette(vectors: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Sum the distances of each row to each cluster in blocks, rows sorted by cluster."""
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
        result[order[chunk]] = _silhouettes(totals, own[order[chunk]], counts)
    return result


def _silhouettes(totals: np.ndarray, own: np.ndarray, counts: np.ndarray) -> np.ndarray:
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
