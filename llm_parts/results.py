"""What clustering gives back: one assignment per request, in the order of the input, and the clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llm_parts.registry import ClusterRecord, ClusterRegistry

if TYPE_CHECKING:
    import pandas as pd

Outcome = Literal["assign", "kept", "new_cluster", "skip", "quarantined", "empty"]

RESULT_COLUMNS = ("request_id", "cluster_id", "name", "confidence", "rationale", "decision", "batch", "batch_number")


@dataclass(frozen=True)
class Assignment:
    """What became of one request.

    decision: assign (to cluster_id), kept (as a previous result had it), new_cluster (a clear intent for which no
    cluster was made), skip (no intent could be told), quarantined (the model failed), empty (no text).
    """

    position: int  # row of the whole input
    request_id: str
    cluster_id: str | None
    confidence: float | None
    rationale: str
    decision: Outcome
    batch_number: int


@dataclass(frozen=True)
class Change:
    """A request whose cluster is another one than before, and why."""

    request_id: str
    before: str | None
    after: str | None
    reason: str


@dataclass(frozen=True)
class ClusteringResult:
    """The result of a whole run; `coverage` is the percentage of requests in a cluster, 0 to 100."""

    batch_id: str
    assignments: pd.DataFrame  # RESULT_COLUMNS, one row per row of the input, in its order
    clusters: list[ClusterRecord]  # by frequency
    coverage: float
    metrics: dict[str, Any]
    total_requests: int
    assigned_requests: int
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class PartialResult:
    """The result of one batch of a run that may be stopped after it.

    `revised` holds the rows of earlier batches that changed since: a rare request that found a cluster at last, or a
    cluster that was merged.
    """

    batch_number: int  # from 1
    batch_id: str
    assignments: pd.DataFrame  # the rows of this batch
    new_clusters: list[ClusterRecord]
    processed_rows: int  # of the whole input, so far
    total_rows: int
    revised: pd.DataFrame


def to_rows(assignments: Sequence[Assignment], registry: ClusterRegistry, *, batch_id: str) -> list[dict[str, Any]]:
    """Assignments as rows of RESULT_COLUMNS, each with the present name of its cluster."""
    return [
        {
            "request_id": assignment.request_id,
            "cluster_id": assignment.cluster_id,
            "name": registry.get(assignment.cluster_id).name if assignment.cluster_id is not None else None,
            "confidence": assignment.confidence,
            "rationale": assignment.rationale,
            "decision": assignment.decision,
            "batch": batch_id,
            "batch_number": assignment.batch_number,
        }
        for assignment in assignments
    ]


def to_frame(
    assignments: Sequence[Assignment], registry: ClusterRegistry, *, batch_id: str, index: Any = None
) -> pd.DataFrame:
    """Assignments as a data frame of RESULT_COLUMNS, with the index of the rows they came from."""
    import pandas as pd

    frame = pd.DataFrame(to_rows(assignments, registry, batch_id=batch_id), columns=list(RESULT_COLUMNS))
    frame = frame.astype({"cluster_id": "object", "name": "object", "confidence": "float64"})
    if index is not None:
        frame.index = index
    return frame


def coverage_of(assignments: Sequence[Assignment]) -> float:
    """The percentage of requests that are in a cluster; 0 where there are none."""
    if not assignments:
        return 0.0
    return 100.0 * sum(assignment.cluster_id is not None for assignment in assignments) / len(assignments)
