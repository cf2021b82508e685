"""How well clusters agree with labels, beside what k-means on the same embeddings gives for nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from llm_parts.requests import Request
from llm_parts.results import Assignment
from llm_parts.shortlist import TextVectors

SCORES = ("ari", "nmi", "ami", "accuracy", "purity", "v_measure", "n_clusters", "n_labels", "n_scored")


def compare_with_baseline(
    assignments: Sequence[Assignment], requests: Sequence[Request], vectors: TextVectors
) -> dict[str, Any]:
    """Scores of our clusters, of k-means with as many clusters, and of k-means with as many clusters as labels.

    Over the requests that have a label and a text; {} where none has. k-means sees every one of them, we are scored on
    those we assigned, and `coverage` says how many that is.
    """
    rows = [row for row, request in enumerate(requests) if request.label is not None and not request.is_empty]
    if not rows:
        return {}
    labels = [requests[row].label for row in rows]
    numbers: dict[str, int] = {}
    ours = [
        -1 if (cluster_id := assignments[row].cluster_id) is None else numbers.setdefault(cluster_id, len(numbers))
        for row in rows
    ]
    points = vectors.of([requests[row].text for row in rows])  # [n, d]
    result = {"ours": _scores(ours, labels)}
    for name, k in (("kmeans_same_k", len(numbers)), ("kmeans_true_k", len(set(labels)))):
        if 1 <= k <= len(rows):
            result[name] = _scores(_kmeans_labels(points, n_clusters=k), labels)
    return result


def _kmeans_labels(points: np.ndarray, *, n_clusters: int) -> np.ndarray:
    from common.kmeans import assign, train_lloyd

    trained = train_lloyd(lambda: iter([points]), n_clusters=n_clusters, max_epochs=100, tol=1e-4, random_state=0)
    return assign(points, trained.centroids)[0]


def _scores(clusters: Any, labels: Sequence[str | None]) -> dict[str, Any]:
    from common.quality import Contingency

    counts = Contingency()
    counts.update(np.asarray(clusters, np.int64), labels)
    scores = asdict(counts.agreement())
    kept = {name: scores[name] for name in (*SCORES, "coverage")}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in kept.items()}
