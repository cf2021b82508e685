"""Rows around some centres, and the neighbours from which UMAP starts."""

from __future__ import annotations

import numpy as np

from common.neighbors import exact_neighbors
from common.umap_graph import FuzzyGraph, fuzzy_graph


def clusters(n: int, *, spread: float, n_centers: int = 25) -> np.ndarray:
    """Rows [n, 12] float32 around some centres; with a small spread their graph falls into parts."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((n_centers, 12))
    return (centers[rng.integers(n_centers, size=n)] + spread * rng.standard_normal((n, 12))).astype(np.float32)


def neighbors_of(vectors: np.ndarray, k: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Each row itself and its k nearest others: [n, k + 1] int32, and their distances."""
    found = exact_neighbors(vectors, k)
    indices = np.hstack([np.arange(len(vectors), dtype=np.int32)[:, None], found.indices])
    return indices, np.hstack([np.zeros((len(vectors), 1), np.float32), found.distances])


def graph_of(vectors: np.ndarray, k: int = 9) -> FuzzyGraph:
    """The graph of these neighbours."""
    return fuzzy_graph(*neighbors_of(vectors, k))
