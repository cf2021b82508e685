"""Quality as the model itself sees it, on a sample: do clusters cohere, are they apart, do their names tell them apart.

Cohesion: the model scores a cluster and some of its requests from 1 to 5. Separation: is a cluster different from the
one nearest to it. Names: shown a request and the names of five clusters near to it, does the model pick the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_parts.client import LlmClient, LlmRequest
from llm_parts.crew import Talk
from llm_parts.merge import Merger, cluster_similarities
from llm_parts.prompts import PromptContext, build_messages, tagged
from llm_parts.registry import ClusterRecord, normal_name
from llm_parts.requests import Request
from llm_parts.results import Assignment
from llm_parts.schemas import CohesionAnswer, NameCheckAnswer
from llm_parts.shortlist import TextVectors

MEMBERS_FOR_COHESION = 10
MEMBERS_FOR_NAMES = 2
SIBLINGS = 4

COHESION_INSTRUCTIONS = """
You check the quality of a cluster of customer requests. You are shown the cluster and some of its requests.
Score how well the requests belong together and to the cluster's criteria:
5: all are this one intent; 4: one is not; 3: most are; 2: a few are; 1: they have nothing in common.
reasoning: one or two sentences that name the requests that do not belong.
"""

NAME_INSTRUCTIONS = """
You are shown one customer request and the names of several clusters. Choose the cluster whose name says best what this
customer wants. Answer with its cluster_id, copied exactly, or null where no name fits.
"""


@dataclass(frozen=True)
class ClusterCheck:
    """What the model said of one sampled cluster; None where it was not asked or its call failed."""

    cluster_id: str
    cohesion: int | None
    cohesion_reasoning: str
    nearest_id: str | None
    is_separate: bool | None  # from its nearest neighbour
    n_name_checks: int
    n_names_right: int


class QualityChecker:
    """Asks the model about a sample of clusters."""

    def __init__(self, client: LlmClient, vectors: TextVectors, *, context: PromptContext) -> None:
        self._client = client
        self._vectors = vectors
        self._context = context
        self._merger = Merger(vectors, context=context)

    def check(
        self,
        records: Sequence[ClusterRecord],
        assignments: Sequence[Assignment],
        requests: Sequence[Request],
        *,
        n_sampled: int,
    ) -> list[ClusterCheck]:
        """Check `n_sampled` of the clusters that hold requests, spread from the largest to the smallest."""
        members: dict[str, list[Request]] = {}
        for assignment, request in zip(assignments, requests, strict=True):
            if assignment.cluster_id is not None and not request.is_empty:
                members.setdefault(assignment.cluster_id, []).append(request)
        filled = [record for record in records if record.cluster_id in members]
        by_size = sorted(filled, key=lambda record: -len(members[record.cluster_id]))
        sample = _spread(by_size, n_sampled)
        if not sample:
            return []
        neighbours = self._neighbours(filled)
        with self._client.crew() as crew:
            talks = [
                crew.start(self._check(record, members[record.cluster_id], neighbours[record.cluster_id]))
                for record in sample
            ]
            return crew.results(talks)

    def _check(
        self, record: ClusterRecord, members: Sequence[Request], neighbours: Sequence[ClusterRecord]
    ) -> Talk[ClusterCheck]:
        """Ask all there is to ask about one cluster, in two rounds at most."""
        # By id, so that the place in the list does not give the answer away.
        shown = sorted([record, *neighbours], key=lambda one: one.cluster_id)
        shown_members = _spread(members, MEMBERS_FOR_NAMES) if neighbours else []
        names = [self._name_question(request, shown) for request in shown_members]
        cohesion, *chosen = yield [self._cohesion_question(record, members), *names]
        word = None
        if neighbours:
            word = yield from self._merger.compare(record, neighbours[0], step="separation")
        valid = [answer.value.cluster_id for answer in chosen if answer.value is not None]
        return ClusterCheck(
            cluster_id=record.cluster_id,
            cohesion=cohesion.value.score if cohesion.value is not None else None,
            cohesion_reasoning=cohesion.value.reasoning if cohesion.value is not None else "",
            nearest_id=neighbours[0].cluster_id if neighbours else None,
            is_separate=word != "same" if word is not None else None,
            n_name_checks=len(valid),
            n_names_right=valid.count(record.cluster_id),
        )

    def _cohesion_question(self, record: ClusterRecord, members: Sequence[Request]) -> LlmRequest[CohesionAnswer]:
        shown = [request.to_prompt(max_chars=500) for request in _spread(members, MEMBERS_FOR_COHESION)]
        prompt = f"{tagged('clusters', [record.to_prompt()])}\n\n{tagged('requests', shown)}\n\nScore this cluster."
        messages = build_messages(COHESION_INSTRUCTIONS, prompt, context=self._context)
        return LlmRequest(messages, CohesionAnswer, "cohesion", step="cohesion")

    def _name_question(self, request: Request, shown: Sequence[ClusterRecord]) -> LlmRequest[NameCheckAnswer]:
        # The names alone: a description would answer for a name that says nothing.
        cards = [{**record.to_prompt(), "summary": "", "criteria": ""} for record in shown]
        prompt = f"{tagged('clusters', cards)}\n\n{tagged('requests', [request.to_prompt()])}\n\nWhich cluster is it?"
        return LlmRequest(
            build_messages(NAME_INSTRUCTIONS, prompt, context=self._context),
            NameCheckAnswer,
            "name_check",
            step="name_check",
            choices={"cluster_id": [record.cluster_id for record in shown]},
        )

    def _neighbours(self, records: Sequence[ClusterRecord]) -> dict[str, list[ClusterRecord]]:
        """The clusters nearest to each cluster, the nearest first."""
        similarity = cluster_similarities(records, self._vectors)
        np.fill_diagonal(similarity, -2.0)
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(SIBLINGS, len(records) - 1)]
        return {record.cluster_id: [records[column] for column in order[row]] for row, record in enumerate(records)}


def repeated_names(records: Sequence[ClusterRecord]) -> list[str]:
    """Names that more than one cluster bears; the registry lets none through, a file edited by hand may hold some."""
    names = [normal_name(record.name) for record in records]
    return sorted({name for name in names if names.count(name) > 1})


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """At most `n` items, spread evenly from the first to the last."""
    if len(items) <= n:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, n).round()]
