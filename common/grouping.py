"""Rows grouped by cluster: codes, sizes, sums and members; and rows of unit length.

Labels are integers; a negative one means that the row is in no cluster (noise).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from common.mapped import release

# Rows turned to float64 at a time.
CHUNK_ROWS = 4096


def cluster_codes(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the clusters, ascending, and for each row the position of its own there, -1 for noise.

    Raises ValueError if there are not as many labels as rows.
    """
    labels = np.asarray(labels)
    if len(rows) != len(labels):
        raise ValueError(f"{len(rows)} rows but {len(labels)} labels")
    inside = labels >= 0
    ids = np.unique(labels[inside])
    codes = np.full(len(labels), -1, np.int64)
    codes[inside] = np.searchsorted(ids, labels[inside])
    return ids.astype(np.int64), codes


def cluster_counts(codes: np.ndarray, k: int) -> np.ndarray:
    """Return the number of rows of each cluster, [k]."""
    return np.bincount(codes[codes >= 0], minlength=k)


def cluster_sums(vectors: np.ndarray, codes: np.ndarray, k: int, *, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the sum of the rows of each cluster, [k, d] float64, each row times its weight.

    It is a product with the sparse table of memberships, which is far quicker than adding row by row. As many rows as
    clusters are taken at a time, or more: each time all sums are gone through.
    """
    from scipy.sparse import csr_array

    total = np.zeros((k, vectors.shape[1]))
    step = max(CHUNK_ROWS, k)
    for start in range(0, len(codes), step):
        part = codes[start : start + step]
        inside = np.flatnonzero(part >= 0)
        values = np.ones(len(inside)) if weights is None else weights[start + inside]
        membership = csr_array((values, (part[inside], inside)), shape=(k, len(part)))
        total += membership @ vectors[start : start + step].astype(np.float64)
        release(vectors[start : start + step])
    return total


def cluster_members(codes: np.ndarray, k: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the code of each cluster and the positions of its rows, ascending."""
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(k + 1))
    for code in range(k):
        yield code, order[bounds[code] : bounds[code + 1]]


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return the rows at unit length in float64; zero rows stay zero."""
    rows = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return rows / np.where(norms > 0, norms, 1.0)[:, None]
