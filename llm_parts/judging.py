"""How the Judge is asked: from wider and wider shortlists, in groups, and again where the answer is surprising.

A request that nobody on its shortlist took is shown the clusters that come next, twice as many, and at last all others;
a cluster that was refused is not shown again. A cluster that the judge chose although several others are nearer by
embedding is asked about again, beside the nearest ones and in another order; where the two answers differ, a third
decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llm_parts.crew import Talk
from llm_parts.judge import Judge, Verdict
from llm_parts.prompts import PromptContext
from llm_parts.requests import Request

WIDER = 3  # times the shortlist are shown, both looks together, before all the others are
MAX_CLUSTERS_IN_PROMPT = 100  # "all" is asked in prompts of this many clusters, the nearest first

Cards = Mapping[str, Mapping[str, Any]]  # cluster id -> what a prompt says of it


@dataclass(frozen=True)
class Case:
    """A request, and the ids of the clusters in question, the nearest by embedding first."""

    request: Request
    ranked: tuple[str, ...]

    @property
    def rank(self) -> dict[str, int]:
        """0 for the nearest cluster, and so on."""
        return {cluster_id: rank for rank, cluster_id in enumerate(self.ranked)}


class JudgePanel:
    """Decides on cases by conversations with a Judge; see llm_parts.crew for what runs them."""

    def __init__(
        self,
        judge: Judge,
        *,
        context: PromptContext,
        group_size: int,
        second_opinion_rank: int,
        shortlist: int | Literal["all"],
    ) -> None:
        self._judge = judge
        self._context = context
        self._group_size = group_size
        self._second_opinion_rank = second_opinion_rank
        self._shortlist = shortlist
        self.n_second_opinions = 0
        self.n_overruled = 0
        self.n_wider_looks = 0

    def groups(self, cases: Sequence[Case]) -> list[list[int]]:
        """Rows of cases that are asked together: requests near to the same cluster share most of their shortlists."""
        order = list(range(len(cases)))
        if self._group_size > 1:
            order.sort(key=lambda row: (cases[row].ranked[:1], row))
        return [order[start : start + self._group_size] for start in range(0, len(order), self._group_size)]

    def decide(self, cases: Sequence[Case], cards: Cards) -> Talk[list[Verdict]]:
        """One verdict for each case of a group; every case has clusters in question."""
        verdicts: dict[int, Verdict] = {}
        left = list(range(len(cases)))
        number = 0
        while looks := {row: look for row in left if (look := self._look(cases[row], number))}:
            self.n_wider_looks += len(looks) if number else 0
            found = yield from self._ask([(cases[row], looks[row]) for row in looks], cards, step="judge")
            for row, verdict in zip(looks, found, strict=True):
                verdicts[row] = yield from self._checked(cases[row], looks[row], verdict, cards)
            left = [row for row in looks if verdicts[row].decision in ("new_cluster", "skip")]
            number += 1
        return [verdicts[row] for row in range(len(cases))]

    def _look(self, case: Case, number: int) -> tuple[str, ...]:
        """The clusters that a case is shown in its look of that number, from 0; none after the last."""
        n = len(case.ranked)
        width = n if self._shortlist == "all" else self._shortlist
        ends = [0] if width > MAX_CLUSTERS_IN_PROMPT else [0, width, min(WIDER * width, width + MAX_CLUSTERS_IN_PROMPT)]
        while ends[-1] < n:
            ends.append(ends[-1] + MAX_CLUSTERS_IN_PROMPT)
        return case.ranked[ends[number] : ends[number + 1]] if number + 1 < len(ends) else ()

    def _ask(self, shown: Sequence[tuple[Case, Sequence[str]]], cards: Cards, *, step: str) -> Talk[list[Verdict]]:
        """Verdicts on cases that are asked about together, or one by one where the answer on all fails."""
        requests = [case.request for case, _ in shown]
        union = _union([look for _, look in shown])
        (answer,) = yield [self._question(requests, union, cards, step)]
        if answer.value is not None or len(shown) == 1:
            return self._judge.read(answer, requests)
        # One bad request must not take its neighbours with it.
        answers = yield [self._question([case.request], look, cards, step) for case, look in shown]
        return [self._judge.read(answer, [request])[0] for answer, request in zip(answers, requests, strict=True)]

    def _question(self, requests: Sequence[Request], shown: Sequence[str], cards: Cards, step: str) -> Any:
        return self._judge.question(requests, [cards[one] for one in shown], context=self._context, step=step)

    # --- second opinions ---------------------------------------------------------------------------------------------

    def _checked(self, case: Case, look: tuple[str, ...], verdict: Verdict, cards: Cards) -> Talk[Verdict]:
        """The verdict, or what two of three opinions say where it is surprising."""
        if not self._is_surprising(verdict, case):
            return verdict
        self.n_second_opinions += 1
        # Half of a shortlist is enough to compare the chosen cluster with its rivals.
        width = MAX_CLUSTERS_IN_PROMPT if self._shortlist == "all" else self._shortlist
        short = _shortened(look, case, str(verdict.cluster_id), n_shown=max(2, width // 2))
        second = (yield from self._ask([(case, _turned(short, 1))], cards, step="second_opinion"))[0]
        if second.cluster_id == verdict.cluster_id:
            return verdict
        third = (yield from self._ask([(case, _turned(short, 2))], cards, step="second_opinion"))[0]
        decided = _majority([verdict, second, third], case)
        self.n_overruled += decided.cluster_id != verdict.cluster_id
        return decided

    def _is_surprising(self, verdict: Verdict, case: Case) -> bool:
        if verdict.cluster_id is None or not self._second_opinion_rank:
            return False
        return verdict.cluster_id not in case.ranked[: self._second_opinion_rank]


def _majority(opinions: Sequence[Verdict], case: Case) -> Verdict:
    """What most opinions say; without a majority, the chosen cluster that is nearest by embedding."""
    valid = [verdict for verdict in opinions if verdict.decision != "quarantined"]
    winner, n_votes = Counter(verdict.cluster_id for verdict in valid).most_common(1)[0]
    if n_votes == 1:
        chosen = [verdict for verdict in valid if verdict.cluster_id is not None]
        return min(chosen, key=lambda verdict: case.rank[str(verdict.cluster_id)])
    return next(verdict for verdict in valid if verdict.cluster_id == winner)


def _shortened(look: tuple[str, ...], case: Case, chosen: str, *, n_shown: int) -> tuple[str, ...]:
    """The nearest `n_shown` clusters, the chosen one among them."""
    if len(look) <= n_shown:
        return look
    nearest = case.ranked[:n_shown]
    return nearest if chosen in nearest else (*nearest[:-1], chosen)


def _turned(shown: tuple[str, ...], times: int) -> tuple[str, ...]:
    """Clusters in another order: reversed, or cut in the middle."""
    middle = len(shown) // 2
    return shown[::-1] if times == 1 else shown[middle:] + shown[:middle]


def _union(looks: Sequence[Sequence[str]]) -> list[str]:
    """All ids of some shortlists, the first of each, then the second of each, and so on."""
    longest = max(map(len, looks), default=0)
    return list(dict.fromkeys(ids[place] for place in range(longest) for ids in looks if place < len(ids)))
