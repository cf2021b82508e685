"""Where UMAP's rows start: the same whether few or many vectors look for it, and apart where the graph is."""

from __future__ import annotations

import numpy as np
import pytest

import common.spectral_start as spectral
from common.density import embed_umap
from tests.near_rows import clusters, graph_of


def test_many_rows_start_where_few_would():
    """One part: the same eigenvectors, up to their signs."""
    vectors = clusters(1200, spread=1.0)
    few, many = (
        find(graph_of(vectors), vectors, 5, np.random.RandomState(0), "cosine")
        for find in (spectral._spectral_of_few, spectral._spectral_of_many)
    )
    cosines = np.sum(few * many, axis=0) / np.linalg.norm(few, axis=0) / np.linalg.norm(many, axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1.0, atol=1e-3)


@pytest.mark.parametrize("n_centers", [3, 25])
def test_parts_that_nothing_connects_start_apart(n_centers, monkeypatch):
    """More than twice as many parts as dimensions, and fewer: each lies around a place of its own."""
    monkeypatch.setattr(spectral, "FEW_ROWS", 100)
    vectors = clusters(1200, spread=0.05, n_centers=n_centers)
    n_parts, part_of = graph_of(vectors).connected_parts()
    assert n_parts >= n_centers
    places = spectral.first_places(graph_of(vectors), vectors, 3, np.random.RandomState(0), metric="cosine")
    centers = np.stack([places[part_of == part].mean(axis=0) for part in range(n_parts)])
    nearest = np.linalg.norm(places[:, None] - centers, axis=2).argmin(axis=1)
    assert np.mean(nearest == part_of) > 0.95
    assert np.all(places.min(axis=0) == 0) and np.all(places.max(axis=0) == 10)


@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_many_rows_are_embedded_alike_each_time(spread, monkeypatch):
    monkeypatch.setattr(spectral, "FEW_ROWS", 100)
    vectors = clusters(1200, spread=spread)
    options = {"n_components": 3, "n_neighbors": 10, "random_state": 0, "n_epochs": 50}
    embedding = embed_umap(vectors, **options)
    assert np.isfinite(embedding).all()
    assert np.array_equal(embedding, embed_umap(vectors, **options))


def test_as_many_components_as_lanczos_vectors(monkeypatch):
    monkeypatch.setattr(spectral, "FEW_ROWS", 100)
    vectors = clusters(600, spread=1.0)
    embedding = embed_umap(vectors, n_components=45, n_neighbors=10, random_state=0, n_epochs=11)
    assert embedding.shape == (600, 45) and np.isfinite(embedding).all()
