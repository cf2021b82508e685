"""What a run will ask before anything is asked: calls, tokens and cost per step.

Proposer and judge calls follow from the input. How many clusters will be found, and so how often they must be compared,
nobody knows before: the guess is the 0.6th power of the requests, less what the registry holds already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llm_parts.checks import MEMBERS_FOR_COHESION, MEMBERS_FOR_NAMES, SIBLINGS
from llm_parts.client import LlmClient, add_up
from llm_parts.framing import count_tokens
from llm_parts.judge import Judge
from llm_parts.judging import MAX_CLUSTERS_IN_PROMPT
from llm_parts.likely import n_shown
from llm_parts.options import ClusterOptions
from llm_parts.prompts import PromptContext
from llm_parts.proposer import Proposer
from llm_parts.registry import ClusterRegistry
from llm_parts.requests import Request

GUESSED_CARD = {
    "cluster_id": "card_not_arrived_1a78cb",
    "name": "Ordered card has not arrived",
    "summary": "Customers whose new or replacement card has not come and who ask where it is.",
    "criteria": "A card was ordered and is late or lost on its way. Not: how to order, activate or replace a card.",
}
# Measured on 1,000 bank requests that found their 77 clusters in one run.
SHARE_JUDGED_AGAIN = 0.12  # of the requests, against a wider shortlist
CALLS_PER_SECOND_OPINION = 1.1
MERGES_PER_NEW_CLUSTER = 3.0
TOKENS_PER_DECISION = 50
TOKENS_PER_PROPOSAL = 90
TOKENS_PER_COMPARISON = 60


class Plan:
    """Estimates of one batch."""

    def __init__(
        self, client: LlmClient, requests: Sequence[Request], registry: ClusterRegistry, *, options: ClusterOptions
    ) -> None:
        self._client = client
        self._options = options
        self._context = PromptContext(options.business_context, options.language)
        self._asked = [request for request in requests if not request.is_empty]
        known = [record.to_prompt() for record in registry.live()]
        self._n_new = max(0, round(len(self._asked) ** 0.6) - len(known)) if self._asked else 0
        self._cards = [*known, *([GUESSED_CARD] * self._n_new)]

    def to_dict(self) -> dict[str, Any]:
        """`calls` per step, their tokens and cost, and the totals; cost is None where the price is not known."""
        steps = [self._proposer(), self._merge(), *self._judge(), *self._checks()]
        return {
            "requests": len(self._asked),
            "guessed_new_clusters": self._n_new,
            **add_up(steps),
        }

    def _proposer(self) -> Any:
        size = self._options.batch_size
        n_batches = math.ceil(len(self._asked) / size)
        rounds = math.ceil(self._n_new / self._options.max_clusters_per_batch) if self._n_new else 0
        n_calls = n_batches + max(0, min(rounds, n_batches) - 1)
        batch = self._asked[:size]
        known = self._cards[: n_shown(len(batch))]
        # Half of the clusters are known on the average, in the course of a run that finds them.
        question = Proposer().question(batch, known[: len(known) // 2], max_clusters=1, context=self._context)
        tokens_in = n_calls * count_tokens(question.messages)
        return self._client.estimate(
            "proposer",
            n_calls=n_calls,
            tokens_in=tokens_in,
            tokens_out=40 * n_calls + TOKENS_PER_PROPOSAL * self._n_new,
        )

    def _judge(self) -> list[Any]:
        group = self._options.judge_batch_size
        shortlist = len(self._cards) if self._options.shortlist == "all" else self._options.shortlist
        shown = self._cards[: min(shortlist, MAX_CLUSTERS_IN_PROMPT)] or [GUESSED_CARD]
        tokens = self._mean_tokens(shown)
        n_first = math.ceil(len(self._asked) / group)
        n_again = round(SHARE_JUDGED_AGAIN * len(self._asked) / group)
        n_second = round(CALLS_PER_SECOND_OPINION * self._options.second_opinions * len(self._asked))
        n_out = TOKENS_PER_DECISION * (len(self._asked) + n_again * group)
        return [
            self._client.estimate(
                "judge", n_calls=n_first + n_again, tokens_in=tokens * (n_first + n_again), tokens_out=n_out
            ),
            self._client.estimate(
                "second_opinion",
                n_calls=n_second,
                tokens_in=tokens * n_second // 2,
                tokens_out=TOKENS_PER_DECISION * n_second,
            ),
        ]

    def _mean_tokens(self, shown: Sequence[dict[str, str]]) -> int:
        """Tokens of one judge prompt, averaged over a hundred requests."""
        group = self._options.judge_batch_size
        step = max(1, len(self._asked) // 100)
        sampled = self._asked[::step]
        groups = [sampled[start : start + group] for start in range(0, len(sampled), group)]
        totals = [count_tokens(Judge().question(part, shown, context=self._context).messages) for part in groups]
        return round(sum(totals) / len(totals)) if totals else 0

    def _merge(self) -> Any:
        n_calls = round(MERGES_PER_NEW_CLUSTER * self._n_new) if self._options.merge_candidates else 0
        return self._client.estimate(
            "merge", n_calls=n_calls, tokens_in=450 * n_calls, tokens_out=TOKENS_PER_COMPARISON * n_calls
        )

    def _checks(self) -> list[Any]:
        n = min(self._options.qa_sample, len(self._cards))
        n_names = n * MEMBERS_FOR_NAMES if len(self._cards) > 1 else 0
        n_compared = n if len(self._cards) > 1 else 0
        each = round(sum(len(request.text) for request in self._asked) / 4 / max(1, len(self._asked)))
        return [
            self._client.estimate(
                "cohesion", n_calls=n, tokens_in=n * (400 + MEMBERS_FOR_COHESION * (each + 20)), tokens_out=60 * n
            ),
            self._client.estimate(
                "separation",
                n_calls=n_compared,
                tokens_in=450 * n_compared,
                tokens_out=TOKENS_PER_COMPARISON * n_compared,
            ),
            self._client.estimate(
                "name_check",
                n_calls=n_names,
                tokens_in=n_names * (300 + each + 25 * (SIBLINGS + 1)),
                tokens_out=20 * n_names,
            ),
        ]
