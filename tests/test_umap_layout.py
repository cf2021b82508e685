"""UMAP by its parts: the steps of umap-learn's estimator, and the same start from far fewer Lanczos vectors."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import common.umap_layout as layout
import common.umap_steps as steps
from common.density import embed_umap
from common.mapped import mapped_matrix
from common.neighbors import exact_neighbors
from common.umap_graph import fuzzy_graph
from tests.near_rows import clusters, graph_of, neighbors_of


@pytest.mark.parametrize(("spread", "n_components"), [(0.05, 5), (1.5, 10)])
def test_the_first_steps_are_those_of_umap_learn(spread, n_components):
    """Before rounding is amplified: 0.001 where rows have moved by 4; a hundredth more of min_dist is seen."""
    import umap

    vectors = clusters(500, spread=spread)
    found = exact_neighbors(vectors, 9)
    knn = np.hstack([np.arange(500)[:, None], found.indices]), np.hstack([np.zeros((500, 1)), found.distances])
    options = {"n_components": n_components, "n_neighbors": 10, "metric": "cosine", "random_state": 3, "n_epochs": 3}
    theirs = umap.UMAP(**options, n_jobs=1, precomputed_knn=(knn[0], knn[1].astype(np.float32))).fit_transform(vectors)

    def off(**others) -> float:
        return float(np.abs(embed_umap(vectors, **{**options, **others}) - theirs).max())

    assert off() < 0.001
    assert off(min_dist=0.11) > 0.01
    assert off(n_epochs=2) > 0.5 and off(random_state=4) > 0.5


@pytest.mark.parametrize("min_dist", [0.0, 0.1, 0.99])
def test_forces_are_right_to_the_last_places_of_float32(min_dist):
    from umap.umap_ import find_ab_params

    a, b = find_ab_params(1.0, min_dist)
    squares = np.geomspace(1e-20, 1e20, 5000).astype(np.float32)
    exact = squares.astype(np.float64)
    pull = 2 * a * b * exact ** (b - 1) / (1 + a * exact**b)
    push = 2 * b / ((0.001 + exact) * (1 + a * exact**b))
    for table, force in zip(steps.force_tables(a, b), (pull, push), strict=True):
        looked_up = np.array([steps.look_up(table, square) for square in squares])
        np.testing.assert_allclose(looked_up, force, rtol=3e-7, atol=1e-37)
        # Two rows in one place, and what is not a number, are no place outside the table.
        assert np.isfinite([steps.look_up(table, np.float32(value)) for value in (0, np.inf, np.nan, -np.nan)]).all()


def test_draws_are_those_of_umap_learn():
    from umap.utils import tau_rand_int

    ours = np.array([-(2**62) + 12345, 2**31 - 2, 987654321], np.int64)
    theirs = ours.copy()
    assert [int(steps.draw(ours)) for _ in range(300)] == [int(tau_rand_int(theirs)) for _ in range(300)]
    assert np.array_equal(ours, theirs)


def plain_schedule(samples: np.float32, n_epochs: int) -> dict[int, int]:
    """The epochs in which an edge is pulled, and its pushes then: two sums that grow, as umap-learn keeps them."""
    period = n_epochs / float(samples)
    gap = period * 0.2
    next_pull, next_push, found = period, period / 5, {}
    for epoch in range(n_epochs):
        if next_pull <= epoch:
            found[epoch] = int((epoch - next_push) / gap)
            next_push = float(Fraction(next_push) + found[epoch] * Fraction(gap))  # rounded once
            next_pull += period
    return found


@pytest.mark.parametrize("n_epochs", [11, 200, 500])
def test_edges_are_due_when_sums_would_say_so(n_epochs):
    """Also where sums meet whole epochs, so that rounding decides: thirds, fifths, and what is next to them."""
    rng = np.random.default_rng(0)
    shares = np.concatenate([rng.random(60), [1, 1 / 2, 1 / 3, 2 / 3, 1 / 5, 3 / 4, 0.7046875, 1e-3, 1e-30]])
    shares = np.concatenate([shares, rng.integers(1, n_epochs, 60) / n_epochs]).astype(np.float32)
    shares = np.concatenate([shares, np.nextafter(shares, 0), np.nextafter(shares, 1)])
    samples = steps.count_samples(shares.copy(), n_epochs)
    of_strongest = steps.pushes_of_strongest(n_epochs)
    n_pulls = 0
    for some, due in zip(samples, steps.first_due(samples, n_epochs).tolist(), strict=True):
        found = {}
        while due < n_epochs:
            found[due], due = steps.go_on(some, due, n_epochs, of_strongest)
        assert found == plain_schedule(some, n_epochs)
        n_pulls += len(found)
    assert n_pulls == pytest.approx(samples.sum(), rel=0.2)


def test_a_seed_gives_the_same_bits_whatever_the_threads():
    vectors = clusters(400, spread=1.0)
    options = {"n_components": 9, "min_dist": 0.1, "metric": "cosine", "n_epochs": 30, "random_state": 0}
    found = []
    for n_threads in (1, None):
        with layout.numba_threads(n_threads):
            found.append(layout.lay_out(graph_of(vectors), vectors, **options))
    assert np.array_equal(*found)
    others = layout.lay_out(graph_of(vectors), vectors, **options | {"random_state": 1})
    assert not np.array_equal(found[0], others)


def test_rows_that_nothing_is_near_have_no_place():
    vectors = clusters(300, spread=1.0)
    indices, distances = neighbors_of(vectors)
    indices[indices == 17], indices[17, 1:], distances[17, 1:] = -1, -1, np.inf
    graph = fuzzy_graph(indices, distances)
    embedding = layout.lay_out(
        graph, vectors, n_components=2, min_dist=0.1, metric="cosine", random_state=0, n_epochs=20
    )
    assert np.isnan(embedding[17]).all() and np.isfinite(np.delete(embedding, 17, axis=0)).all()


def test_rows_in_a_file_are_embedded_as_rows_in_memory(tmp_path):
    """Edges, samples and schedule lie in files then, and their memory is given back part by part."""
    rows = clusters(20_000, spread=1.5)
    in_file = mapped_matrix(rows.shape, folder=tmp_path)
    in_file[:] = rows
    options = {"n_components": 2, "n_neighbors": 15, "random_state": 0, "n_epochs": 3}
    start = np.random.default_rng(1).random((len(rows), 2)).astype(np.float32)
    found = [embed_umap(of, **options, start=start) for of in (rows, in_file)]
    assert np.array_equal(*found)
