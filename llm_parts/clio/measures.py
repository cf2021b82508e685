"""How good base clusters are: compactness and separation, local coherence, agreement with labels and between runs.

All are exact or sampled by a seed (`sampled_scores` says which), and none takes time or memory with the square of the
rows, however many clusters there are. A score that is not defined, such as the silhouette of a single cluster, is NaN;
`as_row` makes it None, which JSON and tables can hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from common.quality import Contingency
from common.separation import calinski_harabasz, davies_bouldin, local_coherence
from common.silhouette import silhouette_score, silhouettes_of_rows

# Scores that are better when they are lower.
LOWER_IS_BETTER = frozenset({"davies_bouldin"})
COUNTS = ("rows", "clusters", "noise")
# Rows times clusters up to which the silhouette is that of all rows, and pairs of clusters up to which Davies-Bouldin
# is that of all clusters: some 5,800.
MAX_COMPARED, MAX_CLUSTER_PAIRS = 1 << 29, 1 << 25


def measure_clusters(
    vectors: np.ndarray,
    labels: np.ndarray,
    *,
    true_labels: Sequence[object] | None = None,
    n_neighbors: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """Score clusters of unit vectors [n, d] by `labels` [n], negative for noise, which is left out of all but `noise`.

    silhouette (cosine), davies_bouldin and calinski_harabasz are the classical scores. local_coherence is the mean
    cosine of a row to its `n_neighbors` nearest fellows, random_coherence that of random pairs of clustered rows, and
    coherence_gain the difference. With labels: nmi, ari and purity of the clustered rows, and acc, the share of all
    labelled rows that are right under the best one-to-one matching, so that noise counts as wrong.

    Raises ValueError if lengths differ.
    """
    labels = np.asarray(labels)
    clustered = labels[labels >= 0]
    n_clusters = len(np.unique(clustered))
    n_compared = MAX_CLUSTER_PAIRS // max(1, n_clusters)
    coherence = local_coherence(vectors, labels, m=n_neighbors, random_state=seed)
    scores = {
        "rows": float(len(labels)),
        "clusters": float(n_clusters),
        "noise": float(len(labels) - len(clustered)),
        "silhouette": _silhouette(vectors, labels, seed=seed),
        "davies_bouldin": davies_bouldin(vectors, labels, sample_size=n_compared, random_state=seed),
        "calinski_harabasz": calinski_harabasz(vectors, labels),
        "local_coherence": coherence.mean,
        "random_coherence": coherence.random_mean,
        "coherence_gain": coherence.mean - coherence.random_mean,
    }
    return scores if true_labels is None else scores | agreement_with_labels(labels, true_labels)


def sampled_scores(scores: Mapping[str, Any]) -> frozenset[str]:
    """Names of those of the scores that are of a sample, because there are very many rows or clusters."""
    n_clusters, n_clustered = scores["clusters"], scores["rows"] - scores["noise"]
    is_sampled = {
        "silhouette": n_clusters * n_clustered > MAX_COMPARED,
        "davies_bouldin": n_clusters**2 > MAX_CLUSTER_PAIRS,
    }
    return frozenset(name for name, sampled in is_sampled.items() if sampled)


def agreement_with_labels(labels: np.ndarray, true_labels: Sequence[object]) -> dict[str, float]:
    """nmi, ari, acc and purity of clusters [n] against labels [n]; all NaN where no clustered row has a label."""
    counts = Contingency()
    counts.update(labels, list(true_labels))
    agreement = counts.agreement()
    # Rows in no cluster are not scored by `accuracy`; here they are wrong.
    return {
        "nmi": agreement.nmi,
        "ari": agreement.ari,
        "acc": agreement.accuracy * agreement.coverage,
        "purity": agreement.purity,
    }


def mean_agreement(labelings: Sequence[np.ndarray]) -> float:
    """Mean adjusted Rand index of all pairs of clusterings of the same rows; noise is one more group. NaN for one."""
    pairs = [_adjusted_rand(one, other) for one, other in combinations(labelings, 2)]
    return float(np.mean(pairs)) if pairs else math.nan


def better(score: float, than: float, *, name: str) -> bool:
    """Whether one value of the score `name` beats another; an undefined one beats nothing."""
    if math.isnan(score) or math.isnan(than):
        return not math.isnan(score)
    return score < than if name in LOWER_IS_BETTER else score > than


def as_row(scores: Mapping[str, Any], *, digits: int = 4) -> dict[str, Any]:
    """The scores as a row of a table: rounded, counts as whole numbers, None for what is not defined."""
    return {
        name: int(value) if name in COUNTS and value is not None else _cell(value, digits)
        for name, value in scores.items()
    }


def _silhouette(vectors: np.ndarray, labels: np.ndarray, *, seed: int) -> float:
    """The mean silhouette by cosine; of very many rows and clusters that of a sample of the rows."""
    clustered = np.flatnonzero(labels >= 0)
    n_asked = MAX_COMPARED // max(1, len(np.unique(labels[clustered])))
    if len(clustered) <= n_asked:
        return silhouette_score(vectors, labels, metric="cosine")
    rows = np.random.default_rng((seed, 1)).choice(clustered, n_asked, replace=False)
    return float(silhouettes_of_rows(vectors, labels, np.sort(rows)).mean())


def _adjusted_rand(one: np.ndarray, other: np.ndarray) -> float:
    counts = Contingency()
    counts.update(one + 1, other + 1)
    return counts.agreement().ari


def _cell(value: Any, digits: int) -> Any:
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return round(value, digits)
