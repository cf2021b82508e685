"""One candidate from settings to score, and what is kept of it.

evaluation, report = evaluate(job, stages)
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.progress import Stopwatch
from common.separation import centroid_cosines, nn_cross_ratio
from common.silhouette import MAX_COMPILED_DIMENSIONS, silhouette_score, silhouettes_from_sums
from image_parts.pipeline import ClusterAssignment
from image_parts.purity import PurityReport, judge_purity
from image_parts.records import NOISE
from image_parts.settings import ImageSettings
from image_parts.tuning.score import score_of
from image_parts.tuning.stages import Held, Stages, embedding_key

log = logging.getLogger(__name__)

# In the order in which tables show them.
METRICS = (
    "max_centroid_cosine",
    "silhouette",
    "max_nn_cross_ratio",
    "silhouette_reduced",
    "noise_share",
    "unassigned_share",
    "n_clusters",
    "largest_share",
)


@dataclass(frozen=True)
class Job:
    """A candidate that is to be evaluated."""

    iteration: int
    phase: int  # 1: on a sample, 2: on all images
    key: str  # the same for candidates that give the same clusters
    choice: dict[str, Any]  # section.param and value, as searched
    settings: ImageSettings  # as run: in phase 1 with sizes that fit the sample
    sample: dict[str, float] | None = None  # fraction and seed of the part that is clustered; None: all images


@dataclass(frozen=True)
class Evaluation:
    """A candidate that was evaluated, or failed; all values are JSON-ready."""

    iteration: int
    phase: int
    key: str
    choice: dict[str, Any]
    settings: dict[str, Any]  # all of them, by section
    sample: dict[str, float] | None = None  # fraction and seed; None: all images
    score: float | None = None
    verdict: str | None = None  # PASS or FAIL, as image_cluster.py says with these settings
    reasons: list[str] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    labels_sha256: str | None = None  # of the label of every image, int64
    error: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; those of mappings are this evaluation's own."""
        return dict(vars(self))  # asdict would copy all settings, a millisecond of every evaluation


class Measures:
    """The measures of label vectors; each distinct one is measured once."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._held, self._held_sums = Held(1 << 28), Held()

    def report(self, settings: ImageSettings, assignment: ClusterAssignment) -> tuple[PurityReport, float]:
        """The purity report as image_cluster.py makes it, and the silhouette in feature space by cosine."""
        sample = self._stages.sample
        digest = labels_digest(assignment.labels)
        name = f"{embedding_key(settings.reduction, sample.vectors.shape)}-{digest}"
        return self._held.get(name, lambda: self._measure(settings, assignment), _n_bytes)

    def _measure(self, settings: ImageSettings, assignment: ClusterAssignment) -> tuple[PurityReport, float]:
        sample, labels, purity = self._stages.sample, assignment.labels, settings.purity
        reduced = self._reduced_silhouette(settings, labels)
        crosses = nn_cross_ratio(self._stages.feature_neighbors(purity).indices, labels)
        of_images = labels[sample.rows]
        report = judge_purity(
            centroid_cosines(sample.vectors, labels),
            reduced,
            crosses,
            labels,
            purity,
            image_sizes=np.bincount(of_images[of_images >= 0], minlength=int(labels.max(initial=NOISE)) + 1),
        )
        return report, silhouette_score(sample.vectors, labels, metric="cosine")

    def _reduced_silhouette(self, settings: ImageSettings, labels: np.ndarray) -> float:
        """As `silhouette_score`, bit for bit, with the sums of a cluster shared by all cuts that have this cluster."""
        embedding, purity = self._stages.embedding(settings.reduction), settings.purity
        inside, size = labels >= 0, purity.silhouette_sample_size
        is_sampled = size is not None and size < int(inside.sum())
        if is_sampled or labels.max(initial=NOISE) < 1 or embedding.shape[1] > MAX_COMPILED_DIMENSIONS:
            return silhouette_score(embedding, labels, metric="euclidean", sample_size=size,
                                    random_state=purity.silhouette_random_state)  # fmt: skip
        key = embedding_key(settings.reduction, self._stages.sample.vectors.shape)
        order, counts = np.argsort(labels, kind="stable"), np.bincount(labels[inside])
        clusters = np.split(order[len(labels) - counts.sum() :], np.cumsum(counts)[:-1])
        sums = np.stack([self._sums_to(key, embedding, members)[inside] for members in clusters], axis=1)
        return float(silhouettes_from_sums(sums, labels[inside], counts).mean())

    def _sums_to(self, key: str, embedding: np.ndarray, members: np.ndarray) -> np.ndarray:
        """The sum of the distances of every row [u] to the rows of one cluster."""
        from common.distance_sums import sum_distances

        def make() -> np.ndarray:
            return sum_distances(embedding, embedding[members], np.array([0, len(members)]))[:, 0]

        digest = hashlib.sha256(members.astype("<i8").tobytes()).hexdigest()
        return self._held_sums.get(f"{key}-{digest}", make, lambda column: column.nbytes)


def evaluate(job: Job, stages: Stages, measures: Measures) -> tuple[Evaluation, PurityReport | None]:
    """Cluster and measure one candidate; what goes wrong with it becomes its `error`.

    Raises OSError where the disk refuses, which no other candidate would mend.
    """
    watch = Stopwatch()
    known: dict[str, Any] = {
        "iteration": job.iteration,
        "phase": job.phase,
        "key": job.key,
        "choice": job.choice,
        "sample": job.sample,
        "settings": job.settings.model_dump(mode="json", exclude={"tuning"}),
    }
    try:
        assignment = stages.cluster(job.settings)
        report, silhouette = measures.report(job.settings, assignment)
    except OSError:
        raise
    except Exception as problem:  # a row with its error: one bad candidate must not end a night of search
        log.debug("iteration %d failed", job.iteration, exc_info=True)
        error = f"{type(problem).__name__}: {problem}"
        return Evaluation(**known, error=error, seconds=round(watch.seconds, 4)), None
    metrics = collect_metrics(report, silhouette, assignment)
    return Evaluation(
        **known,
        score=score_of(metrics, job.settings.tuning.score, job.settings.purity),
        verdict=report.verdict,
        reasons=report.reasons,
        metrics=metrics,
        labels_sha256=labels_digest(assignment.labels[stages.sample.rows]),
        seconds=round(watch.seconds, 4),
    ), report


def collect_metrics(report: PurityReport, silhouette: float, assignment: ClusterAssignment) -> dict[str, float | None]:
    """The measures that the score is made of, and those that tables show."""
    of_report = report.metrics
    return {
        "max_centroid_cosine": of_report["max_centroid_cosine"],
        "silhouette": None if math.isnan(silhouette) else silhouette,
        "max_nn_cross_ratio": of_report["max_nn_cross_ratio"],
        "silhouette_reduced": of_report["silhouette"],
        "noise_share": float((assignment.raw_labels == NOISE).mean()),
        "unassigned_share": of_report["noise_share"],
        "n_clusters": of_report["n_clusters"],
        "largest_share": of_report["largest_share"],
    }


def labels_digest(labels: np.ndarray) -> str:
    """sha256 of the labels of all images [n]."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def _n_bytes(measured: tuple[PurityReport, float]) -> int:
    report, _ = measured
    return 4096 + report.centroid_cosine_matrix.nbytes + 512 * len(report.clusters)
