"""Clusters requests batch by batch: propose, merge, judge, and come back to what nobody took.

Several batches are under way at the same time, by a timetable that no answer can change: proposals for a batch are
asked for while the batches before it are judged, and what one batch finds out reaches the others at fixed points. This
one writer takes every step in the order of the batches. So the result is the same for any number of parallel calls, and
no answer can undo another.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llm_parts.assignment_book import AssignmentBook
from llm_parts.client import LlmClient
from llm_parts.crew import FIRST, Crew, Running, Talk
from llm_parts.judge import Judge, Verdict
from llm_parts.judging import LEFT, Cards, Case, JudgePanel
from llm_parts.likely import likely_clusters, n_shown
from llm_parts.merge import MergeDecision, Merger
from llm_parts.options import ClusterOptions
from llm_parts.prompts import PromptContext
from llm_parts.proposer import Proposals, Proposer, drafts_of
from llm_parts.registry import ClusterRecord, ClusterRegistry
from llm_parts.requests import Request
from llm_parts.results import Assignment, Change
from llm_parts.shortlist import ClusterIndex, TextVectors
from llm_parts.twins import Twins

# The timetable. More of either keeps more calls in flight and lets a batch see less of the ones just before it.
PROPOSED_AHEAD = 3  # batches for which proposals are asked while those before them are still compared and judged
JUDGED_AT_ONCE = 3  # batches whose requests are judged at the same time
# Proposals are asked ahead only while there were this many requests to a new cluster in the batch before: where most
# clusters are new, the next batches would propose the same ones once more.
SETTLED_FROM = 10

MAX_REVIEWS = 5  # rounds over the requests that are left; each must place some, or it is the last
EMBEDDED_FIRST = 1000  # requests, before the first call: some seconds


@dataclass(frozen=True)
class _Merging:
    """A proposal on its way into the registry."""

    draft: ClusterRecord
    requests: Sequence[Request]  # that the Proposer saw in it
    decision: Running[MergeDecision]


@dataclass
class _Batch:
    """Requests on their way through proposing, merging, judging and checking."""

    requests: list[Request]
    n_rows: int  # of the input; 0 for a review of requests that were left
    proposing: Running[Proposals] | None = None
    likely: list[str] = field(default_factory=list)  # clusters that its Proposer was shown
    hit_limit: bool = False  # as many clusters were proposed as may be
    merging: list[_Merging] = field(default_factory=list)
    proposed: dict[int, list[str]] = field(default_factory=dict)  # position -> clusters near to what was proposed
    new: list[str] = field(default_factory=list)  # clusters that were made for it
    in_question: frozenset[str] = frozenset()  # clusters that its requests are judged against
    cards: Cards = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    judging: list[tuple[list[int], Running[list[Verdict]]]] = field(default_factory=list)  # rows of cases
    verdicts: dict[int, Verdict] = field(default_factory=dict)  # by row of cases
    checking: list[tuple[int, Running[Verdict]]] = field(default_factory=list)  # row of cases, its second opinion

    @property
    def is_review(self) -> bool:
        return self.n_rows == 0


class Clusterer:
    """Assigns requests to the clusters of a registry and adds the clusters they need.

    `process_all` takes batches, `finish` comes back to what is left. `previous` maps request ids to the clusters that
    an earlier result gave them: these stay without a question, and count anew only with `count_kept`.
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
        self.vectors = vectors
        self.counts: Counter[str] = Counter()  # what happened, for the report
        self._client = client
        self._options = options
        self._book = AssignmentBook(registry, batch_id=batch_id, previous=previous or {}, count_kept=count_kept)
        self._proposer = proposer or Proposer()
        self._context = PromptContext(options.business_context, options.language)
        self._panel = JudgePanel(
            judge or Judge(),
            context=self._context,
            group_size=options.judge_batch_size,
            second_opinions=options.second_opinions,
            shortlist=options.shortlist,
        )
        self._merger = Merger(
            vectors,
            context=self._context,
            n_candidates=options.merge_candidates,
            similarity=options.merge_similarity,
        )
        self._twins = Twins(registry, self._merger, vectors, similarity=options.merge_similarity)
        self._fresh: list[str] = []  # ids of the clusters made by this run, in the order of their making
        self._waiting: list[Request] = []  # the rare-case buffer
        self._n_new_waiting = 0  # since it was last reviewed
        self._has_more_to_say = False  # whether a proposal was cut short for requests that wait
        self._n_ahead = 0  # batches that proposals are asked ahead for
        self._refused: dict[int, frozenset[str]] = {}  # position -> clusters that did not take the request

    @property
    def assignments(self) -> dict[int, Assignment]:
        """What became of each request so far, by position."""
        return self._book.assignments

    @property
    def changes(self) -> list[Change]:
        """Requests that an earlier result had elsewhere; known after `finish`."""
        return self._book.changes

    # --- the story ---------------------------------------------------------------------------------------------------

    def process(self, requests: Sequence[Request], *, batch_number: int) -> None:
        """Assign one batch; `take_changes` tells what came of it."""
        for _ in self.process_all([(batch_number, requests)]):
            pass

    def process_all(self, batches: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[int]:
        """Assign batches, each with its number; yields how many rows of the input are done whenever some are."""
        todo = deque(
            _Batch(self._book.begin(requests, batch_number=number), n_rows=len(requests))
            for number, requests in batches
        )
        with self._client.crew() as crew:
            yield from self._run(todo, crew)
        self._tidy()

    def get_ready(self, requests: Sequence[Request]) -> None:
        """Load the embedder and embed the first requests, so that no server is kept waiting; asks nothing.

        Those that follow are embedded while the model answers, and these go faster together.
        """
        self._vectors_of([request for request in requests if not request.is_empty][:EMBEDDED_FIRST])

    def finish(self) -> None:
        """Come back to the requests that nobody took, and merge new clusters that are one and the same."""
        with self._client.crew() as crew:
            self._twins.ask(self._fresh, crew)  # most of them are told by then, while what is left is reviewed
            for _ in range(MAX_REVIEWS):
                n_left = len(self._waiting)
                for _ in self._run(deque(self._reviews()), crew):
                    pass
                if len(self._waiting) in (0, n_left):
                    break
            self._tidy()
            self.counts["clusters_merged"] += self._twins.merge(self._fresh, crew)
        self._book.follow_merges()
        self._book.note_changes()

    def take_changes(self) -> list[Assignment]:
        """The assignments that are new, or other ones, since this was last asked; in the order of the input."""
        return self._book.take_changes()

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
            "judged_again_wider": self._panel.n_wider_looks,
            "second_opinions": self._panel.n_second_opinions,
            "overruled_decisions": self._panel.n_overruled,
            **{name: self.counts[name] for name in sorted(self.counts)},
        }

    def _run(self, todo: deque[_Batch], crew: Crew) -> Iterator[int]:
        """Take batches through proposing, merging and judging, several at a time, until all are done."""
        proposed: deque[_Batch] = deque()
        judged: deque[_Batch] = deque()
        checked: deque[_Batch] = deque()
        while todo or proposed or judged or checked:
            while todo and len(proposed) <= self._n_ahead:
                proposed.append(self._start_proposing(todo.popleft(), crew))
            batch = proposed.popleft() if proposed else None
            if batch is not None:
                self._start_merging(batch, crew)
                self._expect_vectors(todo)
                self._admit(batch, crew)
            if checked:
                self._record(checked[0], crew)
                yield checked.popleft().n_rows
            if judged and (batch is None or _n_requests(judged) >= JUDGED_AT_ONCE * self._options.batch_size):
                checked.append(self._start_checking(judged.popleft(), crew))
            if batch is not None:
                judged.append(self._start_judging(batch, crew))
            if self._is_review_due(is_last=not todo):
                todo.extendleft(reversed(self._reviews()))

    def _expect_vectors(self, todo: Iterable[_Batch]) -> None:
        """Have the batches embedded that will be proposed next, while the model compares and judges."""
        for batch in itertools.islice(todo, 2):
            self.vectors.expect([request.text for request in batch.requests])

    # --- proposals ---------------------------------------------------------------------------------------------------

    def _start_proposing(self, batch: _Batch, crew: Crew) -> _Batch:
        """Ask for the clusters that a batch lacks."""
        if batch.requests:
            batch.likely = self._likely_clusters(batch.requests)
            batch.proposing = crew.start(self._propose(batch), urgency=FIRST)
        return batch

    def _likely_clusters(self, requests: Sequence[Request]) -> list[str]:
        likely = likely_clusters(ClusterIndex(self.registry.live(), self.vectors), self._vectors_of(requests))
        return likely if self._options.shortlist == "all" else likely[: n_shown(len(requests))]

    def _propose(self, batch: _Batch) -> Talk[Proposals]:
        limit = self._options.max_clusters_per_batch
        cards = [self.registry.get(cluster_id).to_prompt() for cluster_id in batch.likely]
        (answer,) = yield [self._proposer.question(batch.requests, cards, max_clusters=limit, context=self._context)]
        return self._proposer.read(answer, batch.requests, max_clusters=limit)

    def _start_merging(self, batch: _Batch, crew: Crew) -> None:
        """Ask what the proposed clusters are to the known ones.

        A proposal is left alone if the known cluster nearest to it was not before its Proposer: most likely it repeats
        that one. The Judge is asked first, then; requests that no cluster takes are proposed again in a review, where
        every proposal counts.
        """
        if batch.proposing is None:
            return
        read = crew.result(batch.proposing)
        self.counts["proposals"] += len(read.proposals)
        self.counts["proposals_over_limit"] += read.n_over_limit
        self.counts["invented_request_ids"] += read.n_invented_ids
        batch.hit_limit = read.hit_limit
        drafts = drafts_of(read.proposals, self.registry)
        for proposal, draft, near in zip(
            read.proposals, drafts, self._merger.nearest(self.registry.live(), drafts), strict=True
        ):
            nearest_ids = [record.cluster_id for record in near]
            batch.proposed.update((request.position, nearest_ids) for request in proposal.requests)
            if near and nearest_ids[0] not in batch.likely and not batch.is_review:
                self.counts["proposals_out_of_sight"] += 1
            else:
                running = crew.start(self._merger.decide(draft, near), urgency=FIRST)
                batch.merging.append(_Merging(draft, proposal.requests, running))

    def _admit(self, batch: _Batch, crew: Crew) -> None:
        """Put proposed clusters into the registry, those that are known already as other names of the known ones."""
        for merging in batch.merging:
            draft, decision = merging.draft, crew.result(merging.decision)
            if decision.same_as is not None:
                final = self.registry.add_alias(decision.same_as, draft.name)
                self.counts["proposals_merged"] += 1
            else:
                words = {"summary": draft.summary, "criteria": draft.criteria}
                final = self.registry.add(draft.name, **words, parent_id=decision.part_of)
                batch.new.append(final.cluster_id)
            batch.proposed.update((request.position, [final.cluster_id]) for request in merging.requests)
        self._fresh += batch.new
        is_settled = len(batch.new) * SETTLED_FROM <= len(batch.requests)
        self._n_ahead = min(self._n_ahead + 1, PROPOSED_AHEAD) if is_settled else 0

    # --- judgements --------------------------------------------------------------------------------------------------

    def _start_judging(self, batch: _Batch, crew: Crew) -> _Batch:
        """Ask which cluster each request belongs to, of those that have not refused it already."""
        records = self.registry.live()
        if not records or not batch.requests:
            return batch
        batch.in_question = frozenset(record.cluster_id for record in records)
        batch.cards = {record.cluster_id: record.to_prompt() for record in records}
        ranked = ClusterIndex(records, self.vectors).ranked(self._vectors_of(batch.requests))
        for request, nearest in zip(batch.requests, ranked, strict=True):
            refused = self._refused.get(request.position, frozenset())
            in_question = [pair for pair in nearest if pair[0] not in refused]
            proposed = batch.proposed.get(request.position, [])
            if in_question:
                batch.cases.append(self._panel.case(request, in_question, proposed=proposed, likely=batch.likely))
        for group in self._panel.groups(batch.cases):
            cases = [batch.cases[row] for row in group]
            batch.judging.append((group, crew.start(self._panel.decide(cases, batch.cards))))
        return batch

    def _start_checking(self, batch: _Batch, crew: Crew) -> _Batch:
        """Ask again where a verdict is surprising."""
        for group, running in batch.judging:
            decided = crew.result(running)
            batch.verdicts.update(zip(group, decided, strict=True))
        verdicts = [batch.verdicts[row] for row in range(len(batch.cases))]
        for row in self._panel.surprising(batch.cases, verdicts):
            talk = self._panel.check(batch.cases[row], verdicts[row], batch.cards)
            batch.checking.append((row, crew.start(talk, urgency=FIRST)))
        return batch

    def _record(self, batch: _Batch, crew: Crew) -> None:
        """Enter the verdicts on a batch; the requests that nobody took begin to wait."""
        for row, running in batch.checking:
            batch.verdicts[row] = crew.result(running)
        by_position = {case.request.position: batch.verdicts[row] for row, case in enumerate(batch.cases)}
        if not batch.is_review:
            nobody = Verdict("new_cluster", None, None, "no cluster was known yet")
            by_position = {request.position: by_position.get(request.position, nobody) for request in batch.requests}
        judged = [request for request in batch.requests if request.position in by_position]
        self._book.enter(judged, [by_position[request.position] for request in judged])
        placed = {position for position, verdict in by_position.items() if verdict.decision not in LEFT}
        left = [request for request in batch.requests if request.position not in placed]
        self._refused.update((request.position, batch.in_question) for request in left)
        self._wait(batch, left)

    # --- what is left ------------------------------------------------------------------------------------------------

    def _wait(self, batch: _Batch, left: Sequence[Request]) -> None:
        """Collect the requests of a batch that nobody took."""
        self._waiting = sorted([*self._waiting, *left], key=lambda request: request.position)
        placed_some = len(left) < len(batch.requests)
        if not batch.is_review:
            self._n_new_waiting += len(left)
        if batch.hit_limit and batch.new and left and (placed_some or not batch.is_review):
            self._has_more_to_say = True

    def _is_review_due(self, *, is_last: bool) -> bool:
        """Whether a batch of requests waits, or, after the last batch, some that a longer proposal might help."""
        return self._n_new_waiting >= self._options.batch_size or (is_last and self._has_more_to_say)

    def _reviews(self) -> list[_Batch]:
        """Batches of the requests that wait, those that are alike together; from now on they wait no more."""
        waiting, self._waiting = self._waiting, []
        self._n_new_waiting, self._has_more_to_say = 0, False
        self.counts["reviewed"] += len(waiting)
        return [_Batch(requests, n_rows=0) for requests in self._alike(waiting)]

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

    def _vectors_of(self, requests: Sequence[Request]) -> np.ndarray:
        return self.vectors.of([request.text for request in requests])


def _n_requests(batches: Iterable[_Batch]) -> int:
    return sum(len(batch.requests) for batch in batches)
