"""Formulas that compare a clustering with labels, all from a table of counts [clusters, labels].

They equal scikit-learn's scores of the expanded labels, but need no row: a table of ten million rows is as quick as
one of a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

LogFactorial = Callable[[Any], np.ndarray]

# One-sided 95% of the normal distribution.
Z_95_ONE_SIDED = 1.645

# Entries of a table of log factorials.
_LONGEST_TABLE = 2_000_000
# Pairs of totals whose expected information is computed at once: what stays in the processor's cache.
_PAIRS_AT_ONCE = 2048
# exp(-40) is below the rounding of float64.
_ALIAS_EXPONENT = 40.0


def wilson_lower_bound(successes: Any, n: Any, *, z: float = Z_95_ONE_SIDED) -> Any:
    """Return the lower end of Wilson's score interval for a proportion; 0 where n is 0.

    Source: E. B. Wilson, Probable inference, JASA 22 (1927). Numbers or arrays; z = 1.645 is one-sided 95%.
    """
    successes, n = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    n_safe = np.maximum(n, 1.0)
    share = successes / n_safe
    spread = z * np.sqrt(share * (1.0 - share) / n_safe + z * z / (4.0 * n_safe * n_safe))
    bound = (share + z * z / (2.0 * n_safe) - spread) / (1.0 + z * z / n_safe)
    bound = np.where(n > 0, np.maximum(bound, 0.0), 0.0)
    return float(bound) if bound.ndim == 0 else bound


def agreement_scores(table: Any) -> dict[str, float]:
    """Return purity, accuracy, nmi, ami, ari, homogeneity, completeness and v_measure of a sparse table [k, c]."""
    counts = table.tocoo()
    n = int(counts.data.sum())
    if n == 0:
        names = ("purity", "accuracy", "nmi", "ami", "ari", "homogeneity", "completeness", "v_measure")
        return dict.fromkeys(names, math.nan)
    cluster_totals = np.asarray(table.sum(axis=1)).ravel()
    label_totals = np.asarray(table.sum(axis=0)).ravel()
    h_clusters, h_labels = _entropy(cluster_totals), _entropy(label_totals)
    mutual = _mutual_information(counts, cluster_totals, label_totals)
    homogeneity = mutual / h_labels if h_labels else 1.0
    completeness = mutual / h_clusters if h_clusters else 1.0
    both = homogeneity + completeness
    return {
        "purity": float(table.max(axis=1).toarray().sum() / n),
        "accuracy": clustering_accuracy(table),
        "nmi": _normalized(mutual, (h_clusters + h_labels) / 2.0),
        "ami": _adjusted(mutual, (h_clusters + h_labels) / 2.0, cluster_totals, label_totals),
        "ari": _adjusted_rand(counts.data, cluster_totals, label_totals),
        "homogeneity": homogeneity,
        "completeness": completeness,
        "v_measure": 2.0 * homogeneity * completeness / both if both else 0.0,
    }


def clustering_accuracy(table: Any) -> float:
    """Return the share of rows on the best one-to-one matching of clusters and labels (Hungarian method).

    `table` is a sparse or dense [k, c] matrix of counts; only those above 0 are looked at, however many clusters and
    labels there are. NaN for an empty one.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    counts = csr_array(table).tocoo()
    n, (n_clusters, n_labels) = counts.data.sum(), counts.shape
    if n == 0:
        return math.nan
    # A cluster may stay without a label: each has a column of its own, worth as much as a count of 0. One is added to
    # all, because a weight of 0 would be no edge.
    alone = np.arange(n_clusters)
    weights = np.concatenate([counts.data + 1.0, np.ones(n_clusters)])
    places = (np.concatenate([counts.row, alone]), np.concatenate([counts.col, n_labels + alone]))
    edges = csr_array((weights, places), shape=(n_clusters, n_labels + n_clusters))
    matched = edges[min_weight_full_bipartite_matching(edges, maximize=True)]
    return float((matched.sum() - n_clusters) / n)


def expected_mutual_information(cluster_totals: np.ndarray, label_totals: np.ndarray) -> float:
    """Return the mean mutual information, in nats, of random tables with these totals.

    Source: Vinh, Epps, Bailey, Information theoretic measures for clusterings comparison, JMLR 11 (2010), equation 24.
    There, a cell whose count x is hypergeometric with mean m adds E[x log(x / m)] / n. That is E[x log(x / m) - x + m]
    / n as well, in which no count's part is negative, so that nothing cancels.
    """
    n = int(cluster_totals.sum())
    if len(cluster_totals) == 1 or len(label_totals) == 1:
        return 0.0
    sizes, n_sizes = np.unique(cluster_totals.astype(np.int64), return_counts=True)
    labels, n_labels = np.unique(label_totals.astype(np.int64), return_counts=True)
    few = _log_factorials(0, int(max(sizes[-1], labels[-1])))
    many = _log_factorials(max(0, n - int(sizes[-1] + labels[-1])), n)
    n_pairs = len(sizes) * len(labels)
    total = 0.0
    for start in range(0, n_pairs, _PAIRS_AT_ONCE):
        row, column = np.divmod(np.arange(start, min(start + _PAIRS_AT_ONCE, n_pairs)), len(labels))
        parts = _mean_divergences(sizes[row], labels[column], n, few, many)
        total += float(np.dot(n_sizes[row] * n_labels[column], parts))
    return total / n


def _mean_divergences(
    sizes: np.ndarray, labels: np.ndarray, n: int, few: LogFactorial, many: LogFactorial
) -> np.ndarray:
    """[p] E[x log(x / m) - x + m] of each pair of totals; `few` and `many` are for counts near 0 and near n."""
    means = sizes * (labels / n)
    variances = means * (1.0 - sizes / n) * (1.0 - labels / n) * (n / (n - 1.0))
    strides = _strides(variances)
    # By Bernstein's inequality, counts farther from their mean than this have less than exp(-28) of the probability, a
    # millionth of a millionth.
    reach = 28 / 3 + np.sqrt((28 / 3) ** 2 + 56.0 * variances)
    n_strides = np.ceil(np.minimum(reach, np.minimum(sizes, labels)) / strides).astype(np.int64)
    n_strides = 4 * -(-n_strides // 4)  # so that many pairs have as many and are computed together
    found = np.empty(len(means))
    for number in np.unique(n_strides):
        alike = np.flatnonzero(n_strides == number)
        away = strides[alike] * np.arange(-number, number + 1)[:, None]  # [counts, pairs]
        found[alike] = _mean_divergence(away, sizes[alike], labels[alike], means[alike], n, few, many)
    return found


def _mean_divergence(
    away: np.ndarray,
    sizes: np.ndarray,
    labels: np.ndarray,
    means: np.ndarray,
    n: int,
    few: LogFactorial,
    many: LogFactorial,
) -> np.ndarray:
    """The mean over counts that lie so far `away` ([c, p], the middle row 0) from the most probable one."""
    counts = (sizes + 1) * (labels + 1) // (n + 2) + away
    log_factorials = few(counts)
    for factor in (few(sizes - counts), few(labels - counts), many((n - sizes - labels) + counts)):
        log_factorials += factor
    # To the most probable count; 0 for an impossible one, whose log factorial is infinite.
    probability = np.exp(log_factorials[len(away) // 2] - log_factorials)
    divergence = np.log(np.maximum(counts / means, np.finfo(np.float64).tiny))
    divergence *= counts
    divergence -= away + (counts[len(away) // 2] - means)
    return (probability * divergence).sum(axis=0) / probability.sum(axis=0)


def _strides(variances: np.ndarray) -> np.ndarray:
    """How many counts on the next one is looked at: a mean over every h-th equals that over all, to rounding.

    A hypergeometric count is a sum of independent draws of 0 or 1 (Vatutin, Mikhailov, 1982), so the modulus of its
    characteristic function at t is at most exp(-variance * (1 - cos t)). By Poisson's summation formula, the
    probability of every h-th count differs from 1 / h by no more than twice that at t = 2 pi / h, if that is small.
    """
    strides = np.ones(len(variances), np.int64)
    wide = variances >= _ALIAS_EXPONENT / 2.0
    strides[wide] = (2.0 * math.pi / np.arccos(1.0 - _ALIAS_EXPONENT / variances[wide])).astype(np.int64)
    return strides


def _log_factorials(low: int, high: int) -> LogFactorial:
    """The function log(x! / low!) of counts from `low` to `high`, or log(x!) where a table of them would be long.

    Infinite for counts below 0; counts outside of `low` and `high` must be such.
    """
    if high - low > _LONGEST_TABLE:
        from scipy.special import gammaln

        return lambda counts: gammaln(counts + 1.0)
    table = np.full(high - low + 3, math.inf)
    table[1] = 0.0
    # Sums of logarithms, small numbers beside log(x!), so that their differences keep more digits.
    np.cumsum(np.log(np.arange(low + 1, high + 1, dtype=np.float64)), out=table[2:-1])
    return lambda counts: table.take(counts - (low - 1), mode="clip")


def _entropy(totals: np.ndarray) -> float:
    """Entropy in nats of the distribution of rows over groups."""
    totals = totals[totals > 0]
    n = totals.sum()
    if len(totals) <= 1:
        return 0.0
    return float(-np.sum(totals / n * (np.log(totals) - np.log(n))))


def _mutual_information(counts: Any, cluster_totals: np.ndarray, label_totals: np.ndarray) -> float:
    n = counts.data.sum()
    log_ratio = np.log(counts.data) + np.log(n) - np.log(cluster_totals[counts.row]) - np.log(label_totals[counts.col])
    terms = counts.data / n * log_ratio
    terms[np.abs(terms) < np.finfo(np.float64).eps] = 0.0
    return float(max(terms.sum(), 0.0))


def _normalized(mutual: float, mean_entropy: float) -> float:
    if mean_entropy == 0.0:  # one cluster and one label: the same partition
        return 1.0
    return mutual / mean_entropy


def _adjusted(mutual: float, mean_entropy: float, cluster_totals: np.ndarray, label_totals: np.ndarray) -> float:
    if len(cluster_totals) == 1 or len(label_totals) == 1:
        return 1.0 if len(cluster_totals) == len(label_totals) else 0.0
    expected = expected_mutual_information(cluster_totals, label_totals)
    # Both differences are zero for a perfect match of singletons; the sign is kept and 0/0 becomes 1.
    return _away_from_zero(mutual - expected) / _away_from_zero(mean_entropy - expected)


def _away_from_zero(value: float) -> float:
    eps = float(np.finfo(np.float64).eps)
    return min(value, -eps) if value < 0 else max(value, eps)


def _adjusted_rand(cells: np.ndarray, cluster_totals: np.ndarray, label_totals: np.ndarray) -> float:
    # Python integers: the products of pair counts overflow int64 from about 60,000 rows on.
    n = int(cells.sum())
    together = _sum_of_squares(cells)
    in_clusters, in_labels = _sum_of_squares(cluster_totals), _sum_of_squares(label_totals)
    both, cluster_only, label_only = together - n, in_clusters - together, in_labels - together
    neither = n * n - in_clusters - in_labels + together
    if cluster_only == 0 and label_only == 0:
        return 1.0
    above = 2 * (both * neither - cluster_only * label_only)
    below = (both + label_only) * (label_only + neither) + (both + cluster_only) * (cluster_only + neither)
    return above / below


def _sum_of_squares(counts: np.ndarray) -> int:
    values, times = np.unique(counts, return_counts=True)  # far fewer than there are cells
    return sum(value * value * n for value, n in zip(values.tolist(), times.tolist(), strict=True))
