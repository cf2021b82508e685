"""Neighbours, UMAP, HDBSCAN and DBSCAN: exact, staged equals direct, sound on degenerate data."""

from __future__ import annotations

import logging
import sys
from functools import partial
from itertools import product
from types import ModuleType

import hdbscan
import numpy as np
import pytest
from hdbscan.hdbscan_ import _tree_to_labels
from scipy.cluster.hierarchy import cophenet
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from common import density, mapped
from common.backend import Backend
from common.best_scores import empty_best, offer_tile
from common.cells import cell_neighbors
from common.condensed_tree import condense
from common.config import UserError
from common.density import (
    LinkageTree,
    SpectralStart,
    cluster_dbscan,
    cluster_hdbscan,
    cut_tree,
    embed_umap,
    single_linkage_tree,
)
from common.neighbors import (
    Neighbors,
    _candidates_by_torch,
    _candidates_on_cpu,
    _find_bounds,
    exact_neighbors,
    score_factors,
)
from common.single_linkage import single_linkage

CUML = Backend("cuml", "cuda", "a stand-in")


@pytest.fixture(scope="module")
def blobs():
    """700 rows of 6 dimensions: five clusters of unequal density, and scattered rows."""
    rng = np.random.default_rng(0)
    centers, spreads = rng.standard_normal((5, 6)) * 4, (0.3, 0.5, 0.7, 1, 1)
    parts = [center + rng.standard_normal((120, 6)) * scale for center, scale in zip(centers, spreads, strict=True)]
    return np.vstack([*parts, rng.uniform(-10, 10, (100, 6))]).astype(np.float32)


@pytest.fixture(scope="module")
def wide():
    """200 rows of 70 dimensions: two clusters."""
    rows = np.random.default_rng(3).standard_normal((200, 70)).astype(np.float32)
    rows[:100] += 3
    return rows


@pytest.mark.parametrize("method", [_candidates_on_cpu, partial(_candidates_by_torch, device="cpu")])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("n", "k"), [(1500, 7), (1500, 40), (30, 29), (2, 1)])
def test_neighbors_equal_scikit_learn(metric, n, k, method, monkeypatch):
    monkeypatch.setattr("common.neighbors._candidates_on_cpu", method)
    vectors = np.random.default_rng(n).standard_normal((n, 24)).astype(np.float32) + 1
    result = exact_neighbors(vectors, k, metric=metric, chunk=400)
    _check_against_scikit_learn(result, vectors, k, metric)


def test_neighbors_on_a_gpu_without_torch_are_found_by_cupy(blobs, monkeypatch):
    """As in an environment of RAPIDS: torch is not there, CuPy is; NumPy stands in for its functions."""
    stand_in = ModuleType("cupy")
    for name in ("asarray", "arange", "argpartition"):
        setattr(stand_in, name, getattr(np, name))
    stand_in.asnumpy = np.asarray
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = exact_neighbors(blobs, 5, device="cuda")
    assert np.array_equal(found.indices, exact_neighbors(blobs, 5).indices)


def test_neighbors_of_sorted_clusters_equal_scikit_learn():
    """Nearer rows come in later blocks: whole clusters, and a drift towards the last row."""
    rng = np.random.default_rng(5)
    clusters = np.repeat(rng.standard_normal((15, 12)) * 9, 80, axis=0) + rng.standard_normal((1200, 12))
    drift = rng.standard_normal((1200, 12)) * np.geomspace(9, 0.1, 1200)[:, None]
    for vectors in (clusters.astype(np.float32), drift.astype(np.float32)):
        result = exact_neighbors(vectors, 6, metric="euclidean", chunk=64)
        _check_against_scikit_learn(result, vectors, 6, "euclidean")


def _check_against_scikit_learn(result, vectors, k, metric):
    model = NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(vectors.astype(np.float64))
    distances, indices = model.kneighbors()
    assert (result.indices.dtype, result.distances.dtype) == (np.int32, np.float32)
    assert result.distances == pytest.approx(distances, abs=1e-5)
    assert np.mean(result.indices == indices) > 0.999  # the rest are ties at the rounding of float32


def test_neighbors_by_hand():
    vectors = np.array([[0.0], [1.0], [3.0], [7.0]], np.float32)
    result = exact_neighbors(vectors, 2, metric="euclidean")
    assert result.indices.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert result.distances.tolist() == [[1, 3], [1, 2], [2, 3], [4, 6]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_duplicates_are_at_zero_and_never_the_row_itself(metric):
    rng = np.random.default_rng(2)
    distinct = rng.standard_normal((300, 16)).astype(np.float32)
    vectors = np.repeat(distinct, 5, axis=0)[rng.permutation(1500)]
    result = exact_neighbors(vectors, 4, metric=metric, chunk=128)
    assert (result.distances == 0).all()
    assert (result.indices != np.arange(1500)[:, None]).all()
    assert (np.diff(result.indices, axis=1) > 0).all()  # equal distances go by index
    assert (vectors[result.indices] == vectors[:, None]).all()
    again = exact_neighbors(vectors, 4, metric=metric, chunk=333)
    assert np.array_equal(again.indices, result.indices)


def test_zero_rows_are_at_cosine_distance_one():
    vectors = np.array([[0, 0], [0, 0], [1, 0], [1, 1]], np.float32)
    result = exact_neighbors(vectors, 3)
    assert result.distances[0].tolist() == [1, 1, 1]
    assert result.indices[2].tolist() == [3, 0, 1]


@pytest.mark.parametrize(("spread", "is_used"), [(0.3, True), (30.0, False)])
def test_bounds_in_few_directions_leave_the_neighbors_as_they_are(spread, is_used):
    """Clusters are bounded well in 64 directions; without any structure the bounds are not used."""
    rng = np.random.default_rng(6)
    means = rng.standard_normal((30, 130)) * np.arange(1, 131) ** -0.5
    vectors = means[rng.integers(30, size=2200)] + rng.standard_normal((2200, 130)) * np.arange(1, 131) ** -0.5 * spread
    vectors = vectors.astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7] = 0  # has no direction, and a cosine of 0 to all
    bounds = _find_bounds(vectors, 9)
    assert (bounds is not None) == is_used
    if bounds is not None:
        turned = bounds.turn(vectors)
        assert (turned @ turned.T >= vectors @ vectors.T).all()
    _check_against_scikit_learn(exact_neighbors(vectors, 5, chunk=700), vectors, 5, "cosine")


@pytest.mark.parametrize("reverse", [False, True])
def test_best_scores_do_not_depend_on_the_order_of_tiles(reverse):
    rng = np.random.default_rng(4)
    scores = rng.integers(0, 6, (90, 90)).astype(np.float32)  # many are equal
    scores = scores + scores.T
    ids, best = empty_best(90, 5, beside=scores)
    tiles = [(row, column) for row in range(0, 90, 40) for column in range(row, 90, 40)]
    for row, column in reversed(tiles) if reverse else tiles:
        tile = np.ascontiguousarray(scores[row : row + 40, column : column + 40])
        offer_tile(tile, row, column, ids, best, np.empty((0, 0), np.float32))
    np.fill_diagonal(scores, -1)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :5]  # equal scores by id
    assert np.array_equal(ids, expected)
    assert np.array_equal(best, np.take_along_axis(scores, expected, axis=1))


def test_neighbors_refuse_what_cannot_be(blobs):
    for k in (0, 700):
        with pytest.raises(UserError, match=f"{k} nearest neighbours are asked for among 700 rows"):
            exact_neighbors(blobs, k)
    bad = blobs.copy()
    bad[5, 2] = np.nan
    with pytest.raises(UserError, match="row 5 of the vectors"):
        exact_neighbors(bad, 3)
    with pytest.raises(UserError, match="row 0 of the vectors"):
        exact_neighbors(blobs * 1e20, 3, metric="euclidean")
    with pytest.raises(UserError, match="use cosine or euclidean"):
        exact_neighbors(blobs, 3, metric="manhattan")


@pytest.mark.parametrize("min_samples", [1, 5, 15])
def test_cuts_equal_those_of_the_package_where_heights_differ(blobs, min_samples):
    merges = single_linkage_tree(blobs, min_samples=min_samples).merges
    merges[:, 2] += 1e-7 * np.arange(len(merges))
    tree, n_clusters = LinkageTree(merges, len(blobs)), set()
    for size, epsilon, method in product((40, 5, 20, 100, 300), (0.0, 0.5, 2.0), ("eom", "leaf")):
        ours = cut_tree(tree, min_cluster_size=size, cluster_selection_epsilon=epsilon, cluster_selection_method=method)
        labels, probabilities, *_ = _tree_to_labels(None, merges, size, method, cluster_selection_epsilon=epsilon)
        assert np.array_equal(ours.labels, labels), (size, epsilon, method)
        assert np.array_equal(ours.probabilities, probabilities.astype(np.float32)), (size, epsilon, method)
        n_clusters.add(int(labels.max()) + 1)
    assert len(n_clusters) > 2  # the settings do differ


@pytest.mark.parametrize("min_samples", [1, 4])
@pytest.mark.parametrize("name", ["blobs", "grid"])
def test_clusters_do_not_depend_on_the_order_of_the_rows(blobs, name, min_samples):
    """Also on a grid with most rows twice, where many distances are equal, and where those of the package do depend."""
    rng = np.random.default_rng(8)
    rows = blobs if name == "blobs" else np.round(rng.standard_normal((400, 2)), 1)
    order = rng.permutation(len(rows))
    trees = [single_linkage_tree(of, min_samples=min_samples) for of in (rows[order], rows)]
    for size, epsilon, method in product((2, 3, 10, 40, 399), (0.0, 0.15), ("eom", "leaf")):
        cut = {"cluster_selection_epsilon": epsilon, "cluster_selection_method": method}
        mixed, plain = (cut_tree(tree, min_cluster_size=size, **cut) for tree in trees)
        assert _are_same_clusters(mixed.labels, plain.labels[order]), (size, epsilon, method)
        assert mixed.probabilities == pytest.approx(plain.probabilities[order], abs=1e-6)


def test_what_comes_together_at_one_height_comes_together_at_once():
    """Rows 0-2 and 3-5 lie a step of 1 apart, 4 from row 6 between them; the last two are far.

    Row 6 joins both at height 4, so that it falls out when they part, and no pair of clusters of 3 and 4 is seen.
    """
    rows = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0], [6.0], [40.0], [60.0]])
    condensed = condense(single_linkage_tree(rows, min_samples=1).merges, min_cluster_size=3)
    assert condensed.parents.tolist() == [-1, 0, 0] and condensed.sizes.tolist() == [9, 3, 3]
    assert condensed.births.tolist() == [0, 1 / 4, 1 / 4] and condensed.deaths.tolist() == [1 / 4, 1, 1]
    assert condensed.point_lambdas.tolist() == [1, 1, 1, 1, 1, 1, 1 / 4, 1 / 28, 1 / 28]
    assert condensed.point_clusters[6:].tolist() == [0, 0, 0]
    assert condensed.stabilities.tolist() == pytest.approx([2 / 28 + 7 / 4, 9 / 4, 9 / 4])


@pytest.mark.parametrize("min_samples", [1, 4])
@pytest.mark.parametrize("min_cluster_size", [2, 5, 12])
def test_condensed_trees_follow_the_definition(min_samples, min_cluster_size):
    """Edges of the longest length are removed at once, over and over, on a grid where many are equally long."""
    rng = np.random.default_rng(5)
    rows = np.round(rng.standard_normal((150, 2)) * 6 + rng.integers(3, size=(150, 1)) * [30, 20])
    distances = cdist(rows, rows)
    cores = np.sort(distances, axis=1)[:, min_samples]
    lengths = np.maximum(distances, np.maximum(cores[:, None], cores))
    np.fill_diagonal(lengths, 0)
    condensed = condense(single_linkage_tree(rows, min_samples=min_samples).merges, min_cluster_size=min_cluster_size)
    ours = {
        (np.flatnonzero(condensed.point_clusters == cluster).tobytes(), round(float(stability), 6))
        for cluster, stability in enumerate(condensed.stabilities)
        if np.isfinite(stability)
    }
    expected, point_lambdas = set(), np.zeros(len(rows))
    clusters = [(np.arange(len(rows)), 0.0)]  # points and the density that they split off at
    for points, birth in clusters:
        stability, fallen = 0.0, []
        while len(points):
            longest = _longest_needed(lengths[np.ix_(points, points)])
            density = 1 / longest if longest else np.inf
            is_edge = lengths[np.ix_(points, points)] < longest
            _, parts = connected_components(csr_array(is_edge), directed=False)
            large = [points[parts == part] for part in np.unique(parts) if (parts == part).sum() >= min_cluster_size]
            left = points if not large else points[~np.isin(points, np.concatenate(large))]
            point_lambdas[left], stability = density, stability + len(left) * (density - birth)
            fallen.append(left)
            if len(large) > 1:
                stability += sum(map(len, large)) * (density - birth)
                clusters += [(part, density) for part in large]
            points = large[0] if len(large) == 1 else points[:0]
        if np.isfinite(stability):
            expected.add((np.sort(np.concatenate(fallen)).tobytes(), round(stability, 6)))
    assert len(clusters) == len(condensed.parents) and len(clusters) > 3
    assert condensed.point_lambdas == pytest.approx(point_lambdas)
    assert ours == expected


def _longest_needed(lengths):
    """The longest edge without which not all points [n, n] would be connected; 0 where all are at one place."""
    for length in np.unique(lengths):
        if connected_components(csr_array(lengths <= length), directed=False)[0] == 1:
            return length
    raise AssertionError


def _are_same_clusters(one, other):
    """Whether two labellings differ in the numbers of the clusters at most."""
    n_pairs = np.unique(np.stack([one, other]), axis=1).shape[1]
    return np.array_equal(one == -1, other == -1) and n_pairs == len(np.unique(one)) == len(np.unique(other))


@pytest.mark.parametrize("settings", [{"min_samples": 15}, {"min_samples": 1, "cluster_selection_method": "leaf"}])
def test_hdbscan_of_the_pipeline_equals_a_direct_fit_also_in_many_dimensions(blobs, wide, settings):
    for vectors in (blobs, wide):
        direct = hdbscan.HDBSCAN(min_cluster_size=15, approx_min_span_tree=False, **settings).fit(vectors)
        ours = cluster_hdbscan(vectors, min_cluster_size=15, **settings)
        assert _are_same_clusters(ours.labels, direct.labels_)
        assert ours.probabilities == pytest.approx(direct.probabilities_, abs=1e-6)
        assert (ours.labels.dtype, ours.probabilities.dtype) == (np.int32, np.float32)
        assert ours.labels.max() >= 1
        assert (ours.probabilities[ours.labels == -1] == 0).all()


@pytest.mark.parametrize("min_samples", [3, 4, 5, 8, 12])
@pytest.mark.parametrize("method", ["eom", "leaf"])
def test_where_edges_are_equally_long_a_direct_fit_differs_in_a_few_rows_on_borders(blobs, min_samples, method):
    settings = {"min_cluster_size": 15, "min_samples": min_samples, "cluster_selection_method": method}
    direct = hdbscan.HDBSCAN(approx_min_span_tree=False, **settings).fit(blobs)
    ours = cluster_hdbscan(blobs, **settings)
    assert np.sum((ours.labels == -1) != (direct.labels_ == -1)) <= 3
    inside = (ours.labels >= 0) & (direct.labels_ >= 0)
    assert _are_same_clusters(ours.labels[inside], direct.labels_[inside])


@pytest.mark.parametrize("min_samples", [1, 8])
def test_trees_of_many_dimensions_are_the_package_s_and_equal_ours(wide, min_samples):
    ours = single_linkage(wide, min_samples=min_samples)
    theirs = single_linkage_tree(wide, min_samples=min_samples).merges
    assert cophenet(theirs) == pytest.approx(cophenet(ours), rel=1e-12)


@pytest.mark.parametrize("method", ["eom", "leaf"])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_hdbscan_of_duplicates(method, epsilon):
    points = np.random.default_rng(4).standard_normal((4, 3)).astype(np.float32) * 9
    settings = {"cluster_selection_method": method, "cluster_selection_epsilon": epsilon}
    labels, probabilities = cluster_hdbscan(np.repeat(points, 50, axis=0), min_cluster_size=10, **settings)
    assert [len(set(labels[start : start + 50])) for start in range(0, 200, 50)] == [1, 1, 1, 1]
    assert sorted(set(labels)) == [0, 1, 2, 3]
    assert np.isfinite(probabilities).all()
    same = cluster_hdbscan(np.ones((60, 3), np.float32), min_cluster_size=10, **settings)
    assert (same.labels == -1).all()


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_hdbscan_of_too_few_rows_is_noise(n):
    result = cluster_hdbscan(np.eye(9, dtype=np.float32)[:n], min_cluster_size=10, min_samples=20)
    assert result.labels.tolist() == [-1] * n
    assert result.probabilities.tolist() == [0] * n
    tree = single_linkage_tree(np.eye(9, dtype=np.float32)[:n], min_samples=20)
    assert cut_tree(tree, min_cluster_size=10).labels.tolist() == [-1] * n


def test_hdbscan_refuses_what_cannot_be(blobs):
    with pytest.raises(UserError, match="min_cluster_size is 1; it must be at least 2"):
        cluster_hdbscan(blobs, min_cluster_size=1)
    with pytest.raises(UserError, match="min_samples is 0"):
        cluster_hdbscan(blobs, min_samples=0)
    with pytest.raises(UserError, match="must not be negative"):
        cluster_hdbscan(blobs, cluster_selection_epsilon=-1.0)
    with pytest.raises(UserError, match="use eom or leaf"):
        cluster_hdbscan(blobs, cluster_selection_method="flat")
    bad = blobs.copy()
    bad[[3, 9]] = np.inf
    with pytest.raises(UserError, match="2 of 700 rows have NaN or infinite values, row 3 first"):
        cluster_hdbscan(bad)


def test_dbscan_by_hand():
    # On a line: a pair with a third in reach, a far pair, a lonely row; min_samples counts the row itself.
    vectors = np.array([[0], [1], [2], [10], [11], [50]], np.float32)
    assert cluster_dbscan(vectors, eps=1.0, min_samples=2).tolist() == [0, 0, 0, 1, 1, -1]
    assert cluster_dbscan(vectors, eps=1.0, min_samples=3).tolist() == [0, 0, 0, -1, -1, -1]
    directions = np.array([[1, 0], [2, 0.01], [0, 5], [0, 1]], np.float32)
    assert cluster_dbscan(directions, eps=0.01, min_samples=2, metric="cosine").tolist() == [0, 0, 1, 1]
    assert cluster_dbscan(vectors[:0], eps=1.0, min_samples=2).tolist() == []
    with pytest.raises(UserError, match="eps is 0"):
        cluster_dbscan(vectors, eps=0, min_samples=2)


@pytest.mark.parametrize("are_apart", [False, True])
def test_a_shared_start_of_umap_changes_no_bit(blobs, are_apart):
    """Of a connected graph and of one in pieces, whose starts are found in other ways and draw other random numbers."""
    vectors = blobs + 200 * (np.arange(700)[:, None] % 3) if are_apart else blobs
    settings = {"n_components": 2, "n_neighbors": 8, "metric": "euclidean", "n_epochs": 20, "random_state": 7}
    start, found = SpectralStart(), []
    for min_dist in (0.0, 0.2):
        found.append(embed_umap(vectors, min_dist=min_dist, **settings, start=start))
        assert np.array_equal(found[-1], embed_umap(vectors, min_dist=min_dist, **settings))
    assert not np.array_equal(*found)


def test_umap_separates_blobs_and_repeats(blobs):
    settings = {"n_components": 2, "n_neighbors": 10, "metric": "euclidean", "n_epochs": 100, "random_state": 7}
    first = embed_umap(blobs, **settings)
    assert (first.shape, first.dtype) == ((700, 2), np.float32)
    assert np.array_equal(first, embed_umap(blobs, **settings))
    # A wider graph that is there anyway gives the same embedding.
    knn = exact_neighbors(blobs, 25, metric="euclidean")
    assert np.array_equal(first, embed_umap(blobs, knn=knn, **settings))
    near = exact_neighbors(first, 10, metric="euclidean").indices
    blob = np.repeat(np.arange(5), 120)
    assert np.mean(blob[np.minimum(near[:600], 599)] == blob[:, None]) > 0.9


def test_umap_graph_equals_the_library_s_own(blobs):
    import umap

    # Below 4,096 rows umap-learn computes all distances: exact neighbours too, up to the rounding of float32.
    options = {"n_neighbors": 10, "n_components": 2, "metric": "cosine", "n_epochs": 1, "random_state": 0}
    knn = exact_neighbors(blobs, 9)
    indices = np.hstack([np.arange(700)[:, None], knn.indices])
    distances = np.hstack([np.zeros((700, 1), np.float32), knn.distances])
    theirs = umap.UMAP(**options, n_jobs=1).fit(blobs).graph_
    with pytest.warns(UserWarning, match="transform"):
        ours = umap.UMAP(**options, n_jobs=1, precomputed_knn=(indices, distances)).fit(blobs).graph_
    assert abs(theirs - ours).max() < 1e-3


@pytest.mark.parametrize(("n", "n_components"), [(3, 2), (4, 10), (11, 10), (12, 10)])
def test_umap_of_few_rows(n, n_components, blobs):
    embedding = embed_umap(blobs[:n], n_components=n_components, n_neighbors=2)
    assert embedding.shape == (n, n_components)
    assert np.isfinite(embedding).all()


def test_umap_of_duplicates_and_without_seed(caplog):
    with caplog.at_level(logging.INFO, logger="common.density"):
        embedding = embed_umap(np.ones((40, 5), np.float32), n_components=3, n_neighbors=5, random_state=None)
    assert np.isfinite(embedding).all()
    assert "differs from run to run" in caplog.text


def test_umap_refuses_what_cannot_be(blobs):
    with pytest.raises(UserError, match="n_neighbors is 15 but there are 15 rows; use 2 to 14"):
        embed_umap(blobs[:15], n_neighbors=15)
    with pytest.raises(UserError, match="three rows are the least"):
        embed_umap(blobs[:1], n_neighbors=15)
    knn = exact_neighbors(blobs, 5)
    with pytest.raises(UserError, match=r"graph is 700 x 5, but .* need 700 x 14"):
        embed_umap(blobs, knn=knn, n_neighbors=15)
    bad = blobs.copy()
    bad[1] = np.nan
    with pytest.raises(UserError, match="row 1 first"):
        embed_umap(bad)


class _CumlUMAP:
    """The keyword-only signature of cuML 26.10's UMAP, as far as it concerns us."""

    def __init__(
        self, *, n_neighbors=15, n_components=2, metric="euclidean", n_epochs=None, min_dist=0.1, init="spectral",
        random_state=None, precomputed_knn=None, build_algo="auto", verbose=False, output_type=None,
    ):  # fmt: skip
        self.given = dict(locals())

    def fit_transform(self, vectors):
        assert vectors.dtype == np.float32 and vectors.flags.c_contiguous
        assert self.given["output_type"] == "numpy"
        _CumlUMAP.last = self.given
        return np.zeros((len(vectors), self.given["n_components"]), np.float32, order="F")


class _CumlHDBSCAN:
    """The keyword-only signature of cuML 26.10's HDBSCAN and the limits it checks."""

    def __init__(
        self, *, min_cluster_size=5, min_samples=None, cluster_selection_epsilon=0.0, max_cluster_size=0,
        metric="euclidean", alpha=1.0, cluster_selection_method="eom", allow_single_cluster=False, verbose=False,
        output_type=None,
    ):  # fmt: skip
        self.given = dict(locals())

    def fit(self, vectors):
        assert vectors.dtype == np.float32
        assert self.given["metric"] == "euclidean" and self.given["output_type"] == "numpy"
        assert 1 <= self.given["min_samples"] <= min(1023, len(vectors) - 1)
        _CumlHDBSCAN.last = self.given
        self.labels_ = np.arange(len(vectors), dtype=np.int64) % 2
        self.probabilities_ = np.ones(len(vectors))
        return self


class _CumlDBSCAN:
    """The keyword-only signature of cuML 26.10's DBSCAN."""

    def __init__(self, *, eps=0.5, min_samples=5, metric="euclidean", algorithm="brute", output_type=None):
        assert output_type == "numpy"

    def fit(self, vectors):
        self.labels_ = np.full(len(vectors), -1, np.int64)
        return self


@pytest.fixture
def cuml(monkeypatch):
    for name in ("cuml", "cuml.manifold", "cuml.cluster"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["cuml.manifold"].UMAP = _CumlUMAP
    sys.modules["cuml.cluster"].HDBSCAN = _CumlHDBSCAN
    sys.modules["cuml.cluster"].DBSCAN = _CumlDBSCAN


def test_cuml_is_called_by_its_contract(cuml, blobs, caplog):
    embedding = embed_umap(blobs, n_components=3, n_neighbors=5, random_state=1, backend=CUML)
    assert (embedding.shape, embedding.flags.c_contiguous) == ((700, 3), True)
    assert _CumlUMAP.last["precomputed_knn"] is None  # cuML makes its own graph on the GPU
    assert (_CumlUMAP.last["random_state"], _CumlUMAP.last["init"]) == (1, "spectral")
    knn = Neighbors(np.zeros((700, 9), np.int32), np.ones((700, 9), np.float32))
    embed_umap(blobs, n_neighbors=5, knn=knn, backend=CUML)
    indices, distances = _CumlUMAP.last["precomputed_knn"]
    assert indices.shape == distances.shape == (700, 5)
    assert np.array_equal(indices[:, 0], np.arange(700)) and (distances[:, 0] == 0).all()
    with caplog.at_level(logging.INFO, logger="common.density"):
        labels, probabilities = cluster_hdbscan(
            blobs, min_cluster_size=9, min_samples=4, cluster_selection_method="leaf", backend=CUML
        )
    assert (labels.dtype, probabilities.dtype) == (np.int32, np.float32)
    assert (_CumlHDBSCAN.last["min_cluster_size"], _CumlHDBSCAN.last["min_samples"]) == (9, 4)
    assert _CumlHDBSCAN.last["cluster_selection_method"] == "leaf"
    assert "break ties between equal distances differently" in caplog.text
    assert cluster_dbscan(blobs, eps=1.0, min_samples=3, backend=CUML).dtype == np.int32


def test_more_samples_than_cuml_takes_go_to_the_cpu(cuml, blobs, caplog, monkeypatch):
    monkeypatch.setattr(density, "_CUML_MAX_MIN_SAMPLES", 14)
    result = cluster_hdbscan(blobs, min_samples=15, min_cluster_size=20, backend=CUML)
    on_cpu = cluster_hdbscan(blobs, min_samples=15, min_cluster_size=20)
    assert on_cpu.labels.max() >= 3 and np.array_equal(result.labels, on_cpu.labels)
    assert "cuML takes min_samples up to 14" in caplog.text


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_what_is_made_of_rows_in_a_file_lies_in_files_and_has_the_same_bits(blobs, metric, monkeypatch, tmp_path):
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 1)
    rows = mapped.mapped_matrix(blobs.shape, folder=tmp_path)
    rows[:] = blobs
    for find in (exact_neighbors, cell_neighbors):
        in_file, in_memory = find(rows, 9, metric=metric), find(np.array(blobs), 9, metric=metric)
        for one, other in zip(in_file, in_memory, strict=True):
            assert np.array_equal(one, other)
            assert mapped._mapping_of(one) is not None and mapped._mapping_of(other) is None
    assert all(mapped._mapping_of(factor) is not None for factor in score_factors(rows, metric))
    options = {"n_neighbors": 10, "metric": metric, "n_epochs": 20}
    embeddings = [embed_umap(of, knn=exact_neighbors(of, 9, metric=metric), **options) for of in (rows, blobs)]
    assert np.array_equal(*embeddings)
