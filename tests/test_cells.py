"""Cells: nearly all neighbours are found, and in few products; what k-means cannot part is parted all the same."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from common import cells as cells_module
from common import neighbors as neighbors_module
from common.cells import cell_neighbors, cut_into_cells, label_cells
from common.config import UserError
from common.neighbors import exact_neighbors


def topic_rows(n, *, seed=0, d=24):
    """Unit rows of 40 topics of very different sizes, in an order of their own."""
    rng = np.random.default_rng(seed)
    topic = rng.choice(40, n, p=rng.dirichlet(np.full(40, 0.5)))
    rows = rng.standard_normal((40, d))[topic] + 0.6 * rng.standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def share_found(found, true):
    return np.mean([len(np.intersect1d(*pair)) / len(pair[0]) for pair in zip(found, true, strict=True)])


@pytest.fixture(scope="module")
def rows():
    return topic_rows(6000)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nearly_all_neighbors_are_found_again_and_again(rows, metric):
    true = exact_neighbors(rows, 10, metric=metric)
    found = cell_neighbors(rows, 10, metric=metric, random_state=3)
    assert share_found(found.indices, true.indices) >= 0.97
    assert (found.distances >= true.distances - 1e-6).all() and (np.diff(found.distances) >= 0).all()
    assert (found.indices != np.arange(len(rows))[:, None]).all()
    again = cell_neighbors(rows, 10, metric=metric, random_state=3)
    assert np.array_equal(found.indices, again.indices) and np.array_equal(found.distances, again.distances)


def test_too_few_cells_are_noticed(rows, monkeypatch, caplog):
    """The control: rows sought in their own cell alone are missed, which is said; else more cells are searched."""
    monkeypatch.setattr(cells_module, "_FIRST_CELLS", 1)
    monkeypatch.setattr(cells_module, "_MOST_CELLS", 1)
    true = exact_neighbors(rows, 10)
    with caplog.at_level(logging.INFO):
        few = share_found(cell_neighbors(rows, 10).indices, true.indices)
    assert few < 0.9 and caplog.records[-1].levelname == "WARNING"
    assert float(caplog.messages[-1].split("%")[0].split()[-1]) == pytest.approx(100 * few, abs=4)
    monkeypatch.setattr(cells_module, "_MOST_CELLS", 128)
    with caplog.at_level(logging.INFO):
        assert share_found(cell_neighbors(rows, 10).indices, true.indices) >= 0.97
    assert caplog.records[-1].levelname == "INFO"


def test_few_pairs_are_multiplied_and_four_times_the_rows_take_eight_times_as_many(monkeypatch):
    """Of a given number of cells; comparing all pairs, the control, takes sixteen times as many."""
    monkeypatch.setattr(cells_module, "_MOST_CELLS", 8)
    n_products = []
    offer = neighbors_module.offer_tiles

    def counting(tiles, *arguments, **options):
        n_products[-1] += sum((one.stop - one.start) * (other.stop - other.start) for one, other in tiles)
        offer(tiles, *arguments, **options)

    monkeypatch.setattr(neighbors_module, "offer_tiles", counting)
    monkeypatch.setattr(cells_module, "offer_tiles", counting)
    for find in (cell_neighbors, exact_neighbors):
        for n in (2500, 10_000):
            n_products.append(0)
            find(topic_rows(n), 5)
    few, many, all_of_few, all_of_many = n_products
    assert many / few < 10 < 12 < all_of_many / all_of_few
    assert many < 0.05 * all_of_many


def test_equal_rows_are_parted_into_cells_of_a_bounded_size():
    """Half of all rows are equal: k-means has them in one cell, whose pairs would be a quarter of all."""
    rows = topic_rows(3000)
    rows[::2] = rows[0]
    cells = cut_into_cells(rows)
    sizes = np.diff(cells.bounds)
    assert sorted(cells.order.tolist()) == list(range(3000)) and sizes.min() >= 1
    assert sizes.max() <= 4 * 3000 / round(4 * 3000**0.5) + 1
    found = cell_neighbors(rows, 5)
    assert (found.distances[::2] < 1e-6).all()


@pytest.mark.parametrize(("n", "k"), [(2, 1), (12, 11), (60, 59)])
def test_all_others_are_the_neighbors_of_few_rows(n, k):
    rows = topic_rows(n)
    assert np.array_equal(cell_neighbors(rows, k).indices, exact_neighbors(rows, k).indices)


def test_clusters_are_cells_but_for_large_ones_and_noise(rows):
    labels = np.where(np.arange(6000) < 3000, 0, 1 + np.arange(6000) % 100)
    labels[::7] = -1
    cells = label_cells(rows, labels)
    sizes = np.diff(cells.bounds)
    assert sorted(cells.order.tolist()) == list(range(6000))
    assert sizes.max() < 300  # the half of all rows in cluster 0 is in many cells
    own = [labels[cells.order[start:stop]] for start, stop in zip(cells.bounds[:-1], cells.bounds[1:], strict=True)]
    small = [set(each.tolist()) for each in own if (each > 0).any()]
    assert sum(len(each) == 1 for each in small) == len(small) == 100
    nearest = next(cells.nearest_first(rows[5]))
    assert (rows[nearest] @ rows[5]).mean() == pytest.approx(max(cells.means @ rows[5]), abs=1e-5)


def test_what_cannot_be_is_refused(rows):
    with pytest.raises(UserError, match="6000 nearest neighbours are asked for among 6000 rows"):
        cell_neighbors(rows, 6000)
    bad = rows.copy()
    bad[7, 1] = np.inf
    with pytest.raises(UserError, match="row 7 of the vectors"):
        cell_neighbors(bad, 3)
