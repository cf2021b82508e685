"""How the Judge is asked: from wider and wider shortlists, in groups, and again where the answer is surprising.

A request that nobody on its shortlist took is shown the clusters that come next, twice as many each time, until it has
been shown all; a cluster that was refused is not shown again. Of each batch the most surprising assignments, those to
a cluster that by embedding lies furthest behind its nearest rival, or least ahead of it, are asked about again, beside
the nearest clusters and in another order; where the two answers differ, a third decides.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llm_parts.crew import Talk
from llm_parts.judge import Judge, Verdict
from llm_parts.prompts import PromptContext
from llm_parts.requests import Request

MAX_CLUSTERS_IN_PROMPT = 100  # "all" is asked in prompts of this many clusters, the nearest first

LEFT = ("new_cluster", "skip")  # decisions that leave a request without a cluster

Cards = Mapping[str, Mapping[str, Any]]  # cluster id -> what a prompt says of it


@dataclass(frozen=True)
class Case:
    """A request, the ids of the clusters in question, the nearest by embedding first, and how near each is."""

    request: Request
    ranked: tuple[str, ...]
    similarity: tuple[float, ...]

    def lead_of_rival(self, cluster_id: str) -> float:
        """How much nearer than this cluster the nearest other one is; negative where this one is the nearest."""
        rival = self.similarity[1 if self.ranked[0] == cluster_id else 0] if len(self.ranked) > 1 else -1.0
        return rival - self.similarity[self.ranked.index(cluster_id)]


class JudgePanel:
    """Decides on cases by conversations with a Judge; see llm_parts.crew for what runs them."""

    def __init__(
        self,
        judge: Judge,
        *,
        context: PromptContext,
        group_size: int,
        second_opinions: float,
        shortlist: int | Literal["all"],
    ) -> None:
        self._judge = judge
        self._context = context
        self._group_size = group_size
        self._second_opinions = second_opinions
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

    def decide(self, cases: Sequence[Case], cards: Cards, *, n_looked: int = 0) -> Talk[list[Verdict]]:
        """One verdict for each case of a group, all of which have had `n_looked` looks and have more before them."""
        verdicts: dict[int, Verdict] = {}
        left = list(range(len(cases)))
        for number in itertools.count(n_looked):
            looks = {row: look for row in left if (look := self._look(cases[row], number))}
            if not looks:
                return [verdicts[row] for row in range(len(cases))]
            self.n_wider_looks += len(looks) if number else 0
            found = yield from self._ask([(cases[row], look) for row, look in looks.items()], cards, step="judge")
            verdicts.update(zip(looks, found, strict=True))
            left = [row for row in looks if verdicts[row].decision in LEFT]
        raise AssertionError("looks come to an end")

    def _look(self, case: Case, number: int) -> tuple[str, ...]:
        """The clusters that a case is shown in its look of that number, from 0; none after the last."""
        width = len(case.ranked) if self._shortlist == "all" else self._shortlist
        start = 0
        for _ in range(number):
            start += min(width, MAX_CLUSTERS_IN_PROMPT)
            width *= 2
        return case.ranked[start : start + min(width, MAX_CLUSTERS_IN_PROMPT)]

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

    def surprising(self, cases: Sequence[Case], verdicts: Sequence[Verdict]) -> list[int]:
        """The rows of the most surprising assignments: as many as get a second opinion, in the order of the cases."""
        assigned = [row for row, verdict in enumerate(verdicts) if verdict.cluster_id is not None]
        lead = {row: cases[row].lead_of_rival(str(verdicts[row].cluster_id)) for row in assigned}
        by_surprise = sorted((row for row in assigned if len(cases[row].ranked) > 1), key=lambda row: -lead[row])
        return sorted(by_surprise[: math.ceil(self._second_opinions * len(assigned))])

    def check(self, case: Case, verdict: Verdict, cards: Cards) -> Talk[Verdict]:
        """What two of three opinions say; where that is no cluster, what the looks say that were still to come."""
        self.n_second_opinions += 1
        chosen = str(verdict.cluster_id)
        short = self._rivals(case, chosen)
        second = (yield from self._ask([(case, short[::-1])], cards, step="second_opinion"))[0]
        if second.cluster_id == chosen:
            return verdict
        middle = len(short) // 2
        turned = short[middle:] + short[:middle]
        third = (yield from self._ask([(case, turned)], cards, step="second_opinion"))[0]
        decided = _majority([verdict, second, third], case)
        self.n_overruled += decided.cluster_id != chosen
        n_looked = 1 + next(n for n in itertools.count() if chosen in self._look(case, n))
        if decided.decision not in LEFT or not self._look(case, n_looked):
            return decided
        return (yield from self.decide([case], cards, n_looked=n_looked))[0]

    def _rivals(self, case: Case, chosen: str) -> tuple[str, ...]:
        """The clusters of a second opinion: the chosen one among the nearest, as many as half of a shortlist."""
        width = MAX_CLUSTERS_IN_PROMPT if self._shortlist == "all" else self._shortlist
        nearest = case.ranked[: max(2, width // 2)]
        return nearest if chosen in nearest else (*nearest[:-1], chosen)


def _majority(opinions: Sequence[Verdict], case: Case) -> Verdict:
    """What most opinions say; without a majority, the chosen cluster that is nearest by embedding."""
    valid = [verdict for verdict in opinions if verdict.decision != "quarantined"]
    winner, n_votes = Counter(verdict.cluster_id for verdict in valid).most_common(1)[0]
    if n_votes == 1:
        chosen = [verdict for verdict in valid if verdict.cluster_id is not None]
        return min(chosen, key=lambda verdict: case.ranked.index(str(verdict.cluster_id)))
    return next(verdict for verdict in valid if verdict.cluster_id == winner)


def _union(looks: Sequence[Sequence[str]]) -> list[str]:
    """All ids of some shortlists, the first of each, then the second of each, and so on."""
    longest = max(map(len, looks), default=0)
    return list(dict.fromkeys(ids[place] for place in range(longest) for ids in looks if place < len(ids)))
