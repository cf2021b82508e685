"""UMAP by its parts: the bits of umap-learn's estimator, and the same start from far fewer Lanczos vectors."""

from __future__ import annotations

import numpy as np
import pytest

import common.umap_layout as layout
from common.density import embed_umap
from common.neighbors import exact_neighbors


def clusters(n: int, *, spread: float) -> np.ndarray:
    """Rows of 12 dimensions around 25 centres; with a small spread their graph falls into parts."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((25, 12))
    return (centers[rng.integers(25, size=n)] + spread * rng.standard_normal((n, 12))).astype(np.float32)


def graph_of(vectors: np.ndarray, k: int = 9):
    found = exact_neighbors(vectors, k)
    indices = np.hstack([np.arange(len(vectors), dtype=np.int32)[:, None], found.indices])
    return layout.fuzzy_graph(indices, np.hstack([np.zeros((len(vectors), 1), np.float32), found.distances]))


@pytest.mark.parametrize(("spread", "n_components"), [(0.05, 2), (1.5, 10)])
def test_embeddings_are_those_of_umap_learn(spread, n_components):
    import umap

    vectors = clusters(500, spread=spread)
    found = exact_neighbors(vectors, 9)
    knn = np.hstack([np.arange(500)[:, None], found.indices]), np.hstack([np.zeros((500, 1)), found.distances])
    options = {"n_components": n_components, "n_neighbors": 10, "metric": "cosine", "random_state": 3}
    theirs = umap.UMAP(**options, n_jobs=1, precomputed_knn=(knn[0], knn[1].astype(np.float32))).fit_transform(vectors)
    assert np.array_equal(embed_umap(vectors, **options), theirs)


def test_many_rows_start_where_few_would(monkeypatch):
    """One part: the same eigenvectors, up to their signs. Several: each in a place of its own."""
    graph, vectors = graph_of(clusters(1200, spread=1.0)), clusters(1200, spread=1.0)
    few, many = (
        find(graph.copy(), vectors, 5, np.random.RandomState(0), "cosine")
        for find in (layout._spectral_of_few, layout._spectral_of_many)
    )
    cosines = np.sum(few * many, axis=0) / np.linalg.norm(few, axis=0) / np.linalg.norm(many, axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1.0, atol=1e-3)

    monkeypatch.setattr(layout, "_FEW_ROWS", 100)
    apart = clusters(1200, spread=0.05)
    embedding = embed_umap(apart, n_components=3, n_neighbors=10, random_state=0, n_epochs=50)
    assert np.isfinite(embedding).all()
    assert np.array_equal(embedding, embed_umap(apart, n_components=3, n_neighbors=10, random_state=0, n_epochs=50))


def test_rows_that_nothing_is_near_have_no_place():
    vectors = clusters(300, spread=1.0)
    found = exact_neighbors(vectors, 9)
    indices = np.hstack([np.arange(300, dtype=np.int32)[:, None], found.indices])
    distances = np.hstack([np.zeros((300, 1), np.float32), found.distances])
    indices[indices == 17], indices[17, 1:], distances[17, 1:] = -1, -1, np.inf
    graph = [layout.fuzzy_graph(indices, distances)]
    embedding = layout.lay_out(
        graph, vectors, n_components=2, min_dist=0.1, metric="cosine", random_state=0, n_epochs=20
    )
    assert graph == []  # it is not kept beside its edges
    assert np.isnan(embedding[17]).all() and np.isfinite(np.delete(embedding, 17, axis=0)).all()
