"""Who was assigned where: entered by one writer, counted in the registry, and compared with an earlier result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from llm_parts.judge import Verdict
from llm_parts.registry import ClusterRegistry
from llm_parts.requests import Request
from llm_parts.results import Assignment, Change, Outcome

log = logging.getLogger(__name__)


class AssignmentBook:
    """The assignments of a run by position, and which of them changed since somebody asked.

    `previous` maps request ids to the clusters that an earlier result gave them: these stay without a question, and
    are counted anew only with `count_kept`.
    """

    def __init__(
        self, registry: ClusterRegistry, *, batch_id: str, previous: Mapping[str, str | None], count_kept: bool
    ) -> None:
        self.assignments: dict[int, Assignment] = {}  # by position
        self.changes: list[Change] = []  # from the earlier result
        self._registry = registry
        self._batch_id = batch_id
        self._previous = previous
        self._count_kept = count_kept
        self._changed: set[int] = set()  # positions
        self._batch_numbers: dict[int, int] = {}  # position -> number of its batch

    def begin(self, requests: Sequence[Request], *, batch_number: int) -> list[Request]:
        """Enter what needs no question; returns the requests that need one."""
        self._batch_numbers.update((request.position, batch_number) for request in requests)
        return [request for request in requests if not self._settle_without_asking(request)]

    def enter(self, requests: Sequence[Request], verdicts: Sequence[Verdict]) -> None:
        """Enter verdicts, and count the requests of each cluster in the order of the input."""
        members: dict[str, list[str]] = {}
        for request, verdict in zip(requests, verdicts, strict=True):
            self._assign(request, verdict.cluster_id, verdict.decision, verdict.confidence, verdict.rationale)
            if verdict.cluster_id is not None:
                members.setdefault(verdict.cluster_id, []).append(request.text)
        for cluster_id, texts in members.items():
            self._registry.add_requests(cluster_id, n=len(texts), samples=texts, batch_id=self._batch_id)

    def take_changes(self) -> list[Assignment]:
        """The assignments that are new, or other ones, since this was last asked; in the order of the input."""
        changed, self._changed = sorted(self._changed), set()
        return [self.assignments[position] for position in changed]

    def follow_merges(self) -> None:
        """Put the requests of merged clusters into those that took them in."""
        for position, assignment in self.assignments.items():
            target = self._registry.resolve(assignment.cluster_id)
            if target != assignment.cluster_id:
                self.assignments[position] = replace(assignment, cluster_id=target)
                self._changed.add(position)

    def note_changes(self) -> None:
        """List the requests that an earlier result had elsewhere, and log each."""
        for position in sorted(self.assignments):
            assignment = self.assignments[position]
            before = self._previous.get(assignment.request_id)
            if before is None or before == assignment.cluster_id:
                continue
            kept = assignment.decision == "kept"
            reason = assignment.rationale if kept else f"cluster {before} is not known any more"
            self.changes.append(Change(assignment.request_id, before, assignment.cluster_id, reason))
            log.info("request %s: %s -> %s (%s)", assignment.request_id, before, assignment.cluster_id, reason)

    def _settle_without_asking(self, request: Request) -> bool:
        """Whether a request needs no question: it has no text, or an earlier result holds."""
        if request.is_empty:
            self._assign(request, None, "empty", None, "the request has no text")
            return True
        before = self._previous.get(request.request_id)
        after = self._registry.resolve(before)
        if after is None:
            return False
        reason = "kept" if after == before else f"cluster {before} was merged into {after}"
        self._assign(request, after, "kept", None, reason)
        if self._count_kept:
            self._registry.add_requests(after, n=1, samples=[request.text], batch_id=self._batch_id)
        return True

    def _assign(
        self, request: Request, cluster_id: str | None, decision: Outcome, confidence: float | None, rationale: str
    ) -> None:
        position = request.position
        before = self.assignments.get(position)
        if before is None or (before.cluster_id, before.decision) != (cluster_id, decision):
            self._changed.add(position)
        self.assignments[position] = Assignment(
            position, request.request_id, cluster_id, confidence, rationale, decision, self._batch_numbers[position]
        )
