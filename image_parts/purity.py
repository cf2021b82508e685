"""How clean clusters are, judged without true labels.

    report = measure_purity(features.vectors, reduced.embedding, assignment.labels, settings.purity)
    report.verdict, report.metrics["silhouette"]

Three measures, each with a threshold. `max_centroid_cosine`: the cosine of the two most similar clusters, between their
mean feature vectors. `silhouette`: in the reduced space, euclidean, noise left out. `max_nn_cross_ratio`: of the worst
cluster, the mean share of the nearest images (by cosine of the features) that lie in other clusters.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.neighbors import Neighbors, exact_neighbors
from common.separation import CentroidCosines, CrossRatios, centroid_cosines, nn_cross_ratio
from common.silhouette import silhouette_score
from image_parts.records import NOISE, cluster_name, number_or_none
from image_parts.settings import PuritySettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterPurity:
    """One cluster beside its neighbours."""

    cluster: str
    size: int  # images, duplicates too
    n_distinct: int
    nearest_cluster: str | None  # by the cosine of the centroids
    nearest_cosine: float | None
    cross_ratio: float
    dominant_neighbor: str | None  # the other cluster that holds most of its foreign neighbours


@dataclass(frozen=True)
class PurityReport:
    """The measures, what they were held against, and the verdict."""

    verdict: str  # PASS or FAIL
    reasons: list[str]  # why it failed
    metrics: dict[str, float | None]  # None where undefined, as with a single cluster
    thresholds: dict[str, float]
    clusters: list[ClusterPurity]
    leakage_candidates: list[dict[str, Any]]  # pairs of clusters that may be one
    centroid_cosine_matrix: np.ndarray  # [k, k] float64

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; the matrix has a file of its own."""
        values = {name: value for name, value in self.__dict__.items() if name != "centroid_cosine_matrix"}
        return {**values, "clusters": [dict(vars(cluster)) for cluster in self.clusters]}


def measure_purity(
    vectors: np.ndarray,
    embedding: np.ndarray,
    labels: np.ndarray,
    settings: PuritySettings,
    *,
    image_sizes: np.ndarray | None = None,
    neighbors: Neighbors | None = None,
    device: str = "cpu",
) -> PurityReport:
    """Measure clusters of distinct images: `vectors` [u, d], `embedding` [u, e], `labels` [u] with NOISE.

    `image_sizes` [n_clusters] counts the images of each cluster with their duplicates. `neighbors` is what
    `feature_neighbors` gave, for callers that have it.
    """
    neighbors = neighbors or feature_neighbors(vectors, settings, device=device)
    cosines = centroid_cosines(vectors, labels)
    silhouette = silhouette_score(
        embedding,
        labels,
        metric="euclidean",
        sample_size=settings.silhouette_sample_size,
        random_state=settings.silhouette_random_state,
    )
    return judge_purity(cosines, silhouette, nn_cross_ratio(neighbors.indices, labels), labels, settings, image_sizes)


def feature_neighbors(vectors: np.ndarray, settings: PuritySettings, *, device: str = "cpu") -> Neighbors:
    """The nearest images of each image by the cosine of their features; depends on no clustering."""
    return exact_neighbors(vectors, min(settings.k_neighbors, len(vectors) - 1), metric="cosine", device=device)


def judge_purity(
    cosines: CentroidCosines,
    silhouette: float,
    crosses: CrossRatios,
    labels: np.ndarray,
    settings: PuritySettings,
    image_sizes: np.ndarray | None = None,
) -> PurityReport:
    """Hold measures against the thresholds; for callers that have the measures already."""
    sizes = np.bincount(labels[labels >= 0], minlength=len(cosines.cluster_ids))
    metrics: dict[str, float | None] = {
        "max_centroid_cosine": number_or_none(cosines.max_cosine),
        "silhouette": number_or_none(silhouette),
        "max_nn_cross_ratio": number_or_none(crosses.max_ratio),
        "n_clusters": len(sizes),
        "noise_share": float((labels == NOISE).mean()) if len(labels) else 0.0,
        "largest_share": float(sizes.max(initial=0) / max(len(labels), 1)),
    }
    reasons = _reasons(metrics, settings)
    return PurityReport(
        verdict="FAIL" if reasons else "PASS",
        reasons=reasons,
        metrics=metrics,
        thresholds={
            "max_centroid_cosine": settings.max_centroid_cosine,
            "min_silhouette": settings.min_silhouette,
            "max_nn_cross_ratio": settings.max_nn_cross_ratio,
        },
        clusters=_describe_clusters(cosines, crosses, sizes, sizes if image_sizes is None else image_sizes),
        leakage_candidates=_leakage_candidates(cosines, crosses, settings),
        centroid_cosine_matrix=cosines.matrix,
    )


def _reasons(metrics: dict[str, float | None], settings: PuritySettings) -> list[str]:
    cosine, silhouette = metrics["max_centroid_cosine"], metrics["silhouette"]
    cross = metrics["max_nn_cross_ratio"]
    if not metrics["n_clusters"]:
        return ["there is no cluster: all images are noise"]
    reasons = []
    if cosine is None or silhouette is None:
        reasons.append("there is only one cluster, so separation cannot be measured")
    if cosine is not None and cosine > settings.max_centroid_cosine:
        reasons.append(f"max_centroid_cosine {cosine:.4f} is above {settings.max_centroid_cosine:g}")
    if silhouette is not None and silhouette < settings.min_silhouette:
        reasons.append(f"silhouette {silhouette:.4f} is below {settings.min_silhouette:g}")
    if cross is not None and cross > settings.max_nn_cross_ratio:
        reasons.append(f"max_nn_cross_ratio {cross:.4f} is above {settings.max_nn_cross_ratio:g}")
    return reasons


def _describe_clusters(
    cosines: CentroidCosines, crosses: CrossRatios, sizes: np.ndarray, image_sizes: np.ndarray
) -> list[ClusterPurity]:
    others = cosines.matrix.copy()
    np.fill_diagonal(others, -np.inf)
    rows = []
    for position, cluster in enumerate(cosines.cluster_ids):
        nearest = int(others[position].argmax()) if len(others) > 1 else None
        dominant = int(crosses.dominant_neighbors[position])
        rows.append(
            ClusterPurity(
                cluster=cluster_name(int(cluster)),
                size=int(image_sizes[cluster]),
                n_distinct=int(sizes[cluster]),
                nearest_cluster=None if nearest is None else cluster_name(int(cosines.cluster_ids[nearest])),
                nearest_cosine=None if nearest is None else float(others[position, nearest]),
                cross_ratio=float(crosses.ratios[position]),
                dominant_neighbor=cluster_name(dominant) if dominant >= 0 else None,
            )
        )
    return rows


def _leakage_candidates(
    cosines: CentroidCosines, crosses: CrossRatios, settings: PuritySettings
) -> list[dict[str, Any]]:
    """Pairs of clusters that look like one, the most alike first."""
    ids, found = cosines.cluster_ids, []
    for left, right in zip(*np.triu_indices(len(ids), k=1), strict=True):
        if cosines.matrix[left, right] > settings.max_centroid_cosine:
            found.append((ids[left], ids[right], "centroids are alike", cosines.matrix[left, right]))
    for place in np.flatnonzero(crosses.ratios > settings.max_nn_cross_ratio):
        other = crosses.dominant_neighbors[place]
        found.append((ids[place], other, "neighbours lie in the other cluster", crosses.ratios[place]))
    found.sort(key=lambda candidate: -candidate[3])
    return [
        {"clusters": [cluster_name(int(one)), cluster_name(int(other))], "reason": reason, "value": float(value)}
        for one, other, reason, value in found
    ]
