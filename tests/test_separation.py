"""Geometry of clusters: by hand, against scikit-learn, and noise left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics

from common.separation import (
    ClusterSums,
    calinski_harabasz,
    centroid_cosines,
    davies_bouldin,
    effective_rank,
    local_coherence,
    nn_cross_ratio,
)
from common.silhouette import silhouette_samples, silhouette_score


@pytest.fixture(scope="module")
def blobs():
    """900 rows of 8 dimensions in six overlapping clusters, one with a single row, and 100 rows of noise."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.integers(0, 5, size=899), [7], np.full(100, -1)])
    centers = rng.standard_normal((8, 8)) * 2 + 1
    vectors = (centers[labels] + rng.standard_normal((1000, 8))).astype(np.float32)
    order = rng.permutation(1000)
    return vectors[order], labels[order]


@pytest.mark.parametrize("n_dimensions", [8, 50])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "sqeuclidean"])
def test_silhouette_equals_scikit_learn(blobs, metric, n_dimensions):
    vectors, labels = blobs
    if n_dimensions > 8:  # euclidean distances in few dimensions go another way
        turn = np.random.default_rng(1).standard_normal((8, n_dimensions), dtype=np.float32)
        vectors = vectors @ turn
    clustered = labels >= 0
    ours = silhouette_samples(vectors, labels, metric=metric)
    assert np.isnan(ours[~clustered]).all()
    expected = metrics.silhouette_samples(vectors[clustered].astype(np.float64), labels[clustered], metric=metric)
    tolerance = 1e-6 if metric == "euclidean" else 1e-7  # distances of single rows are float32, sums float64
    assert ours[clustered] == pytest.approx(expected, abs=tolerance)
    assert silhouette_score(vectors, labels, metric=metric) == pytest.approx(expected.mean(), abs=1e-7)


def test_silhouette_by_hand():
    # On a line at 0, 1 and 4, 6. Row 0: a = 1, b = 5; row 2: a = 2, b = 3.5; so (4/5 + 3/4 + 3/7 + 7/11 ...).
    vectors = np.array([[0.0], [1.0], [4.0], [6.0]], np.float32)
    samples = silhouette_samples(vectors, [0, 0, 1, 1], metric="euclidean")
    assert samples == pytest.approx([4 / 5, 3 / 4, 1.5 / 3.5, 3.5 / 5.5])
    # Cosine: east, east, north: the pair has a = 0, b = 1; the single row is 0 by definition.
    vectors = np.array([[1, 0], [2, 0], [0, 3]], np.float32)
    assert silhouette_samples(vectors, [0, 0, 1]).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "sqeuclidean"])
def test_silhouette_of_equal_rows_is_zero_not_rounding_noise(metric):
    vectors = np.tile(np.float32([0.1, 0.7, 0.3]), (40, 1))
    assert silhouette_samples(vectors, np.arange(40) % 2, metric=metric).tolist() == [0.0] * 40


def test_silhouette_with_zero_vectors_equals_scikit_learn():
    vectors = np.array([[0, 0], [0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    labels = [0, 0, 1, 1, 0]
    expected = metrics.silhouette_samples(vectors, labels, metric="cosine")
    assert silhouette_samples(vectors, labels) == pytest.approx(expected, abs=1e-7)


def test_sampled_silhouette_is_seeded_and_draws_no_noise(blobs):
    vectors, labels = blobs
    first = silhouette_score(vectors, labels, metric="euclidean", sample_size=300, random_state=3)
    assert first == silhouette_score(vectors, labels, metric="euclidean", sample_size=300, random_state=3)
    assert first != silhouette_score(vectors, labels, metric="euclidean", sample_size=300, random_state=4)
    full = silhouette_score(vectors, labels, metric="euclidean")
    assert first == pytest.approx(full, abs=0.05)
    assert silhouette_score(vectors, labels, metric="euclidean", sample_size=900) == full


def test_one_cluster_or_none_is_undefined():
    vectors = np.eye(4, dtype=np.float32)
    for labels in ([0, 0, 0, 0], [0, 0, -1, -1], [-1] * 4):
        assert math.isnan(silhouette_score(vectors, labels))
        assert math.isnan(centroid_cosines(vectors, labels).max_cosine)
        assert math.isnan(davies_bouldin(vectors, labels))
        assert math.isnan(calinski_harabasz(vectors, labels))
    assert math.isnan(nn_cross_ratio(np.zeros((4, 2), int), [-1] * 4).max_ratio)
    assert math.isnan(local_coherence(vectors, [-1] * 4).mean)


def test_labels_and_rows_must_match():
    with pytest.raises(ValueError, match="3 rows but 2 labels"):
        silhouette_samples(np.eye(3), [0, 1])
    with pytest.raises(ValueError, match="manhattan"):
        silhouette_samples(np.eye(3), [0, 1, 1], metric="manhattan")


def test_centroid_cosines_by_hand():
    # Means: (1, 0), (0, 2) and (3, 3); the last is at 45 degrees to both, and of its two pairs the first is named.
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, 3], [3, 3], [9, -9]], np.float32)
    result = centroid_cosines(vectors, [0, 0, 4, 4, 5, -1])
    half = math.sqrt(0.5)
    assert result.cluster_ids.tolist() == [0, 4, 5]
    assert result.matrix == pytest.approx(np.array([[1, 0, half], [0, 1, half], [half, half, 1]]))
    assert result.max_cosine == pytest.approx(half)
    assert result.max_pair == (0, 5)


def test_cross_ratio_by_hand():
    # Rows 0, 1, 2 in cluster 3; rows 3, 4 in cluster 8; row 5 is noise.
    labels = [3, 3, 3, 8, 8, -1]
    neighbors = np.array([[1, 3], [0, 2], [4, 5], [4, 0], [3, 5], [0, 1]])
    result = nn_cross_ratio(neighbors, labels)
    assert result.cluster_ids.tolist() == [3, 8]
    assert result.ratios == pytest.approx([(1 / 2 + 0 + 1 / 2) / 3, (1 / 2 + 0) / 2])
    assert result.dominant_neighbors.tolist() == [8, 3]
    assert result.max_ratio == pytest.approx(1 / 3)
    alone = nn_cross_ratio(np.array([[1], [0], [3], [2]]), [0, 0, 1, 1])
    assert (alone.ratios.tolist(), alone.dominant_neighbors.tolist()) == ([0, 0], [-1, -1])


def test_cross_ratio_equals_a_double_loop(blobs):
    labels = blobs[1]
    rng = np.random.default_rng(1)
    neighbors = rng.integers(0, 1000, size=(1000, 5))
    expected = {}
    for row, label in enumerate(labels):
        if label >= 0:
            crossing = [labels[near] not in (label, -1) for near in neighbors[row]]
            expected.setdefault(label, []).append(sum(crossing) / 5)
    result = nn_cross_ratio(neighbors, labels)
    assert result.ratios == pytest.approx([np.mean(expected[label]) for label in sorted(expected)])


def test_streamed_scores_equal_scikit_learn(blobs):
    vectors, labels = blobs
    parts = [slice(0, 300), slice(300, 310), slice(310, 1000)]
    sums = ClusterSums()
    for part in parts[:2]:
        sums.update(vectors[part], labels[part])
    other = ClusterSums()
    other.update(vectors[parts[2]], labels[parts[2]])
    sums.merge(other)
    for part in parts:
        sums.update_distances(vectors[part], labels[part])
    clustered = labels >= 0
    rows, ids = vectors[clustered].astype(np.float64), labels[clustered]
    assert sums.calinski_harabasz() == pytest.approx(metrics.calinski_harabasz_score(rows, ids), rel=1e-9)
    assert sums.davies_bouldin() == pytest.approx(metrics.davies_bouldin_score(rows, ids), rel=1e-9)
    assert davies_bouldin(vectors, labels) == pytest.approx(sums.davies_bouldin(), rel=1e-12)
    assert calinski_harabasz(vectors, labels) == pytest.approx(sums.calinski_harabasz(), rel=1e-12)


def test_scores_of_clusters_without_spread_equal_scikit_learn():
    vectors = np.repeat(np.float32([[0.1, 0.2], [5, 5], [5, 5]]), 4, axis=0)
    labels = np.repeat([0, 1, 2], 4)
    assert calinski_harabasz(vectors, labels) == metrics.calinski_harabasz_score(vectors, labels) == 1.0
    assert davies_bouldin(vectors, labels) == metrics.davies_bouldin_score(vectors, labels) == 0.0


def test_local_coherence_by_hand_and_by_loop(blobs):
    vectors = np.float32([[1, 0], [1, 0], [0, 1], [0, 2], [5, 0]])
    result = local_coherence(vectors, [0, 0, 0, 1, 2], m=1)
    assert result.coherence[0] == pytest.approx(2 / 3)  # cosines to the nearest: 1, 1 and 0
    assert np.isnan(result.coherence[1:]).all()
    vectors, labels = blobs
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    members = units[labels == 2]
    cosines = members @ members.T
    np.fill_diagonal(cosines, -2)
    expected = np.sort(cosines, axis=1)[:, -10:].mean()
    result = local_coherence(vectors, labels)
    assert result.coherence[2] == pytest.approx(expected, abs=1e-6)
    assert result.mean > result.random_mean
    clustered = units[labels >= 0].astype(np.float64)
    all_pairs = (clustered.sum(axis=0) @ clustered.sum(axis=0) - len(clustered)) / len(clustered) / (len(clustered) - 1)
    assert result.random_mean == pytest.approx(all_pairs, abs=0.02)
    asked = local_coherence(vectors, labels, rows_per_cluster=60)
    assert asked.coherence[2] == pytest.approx(expected, abs=0.03)


def test_effective_rank():
    assert effective_rank(np.eye(5, dtype=np.float32)) == pytest.approx(5)
    assert effective_rank(np.outer(np.arange(1, 9), [3, 4, 0])) == pytest.approx(1)
    # Singular values 3 and 1: exp of the entropy of (3/4, 1/4).
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(np.array([[3.0, 0, 0], [0, 1, 0]])) == pytest.approx(expected)
    shifted = np.eye(3)[[0, 1, 0, 1]] + np.array([0, 0, 50.0])
    assert effective_rank(shifted, center=True) == pytest.approx(1)
    assert math.isnan(effective_rank(np.zeros((4, 3))))
