"""Agreement of clusters with labels: by hand, against scikit-learn, and streamed equals at once."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.special import gammaln
from sklearn import metrics

from common.agreement import clustering_accuracy, expected_mutual_information, wilson_lower_bound
from common.config import UserError
from common.quality import Contingency

# Cluster 0: a a b; cluster 1: b b, one unlabelled; cluster 2: only an unlabelled row; noise: a, and one of neither.
CLUSTERS = [0, 0, 0, 1, 1, 1, 2, -1, -1]
LABELS = ["a", "a", "b", "b", "b", None, None, "a", None]


def count(clusters, labels) -> Contingency:
    counts = Contingency()
    counts.update(clusters, labels)
    return counts


def test_by_hand():
    quality = count(CLUSTERS, LABELS).per_cluster()
    assert quality.cluster_ids.tolist() == [0, 1, 2]
    assert quality.sizes.tolist() == [3, 3, 1]
    assert quality.n_labeled.tolist() == [3, 2, 0]
    assert quality.majority_labels == ["a", "b", None]
    assert quality.purity[:2] == pytest.approx([2 / 3, 1.0])
    assert math.isnan(quality.purity[2])
    assert quality.entropy[:2] == pytest.approx([math.log2(3) - 2 / 3, 0.0])
    assert quality.purity_lower_bound[2] == 0.0
    scores = count(CLUSTERS, LABELS).agreement()
    assert (scores.n_rows, scores.n_scored) == (9, 5)
    assert (scores.n_without_label, scores.n_without_cluster, scores.n_without_both) == (2, 1, 1)
    assert (scores.n_clusters, scores.n_labels) == (3, 2)
    assert scores.purity == pytest.approx(4 / 5)
    assert scores.accuracy == pytest.approx(4 / 5)
    assert scores.coverage == pytest.approx(5 / 6)


def test_wilson_by_hand():
    # 9 of 10: centre (0.9 + 0.1353) / 1.2706, half width 1.645 * sqrt(0.009 + 0.0067651) / 1.2706
    assert wilson_lower_bound(9, 10) == pytest.approx((1.035301 - 0.206543) / 1.270603, abs=1e-5)
    assert wilson_lower_bound(0, 0) == 0.0
    assert wilson_lower_bound(0, 5) == 0.0
    assert wilson_lower_bound(np.array([1, 100]), np.array([1, 100])) == pytest.approx([0.26984, 0.97365], abs=1e-5)


@pytest.mark.parametrize(
    ("n", "k", "n_labels", "noise"),
    [(500, 7, 5, 0.5), (3000, 40, 12, 0.1), (200, 200, 3, 1.0), (50, 1, 4, 1.0), (50, 4, 1, 1.0), (60, 60, 60, 0.0)],
)
def test_equals_scikit_learn(n, k, n_labels, noise):
    rng = np.random.default_rng(n + k)
    labels = rng.integers(n_labels, size=n) if n_labels < n else np.arange(n)
    clusters = np.where(rng.random(n) < noise, rng.integers(k, size=n), labels % k)
    scores = count(clusters, labels).agreement()
    expected = {
        "nmi": metrics.normalized_mutual_info_score(labels, clusters),
        "ami": metrics.adjusted_mutual_info_score(labels, clusters),
        "ari": metrics.adjusted_rand_score(labels, clusters),
        "homogeneity": metrics.homogeneity_score(labels, clusters),
        "completeness": metrics.completeness_score(labels, clusters),
        "v_measure": metrics.v_measure_score(labels, clusters),
    }
    assert {name: getattr(scores, name) for name in expected} == pytest.approx(expected, abs=1e-9)


def test_expected_information_in_a_window_equals_the_full_sum():
    from sklearn.metrics.cluster import expected_mutual_information as full_sum

    rng = np.random.default_rng(0)
    table = rng.integers(0, 900, size=(9, 5)) * np.array([1, 3, 1, 9, 40])
    ours = expected_mutual_information(table.sum(axis=1), table.sum(axis=0))
    assert ours == pytest.approx(full_sum(table, int(table.sum())), rel=1e-9)


@pytest.mark.parametrize(
    ("sizes", "labels"),
    [
        ([900, 2100], [2900, 100]),  # impossible counts on both sides
        ([30_000, 50_000, 20_000], [9_000, 41_000, 49_997, 3]),  # wide: every tenth to thirtieth count is looked at
        ([1, 1, 1], [2, 1]),
    ],
)
def test_expected_information_from_some_counts_equals_the_sum_over_all(sizes, labels):
    def log_choose(n, k):
        return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)

    n = sum(sizes)
    expected = 0.0
    for size in sizes:
        for label in labels:
            counts = np.arange(max(1, size + label - n), min(size, label) + 1)
            log_probability = log_choose(label, counts) + log_choose(n - label, size - counts) - log_choose(n, size)
            expected += np.sum(np.exp(log_probability) * counts / n * np.log(n * counts / (size * label)))
    ours = expected_mutual_information(np.array(sizes), np.array(labels))
    assert ours == pytest.approx(expected, rel=1e-7)


def test_one_cluster_and_one_label_is_a_perfect_match():
    scores = count([3, 3, 3], ["x", "x", "x"]).agreement()
    assert (scores.nmi, scores.ami, scores.ari, scores.v_measure, scores.purity, scores.accuracy) == (1,) * 6


def test_accuracy_matches_one_to_one():
    # Both clusters are mostly "a", but only one of them may have it: purity 4/5, accuracy (2 + 1) / 5.
    scores = count([0, 0, 1, 1, 1], ["a", "a", "a", "a", "b"]).agreement()
    assert scores.purity == pytest.approx(4 / 5)
    assert scores.accuracy == pytest.approx(3 / 5)


@pytest.mark.parametrize(("n_clusters", "n_labels"), [(40, 25), (25, 40), (1, 7), (7, 1)])
def test_accuracy_is_that_of_the_best_matching_of_a_full_table(n_clusters, n_labels):
    table = np.random.default_rng(n_clusters).poisson(0.7, size=(n_clusters, n_labels))
    rows, columns = linear_sum_assignment(table, maximize=True)
    assert clustering_accuracy(table) == pytest.approx(table[rows, columns].sum() / table.sum(), rel=1e-12)
    assert clustering_accuracy(csr_array(table)) == clustering_accuracy(table)


def test_accuracy_of_very_many_clusters_and_labels_takes_no_table_of_all_pairs():
    """A full one would be 20,000 times 10,000 counts."""
    rows = np.arange(20_000)
    table = csr_array((np.where(rows % 2, 1, 2), (rows, rows // 2)), shape=(20_000, 10_000))
    assert clustering_accuracy(table) == pytest.approx(2 / 3)  # of two clusters of a label the larger has it


def test_streaming_and_merging_equal_counting_at_once():
    rng = np.random.default_rng(1)
    clusters = rng.integers(-1, 30, size=5000)
    labels = [None if code == 0 else f"intent {code}" for code in rng.integers(0, 20, size=5000)]
    whole = count(clusters, labels)
    streamed, merged = Contingency(), Contingency()
    for start in range(0, 5000, 700):
        batch = slice(start, start + 700)
        streamed.update(clusters[batch], labels[batch])
        # Labels come in another order in each part, and parts travel between processes.
        merged.merge(pickle.loads(pickle.dumps(count(clusters[batch][::-1], labels[batch][::-1]))))
    for other in (streamed, merged):
        assert other.agreement() == whole.agreement()
        assert other.per_cluster().majority_labels == whole.per_cluster().majority_labels
        assert np.array_equal(other.per_cluster().sizes, whole.per_cluster().sizes)
        assert np.array_equal(other.per_cluster().entropy, whole.per_cluster().entropy, equal_nan=True)


def test_ids_and_labels_too_many_for_a_table_are_counted_alike():
    rng = np.random.default_rng(2)
    clusters = rng.integers(-1, 40, size=3000)
    labels = rng.integers(50, size=3000).astype(str)
    few, many = count(clusters, labels), count(np.where(clusters < 0, -1, clusters * 50_000_000), labels)
    assert many.agreement() == few.agreement()
    assert many.cluster_ids.tolist() == [50_000_000 * cluster for cluster in few.cluster_ids]
    assert many.per_cluster().n_labeled.tolist() == few.per_cluster().n_labeled.tolist()


def test_majority_among_equals_is_the_first_by_name_in_any_order():
    for labels in (["b", "a", "c"], ["c", "b", "a"]):
        assert count([0, 0, 0], labels).per_cluster().majority_labels == ["a"]


@pytest.mark.parametrize(
    ("clusters", "labels"),
    [
        (pa.array([0, 1, None]), pa.array(["a", "b", "a"])),
        (pa.chunked_array([[0, 1], [None]]), pa.chunked_array([["a"], ["b", "a"]])),
        (pa.array([0.0, 1.0, float("nan")]), pa.array(["a", "b", "a"]).dictionary_encode()),
        (pd.Series([0, 1, None]), pd.Series(["a", "b", "a"])),
        (np.array([0.0, 1.0, np.nan]), np.array(["a", "b", "a"])),
        ([0, 1, None], ["a", "b", "a"]),
        (np.array([0, 1, -7], np.int32), pd.Series(["a", "b", "a"], dtype="category")),
    ],
)
def test_every_kind_of_column(clusters, labels):
    scores = count(clusters, labels).agreement()
    assert (scores.n_scored, scores.n_without_cluster, scores.n_labels) == (2, 1, 2)


def test_mixed_blank_and_numeric_labels():
    counts = count([0] * 7, ["1", 1, " ", "", float("nan"), None, 2.5])
    assert counts.labels == ["1", "2.5"]
    assert counts.per_cluster().n_labeled.tolist() == [3]
    assert count([0, 0], [7, 8]).labels == ["7", "8"]
    assert count([0, 0], [None, None]).agreement().n_without_label == 2


def test_chosen_clusters_in_their_order():
    quality = count(CLUSTERS, LABELS).per_cluster(cluster_ids=[5, 1, 0])
    assert quality.cluster_ids.tolist() == [5, 1, 0]
    assert quality.sizes.tolist() == [0, 3, 3]
    assert quality.majority_labels == [None, "b", "a"]


def test_nothing_scored_is_nan_not_perfect():
    for counts in (Contingency(), count([], []), count([0, 1], [None, None]), count([-1], ["a"])):
        scores = counts.agreement()
        assert scores.n_scored == 0
        assert all(math.isnan(value) for value in (scores.purity, scores.nmi, scores.ami, scores.ari, scores.accuracy))
    assert len(Contingency().per_cluster().cluster_ids) == 0


def test_bad_ids_are_user_errors():
    with pytest.raises(UserError, match="whole numbers"):
        count(["x", "y"], ["a", "b"])
    with pytest.raises(UserError, match="whole numbers"):
        count([0.5, 1.0], ["a", "b"])
    with pytest.raises(UserError, match="too large"):
        count([2**40], ["a"])
    with pytest.raises(ValueError, match="2 cluster ids but 1 labels"):
        count([0, 1], ["a"])


def test_rand_index_does_not_overflow():
    # 3 million rows: the products of pair counts are beyond 2**63.
    clusters = np.repeat(np.arange(3), 1_000_000)
    labels = clusters.copy()
    labels[:1000] = 2
    scores = count(clusters, labels).agreement()
    assert 0.998 < scores.ari < 1.0
    assert scores.ari == pytest.approx(metrics.adjusted_rand_score(labels[::100], clusters[::100]), abs=1e-3)
