"""The Proposer: sees a batch of requests beside the known clusters nearest to them, and proposes those that lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_parts.client import Answer, LlmRequest
from llm_parts.prompts import PromptContext, build_messages, tagged
from llm_parts.registry import (
    MAX_NAME_CHARS,
    MAX_TEXT_CHARS,
    ClusterRecord,
    ClusterRegistry,
    clean_line,
    make_cluster_id,
    normal_name,
)
from llm_parts.requests import Request
from llm_parts.schemas import ProposerAnswer

# All requests of one proposal together; each is cut to its share, so that a batch fits a small context window.
MAX_CHARS_OF_ALL = 24_000
MIN_CHARS_OF_EACH = 200

SAMPLES_OF_DRAFT = 3

INSTRUCTIONS = """
You sort the requests that customers send to a contact centre into clusters. A cluster is one intent: what the customer
wants done or answered. Requests of one cluster could be answered by the same procedure.

You are shown a batch of requests and the known clusters nearest to them. Propose the clusters that are missing.
- Propose a cluster only for requests that none of the known clusters covers. An empty list is a good answer.
- One intent, one cluster: do not split by wording, mood, product name or language, and do not put two intents together.
- name: ten words at most, says the intent, is different from every other name.
- summary: one or two sentences on what these customers want.
- criteria: what a request must have to belong here, and what similar requests do not belong here.
- request_ids: the ids of the requests of this batch that belong to it, copied exactly.
- No names, numbers or other personal data of customers in any field.
"""


@dataclass(frozen=True)
class Proposal:
    """One cluster that was proposed, cleaned, with the requests of the batch it was seen in."""

    name: str
    summary: str
    criteria: str
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Proposals:
    """What became of one proposer call."""

    proposals: list[Proposal]
    hit_limit: bool  # as many came as may come: there may be more to propose
    n_over_limit: int = 0
    n_invented_ids: int = 0


class Proposer:
    """Asks for the clusters that a batch needs and that are not known; override `build_prompt` for other words."""

    instructions = INSTRUCTIONS

    def build_prompt(
        self, requests: Sequence[Mapping[str, Any]], clusters: Sequence[Mapping[str, Any]], *, max_clusters: int
    ) -> str:
        """The user message: the nearest known clusters, the requests, and how many clusters may be proposed."""
        return "\n\n".join(
            [
                f"Known clusters nearest to these requests:\n{tagged('clusters', clusters)}",
                f"Requests:\n{tagged('requests', requests)}",
                f"Propose the missing clusters, {max_clusters} at most, the most frequent first.",
            ]
        )

    def question(
        self,
        requests: Sequence[Request],
        clusters: Sequence[Mapping[str, Any]],
        *,
        max_clusters: int,
        context: PromptContext,
    ) -> LlmRequest[ProposerAnswer]:
        """The call that asks for proposals."""
        share = max(MIN_CHARS_OF_EACH, MAX_CHARS_OF_ALL // max(1, len(requests)))
        shown = [request.to_prompt(max_chars=share) for request in requests]
        prompt = self.build_prompt(shown, clusters, max_clusters=max_clusters)
        return LlmRequest(
            build_messages(self.instructions, prompt, context=context), ProposerAnswer, "proposer", step="proposer"
        )

    def read(self, answer: Answer[ProposerAnswer], requests: Sequence[Request], *, max_clusters: int) -> Proposals:
        """The proposals of an answer; none where the call was quarantined, its requests are then still judged."""
        if answer.value is None:
            return Proposals([], hit_limit=False)
        by_id = {request.prompt_id: request for request in requests}
        proposals: dict[str, Proposal] = {}  # by name: a name that comes twice is one cluster
        n_invented = 0
        for proposed in answer.value.clusters[:max_clusters]:
            name = clean_line(proposed.name, max_chars=MAX_NAME_CHARS)
            if not name:
                continue
            members = [by_id[given] for given in dict.fromkeys(proposed.request_ids) if given in by_id]
            n_invented += len(set(proposed.request_ids) - by_id.keys())
            proposal = Proposal(
                name=name,
                summary=clean_line(proposed.summary, max_chars=MAX_TEXT_CHARS),
                criteria=clean_line(proposed.criteria, max_chars=MAX_TEXT_CHARS),
                requests=tuple(members),
            )
            first = proposals.setdefault(normal_name(name), proposal)
            if first is not proposal:
                together = dict.fromkeys([*first.requests, *proposal.requests])
                proposals[normal_name(name)] = replace(first, requests=tuple(together))
        n_proposed = len(answer.value.clusters)
        return Proposals(
            list(proposals.values()),
            hit_limit=n_proposed >= max_clusters,
            n_over_limit=max(0, n_proposed - max_clusters),
            n_invented_ids=n_invented,
        )


def drafts_of(proposals: Sequence[Proposal], registry: ClusterRegistry) -> list[ClusterRecord]:
    """Proposals as records that are in no registry yet, each under an id that nobody has."""
    drafts: dict[str, ClusterRecord] = {}
    for proposal in proposals:
        taken = [*(record.cluster_id for record in registry.all_records()), *drafts]
        cluster_id = make_cluster_id(proposal.name, taken=taken)
        drafts[cluster_id] = ClusterRecord(
            cluster_id=cluster_id,
            name=proposal.name,
            summary=proposal.summary,
            criteria=proposal.criteria,
            sample_requests=[request.text for request in proposal.requests[:SAMPLES_OF_DRAFT]],
        )
    return list(drafts.values())
