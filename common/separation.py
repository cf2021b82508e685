"""How compact clusters are and how far apart, without a matrix of all pairs.

    centroid_cosines(vectors, labels).max_cosine              # the two most similar clusters
    nn_cross_ratio(neighbors.indices, labels).ratios          # from a kNN graph that is there anyway

Everywhere: `vectors` is [n, d] float, `labels` is [n] integers, and rows with a negative label (noise) are left out.
A score that is undefined, as with a single cluster, is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from common.grouping import CHUNK_ROWS, cluster_codes, cluster_counts, cluster_members, cluster_sums, unit_rows
from common.mapped import release

# Elements of one block of distances, float64: 4 MB stay in the cache of a core.
_BLOCK_ELEMENTS = 1 << 19
# Rows whose neighbours are counted at a time, by pairs of clusters, of which there may be many.
_COUNTED_ROWS = 1 << 14


@dataclass(frozen=True)
class CentroidCosines:
    """Cosine between the mean vectors of each two clusters."""

    cluster_ids: np.ndarray  # [k]
    matrix: np.ndarray  # [k, k] float64, ones on the diagonal
    max_cosine: float  # of two different clusters; NaN with fewer than two
    max_pair: tuple[int, int] | None  # their ids, the smaller first


@dataclass(frozen=True)
class CrossRatios:
    """How often the nearest neighbours of a cluster's rows lie in other clusters."""

    cluster_ids: np.ndarray  # [k]
    ratios: np.ndarray  # [k] float64: mean share of neighbours in other clusters; noise is no cluster
    dominant_neighbors: np.ndarray  # [k]: the other cluster that most of them lie in; -1 where there is none
    max_ratio: float  # NaN without clusters


@dataclass(frozen=True)
class LocalCoherence:
    """Mean cosine of rows to their nearest fellows, and of random pairs of rows for comparison."""

    cluster_ids: np.ndarray  # [k]
    coherence: np.ndarray  # [k] float64; NaN for clusters of one row
    mean: float  # over the rows of all clusters
    random_mean: float  # over random pairs of rows, whatever their cluster


def centroid_cosines(vectors: np.ndarray, labels: np.ndarray) -> CentroidCosines:
    """Return the cosines between the L2-normalised mean vectors of all clusters, and the most similar pair."""
    ids, codes = cluster_codes(vectors, labels)
    means = cluster_sums(vectors, codes, len(ids)) / np.maximum(cluster_counts(codes, len(ids)), 1)[:, None]
    units = unit_rows(means)
    matrix = np.clip(units @ units.T, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    if len(ids) < 2:
        return CentroidCosines(ids, matrix, math.nan, None)
    rows, columns = np.triu_indices(len(ids), k=1)
    top = int(np.argmax(matrix[rows, columns]))
    pair = (int(ids[rows[top]]), int(ids[columns[top]]))
    return CentroidCosines(ids, matrix, float(matrix[rows[top], columns[top]]), pair)


def nn_cross_ratio(neighbor_ids: np.ndarray, labels: np.ndarray) -> CrossRatios:
    """Return, for each cluster, the mean share of its rows' nearest neighbours that lie in other clusters.

    `neighbor_ids` is [n, k] integers, the row itself left out (`exact_neighbors`). A neighbour that is noise counts in
    the k but lies in no other cluster.
    """
    ids, codes = cluster_codes(neighbor_ids, labels)
    n_clusters, k = len(ids), neighbor_ids.shape[1]
    pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start in range(0, len(codes), _COUNTED_ROWS):  # a table of all neighbours' clusters would take 8 k bytes a row
        rows = slice(start, start + _COUNTED_ROWS)
        own, near = codes[rows, None], codes[neighbor_ids[rows]]
        crosses = (own >= 0) & (near >= 0) & (near != own)
        pairs, counts = _add_counts(pairs, counts, (own * n_clusters + near)[crosses])
        release(neighbor_ids[rows])
    sources, targets = np.divmod(pairs, max(n_clusters, 1))
    n_crosses = np.bincount(sources, weights=counts, minlength=n_clusters)
    ratios = n_crosses / (np.maximum(cluster_counts(codes, n_clusters), 1) * max(k, 1))
    dominant = _dominant_targets(sources, targets, counts, n_clusters)
    dominant_ids = np.where(dominant >= 0, ids[dominant], -1) if n_clusters else ids
    return CrossRatios(ids, ratios, dominant_ids, float(ratios.max()) if n_clusters else math.nan)


def local_coherence(
    vectors: np.ndarray,
    labels: np.ndarray,
    *,
    m: int = 10,
    random_state: int = 0,
    rows_per_cluster: int = 1000,
    n_random_pairs: int = 20_000,
) -> LocalCoherence:
    """Return the mean cosine of rows to the `m` nearest rows of their cluster, against that of random pairs.

    At most `rows_per_cluster` rows of a cluster are asked, each about all its fellows, so that time is linear in n.
    Clusters of fewer than m + 1 rows use what they have.
    """
    ids, codes = cluster_codes(vectors, labels)
    rng = np.random.default_rng(random_state)
    coherence, counts = np.full(len(ids), np.nan), cluster_counts(codes, len(ids))
    for code, members in cluster_members(codes, len(ids)):
        asked = np.arange(len(members))
        if len(members) > rows_per_cluster:
            asked = np.sort(rng.choice(len(members), size=rows_per_cluster, replace=False))
        if len(members) > 1:
            coherence[code] = _mean_nearest_cosine(unit_rows(vectors[members]), asked, m)
    defined = ~np.isnan(coherence)
    mean = float(np.average(coherence[defined], weights=counts[defined])) if defined.any() else math.nan
    random_mean = _mean_random_cosine(vectors, np.flatnonzero(codes >= 0), n_random_pairs, rng)
    return LocalCoherence(ids, coherence, mean, random_mean)


def effective_rank(vectors: np.ndarray, *, center: bool = False) -> float:
    """Return exp(entropy) of the normalised singular values: how many directions the rows really use.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007. Between 1 and min(n, d); NaN for no rows or all zeros.
    """
    n, d = vectors.shape
    mean = vectors.mean(axis=0, dtype=np.float64) if center and n else np.zeros(d)
    if n < d:
        rows = vectors.astype(np.float64) - mean
        gram = rows @ rows.T
    else:
        gram = np.zeros((d, d))
        for start in range(0, n, CHUNK_ROWS):
            rows = vectors[start : start + CHUNK_ROWS].astype(np.float64) - mean
            gram += rows.T @ rows
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    if singular.sum() == 0.0:
        return math.nan
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


class ClusterSums:
    """Sizes, sums and squares of clusters, gathered batch by batch; two passes give Davies-Bouldin, one the rest.

    Memory is O(clusters x dimensions). Tables of shards are added with `merge` before the second pass; after it their
    `distances` add up.
    """

    def __init__(self) -> None:
        self.cluster_ids: np.ndarray = np.zeros(0, np.int64)
        self.counts: np.ndarray = np.zeros(0, np.int64)
        self.sums: np.ndarray = np.zeros((0, 0))  # [k, d] float64
        self.squares: np.ndarray = np.zeros(0)  # [k] float64: sum of squared norms
        self.distances: np.ndarray = np.zeros(0)  # [k] float64: sum of distances to the centroid (second pass)

    @property
    def centroids(self) -> np.ndarray:
        """Mean vectors, [k, d] float64."""
        return self.sums / self.counts[:, None]

    def update(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch of the first pass."""
        ids, codes = cluster_codes(vectors, labels)
        batch = ClusterSums()
        batch.cluster_ids, batch.counts = ids, cluster_counts(codes, len(ids))
        batch.sums = cluster_sums(vectors, codes, len(ids))
        norms = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        batch.squares = np.bincount(codes[codes >= 0], weights=norms[codes >= 0], minlength=len(ids))
        self.merge(batch)

    def update_distances(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch of the second pass, when `centroids` are final; every batch of the first must come again."""
        inside = np.flatnonzero(np.asarray(labels) >= 0)
        codes = np.searchsorted(self.cluster_ids, np.asarray(labels)[inside])
        centroids = self.centroids
        for start in range(0, len(inside), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            lengths = np.linalg.norm(vectors[inside[chunk]] - centroids[codes[chunk]], axis=1)
            self.distances += np.bincount(codes[chunk], weights=lengths, minlength=len(self.counts))

    def merge(self, other: ClusterSums) -> None:
        """Add the sums of other rows."""
        if len(other.cluster_ids) == 0:
            return
        ids = np.union1d(self.cluster_ids, other.cluster_ids)
        total = ClusterSums()
        total.cluster_ids, total.counts = ids, np.zeros(len(ids), np.int64)
        total.sums, total.squares = np.zeros((len(ids), other.sums.shape[1])), np.zeros(len(ids))
        for part in (self, other):
            if len(part.cluster_ids):
                rows = np.searchsorted(ids, part.cluster_ids)
                total.sums[rows] += part.sums
                total.counts[rows] += part.counts
                total.squares[rows] += part.squares
        self.cluster_ids, self.counts, self.sums, self.squares = ids, total.counts, total.sums, total.squares
        self.distances = np.zeros(len(ids))

    def calinski_harabasz(self) -> float:
        """Return the ratio of the variances between and within clusters; higher is better, NaN for one cluster.

        Source: Calinski and Harabasz, A dendrite method for cluster analysis, Comm. in Statistics 3 (1974).
        """
        k, n = len(self.counts), int(self.counts.sum())
        if k < 2 or n <= k:
            return math.nan
        offsets = self.centroids - self.sums.sum(axis=0) / n
        between = float(np.sum(self.counts * np.einsum("kd,kd->k", offsets, offsets)))
        within = float(np.sum(self.squares - np.einsum("kd,kd->k", self.sums, self.sums) / self.counts))
        # Below the rounding of the squares there is no spread left within clusters.
        if within <= 1e-14 * float(self.squares.sum()):
            return 1.0
        return between * (n - k) / (within * (k - 1))

    def davies_bouldin(self, *, sample_size: int | None = None, random_state: int = 0) -> float:
        """Return the mean similarity of each cluster to its most similar one; lower is better, NaN for one cluster.

        With `sample_size` the mean is that of so many clusters at most, each compared with all: k^2 pairs are many.
        Source: Davies and Bouldin, A cluster separation measure, IEEE PAMI 1 (1979). Needs the second pass.
        """
        if len(self.counts) < 2:
            return math.nan
        spread = self.distances / self.counts
        centroids = self.centroids
        asked = np.arange(len(spread))
        if sample_size is not None and sample_size < len(asked):
            asked = np.sort(np.random.default_rng(random_state).choice(asked, sample_size, replace=False))
        worst = np.zeros(len(asked))
        furthest = 0.0
        step = max(1, _BLOCK_ELEMENTS // len(spread))
        for start in range(0, len(asked), step):  # no table of all pairs of clusters
            part = asked[start : start + step]
            between = np.sqrt(_squared_distances(centroids[part], centroids))
            furthest = max(furthest, float(between.max()))
            between[between == 0] = np.inf
            worst[start : start + step] = np.max((spread[part, None] + spread) / between, axis=1)
        if np.allclose(spread, 0) or np.isclose(furthest, 0):
            return 0.0
        return float(np.mean(worst))


def calinski_harabasz(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Return the Calinski-Harabasz score of vectors in memory."""
    sums = ClusterSums()
    sums.update(vectors, labels)
    return sums.calinski_harabasz()


def davies_bouldin(
    vectors: np.ndarray, labels: np.ndarray, *, sample_size: int | None = None, random_state: int = 0
) -> float:
    """Return the Davies-Bouldin score of vectors in memory, with `sample_size` that of a sample of the clusters."""
    sums = ClusterSums()
    sums.update(vectors, labels)
    sums.update_distances(vectors, labels)
    return sums.davies_bouldin(sample_size=sample_size, random_state=random_state)


def _squared_distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    norms = np.einsum("kd,kd->k", points, points)[:, None] + np.einsum("kd,kd->k", others, others)
    squared = np.maximum(norms - 2.0 * points @ others.T, 0.0)
    # What cancellation leaves of equal points is no distance.
    squared[squared < 1e-14 * norms] = 0.0
    return squared


def _add_counts(values: np.ndarray, counts: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and how often each is there, when `more` come to those that were counted."""
    distinct, places = np.unique(np.concatenate([values, more]), return_inverse=True)
    weights = np.concatenate([counts, np.ones(len(more), np.int64)])
    return distinct, np.bincount(places, weights=weights, minlength=len(distinct)).astype(np.int64)


def _dominant_targets(sources: np.ndarray, targets: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """For each of k sources its most frequent target, the smallest among equals; -1 where there is none."""
    order = np.lexsort((targets, -counts, sources))
    first_sources, first = np.unique(sources[order], return_index=True)
    dominant = np.full(k, -1, np.int64)
    dominant[first_sources] = targets[order][first]
    return dominant


def _mean_nearest_cosine(units: np.ndarray, asked: np.ndarray, m: int) -> float:
    m = min(m, len(units) - 1)
    total = 0.0
    step = max(1, _BLOCK_ELEMENTS // len(units))
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        cosines = units[part] @ units.T
        cosines[np.arange(len(part)), part] = -np.inf  # itself
        total += float(np.partition(cosines, len(units) - m, axis=1)[:, len(units) - m :].sum())
    return total / (len(asked) * m)


def _mean_random_cosine(vectors: np.ndarray, rows: np.ndarray, n_pairs: int, rng: np.random.Generator) -> float:
    if len(rows) < 2:
        return math.nan
    left = rng.integers(len(rows), size=n_pairs)
    right = (left + rng.integers(1, len(rows), size=n_pairs)) % len(rows)  # another row
    total = 0.0
    for start in range(0, n_pairs, CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        a, b = unit_rows(vectors[rows[left[chunk]]]), unit_rows(vectors[rows[right[chunk]]])
        total += float(np.einsum("nd,nd->", a, b))
    return total / n_pairs
