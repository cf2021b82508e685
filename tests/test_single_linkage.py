"""The tree of HDBSCAN: as short as any, the package's heights, and the same for any number of threads."""

from __future__ import annotations

import tracemalloc

import hdbscan
import numpy as np
import pytest
from scipy.cluster.hierarchy import cophenet, is_valid_linkage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.spatial.distance import cdist

import common.kd_tree
import common.single_linkage
import common.threads
from common.config import UserError
from common.kd_tree import build_kd_tree, kth_squares
from common.single_linkage import single_linkage, spanning_tree


def blobs(n, d, *, seed=0, dtype=np.float32):
    """Rows about ten centres, some so wide that they run into others."""
    rng = np.random.default_rng(seed)
    of = rng.integers(10, size=n)
    rows = rng.standard_normal((10, d))[of] * 5 + rng.standard_normal((n, d)) * np.geomspace(0.1, 3, 10)[of, None]
    return rows.astype(dtype)


def grid():
    """Most rows several times, and distances that many pairs share."""
    return np.round(np.random.default_rng(8).standard_normal((300, 2)), 1)


def spiral():
    """Rows ever nearer to one another."""
    return (np.geomspace(1e-6, 1e3, 300)[:, None] * np.array([[1.0, -1.0]])).astype(np.float32)


SETS = {
    "blobs": blobs(400, 6), "float64": blobs(300, 3, dtype=np.float64), "many dimensions": blobs(300, 70),
    "grid": grid(), "spiral": spiral(), "one dimension": blobs(200, 1), "a single leaf": blobs(20, 2),
    "two rows": blobs(2, 4), "equal rows": np.ones((300, 3), np.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("min_samples", [1, 5, 1000])
def test_rows_join_where_those_of_the_package_do(name, min_samples):
    """At which height two rows come together is one number, however equal distances are told apart."""
    rows = SETS[name]
    merges = single_linkage(rows, min_samples=min_samples)
    theirs = hdbscan.hdbscan(
        rows.astype(np.float64), min_cluster_size=len(rows), min_samples=min_samples, approx_min_span_tree=False
    )[4]
    assert is_valid_linkage(merges)
    assert cophenet(merges) == pytest.approx(cophenet(theirs), rel=1e-12)


def test_merges_by_hand():
    rows = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert single_linkage(rows, min_samples=1).tolist() == [[0, 1, 1, 2], [2, 4, 2, 3], [3, 5, 4, 4]]
    # The second neighbours are 3, 2, 3 and 6 away: the first three rows come together at 3, the last at 6.
    merges = single_linkage(rows, min_samples=2)
    assert merges[:, 2].tolist() == [3, 3, 6]
    assert merges[-1].tolist() == [3, 5, 6, 4]


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_tree_is_the_shortest_over_many_blocks_whatever_the_threads(monkeypatch, n_threads):
    monkeypatch.setattr(common.single_linkage, "_BLOCK", 16)
    monkeypatch.setattr(common.single_linkage, "_TILE", 4)
    monkeypatch.setattr(common.kd_tree, "_TILE", 4)
    monkeypatch.setattr(common.threads, "available_threads", lambda: n_threads)
    rows = blobs(700, 3, seed=4)
    distances = cdist(rows.astype(np.float64), rows)
    cores = np.sort(distances, axis=1)[:, 7]
    shortest = minimum_spanning_tree(np.maximum(distances, np.maximum(cores[:, None], cores)))
    merges = single_linkage(rows, min_samples=7)
    assert merges[:, 2] == pytest.approx(np.sort(shortest.data), rel=1e-12)


def test_no_bit_depends_on_the_threads(monkeypatch):
    rows, found = blobs(20_000, 3, seed=4), []
    for n_threads in (1, 2, 5):
        monkeypatch.setattr(common.threads, "available_threads", lambda n=n_threads: n)
        found.append(single_linkage(rows, min_samples=7))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_edges_are_as_long_as_they_say_and_connect_all_rows():
    rows = blobs(2000, 4)
    edges = spanning_tree(rows, min_samples=1)
    one, other = rows.astype(np.float64)[edges.ends.T]
    squares = ((one - other) ** 2).sum(axis=1)
    nearest = np.sort(cdist(rows.astype(np.float64), rows), axis=1)[:, 1] ** 2
    longest = np.maximum(squares, nearest[edges.ends].max(axis=1))
    assert edges.squares == pytest.approx(longest, rel=1e-9, abs=1e-12)
    graph = csr_array((np.ones(1999), edges.ends.T), shape=(2000, 2000))
    assert connected_components(graph, directed=False)[0] == 1


def test_many_equal_rows_join_at_zero():
    rows = np.repeat(blobs(12, 3), 1000, axis=0)
    heights = single_linkage(rows, min_samples=10)[:, 2]
    assert (heights[: 12 * 999] == 0).all() and (heights[12 * 999 :] > 0).all()


def test_memory_a_row_is_bounded():
    """What numpy reserves, below 160 bytes a row of ten dimensions; hdbscan's own tree takes some 600."""
    rows = blobs(30_000, 10)
    single_linkage(rows[:100], min_samples=10)
    tracemalloc.start()
    try:
        single_linkage(rows, min_samples=10)
        assert tracemalloc.get_traced_memory()[1] < 160 * len(rows)
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("error")
def test_distances_beyond_float64_are_told_and_those_beyond_float32_are_none():
    with pytest.raises(UserError, match="scale the vectors down"):
        single_linkage(np.array([[0.0], [1e200], [2e200]]), min_samples=1)
    # Added up in another order these squares are infinite: the search would find no edge, and never end.
    largest = np.full((2, 9), np.sqrt(np.finfo(np.float64).max / 9))
    largest[0] = 0
    with pytest.raises(UserError, match="scale the vectors down"):
        single_linkage(largest, min_samples=1)
    rows = (np.random.default_rng(0).standard_normal((100, 3)) * 1e38).clip(-3e38, 3e38).astype(np.float32)
    huge, plain = (single_linkage(of, min_samples=2) for of in (rows, rows.astype(np.float64) / 2**100))
    assert huge[:, 2] == pytest.approx(plain[:, 2] * 2.0**100, rel=1e-12)


def test_too_few_rows_and_samples_are_refused():
    for n_rows, min_samples in ((1, 1), (0, 1), (5, 0)):
        with pytest.raises(ValueError, match="two rows and 1 are the least"):
            single_linkage(np.zeros((n_rows, 2)), min_samples=min_samples)


# --- the k-d tree ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_every_point_lies_in_one_leaf_and_in_the_boxes_above_it(name):
    rows = SETS[name]
    tree = build_kd_tree(rows)
    assert tree.points.dtype == rows.dtype
    assert np.array_equal(tree.points, rows[tree.order]) and np.array_equal(np.sort(tree.order), np.arange(len(rows)))
    for (start, end), child, low, high in zip(tree.spans, tree.children, tree.lows, tree.highs, strict=True):
        inside = tree.points[start:end]
        assert np.array_equal(low, inside.min(axis=0)) and np.array_equal(high, inside.max(axis=0))
        if child >= 0:
            assert tree.spans[[child, child + 1]].tolist() == [
                [start, tree.spans[child, 1]],
                [tree.spans[child, 1], end],
            ]
    leaves = tree.spans[tree.children < 0]
    sizes = np.diff(leaves, axis=1)
    assert sizes.sum() == len(rows) and sizes.min() >= 1 and sizes.max() <= 24


def test_boxes_end_where_clusters_do():
    """Two clusters of unequal size: a cut in the middle would leave a box that spans the gap."""
    rows = np.concatenate([np.linspace(0, 1, 60), np.linspace(100, 101, 140)])[:, None]
    tree = build_kd_tree(rows)
    assert tree.spans[1].tolist() == [0, 60]
    assert tree.highs[1].tolist() == [1] and tree.lows[2].tolist() == [100]
    assert build_kd_tree(np.linspace(0, 1, 100)[:, None]).spans[1].tolist() == [0, 50]


@pytest.mark.parametrize("name", ["blobs", "float64", "many dimensions", "grid", "spiral", "equal rows"])
@pytest.mark.parametrize("k", [1, 2, 50, 199])
def test_kth_squares_equal_those_of_all_pairs(name, k):
    rows = SETS[name][:300]
    tree = build_kd_tree(rows)
    points = tree.points.astype(np.float64)
    squares = np.sort(((points[:, None] - points) ** 2).sum(axis=2), axis=1)
    assert kth_squares(tree, k) == pytest.approx(squares[:, k], rel=1e-12)
