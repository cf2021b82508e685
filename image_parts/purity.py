"""How clean clusters are without true labels, and how right they are with them.

    report = measure_purity(features.vectors, reduced.embedding, assignment.labels, settings.purity)
    report.verdict, report.metrics["silhouette"]

Three measures, each with a threshold. `max_centroid_cosine`: the cosine of the two most similar clusters, between their
mean feature vectors. `silhouette`: in the reduced space, euclidean, noise left out. `max_nn_cross_ratio`: of the worst
cluster, the mean share of the nearest images (by cosine of the features) that lie in other clusters.
"""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import UserError
from common.neighbors import Neighbors, exact_neighbors
from common.quality import Agreement, Contingency
from common.separation import CentroidCosines, CrossRatios, centroid_cosines, nn_cross_ratio
from common.silhouette import silhouette_score
from image_parts.records import NOISE, ImageRecord, cluster_name
from image_parts.settings import PuritySettings

log = logging.getLogger(__name__)

PARENT_FOLDER = "parent_folder"


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
        return {**values, "clusters": [asdict(cluster) for cluster in self.clusters]}


@dataclass(frozen=True)
class TrueLabels:
    """The label of each image, and where they came from."""

    labels: list[str | None]  # [n]
    source: str
    n_unmatched: int  # rows of the CSV that name no image


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
        "max_centroid_cosine": _number(cosines.max_cosine),
        "silhouette": _number(silhouette),
        "max_nn_cross_ratio": _number(crosses.max_ratio),
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


def read_truth(records: Sequence[ImageRecord], source: str, *, input_dir: Path, image_subdir: str) -> TrueLabels:
    """True labels of images: the name of their parent folder, or a CSV with the columns `path` and `label`.

    A parent folder called `image_subdir` is passed over, as it only parts images from labels. Paths in the CSV are
    relative to `input_dir` or absolute; a bare file name does where it is unique.

    Raises UserError where the CSV cannot be used or names none of the images.
    """
    if source == PARENT_FOLDER:
        return TrueLabels([_folder_label(record.relative_path, image_subdir) for record in records], source, 0)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"purity.truth {path} is no file; give a CSV with the columns path and label, or parent_folder")
    given = _read_label_csv(path)
    by_name = Counter(Path(record.relative_path).name for record in records)
    labels: list[str | None] = []
    used: set[str] = set()
    for record in records:
        name = Path(record.relative_path).name
        candidates = [record.relative_path, str(record.path), *([name] if by_name[name] == 1 else [])]
        match = next((candidate for candidate in candidates if candidate in given), None)
        labels.append(given[match] if match is not None else None)
        used |= {match} if match is not None else set()
    if records and not used:
        raise UserError(
            f"purity.truth {path}: none of its {len(given)} paths is one of the {len(records)} images, such as "
            f"{records[0].relative_path}; give paths relative to {input_dir}"
        )
    return TrueLabels(labels, str(path), len(given.keys() - used))


def compare_with_truth(labels: np.ndarray, truth: TrueLabels) -> dict[str, Any]:
    """NMI, ARI, ACC and purity of all images against true labels.

    ACC counts labelled images that are noise as wrong; the other scores leave noise out, and `coverage` says how much
    that is.
    """
    counts = Contingency()
    counts.update(labels, truth.labels)
    scores: Agreement = counts.agreement()
    return {
        "source": truth.source,
        "n_images": scores.n_rows,
        "n_labeled": scores.n_scored + scores.n_without_cluster,
        "n_unmatched": truth.n_unmatched,
        "n_labels": scores.n_labels,
        "n_clusters": scores.n_clusters,
        "acc": _number(scores.accuracy * scores.coverage),
        "nmi": _number(scores.nmi),
        "ari": _number(scores.ari),
        "ami": _number(scores.ami),
        "purity": _number(scores.purity),
        "coverage": _number(scores.coverage),
    }


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
    ids = cosines.cluster_ids
    found = []
    for left, right in zip(*np.triu_indices(len(ids), k=1), strict=True):
        if cosines.matrix[left, right] > settings.max_centroid_cosine:
            found.append(
                {
                    "clusters": [cluster_name(int(ids[left])), cluster_name(int(ids[right]))],
                    "reason": "centroids are alike",
                    "value": float(cosines.matrix[left, right]),
                }
            )
    for position in np.flatnonzero(crosses.ratios > settings.max_nn_cross_ratio):
        pair = (int(ids[position]), int(crosses.dominant_neighbors[position]))
        found.append(
            {
                "clusters": [cluster_name(number) for number in pair],
                "reason": "neighbours lie in the other cluster",
                "value": float(crosses.ratios[position]),
            }
        )
    return sorted(found, key=lambda candidate: -float(str(candidate["value"])))


def _folder_label(relative_path: str, image_subdir: str) -> str | None:
    folders = [part for part in Path(relative_path).parts[:-1] if part != image_subdir]
    return folders[-1] if folders else None


def _read_label_csv(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            if not {"path", "label"} <= set(columns):
                raise UserError(f"purity.truth {path} has the columns {columns}; it needs path and label")
            return {row["path"]: row["label"] for row in reader}
    except (UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"purity.truth {path} cannot be read: {problem}; save it as CSV in UTF-8") from None


def _number(value: float) -> float | None:
    """NaN, which JSON does not know, as None."""
    return None if math.isnan(value) else float(value)
