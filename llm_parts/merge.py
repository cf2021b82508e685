"""Merging: a proposed cluster that is known already becomes another name of the known one.

Candidates come by embedding, the model decides: same, part of or different. "Same" must be said twice, the second time
with the two clusters changed about, because one wrong "same" loses a cluster for good. Pairs are asked many at a time;
then one writer goes through the proposals in their order, so that it does not matter which answer came first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_parts.client import LlmClient, LlmRequest
from llm_parts.prompts import PromptContext, build_messages, tagged
from llm_parts.registry import ClusterRecord, normal_name
from llm_parts.schemas import MergeAnswer
from llm_parts.shortlist import TextVectors, mean_rows, search_texts

N_EXAMPLES = 3

INSTRUCTIONS = """
You compare two clusters of customer requests. A cluster is one intent: what the customer wants done or answered.

You are shown two clusters, each with its criteria and a few requests. Decide:
- same: both are the same intent in other words; one procedure answers all of their requests.
- part_of: every request of the first belongs to the second as well, and the second is wider.
- different: anything else, however close the topics are.
reasoning: one or two sentences, first what they share, then what divides them.
"""


@dataclass(frozen=True)
class MergeDecision:
    """What was decided on one proposal: the cluster it is the same as, or the wider one it is a part of, or neither."""

    same_as: str | None = None
    part_of: str | None = None


class Merger:
    """Finds the clusters that are one and the same."""

    instructions = INSTRUCTIONS

    def __init__(
        self, client: LlmClient, vectors: TextVectors, *, context: PromptContext, n_candidates: int, similarity: float
    ) -> None:
        self._client = client
        self._vectors = vectors
        self._context = context
        self._n_candidates = n_candidates
        self._similarity = similarity

    def build_prompt(self, clusters: Sequence[Mapping[str, Any]]) -> str:
        """The user message: the two clusters to compare."""
        return f"{tagged('clusters', clusters)}\n\nIs the first the same as the second, a part of it, or different?"

    def decide(self, known: Sequence[ClusterRecord], new: Sequence[ClusterRecord]) -> dict[str, MergeDecision]:
        """For each new cluster, what it is to the known ones and to the new ones before it.

        All are compared with their nearest first; only those that are not the same go on to their second nearest.
        """
        records = [*known, *new]
        candidates = self._candidates(records, n_known=len(known))
        same: dict[int, int] = {}
        wider: dict[int, int] = {}
        for place in range(self._n_candidates):
            rows = [row for row, columns in candidates.items() if row not in same and place < len(columns)]
            words = self.ask([(records[row], records[candidates[row][place]]) for row in rows])
            for row, word in zip(rows, words, strict=True):
                if word == "same":
                    same[row] = candidates[row][place]
                elif word == "part_of":
                    wider.setdefault(row, candidates[row][place])
        return {
            records[row].cluster_id: MergeDecision(
                same_as=records[same[row]].cluster_id if row in same else None,
                part_of=records[wider[row]].cluster_id if row in wider and row not in same else None,
            )
            for row in range(len(known), len(records))
        }

    def ask(self, pairs: Sequence[tuple[ClusterRecord, ClusterRecord]], *, step: str = "merge") -> list[str]:
        """same, part_of or different for each pair; a call that was quarantined leaves its pair different."""
        words = self._ask_once(pairs, step)
        agreed = [row for row, word in enumerate(words) if word == "same"]
        again = self._ask_once([(pairs[row][1], pairs[row][0]) for row in agreed], step)
        for row, word in zip(agreed, again, strict=True):
            words[row] = word if word == "same" else "different"
        return words

    def _ask_once(self, pairs: Sequence[tuple[ClusterRecord, ClusterRecord]], step: str) -> list[str]:
        answers = self._client.ask_many([self._question(first, second, step) for first, second in pairs])
        return [answer.value.decision if answer.value is not None else "different" for answer in answers]

    def _question(self, first: ClusterRecord, second: ClusterRecord, step: str) -> LlmRequest[MergeAnswer]:
        prompt = self.build_prompt([_card(first), _card(second)])
        return LlmRequest(
            build_messages(self.instructions, prompt, context=self._context), MergeAnswer, "merge", step=step
        )

    def _candidates(self, records: Sequence[ClusterRecord], *, n_known: int) -> dict[int, list[int]]:
        """For each new record the records before it that it may be, nearest first; one of its name always may."""
        if self._n_candidates == 0 or len(records) == n_known:
            return {}
        similarity = cluster_similarities(records, self._vectors)
        names = [normal_name(record.name) for record in records]
        candidates = {}
        for row in range(n_known, len(records)):
            scores = similarity[row, :row].copy()
            scores[[column for column in range(row) if names[column] == names[row]]] = 2.0  # above every cosine
            nearest = np.argsort(-scores, kind="stable")[: self._n_candidates]
            candidates[row] = [int(column) for column in nearest if scores[column] >= self._similarity]
        return candidates


def cluster_similarities(records: Sequence[ClusterRecord], vectors: TextVectors) -> np.ndarray:
    """How near clusters are to each other [c, c]: the better cosine of their descriptions and of their means."""
    texts = [search_texts(record) for record in records]
    flat = vectors.of([text for group in texts for text in group])
    starts = np.cumsum([0, *(len(group) for group in texts)])[:-1]
    described = flat[starts + 1]  # the second text is name, summary and criteria
    means = mean_rows(flat, starts)
    return np.round(np.maximum(described @ described.T, means @ means.T), 4)


def _card(record: ClusterRecord) -> dict[str, Any]:
    return {**record.to_prompt(), "examples": [text[:300] for text in record.sample_requests[:N_EXAMPLES]]}
