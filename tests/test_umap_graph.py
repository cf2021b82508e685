"""The graph of UMAP, made and gone through some rows at a time: as scipy and umap-learn make it whole."""

from __future__ import annotations

import numpy as np
import pytest

import common.umap_graph as graphs
from common.mapped import mapped_matrix
from common.umap_graph import FuzzyGraph, ScaledGraph, fuzzy_graph
from tests.near_rows import clusters, graph_of, neighbors_of


@pytest.fixture(params=["in one go", "in parts"])
def parts(request, monkeypatch):
    """As many rows as the tests have, and far fewer, of which none is a part of the last."""
    if request.param == "in parts":
        monkeypatch.setattr(graphs, "_ROWS", 70)
        monkeypatch.setattr(graphs, "_LEAST_TARGETS", 130)


def test_a_graph_is_that_of_umap_learn(parts):
    from umap.umap_ import fuzzy_simplicial_set

    indices, distances = neighbors_of(clusters(1000, spread=1.0))
    indices[5, 3:], distances[5, 3:] = -1, np.inf  # fewer than were sought
    indices[7, 1:], distances[7, 1:] = -1, np.inf
    theirs = fuzzy_simplicial_set(
        np.zeros((1000, 1)), 10, None, None, knn_indices=indices, knn_dists=distances, return_dists=False
    )[0].tocsr()
    theirs.sort_indices()
    ours = fuzzy_graph(indices, distances)
    assert np.array_equal(ours.indptr, theirs.indptr) and np.array_equal(ours.tails, theirs.indices)
    assert np.array_equal(ours.strengths, theirs.data)
    assert len(ours) == 1000 and not ours.is_alone[5]


def test_a_graph_in_files_is_the_one_in_memory(tmp_path):
    indices, distances = neighbors_of(clusters(40_000, spread=1.0))
    in_file = mapped_matrix(indices.shape, folder=tmp_path, dtype=np.int32)
    in_file[:] = indices
    ours, theirs = fuzzy_graph(in_file, distances), fuzzy_graph(indices, distances)
    for name in ("indptr", "tails", "strengths"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.connected_parts()[0] == theirs.connected_parts()[0]
    least = float(np.median(theirs.strengths))
    strong = ours.drop_weak_edges(least)
    expected = theirs.to_scipy()
    expected.data[expected.data < least] = 0
    expected.eliminate_zeros()
    assert np.array_equal(strong.tails, expected.indices) and np.array_equal(strong.indptr, expected.indptr)


def test_a_row_without_neighbors_has_no_edge():
    indices, distances = neighbors_of(clusters(300, spread=1.0))
    indices[indices == 17], indices[17, 1:], distances[17, 1:] = -1, -1, np.inf
    graph = fuzzy_graph(indices, distances)
    assert np.flatnonzero(graph.is_alone).tolist() == [17]
    assert graph.sum_strengths()[17] == 0
    assert 17 not in graph.tails


def test_strengths_are_united_as_probabilities():
    """Two rows, each the other's only neighbour: 1 + 1 - 1. A third one that only looks at the first: 1 + 0 - 0."""
    indices = np.array([[0, 1], [1, 0], [2, 0]], np.int32)
    distances = np.array([[0, 1], [0, 1], [0, 5]], np.float32)
    graph = fuzzy_graph(indices, distances)
    assert graph.to_scipy().toarray().tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert graph.strongest() == 1.0


def test_weak_edges_go_and_the_least_stays(parts):
    graph = FuzzyGraph(
        np.array([0, 2, 3, 5]), np.array([1, 2, 0, 0, 1], np.int32), np.array([0.5, 0.1, 0.5, 0.1, 0.2], np.float32)
    )
    strong = graph.drop_weak_edges(0.2)
    assert strong.indptr.tolist() == [0, 1, 2, 3]
    assert strong.tails.tolist() == [1, 0, 1]
    assert strong.strengths.tolist() == np.float32([0.5, 0.5, 0.2]).tolist()


def test_parts_are_numbered_by_their_first_rows(parts):
    from scipy.sparse.csgraph import connected_components

    graph = graph_of(clusters(1200, spread=0.05))
    n_parts, part_of = graph.connected_parts()
    expected, labels = connected_components(graph.to_scipy(), directed=False)
    assert n_parts == expected > 20
    assert np.array_equal(part_of, labels)


def test_a_part_is_a_graph_of_its_own_and_multiplies_as_its_table(parts):
    """Its rows stand between those of others."""
    graph = graph_of(clusters(1200, spread=0.05))
    n_parts, part_of = graph.connected_parts()
    members = np.flatnonzero(part_of == n_parts // 2)
    place_of = np.full(1200, -1, np.int32)
    place_of[members] = np.arange(len(members))
    part, expected = graph.take(members, place_of), graph.to_scipy()[members][:, members]
    assert np.array_equal(part.to_scipy().toarray(), expected.toarray())
    sums = np.asarray(expected.astype(np.float64).sum(axis=1)).ravel()
    np.testing.assert_allclose(part.sum_strengths(), sums)
    table = expected.toarray() / np.sqrt(sums) / np.sqrt(sums)[:, None]
    vector = np.random.default_rng(0).standard_normal(len(members))
    np.testing.assert_allclose(ScaledGraph(part).to_table(), table, rtol=1e-6)
    np.testing.assert_allclose(ScaledGraph(part).multiply(vector), table @ vector, atol=1e-6)


def test_a_row_is_not_its_own_neighbor_wherever_it_stands():
    indices, distances = neighbors_of(clusters(300, spread=1.0))
    first, distances[5, 1] = fuzzy_graph(indices, distances), 0
    indices[5, :2] = indices[5, 1::-1]
    assert np.array_equal(fuzzy_graph(indices, distances).tails, first.tails)
