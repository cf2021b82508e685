"""What judges are asked about a run: samples of its facets, names, placements and paths, and the tables of verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_parts.clio.base_names import BaseNames
from llm_parts.clio.comparison import placements
from llm_parts.clio.conversations import Conversation
from llm_parts.clio.facets import FacetTable
from llm_parts.clio.judges import (
    Judge,
    Pair,
    Verdicts,
    agreement_rows,
    codebook_warnings,
    judge_pairs,
    judge_scores,
    pair_rows,
    score_rows,
)
from llm_parts.clio.prompts import named_cards, tagged, text_cards
from llm_parts.clio.taxonomy import ClusterName, Hierarchy

Tables = list[tuple[str, list[dict[str, Any]]]]

MEMBERS_SHOWN = 10


@dataclass
class Inspection:
    """Verdicts of all judges on a run, as tables; votes[kind] is the share that a hierarchy got."""

    judges: Sequence[Judge]
    n_sampled: int
    seed: int
    verdicts: list[Verdicts] = field(default_factory=list)
    score_rows: list[dict[str, Any]] = field(default_factory=list)
    pair_rows: list[dict[str, Any]] = field(default_factory=list)
    votes: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def inspect_facets(self, conversations: Sequence[Conversation], facets: FacetTable) -> None:
        """Score the facets of sampled dialogues."""
        rows = self.sample(facets.has_facets(), draw=0)
        items = [(dialogue_of(conversations[row]), notes_of(facets, row)) for row in rows]
        if items:
            self._keep(verdicts := judge_scores(items, kind="facets", judges=self.judges))
            self.score_rows += score_rows(verdicts)

    def inspect_names(self, base: BaseNames) -> None:
        """Compare the name of sampled clusters with that of the cluster nearest to each, over its members."""
        if base.n_clusters < 2:
            return
        pairs = []
        for row in self.sample(range(base.n_clusters), draw=1):
            other = _nearest_other(base.centroids, row, own=row)
            pairs.append(Pair(_members(base, row), _card(base.names[row]), _card(base.names[other])))
        self._compare(pairs, kind="names", tag="names", first="its name", second="that of a neighbour")

    def inspect_placements(
        self, conversations: Sequence[Conversation], base: BaseNames, vectors: np.ndarray, *, n_labels: int | None
    ) -> None:
        """Compare, for sampled dialogues, the name of their cluster with that of the nearest other one."""
        verdicts = None
        if base.n_clusters >= 2:
            pairs = []
            for row in self.sample(np.flatnonzero(base.labels >= 0).tolist(), draw=2):
                own = int(base.labels[row])
                other = _nearest_other(base.centroids, own, own=own, vector=vectors[row])
                evidence = dialogue_of(conversations[row])
                pairs.append(Pair(evidence, _card(base.names[own]), _card(base.names[other])))
            verdicts = self._compare(pairs, kind="placements", tag="names", first="its cluster", second="a neighbour")
        self.warnings += codebook_warnings(n_names=base.n_clusters, n_labels=n_labels, placements=verdicts)

    def compare_hierarchies(self, first: Hierarchy, second: Hierarchy, base: BaseNames) -> None:
        """Compare the paths of sampled base clusters in two hierarchies, where they differ."""
        paths = [placements(hierarchy, base.names) for hierarchy in (first, second)]
        differ = [row for row in range(base.n_clusters) if paths[0][row] != paths[1][row]]
        pairs = [
            Pair(tagged("children", [_card(base.names[row])]), {"name": paths[0][row]}, {"name": paths[1][row]})
            for row in self.sample(differ, draw=3)
        ]
        verdicts = self._compare(pairs, kind="hierarchies", tag="parents", first=first.kind, second=second.kind)
        shares = verdicts.shares() if verdicts else None
        if shares:
            self.votes = {first.kind: round(shares[0], 4), second.kind: round(shares[1], 4)}

    def compare_naming(self, base: BaseNames) -> None:
        """Compare the names of the chosen way with those of each other way, where they differ."""
        methods = list(base.by_method)
        for other in methods[1:]:
            ours, theirs = base.by_method[methods[0]], base.by_method[other]
            differ = [row for row in range(base.n_clusters) if ours[row] != theirs[row]]
            pairs = [
                Pair(_members(base, row), _card(ours[row]), _card(theirs[row])) for row in self.sample(differ, draw=4)
            ]
            self._compare(pairs, kind="naming", tag="names", first=methods[0], second=other)

    def tables(self) -> Tables:
        """The tables that hold something."""
        found: Tables = [
            ("Judges: scores of facets, 1 to 5, with 95% intervals", self.score_rows),
            ("Judges: which of two is better, with 95% intervals", self.pair_rows),
            ("Judges: how far they agree", agreement_rows(self.verdicts)),
        ]
        return [(title, rows) for title, rows in found if rows]

    def sample(self, rows: Sequence[int], *, draw: int) -> list[int]:
        """At most `n_sampled` random rows, ascending."""
        drawn = np.random.default_rng([self.seed, 2, draw]).permutation(len(rows))[: self.n_sampled]
        return sorted(rows[place] for place in drawn.tolist())

    def _compare(self, pairs: Sequence[Pair], *, kind: str, tag: str, first: str, second: str) -> Verdicts | None:
        if not pairs or not self.judges:
            return None
        self._keep(verdicts := judge_pairs(pairs, kind=kind, tag=tag, judges=self.judges))
        self.pair_rows += pair_rows(verdicts, first=first, second=second)
        return verdicts

    def _keep(self, verdicts: Verdicts) -> None:
        self.verdicts.append(verdicts)


def dialogue_of(conversation: Conversation) -> str:
    """A dialogue in its tag."""
    return tagged("dialogue", [turn.to_prompt() for turn in conversation.turns])


def notes_of(facets: FacetTable, row: int) -> list[dict[str, Any]]:
    """The facets of one dialogue, as a judge sees them; facets without an answer are left out."""
    return [{"name": name, "value": values[row]} for name, values in facets.columns.items() if values[row] is not None]


def _members(base: BaseNames, row: int) -> str:
    return tagged("members", text_cards(base.evidence[row].members[:MEMBERS_SHOWN]))


def _card(name: ClusterName) -> dict[str, Any]:
    return dict(named_cards([name])[0])


def _nearest_other(centroids: np.ndarray, row: int, *, own: int, vector: np.ndarray | None = None) -> int:
    """The cluster nearest to a vector, or to the centroid of cluster `row`, that is not its own."""
    nearness = centroids @ (centroids[row] if vector is None else vector)
    nearness[own] = -np.inf
    return int(nearness.argmax())
