"""Clusters requests batch by batch: propose, merge, judge, and come back to what nobody took.

All questions of one step are asked at once; their answers are read in the order of the input by this one writer of the
registry. So the result is the same for any number of parallel calls, and no answer can undo another.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llm_parts.client import LlmClient
from llm_parts.judge import Judge, Verdict
from llm_parts.judging import Case, JudgePanel
from llm_parts.merge import Merger, cluster_similarities
from llm_parts.options import ClusterOptions
from llm_parts.prompts import PromptContext
from llm_parts.proposer import Proposal, Proposer
from llm_parts.registry import ClusterRecord, ClusterRegistry, make_cluster_id
from llm_parts.requests import Request
from llm_parts.results import Assignment, Change
from llm_parts.shortlist import ClusterIndex, TextVectors

log = logging.getLogger(__name__)

WIDER = 3  # times the shortlist, for requests that nobody took from the first one
MAX_CLUSTERS_IN_PROMPT = 100  # "all" is asked in prompts of this many clusters, the nearest first
MAX_REVIEWS = 5  # rounds over the requests that are left; each must place some, or it is the last
SAMPLES_OF_PROPOSAL = 3
NEAREST_FOR_PROPOSER = 3  # known clusters that each request of a batch puts before the Proposer


class Clusterer:
    """Assigns requests to the clusters of a registry and adds the clusters they need.

    `process` takes one batch after the other, `finish` comes back to what is left. `previous` maps request ids to the
    clusters that an earlier result gave them: these stay without a question, and count anew only with `count_kept`.
    """

    def __init__(
        self,
        client: LlmClient,
        registry: ClusterRegistry,
        *,
        options: ClusterOptions,
        vectors: TextVectors,
        batch_id: str,
        judge: Judge | None = None,
        proposer: Proposer | None = None,
        previous: Mapping[str, str | None] | None = None,
        count_kept: bool = False,
    ) -> None:
        self.registry = registry
        self.batch_id = batch_id
        self.assignments: dict[int, Assignment] = {}  # by position
        self.changes: list[Change] = []
        self.counts: Counter[str] = Counter()  # what happened, for the report
        self._client = client
        self._options = options
        self.vectors = vectors
        self._proposer = proposer or Proposer()
        context = PromptContext(options.business_context, options.language)
        self._context = context
        self._panel = JudgePanel(
            client,
            judge or Judge(),
            context=context,
            group_size=options.judge_batch_size,
            second_opinion_rank=options.second_opinion_rank,
            shortlist=options.shortlist if options.shortlist != "all" else MAX_CLUSTERS_IN_PROMPT,
        )
        self._merger = Merger(
            client,
            vectors,
            context=context,
            n_candidates=options.merge_candidates,
            similarity=options.merge_similarity,
        )
        self._previous = previous or {}
        self._count_kept = count_kept
        self._fresh: list[str] = []  # ids of the clusters made by this run, in the order of their making
        self._waiting: list[Request] = []  # the rare-case buffer
        self._n_new_waiting = 0  # since it was last reviewed
        self._changed: set[int] = set()  # positions
        self._numbers: dict[int, int] = {}  # position -> number of its batch

    # --- the story ---------------------------------------------------------------------------------------------------

    def process(self, requests: Sequence[Request], *, batch_number: int) -> None:
        """Assign one batch; `take_changes` tells what came of it."""
        self._numbers.update((request.position, batch_number) for request in requests)
        open_requests = [request for request in requests if not self._settle_without_asking(request)]
        new, more_to_come = self._propose(open_requests)
        left = self._judge(open_requests)
        while more_to_come and new and left:
            new, more_to_come = self._propose(left)
            left = self._judge(left, among=new) if new else left
        self._waiting += left
        self._n_new_waiting += len(left)
        if self._n_new_waiting >= self._options.batch_size:
            self._review_waiting()
        self._tidy()

    def finish(self) -> None:
        """Come back to the requests that nobody took, and merge new clusters that are one and the same."""
        for _ in range(MAX_REVIEWS):
            n_left = len(self._waiting)
            self._review_waiting()
            if len(self._waiting) in (0, n_left):
                break
        self._tidy()
        self._merge_twins()
        self._note_changes()

    def take_changes(self) -> list[Assignment]:
        """The assignments that are new, or other ones, since this was last asked; in the order of the input."""
        changed, self._changed = sorted(self._changed), set()
        return [self.assignments[position] for position in changed]

    def new_clusters(self) -> list[ClusterRecord]:
        """The clusters that this run has made and that still stand, in the order of their making."""
        return [
            self.registry.get(cluster_id)
            for cluster_id in self._fresh
            if self.registry.resolve(cluster_id) == cluster_id
        ]

    def metrics(self) -> dict[str, int]:
        """Counts of what happened beside the assignments."""
        return {
            "new_clusters": len(self.new_clusters()),
            "second_opinions": self._panel.n_second_opinions,
            "overruled_decisions": self._panel.n_overruled,
            **{name: self.counts[name] for name in sorted(self.counts)},
        }

    # --- proposals ---------------------------------------------------------------------------------------------------

    def _propose(self, requests: Sequence[Request]) -> tuple[list[str], bool]:
        """Add the clusters that these requests lack; returns their ids, and whether there may be more to propose."""
        if not requests:
            return [], False
        limit = self._options.max_clusters_per_batch
        question = self._proposer.question(
            requests, self._known_cards(requests), max_clusters=limit, context=self._context
        )
        answer = self._client.ask_many([question])[0]
        read = self._proposer.read(answer, requests, max_clusters=limit)
        self.counts["proposals"] += len(read.proposals)
        self.counts["proposals_over_limit"] += read.n_over_limit
        self.counts["invented_request_ids"] += read.n_invented_ids
        return self._admit(read.proposals), read.hit_limit

    def _known_cards(self, requests: Sequence[Request]) -> list[dict[str, str]]:
        """The known clusters that a proposer should see: the few nearest to each request, the most often near first."""
        index = ClusterIndex(self.registry.live(), self.vectors)
        if not len(index):
            return []
        similarity = index.similarities(self._vectors_of(requests))
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :NEAREST_FOR_PROPOSER]
        votes = np.bincount(nearest.ravel(), minlength=len(index))
        order = np.lexsort((-similarity.max(axis=0), -votes))
        if self._options.shortlist != "all":
            order = order[: min(int((votes > 0).sum()), MAX_CLUSTERS_IN_PROMPT)]
        return [self.registry.get(index.cluster_ids[column]).to_prompt() for column in order]

    def _admit(self, proposals: Sequence[Proposal]) -> list[str]:
        """Put proposals into the registry, those that are known already as other names of the known ones."""
        drafts = self._drafts(proposals)
        known = self.registry.live()
        decisions = self._merger.decide(known, drafts)
        final: dict[str, str] = {record.cluster_id: record.cluster_id for record in known}
        new: list[str] = []
        for draft in drafts:
            decision = decisions[draft.cluster_id]
            if decision.same_as is not None:
                final[draft.cluster_id] = final[decision.same_as]
                self.registry.add_alias(final[decision.same_as], draft.name)
                self.counts["proposals_merged"] += 1
                continue
            parent = final[decision.part_of] if decision.part_of is not None else None
            record = self.registry.add(draft.name, summary=draft.summary, criteria=draft.criteria, parent_id=parent)
            final[draft.cluster_id] = record.cluster_id
            new.append(record.cluster_id)
        self._fresh += new
        return new

    def _drafts(self, proposals: Sequence[Proposal]) -> list[ClusterRecord]:
        """Proposals as records that are in no registry yet, under ids that nobody has."""
        drafts: dict[str, ClusterRecord] = {}
        for proposal in proposals:
            taken = [*(record.cluster_id for record in self.registry.all_records()), *drafts]
            cluster_id = make_cluster_id(proposal.name, taken=taken)
            drafts[cluster_id] = ClusterRecord(
                cluster_id=cluster_id,
                name=proposal.name,
                summary=proposal.summary,
                criteria=proposal.criteria,
                sample_requests=[request.text for request in proposal.requests[:SAMPLES_OF_PROPOSAL]],
            )
        return list(drafts.values())

    # --- judgements --------------------------------------------------------------------------------------------------

    def _judge(self, requests: Sequence[Request], *, among: Sequence[str] | None = None) -> list[Request]:
        """Assign requests, from wider and wider shortlists; returns those that no cluster took.

        `among`: the only clusters in question, because all others were refused already.
        """
        records = self.registry.live() if among is None else [self.registry.get(cluster_id) for cluster_id in among]
        verdicts: dict[int, Verdict] = {}
        left = list(requests)
        if records and left:
            ranked = ClusterIndex(records, self.vectors).ranked(self._vectors_of(left))
            ranking = {request.position: ids for request, ids in zip(left, ranked, strict=True)}
            cards = {record.cluster_id: record.to_prompt() for record in records}
            for start, stop in self._windows(len(records)):
                if start == 0 and stop > self._first_width(len(records)):
                    self.counts["judged_again_wider"] += len(left)
                cases = [_case(request, ranking[request.position], start, stop) for request in left]
                decided = self._panel.decide(cases, cards)
                verdicts.update((request.position, verdict) for request, verdict in zip(left, decided, strict=True))
                left = [request for request in left if verdicts[request.position].decision in ("new_cluster", "skip")]
        self._record(requests, verdicts)
        return left

    def _first_width(self, n_clusters: int) -> int:
        return n_clusters if self._options.shortlist == "all" else min(self._options.shortlist, n_clusters)

    def _windows(self, n_clusters: int) -> list[tuple[int, int]]:
        """Which places of the ranking are shown one after the other: the nearest, more of them, all in parts."""
        first = self._first_width(n_clusters)
        windows = [(0, min(width, n_clusters)) for width in (first, WIDER * first) if width <= MAX_CLUSTERS_IN_PROMPT]
        whole = [(s, min(s + MAX_CLUSTERS_IN_PROMPT, n_clusters)) for s in range(0, n_clusters, MAX_CLUSTERS_IN_PROMPT)]
        if self._options.shortlist == "all":
            return whole
        windows = windows or [(0, first)]
        return list(dict.fromkeys([*windows, *whole] if windows[-1][1] < n_clusters else windows))

    def _record(self, requests: Sequence[Request], verdicts: Mapping[int, Verdict]) -> None:
        """Enter verdicts as assignments, and count the requests of each cluster in the order of the input."""
        members: dict[str, list[str]] = {}
        for request in requests:
            verdict = verdicts.get(request.position)
            if verdict is None:  # there was no cluster to ask about
                verdict = Verdict("new_cluster", None, None, "no cluster was known yet")
            self._assign(request, verdict.cluster_id, verdict.decision, verdict.confidence, verdict.rationale)
            if verdict.cluster_id is not None:
                members.setdefault(verdict.cluster_id, []).append(request.text)
        for cluster_id, texts in members.items():
            self.registry.add_requests(cluster_id, n=len(texts), samples=texts, batch_id=self.batch_id)

    def _assign(
        self, request: Request, cluster_id: str | None, decision: Any, confidence: float | None, rationale: str
    ) -> None:
        position = request.position
        before = self.assignments.get(position)
        if before is None or (before.cluster_id, before.decision) != (cluster_id, decision):
            self._changed.add(position)
        self.assignments[position] = Assignment(
            position, request.request_id, cluster_id, confidence, rationale, decision, self._numbers[position]
        )

    def _settle_without_asking(self, request: Request) -> bool:
        """Whether a request needs no question: it has no text, or an earlier result holds."""
        if request.is_empty:
            self._assign(request, None, "empty", None, "the request has no text")
            return True
        before = self._previous.get(request.request_id)
        after = self.registry.resolve(before)
        if after is None:
            return False
        reason = "kept" if after == before else f"cluster {before} was merged into {after}"
        self._assign(request, after, "kept", None, reason)
        if self._count_kept:
            self.registry.add_requests(after, n=1, samples=[request.text], batch_id=self.batch_id)
        return True

    # --- what is left ------------------------------------------------------------------------------------------------

    def _review_waiting(self) -> None:
        """Propose and judge again for the requests that nobody took, those that are alike together."""
        left: list[Request] = []
        for requests in self._alike(self._waiting):
            self.counts["reviewed"] += len(requests)
            self._propose(requests)
            left += self._judge(requests)
        self._waiting = sorted(left, key=lambda request: request.position)
        self._n_new_waiting = 0

    def _alike(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Batches of requests: the first with those nearest to it, then the first that is left with its nearest."""
        batches, left = [], list(requests)
        while left:
            vectors = self._vectors_of(left)
            order = np.argsort(-np.round(vectors @ vectors[0], 4), kind="stable")
            chosen = {0, *(int(row) for row in order[: self._options.batch_size])}
            batches.append([request for row, request in enumerate(left) if row in chosen])
            left = [request for row, request in enumerate(left) if row not in chosen]
        return batches

    def _tidy(self) -> None:
        """Forget new clusters that no request came to."""
        for cluster_id in [cluster_id for cluster_id in self._fresh if self.registry.get(cluster_id).count == 0]:
            if self.registry.get(cluster_id).status != "merged":
                self.registry.remove(cluster_id)
                self._fresh.remove(cluster_id)
                self.counts["proposals_unused"] += 1

    def _merge_twins(self) -> None:
        """Compare each new cluster with the one nearest to it, now that their requests are known, and merge equals."""
        asked: set[frozenset[str]] = set()
        while self._options.merge_candidates:
            pairs = [pair for pair in self._twin_candidates() if frozenset(r.cluster_id for r in pair) not in asked]
            asked |= {frozenset(record.cluster_id for record in pair) for pair in pairs}
            words = self._merger.ask(pairs)
            same = [pair for pair, word in zip(pairs, words, strict=True) if word == "same"]
            for first, second in same:
                self._merge(first.cluster_id, second.cluster_id)
            if not same:
                break
        self._follow_merges()

    def _twin_candidates(self) -> list[tuple[ClusterRecord, ClusterRecord]]:
        """Each new cluster with its nearest neighbour, the newer one first."""
        live = self.registry.live()
        if len(live) < 2:
            return []
        similarity = cluster_similarities(live, self.vectors)
        np.fill_diagonal(similarity, -2.0)
        fresh = set(self._fresh)
        rows = [row for row, record in enumerate(live) if record.cluster_id in fresh]
        best = {row: int(np.argmax(similarity[row])) for row in rows}
        near = {
            tuple(sorted((row, best[row])))
            for row in rows
            if similarity[row, best[row]] >= self._options.merge_similarity
        }
        return [(live[newer], live[older]) for older, newer in sorted(near)]

    def _merge(self, first: str, second: str) -> None:
        """Merge two live clusters, the smaller into the larger; of equals the newer into the older."""
        one, other = self.registry.resolve(first), self.registry.resolve(second)
        if one is None or other is None or one == other:
            return
        if self.registry.get(one).count > self.registry.get(other).count:
            one, other = other, one
        self.registry.merge(one, other)
        self.counts["clusters_merged"] += 1
        log.info("cluster %s is the same as %s and was merged into it", one, other)

    def _follow_merges(self) -> None:
        for position, assignment in self.assignments.items():
            target = self.registry.resolve(assignment.cluster_id)
            if target != assignment.cluster_id:
                self.assignments[position] = replace(assignment, cluster_id=target)
                self._changed.add(position)

    def _note_changes(self) -> None:
        """List the requests that an earlier result had elsewhere, and log each."""
        for position in sorted(self.assignments):
            assignment = self.assignments[position]
            before = self._previous.get(assignment.request_id)
            if before is None or before == assignment.cluster_id:
                continue
            reason = (
                assignment.rationale if assignment.decision == "kept" else f"cluster {before} is not known any more"
            )
            self.changes.append(Change(assignment.request_id, before, assignment.cluster_id, reason))
            log.info("request %s: %s -> %s (%s)", assignment.request_id, before, assignment.cluster_id, reason)

    def _vectors_of(self, requests: Sequence[Request]) -> np.ndarray:
        return self.vectors.of([request.text for request in requests])


def _case(request: Request, ranking: Sequence[str], start: int, stop: int) -> Case:
    return Case(request, tuple(ranking[start:stop]), {cluster_id: rank for rank, cluster_id in enumerate(ranking)})
