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
        cohesion = self._ask_cohesion(sample, members)
        neighbours = self._neighbours(filled)
        separation = self._ask_separation(sample, neighbours)
        names = self._ask_names(sample, members, neighbours)
        return [
            ClusterCheck(
                cluster_id=record.cluster_id,
                cohesion=cohesion[record.cluster_id][0],
                cohesion_reasoning=cohesion[record.cluster_id][1],
                nearest_id=next((near.cluster_id for near in neighbours[record.cluster_id]), None),
                is_separate=separation.get(record.cluster_id),
                n_name_checks=names.get(record.cluster_id, (0, 0))[0],
                n_names_right=names.get(record.cluster_id, (0, 0))[1],
            )
            for record in sample
        ]

    def _ask_cohesion(
        self, sample: Sequence[ClusterRecord], members: dict[str, list[Request]]
    ) -> dict[str, tuple[int | None, str]]:
        questions = []
        for record in sample:
            shown = [
                request.to_prompt(max_chars=500)
                for request in _spread(members[record.cluster_id], MEMBERS_FOR_COHESION)
            ]
            prompt = f"{tagged('clusters', [record.to_prompt()])}\n\n{tagged('requests', shown)}\n\nScore this cluster."
            messages = build_messages(COHESION_INSTRUCTIONS, prompt, context=self._context)
            questions.append(LlmRequest(messages, CohesionAnswer, "cohesion", step="cohesion"))
        answers = self._client.ask_many(questions)
        return {
            record.cluster_id: (answer.value.score, answer.value.reasoning) if answer.value is not None else (None, "")
            for record, answer in zip(sample, answers, strict=True)
        }

    def _ask_separation(
        self, sample: Sequence[ClusterRecord], neighbours: dict[str, list[ClusterRecord]]
    ) -> dict[str, bool]:
        merger = Merger(self._client, self._vectors, context=self._context, n_candidates=1, similarity=-1.0)
        asked = [record for record in sample if neighbours[record.cluster_id]]
        words = merger.ask([(record, neighbours[record.cluster_id][0]) for record in asked], step="separation")
        return {record.cluster_id: word != "same" for record, word in zip(asked, words, strict=True)}

    def _ask_names(
        self,
        sample: Sequence[ClusterRecord],
        members: dict[str, list[Request]],
        neighbours: dict[str, list[ClusterRecord]],
    ) -> dict[str, tuple[int, int]]:
        asked: list[str] = []
        questions = []
        for record in sample:
            # By id, so that the place in the list does not give the answer away.
            shown = sorted([record, *neighbours[record.cluster_id]], key=lambda one: one.cluster_id)
            if len(shown) < 2:
                continue
            for request in _spread(members[record.cluster_id], MEMBERS_FOR_NAMES):
                questions.append(self._name_question(request, shown))
                asked.append(record.cluster_id)
        counts: dict[str, tuple[int, int]] = {}
        for cluster_id, answer in zip(asked, self._client.ask_many(questions), strict=True):
            if answer.value is not None:
                n_asked, n_right = counts.get(cluster_id, (0, 0))
                counts[cluster_id] = (n_asked + 1, n_right + (answer.value.cluster_id == cluster_id))
        return counts

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
