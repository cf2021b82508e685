"""How the Judge is asked: from wider and wider shortlists, in groups, and again where the answer is surprising.

A request that nobody on its shortlist took is judged again against a shortlist twice as wide, and so on until it has
been shown all; clusters that it refused are not shown again. Of each batch the most surprising assignments, those to
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

PLACES_FOR_EXPECTED = 4  # of so many places on a shortlist one is for what the batch of a request lets expect

LEFT = ("new_cluster", "skip")  # decisions that leave a request without a cluster

Cards = Mapping[str, Mapping[str, Any]]  # cluster id -> what a prompt says of it


@dataclass(frozen=True)
class Case:
    """A request, the ids of the clusters in question in the order of the looks, and how near each is by embedding."""

    request: Request
    ranked: tuple[str, ...]
    similarity: tuple[float, ...]

    def lead_of_rival(self, cluster_id: str) -> float:
        """How much nearer than this cluster the nearest other one is; negative where this one is the nearest."""
        similarity = dict(zip(self.ranked, self.similarity, strict=True))
        own = similarity.pop(cluster_id)
        return max(similarity.values(), default=-1.0) - own


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

    def case(
        self, request: Request, nearest: Sequence[tuple[str, float]], *, proposed: Sequence[str], likely: Sequence[str]
    ) -> Case:
        """A request with the clusters in question: its shortlist, those that are likely, then all others.

        The shortlist are the clusters nearest to the request, but for its last places. These go to what was proposed
        for the request, or else to the nearest of those that its batch is likely about; so do the places after it.
        """
        similarity, in_batch = dict(nearest), set(likely)
        expected = [cluster_id for cluster_id in proposed if cluster_id in similarity]
        expected = expected or [cluster_id for cluster_id in similarity if cluster_id in in_batch]
        n_own = len(nearest)
        if self._shortlist != "all":
            n_own = self._shortlist - self._shortlist // PLACES_FOR_EXPECTED
        ranked = dict.fromkeys([*list(similarity)[:n_own], *expected, *similarity])
        return Case(request, tuple(ranked), tuple(similarity[cluster_id] for cluster_id in ranked))

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
            width = start
        return case.ranked[start : start + min(width, MAX_CLUSTERS_IN_PROMPT)]

    def _ask(self, shown: Sequence[tuple[Case, Sequence[str]]], cards: Cards, *, step: str) -> Talk[list[Verdict]]:
        """Verdicts on cases that are asked about together; one by one where the answer on all cannot be used."""
        requests = [case.request for case, _ in shown]
        union = _union([look for _, look in shown])
        (answer,) = yield [self._question(requests, union, cards, step)]
        verdicts = self._judge.read(answer, requests)
        if len(shown) == 1:
            return verdicts
        # One bad request must not take its neighbours with it, nor one be given a cluster that it refused before.
        alone = [
            place
            for place, (case, _) in enumerate(shown)
            if answer.value is None or verdicts[place].cluster_id not in (None, *case.ranked)
        ]
        answers = yield [self._question([requests[place]], shown[place][1], cards, step) for place in alone]
        for place, own in zip(alone, answers, strict=True):
            verdicts[place] = self._judge.read(own, [requests[place]])[0]
        return verdicts

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
