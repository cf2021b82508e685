"""What a run will ask before anything is asked: calls, tokens and cost of each step.

Facets follow from the input: equal dialogues are asked about once. The steps after them follow from the number of base
clusters, which base_guess.py guesses; where several numbers may come, the estimate is the mean of what each would ask,
since one cluster more or less may decide on whether there is a hierarchy at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from common.config import canonical_json
from llm_parts.client import StepEstimate, add_up
from llm_parts.clio.base_guess import draw_base_counts
from llm_parts.clio.conversations import ConversationTable
from llm_parts.clio.facets import FacetRequests
from llm_parts.clio.hierarchy_llm import MAX_PARENTS_SHOWN
from llm_parts.clio.judges import PAIR_INSTRUCTIONS
from llm_parts.clio.levels import NAMES_TOGETHER, count_hierarchy_calls, plan_levels
from llm_parts.clio.settings import ClioSettings, ModelChoice
from llm_parts.framing import count_tokens
from llm_parts.ledger import cost_of
from llm_parts.settings import LlmSettings

_NAMED_AGAIN = 0.25  # share of names that are equal or false at first
_CHECKED_AGAIN = 0.1  # share of names that are checked once more
_TOKENS_OF_A_FACET = 30
_TOKENS_OF_A_NAME, _TOKENS_OF_A_SHORT_NAME = 50, 12  # with its summary and without
_FIXED = 350  # instructions and rules of a prompt
_TOKENS_OUT = {"facets": 90, "compare_facets": 90, "cluster_name": 100, "hierarchy_rename": 100, "linkage_rename": 100}
_SHORT_ANSWER = 40


class Plan:
    """The estimate of one run."""

    def __init__(self, table: ConversationTable, *, settings: ClioSettings, llm: LlmSettings) -> None:
        self._settings = settings
        self._llm = llm
        self._asked = [conversation for conversation in table.conversations if not conversation.is_empty]
        self._requests = FacetRequests(self._asked, settings=settings)
        self._n_distinct = len({_key(self._requests[row].messages) for row in range(len(self._asked))})
        self._drawn = draw_base_counts(
            self._asked,
            settings=settings,
            n_distinct=self._n_distinct,
            is_extractive=llm.provider == "extractive",
        )
        self._n_base = round(sum(self._drawn) / len(self._drawn))

    def to_dict(self) -> dict[str, Any]:
        """`calls` per step, their tokens and cost, and the totals; cost is None where the price is not known."""
        steps = [self._estimate(step, n_calls) for step, n_calls in self.calls().items() if n_calls]
        return {
            "guessed_base_clusters": self._n_base,
            **add_up(steps),
        }

    def calls(self) -> dict[str, int]:
        """Calls by step."""
        drawn = [self._calls_over(n_base) for n_base in self._drawn]
        steps = max(drawn, key=len)  # those of hierarchies are not there where there is none
        return {step: round(sum(calls.get(step, 0) for calls in drawn) / len(drawn)) for step in steps}

    def _calls_over(self, n_base: int) -> dict[str, int]:
        """Calls by step where there are so many base clusters."""
        settings = self._settings
        levels = count_hierarchy_calls(n_base, n_levels=settings.levels, n_top=settings.n_top) if n_base else {}
        others = [method for method in dict.fromkeys(settings.compare_naming) if method != settings.naming]
        n_variants = len(settings.sampling_sweep.variants())
        n_checked = settings.n_truth_checks * n_base if n_base > 1 else 0
        n_named = round(n_base * (1 + _NAMED_AGAIN)) if n_base > 1 else n_base
        by_llm = [step for step in levels if step != "linkage_rename"]
        n_audited = n_base + levels.get("hierarchy_rename", 0) + levels.get("linkage_rename", 0)
        return {
            "facets": self._n_distinct,
            "cluster_name": n_named,
            **{f"cluster_name_{method}": n_named for method in others},
            "name_check": round(n_checked * (1 + len(others) + _CHECKED_AGAIN)),
            "cluster_name_sampling": n_named * n_variants,
            **levels,
            **{step: levels[step] * (1 + n_variants) for step in by_llm},
            "privacy_audit": n_audited if settings.audit_threshold > 1 else 0,
            **self._judge_calls(n_base, len(others)),
        }

    def _judge_calls(self, n_base: int, n_other_methods: int) -> dict[str, int]:
        """Every judge scores a sample of facets once and compares pairs twice; other extractors are scored too."""
        settings, n_judges = self._settings, len(self._settings.judges)
        n_rows = min(settings.judge_sample, len(self._asked))
        n_names = min(settings.judge_sample, n_base) if n_base > 1 else 0
        n_extracted = n_rows * len(settings.extractors) if n_judges else 0
        has_levels = bool(plan_levels(n_base, n_levels=settings.levels, n_top=settings.n_top))
        return {
            "compare_facets": n_extracted,
            "judge_facets": n_rows * n_judges,
            "judge_extraction": n_extracted * n_judges,
            "judge_names": 2 * n_names * n_judges,
            "judge_placements": 2 * n_rows * n_judges if n_names else 0,
            "judge_hierarchies": 2 * n_names * n_judges if has_levels else 0,
            "judge_naming": 2 * n_names * n_judges * n_other_methods,
        }

    def _estimate(self, step: str, n_calls: int) -> StepEstimate:
        """One step, each model's share of it at that model's price."""
        models = self._models_of(step)
        tokens_in = n_calls * self._tokens_in(step)
        tokens_out = n_calls * _TOKENS_OUT.get(step, _SHORT_ANSWER)
        prices = [model.llm_settings(self._llm).price for model in models]
        costs = [cost_of(price, tokens_in // len(models), tokens_out // len(models)) for price in prices]
        cost = None if None in costs else sum(cost for cost in costs if cost is not None)
        return StepEstimate(step, n_calls, tokens_in, tokens_out, cost)

    def _models_of(self, step: str) -> Sequence[ModelChoice]:
        if step.startswith("judge_"):
            return self._settings.judges
        return self._settings.extractors if step == "compare_facets" else (ModelChoice(),)

    def _tokens_in(self, step: str) -> int:
        """Tokens of one prompt of a step: of facets as they are, on a sample; of the others by what they show."""
        settings = self._settings
        if step in ("facets", "compare_facets"):
            return self._mean_tokens()
        if step in ("judge_facets", "judge_extraction", "judge_placements"):
            return self._mean_tokens() + count_tokens([{"role": "user", "content": PAIR_INSTRUCTIONS}])
        shown = {
            "cluster_name": (settings.n_members + settings.n_outsiders) * _TOKENS_OF_A_FACET,
            "judge_names": 10 * _TOKENS_OF_A_FACET,
            "hierarchy_propose": 50 * _TOKENS_OF_A_NAME,
            "hierarchy_dedupe": min(self._n_base, NAMES_TOGETHER) * _TOKENS_OF_A_SHORT_NAME,
            "hierarchy_assign": self._parents_shown() * _TOKENS_OF_A_SHORT_NAME,
            "hierarchy_rename": 20 * _TOKENS_OF_A_NAME,
            "linkage_rename": 20 * _TOKENS_OF_A_NAME,
        }
        return _FIXED + shown.get(step, 2 * _TOKENS_OF_A_NAME)

    def _parents_shown(self) -> int:
        """Names that a prompt shows to a cluster of the base: those of the lowest level, or the nearest of many."""
        sizes = plan_levels(self._n_base, n_levels=self._settings.levels, n_top=self._settings.n_top)
        return min(MAX_PARENTS_SHOWN, sizes[0]) if sizes else 0

    def _mean_tokens(self) -> int:
        rows = range(0, len(self._asked), max(1, len(self._asked) // 100))
        totals = [count_tokens(self._requests[row].messages) for row in rows]
        return round(sum(totals) / len(totals)) if totals else 0


def _key(messages: Any) -> bytes:
    return hashlib.sha256(canonical_json(messages).encode("utf-8", "replace")).digest()
