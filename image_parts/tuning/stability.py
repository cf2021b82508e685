"""Whether a candidate's clusters come back with other UMAP seeds.

UMAP's embedding depends on its seed, and HDBSCAN turns small differences into other clusters. A candidate that a seed
flips won by luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import EngineSettings
from common.engine import map_items
from common.quality import Contingency
from image_parts.scan import n_workers_of
from image_parts.settings import ImageSettings
from image_parts.tuning.evaluate import Evaluation, collect_metrics
from image_parts.tuning.samples import SampleHandle, Samples, open_stages
from image_parts.tuning.score import score_of
from image_parts.tuning.space import SearchSpace


@dataclass(frozen=True)
class Stability:
    """How one candidate fared with other seeds."""

    iteration: int
    seeds: tuple[int, ...]
    aris: tuple[float, ...]  # with the clusters of the candidate itself; noise counts as a cluster
    scores: tuple[float, ...]
    n_clusters: tuple[int, ...]
    min_ari: float  # what was asked for

    @property
    def is_stable(self) -> bool:
        """Whether no seed flips it."""
        return min(self.aris) >= self.min_ari

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "mean_ari": float(np.mean(self.aris)),
            "least_ari": min(self.aris),
            "mean_score": float(np.mean(self.scores)),
            "stable": self.is_stable,
            "seeds": list(self.seeds),
            "aris": list(self.aris),
            "scores": list(self.scores),
            "n_clusters": list(self.n_clusters),
        }


@dataclass(frozen=True)
class _Repeat:
    sample: SampleHandle
    settings: ImageSettings
    seed: int


def measure_stability(candidates: Sequence[Evaluation], space: SearchSpace, samples: Samples) -> dict[int, Stability]:
    """Cluster each candidate again with other UMAP seeds; by iteration."""
    tuning = space.base.tuning
    repeats = []
    for candidate in candidates:
        settings = space.settings_of(candidate.choice)
        own = settings.reduction.random_state or 0
        for offset in range(1, tuning.stability_seeds + 1):
            repeats.append(_Repeat(samples.of(settings), settings, own + offset))
    n_workers = min(n_workers_of(tuning.n_jobs), max(1, len(repeats)))
    compared = map_items(_compare, repeats, EngineSettings(n_jobs=n_workers, timeout_s=24 * 3600.0))
    found = {}
    for place, candidate in enumerate(candidates):
        part = slice(place * tuning.stability_seeds, (place + 1) * tuning.stability_seeds)
        aris, scores, counts = zip(*compared[part], strict=True)
        seeds = tuple(repeat.seed for repeat in repeats[part])
        found[candidate.iteration] = Stability(
            candidate.iteration, seeds, aris, scores, counts, tuning.stability_min_ari
        )
    return found


def adjusted_rand(left: np.ndarray, right: np.ndarray) -> float:
    """ARI of two label vectors [n]; noise is a cluster like any other."""
    counts = Contingency()
    counts.update(left + 1, right + 1)
    return counts.agreement().ari


def _compare(repeat: _Repeat) -> tuple[float, float, int]:
    """ARI with the candidate itself, score, and number of clusters."""
    stages, measures = open_stages(repeat.sample)
    rows = stages.sample.rows
    values = repeat.settings.model_dump()
    values["reduction"]["random_state"] = repeat.seed
    settings = ImageSettings.model_validate(values)
    assignment = stages.cluster(settings)
    ari = adjusted_rand(stages.cluster(repeat.settings).labels[rows], assignment.labels[rows])
    report, silhouette = measures.report(settings, assignment)
    metrics = collect_metrics(report, silhouette, assignment)
    return ari, score_of(metrics, settings.tuning.score, settings.purity), int(metrics["n_clusters"] or 0)
