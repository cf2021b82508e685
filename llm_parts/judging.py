"""How the Judge is asked: in groups, one by one where a group fails, and again where the answer is surprising.

A cluster that the judge chose although several others are nearer by embedding is asked about again, beside the nearest
ones and in another order; where the two answers differ, a third decides. Most wrong answers are caught by that, for a
call more on about one request in ten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_parts.client import LlmClient
from llm_parts.judge import Judge, Verdict
from llm_parts.prompts import PromptContext
from llm_parts.requests import Request


@dataclass(frozen=True)
class Case:
    """A request, the ids of the clusters shown for it, and how near all clusters are."""

    request: Request
    shown: tuple[str, ...]
    rank: Mapping[str, int]  # cluster id -> 0 for the nearest by embedding


class JudgePanel:
    """Asks a Judge about many requests at once and gives back one verdict for each, in their order."""

    def __init__(
        self,
        client: LlmClient,
        judge: Judge,
        *,
        context: PromptContext,
        group_size: int,
        second_opinion_rank: int,
        shortlist: int,
    ) -> None:
        self._client = client
        self._judge = judge
        self._context = context
        self._group_size = group_size
        self._second_opinion_rank = second_opinion_rank
        # Half is enough to compare the chosen cluster with its rivals.
        self._shortlist = max(2, shortlist // 2)
        self.n_second_opinions = 0
        self.n_overruled = 0

    def decide(self, cases: Sequence[Case], cards: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per case; `cards` says of each cluster id what a prompt shows."""
        verdicts = self._ask(cases, cards, step="judge")
        doubtful = [row for row, verdict in enumerate(verdicts) if self._is_surprising(verdict, cases[row])]
        self._ask_again(doubtful, cases, cards, verdicts)
        return verdicts

    def _ask(
        self, cases: Sequence[Case], cards: Mapping[str, Mapping[str, Any]], *, step: str, single: bool = False
    ) -> list[Verdict]:
        groups = self._groups(cases, single=single)
        questions = []
        for group in groups:
            shown = _union([cases[row].shown for row in group])
            requests = [cases[row].request for row in group]
            shown_cards = [cards[cluster_id] for cluster_id in shown]
            questions.append(self._judge.question(requests, shown_cards, context=self._context, step=step))
        verdicts: dict[int, Verdict] = {}
        alone: list[int] = []
        for group, answer in zip(groups, self._client.ask_many(questions), strict=True):
            if answer.value is None and len(group) > 1:
                alone += group  # one bad request must not take its neighbours with it
                continue
            requests = [cases[row].request for row in group]
            verdicts.update(zip(group, self._judge.read(answer, requests), strict=True))
        if alone:
            again = self._ask([cases[row] for row in alone], cards, step=step, single=True)
            verdicts.update(zip(alone, again, strict=True))
        return [verdicts[row] for row in range(len(cases))]

    def _groups(self, cases: Sequence[Case], *, single: bool) -> list[list[int]]:
        """Rows that are asked together: requests near to the same cluster share most of their shortlists."""
        size = 1 if single else self._group_size
        order = list(range(len(cases)))
        if size > 1:
            order.sort(key=lambda row: (cases[row].shown[:1], row))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _is_surprising(self, verdict: Verdict, case: Case) -> bool:
        if verdict.cluster_id is None or not self._second_opinion_rank:
            return False
        return case.rank[verdict.cluster_id] >= self._second_opinion_rank

    def _ask_again(
        self,
        rows: list[int],
        cases: Sequence[Case],
        cards: Mapping[str, Mapping[str, Any]],
        verdicts: list[Verdict],
    ) -> None:
        """Replace surprising verdicts by what two of three answers say."""
        self.n_second_opinions += len(rows)
        short = {row: _shortened(cases[row], str(verdicts[row].cluster_id), self._shortlist) for row in rows}
        second = self._ask([_turned(short[row], 1) for row in rows], cards, step="second_opinion", single=True)
        opinions = {row: [verdicts[row], other] for row, other in zip(rows, second, strict=True)}
        split = [row for row in rows if opinions[row][0].cluster_id != opinions[row][1].cluster_id]
        third = self._ask([_turned(short[row], 2) for row in split], cards, step="second_opinion", single=True)
        for row, other in zip(split, third, strict=True):
            opinions[row].append(other)
            verdicts[row] = _majority(opinions[row], cases[row])
            self.n_overruled += verdicts[row].cluster_id != opinions[row][0].cluster_id


def _majority(opinions: Sequence[Verdict], case: Case) -> Verdict:
    """What most opinions say; without a majority, the chosen cluster that is nearest by embedding."""
    valid = [verdict for verdict in opinions if verdict.decision != "quarantined"]
    winner, n_votes = Counter(verdict.cluster_id for verdict in valid).most_common(1)[0]
    if n_votes == 1:
        chosen = [verdict for verdict in valid if verdict.cluster_id is not None]
        return min(chosen, key=lambda verdict: case.rank[str(verdict.cluster_id)])
    return next(verdict for verdict in valid if verdict.cluster_id == winner)


def _shortened(case: Case, chosen: str, n_shown: int) -> Case:
    """The same case with the nearest `n_shown` clusters, the chosen one among them."""
    if len(case.shown) <= n_shown:
        return case
    nearest = sorted(case.rank, key=lambda cluster_id: case.rank[cluster_id])[:n_shown]
    return Case(case.request, tuple(nearest if chosen in nearest else [*nearest[:-1], chosen]), case.rank)


def _turned(case: Case, times: int) -> Case:
    """The same case with its clusters in another order: reversed, then cut in the middle."""
    middle = len(case.shown) // 2
    order = case.shown[::-1] if times == 1 else case.shown[middle:] + case.shown[:middle]
    return Case(case.request, order, case.rank)


def _union(lists: Sequence[Sequence[str]]) -> list[str]:
    """All ids of some shortlists, the first of each, then the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    return list(dict.fromkeys(ids[place] for place in range(longest) for ids in lists if place < len(ids)))
