"""Merging: a proposed cluster that is known already becomes another name of the known one.

Candidates come by embedding, the model decides: same, part of or different. "Same" must be said twice, the second time
with the two clusters changed about, because one wrong "same" loses a cluster for good. Proposals of one answer are not
compared with each other: the model has just told them apart. Should it have been wrong, they are found to be twins at
the end, when the requests of both are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.threads import one_blas_thread
from llm_parts.client import LlmRequest
from llm_parts.crew import Talk
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
        self, vectors: TextVectors, *, context: PromptContext, n_candidates: int = 1, similarity: float = -1.0
    ) -> None:
        self._vectors = vectors
        self._context = context
        self._n_candidates = n_candidates
        self._similarity = similarity

    @property
    def merges(self) -> bool:
        """Whether clusters are compared at all: with `merge_candidates: 0` they are not."""
        return self._n_candidates > 0

    def build_prompt(self, clusters: Sequence[Mapping[str, Any]]) -> str:
        """The user message: the two clusters to compare."""
        return f"{tagged('clusters', clusters)}\n\nIs the first the same as the second, a part of it, or different?"

    def nearest(self, known: Sequence[ClusterRecord], new: Sequence[ClusterRecord]) -> list[list[ClusterRecord]]:
        """For each new cluster the known ones that it may be, nearest first; one of its name always is the first."""
        if not known or not new:
            return [[] for _ in new]
        similarity = cluster_similarities([*known, *new], self._vectors)[len(known) :, : len(known)]  # [new, known]
        names = np.array([normal_name(record.name) for record in known])
        for row, record in zip(similarity, new, strict=True):
            row[names == normal_name(record.name)] = 2.0  # above every cosine
        order = np.argsort(-similarity, axis=1, kind="stable")
        return [
            [known[column] for column in columns if row[column] >= self._similarity]
            for row, columns in zip(similarity, order, strict=True)
        ]

    def decide(self, record: ClusterRecord, nearest: Sequence[ClusterRecord]) -> Talk[MergeDecision]:
        """Compare a new cluster with the few known ones nearest to it, until it is the same as one."""
        part_of = None
        for other in nearest[: self._n_candidates]:
            word = yield from self.compare(record, other)
            if word == "same":
                return MergeDecision(same_as=other.cluster_id)
            if word == "part_of":
                part_of = part_of or other.cluster_id
        return MergeDecision(part_of=part_of)

    def compare(self, first: ClusterRecord, second: ClusterRecord, *, step: str = "merge") -> Talk[str]:
        """same, part_of or different for a pair; a call that was quarantined leaves it different."""
        (answer,) = yield [self._question(first, second, step)]
        word = answer.value.decision if answer.value is not None else "different"
        if word != "same":
            return word
        (answer,) = yield [self._question(second, first, step)]
        agrees = answer.value is not None and answer.value.decision == "same"
        return "same" if agrees else "different"

    def _question(self, first: ClusterRecord, second: ClusterRecord, step: str) -> LlmRequest[MergeAnswer]:
        prompt = self.build_prompt([_card(first), _card(second)])
        return LlmRequest(
            build_messages(self.instructions, prompt, context=self._context), MergeAnswer, "merge", step=step
        )


def cluster_similarities(records: Sequence[ClusterRecord], vectors: TextVectors) -> np.ndarray:
    """How near clusters are to each other [c, c]: the better cosine of their descriptions and of their means."""
    texts = [search_texts(record) for record in records]
    flat = vectors.of([text for group in texts for text in group])
    starts = np.cumsum([0, *(len(group) for group in texts)])[:-1]
    described = flat[starts + 1]  # the second text is name, summary and criteria
    means = mean_rows(flat, starts)
    with one_blas_thread():
        return np.round(np.maximum(described @ described.T, means @ means.T), 4)


def _card(record: ClusterRecord) -> dict[str, Any]:
    return {**record.to_prompt(), "examples": [text[:300] for text in record.sample_requests[:N_EXAMPLES]]}
