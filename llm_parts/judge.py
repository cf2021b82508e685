"""The Judge: decides for each request which cluster of its shortlist it belongs to, or that none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, model_validator

from llm_parts.client import Answer, Failure, LlmRequest
from llm_parts.prompts import PromptContext, build_messages, tagged
from llm_parts.requests import Request
from llm_parts.schemas import Decision, JudgeAnswer

INSTRUCTIONS = """
You decide which cluster a customer's request belongs to. A cluster is one intent: what the customer wants done or
answered.

For every request give one decision, each on its own, whatever the other requests say:
- assign: one of the clusters shown covers what this customer wants. Give its cluster_id, copied exactly. Of several
  that fit, take the most specific one.
- new_cluster: the request has a clear intent, and none of the clusters shown covers it. cluster_id is null.
- skip: the request has no intent that could be told, such as noise, a greeting or an empty message. cluster_id is null.
confidence: from 0 to 1, how sure you are. rationale: one short sentence, without personal data.
Judge by the criteria of the clusters, not by words in common. Do not assign what merely comes close.
"""


class CompleteDecision(Decision):
    """A decision that names a cluster if and only if it assigns."""

    @model_validator(mode="after")
    def _assigns_to_something(self) -> CompleteDecision:
        if self.decision == "assign" and self.cluster_id is None:
            raise ValueError("a decision to assign needs a cluster_id; if no cluster fits, say new_cluster or skip")
        return self


@lru_cache(maxsize=64)
def answer_model(n_requests: int) -> type[JudgeAnswer]:
    """JudgeAnswer with exactly one decision for each of `n_requests` requests."""

    class CompleteJudgeAnswer(JudgeAnswer):
        decisions: list[CompleteDecision] = Field(min_length=n_requests, max_length=n_requests)  # type: ignore[assignment]

        @model_validator(mode="after")
        def _each_request_once(self) -> CompleteJudgeAnswer:
            if len({decision.request_id for decision in self.decisions}) < len(self.decisions):
                raise ValueError("every request needs exactly one decision, under its own request_id")
            return self

    return CompleteJudgeAnswer


@dataclass(frozen=True)
class Verdict:
    """What the Judge said of one request; a failed call quarantines it."""

    decision: Literal["assign", "new_cluster", "skip", "quarantined"]
    cluster_id: str | None
    confidence: float | None
    rationale: str
    failure: Failure | None = None


class Judge:
    """Asks which cluster of a shortlist each request belongs to; override `build_prompt` to ask in other words."""

    instructions = INSTRUCTIONS

    def build_prompt(self, requests: Sequence[Mapping[str, Any]], clusters: Sequence[Mapping[str, Any]]) -> str:
        """The user message: the shortlist, and the requests to decide on."""
        return "\n\n".join(
            [
                f"Clusters to choose from:\n{tagged('clusters', clusters)}",
                f"Requests:\n{tagged('requests', requests)}",
                "Decide on every request.",
            ]
        )

    def question(
        self,
        requests: Sequence[Request],
        clusters: Sequence[Mapping[str, Any]],
        *,
        context: PromptContext,
        step: str = "judge",
    ) -> LlmRequest[JudgeAnswer]:
        """The call that decides on a group of requests; only ids of `clusters` are accepted."""
        prompt = self.build_prompt([request.to_prompt() for request in requests], clusters)
        return LlmRequest(
            build_messages(self.instructions, prompt, context=context),
            answer_model(len(requests)),
            "judge",
            step=step,
            choices={
                "cluster_id": [str(cluster["cluster_id"]) for cluster in clusters],
                "request_id": [request.prompt_id for request in requests],
            },
        )

    def read(self, answer: Answer[JudgeAnswer], requests: Sequence[Request]) -> list[Verdict]:
        """One verdict per request, in their order; all are quarantined where the call was."""
        if answer.value is None:
            reason = answer.failure.message if answer.failure else "no answer"
            return [Verdict("quarantined", None, None, reason, answer.failure) for _ in requests]
        by_id = {decision.request_id: decision for decision in answer.value.decisions}
        return [_to_verdict(by_id[request.prompt_id]) for request in requests]


def _to_verdict(decision: Decision) -> Verdict:
    cluster_id = decision.cluster_id if decision.decision == "assign" else None
    return Verdict(decision.decision, cluster_id, decision.confidence, decision.rationale)
