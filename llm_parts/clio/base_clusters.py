"""Base clusters of facet vectors: k-means, HDBSCAN or DBSCAN, on the embeddings or on their UMAP.

    base = cluster_vectors(vectors, settings=settings, seed=7)
    base.labels, base.centroids, base.scores
    groups = members_and_outsiders(vectors, base.labels, base.centroids, n_members=50, n_outsiders=50, seed=7)

Rows without direction (nothing was extracted) are in no cluster. Time and memory are linear in the rows for a given
number of clusters; `n_clusters: auto` lets that number grow with rows ** 0.6, from 63 for 1,000 to 1,000 for 100,000.
Where rows times clusters are very many, neither k-means nor evidence compares all with all.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.grouping import cluster_members, cluster_sums
from llm_parts.clio.algorithms import Space, label_rows
from llm_parts.clio.measures import mean_agreement, measure_clusters
from llm_parts.clio.nearby import nearest_rows
from llm_parts.clio.taxonomy import NOISE
from llm_parts.clio.vector_settings import VectorSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = logging.getLogger(__name__)

# Stability is that of a sample where there are more rows.
STABILITY_ROWS = 5000


@dataclass(frozen=True, eq=False)
class BaseClusters:
    """A clustering of n rows; cluster 0 is the largest."""

    labels: np.ndarray  # [n] int64, -1 in no cluster
    centroids: np.ndarray  # [k, d] float32: mean directions of the members, of unit length
    scores: dict[str, float]  # of measures.measure_clusters, and `stability`

    @property
    def n_clusters(self) -> int:
        """How many clusters there are; 0 where all rows are noise."""
        return len(self.centroids)


def cluster_vectors(
    vectors: np.ndarray,
    *,
    settings: VectorSettings,
    seed: int,
    true_labels: Sequence[object] | None = None,
) -> BaseClusters:
    """Cluster unit vectors [n, d] as `settings` say; equal seeds give equal labels.

    `true_labels` [n] only add scores. Raises UserError for values that are not finite, for density clustering of too
    many rows without UMAP, and for an eps that reaches too far.
    """
    base = cluster_space(Space(vectors, seed=seed), settings=settings, true_labels=true_labels)
    base.scores["stability"] = measure_stability(vectors, settings=settings, seed=seed, labels=base.labels)
    return base


def cluster_space(
    space: Space, *, settings: VectorSettings, true_labels: Sequence[object] | None = None
) -> BaseClusters:
    """Cluster a space and score it, but for its stability; for callers that try many settings on one space."""
    labels = label_rows(space, settings=settings)
    n_clusters = int(labels.max(initial=NOISE)) + 1
    _log_clusters(labels, n_clusters, space=space, settings=settings)
    scores = measure_clusters(
        space.vectors,
        labels,
        true_labels=true_labels,
        n_neighbors=settings.clustering.coherence_neighbors,
        seed=space.seed,
    )
    return BaseClusters(labels, centroid_directions(space.vectors, labels, n_clusters=n_clusters), scores)


def measure_stability(
    vectors: np.ndarray, *, settings: VectorSettings, seed: int, labels: np.ndarray | None = None
) -> float:
    """Mean adjusted Rand index of clusterings of the same rows by `clustering.stability_runs` seeds; NaN for one.

    NaN too where no row has a direction. `labels` [n] are those of `seed`, where they are known. Of more than 5,000
    rows a sample is clustered. Density clustering of the embeddings themselves draws nothing at random and has
    stability 1.
    """
    n_runs = settings.clustering.stability_runs
    if n_runs < 2 or not vectors.any():
        return math.nan
    if settings.algorithm != "kmeans" and settings.clustering.space == "embeddings":
        return 1.0
    if len(vectors) > STABILITY_ROWS:
        chosen = np.random.default_rng(seed).choice(len(vectors), STABILITY_ROWS, replace=False)
        vectors, labels = vectors[np.sort(chosen)], None
        # One start is what so many rows get in whole, too.
        settings = settings.model_copy(update={"clustering": settings.clustering.model_copy(update={"n_init": 1})})
    known = [] if labels is None else [labels]
    others = [label_rows(Space(vectors, seed=seed + run), settings=settings) for run in range(len(known), n_runs)]
    return mean_agreement([*known, *others])


def centroid_directions(vectors: np.ndarray, labels: np.ndarray, *, n_clusters: int) -> np.ndarray:
    """Mean directions of the clusters of unit vectors [n, d], [n_clusters, d] float32 of unit length."""
    from common.kmeans import unit_rows

    return unit_rows(cluster_sums(vectors, labels, n_clusters))


# --- Evidence for names ----------------------------------------------------------------------------------------------


def members_and_outsiders(
    vectors: np.ndarray, labels: np.ndarray, centroids: np.ndarray, *, n_members: int, n_outsiders: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers of random members of each cluster, and of the rows outside it that are nearest to its centroid.

    `vectors` [n, d] and `centroids` [k, d] are of unit length. Both lists go from near to far. Rows without a direction
    are neither. Members are drawn by seed and cluster, so that those of one cluster do not depend on other clusters.
    Of very many rows and clusters outsiders are sought in the clusters nearest by, which finds nearly all of them.
    """
    found = _outsiders(vectors, labels, centroids, n=n_outsiders, seed=seed)
    groups = []
    for (cluster, own), outsiders in zip(cluster_members(labels, len(centroids)), found, strict=True):
        drawn = _draw(own, n_members, seed=(seed, cluster))
        nearness = vectors[drawn] @ centroids[cluster]
        groups.append((drawn[np.argsort(-nearness, kind="stable")], outsiders))
    return groups


def _outsiders(
    vectors: np.ndarray, labels: np.ndarray, centroids: np.ndarray, *, n: int, seed: int
) -> Iterator[np.ndarray]:
    """Row numbers of the `n` rows outside of each cluster that are nearest to its centroid."""
    directed = np.flatnonzero(vectors.any(axis=1))
    rows = vectors if len(directed) == len(vectors) else vectors[directed]
    for near in nearest_rows(rows, centroids, n, own=labels[directed], seed=seed):
        yield directed[near]


def nearest_members(vectors: np.ndarray, labels: np.ndarray, centroids: np.ndarray, *, n: int) -> list[np.ndarray]:
    """Row numbers of the `n` members of each cluster that are nearest to its centroid, nearest first."""
    nearest = []
    for cluster, own in cluster_members(labels, len(centroids)):
        cosines = vectors[own] @ centroids[cluster]
        nearest.append(own[np.argsort(-cosines, kind="stable")[:n]])
    return nearest


def _draw(rows: np.ndarray, n: int, *, seed: tuple[int, int]) -> np.ndarray:
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(np.random.SeedSequence(seed)).choice(rows, n, replace=False))


def _log_clusters(labels: np.ndarray, n_clusters: int, *, space: Space, settings: VectorSettings) -> None:
    """Say what came out, and what is not as it was asked for."""
    n_rows, n_noise = len(labels), int((labels == NOISE).sum())
    if not n_rows:
        return
    log.info("clusters: %d of %d rows by %s, noise %d", n_clusters, n_rows, settings.algorithm, n_noise)
    if n_clusters == 0:
        log.warning("clusters: all %d rows are noise; %s", n_rows, _what_to_change(settings, space))
    elif settings.algorithm == "kmeans" and isinstance(settings.n_clusters, int) and n_clusters < settings.n_clusters:
        log.warning(
            "clusters: clio.n_clusters is %d, but of %d rows %d differ: %d clusters",
            *(settings.n_clusters, n_rows, space.n_distinct, n_clusters),
        )
    if settings.clustering.space == "umap" and not space.is_umap(settings):
        log.warning("clusters: %d rows that differ are too few for UMAP; the embeddings are used", space.n_distinct)


def _what_to_change(settings: VectorSettings, space: Space) -> str:
    if not len(space.rows):
        return "none has a vector: nothing was extracted"
    if settings.algorithm == "hdbscan":
        return "lower clio.hdbscan_min_cluster_size or clio.clustering.hdbscan_min_samples"
    return "raise clio.clustering.dbscan_eps or lower clio.clustering.dbscan_min_samples"
