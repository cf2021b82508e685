"""Twins: clusters that turn out to be one and the same once requests of both are known."""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np

from llm_parts.crew import Crew, Running
from llm_parts.merge import Merger, cluster_similarities
from llm_parts.registry import ClusterRecord, ClusterRegistry
from llm_parts.shortlist import TextVectors

log = logging.getLogger(__name__)

Pair = tuple[ClusterRecord, ClusterRecord]


class Twins:
    """Compares new clusters each with the one nearest to it, and merges equals; no pair is asked about twice."""

    def __init__(self, registry: ClusterRegistry, merger: Merger, vectors: TextVectors, *, similarity: float) -> None:
        self._registry = registry
        self._merger = merger
        self._vectors = vectors
        self._least_similarity = similarity
        self._asked: set[frozenset[str]] = set()
        self._open: list[tuple[Pair, Running[str]]] = []  # pairs without an answer yet

    def ask(self, fresh: Collection[str], crew: Crew) -> None:
        """Ask about the clusters of `fresh`; `merge` takes the answers in."""
        if not self._merger.merges:
            return
        for pair in self._candidates(set(fresh)):
            if _ids(pair) not in self._asked:
                self._asked.add(_ids(pair))
                self._open.append((pair, crew.start(self._merger.compare(*pair))))

    def merge(self, fresh: Collection[str], crew: Crew) -> int:
        """Ask about what is not asked yet, merge equals until there are none, and return how many were merged."""
        n_merged = 0
        while True:
            self.ask(fresh, crew)
            words = [(pair, crew.result(running)) for pair, running in self._open]
            self._open = []
            same = [pair for pair, word in words if word == "same"]
            n_merged += sum(self._merge(first.cluster_id, second.cluster_id) for first, second in same)
            if not same:
                return n_merged

    def _candidates(self, fresh: Collection[str]) -> list[Pair]:
        """Each new cluster with its nearest neighbour, the newer one first."""
        live = self._registry.live()
        if len(live) < 2:
            return []
        similarity = cluster_similarities(live, self._vectors)
        np.fill_diagonal(similarity, -2.0)
        rows = [row for row, record in enumerate(live) if record.cluster_id in fresh]
        best = {row: int(np.argmax(similarity[row])) for row in rows}
        near = {tuple(sorted((row, best[row]))) for row in rows if similarity[row, best[row]] >= self._least_similarity}
        return [(live[newer], live[older]) for older, newer in sorted(near)]

    def _merge(self, first: str, second: str) -> bool:
        """Merge two live clusters, the smaller into the larger; of equals the newer into the older."""
        one, other = self._registry.resolve(first), self._registry.resolve(second)
        if one is None or other is None or one == other:
            return False
        if self._registry.get(one).count > self._registry.get(other).count:
            one, other = other, one
        self._registry.merge(one, other)
        log.info("cluster %s is the same as %s and was merged into it", one, other)
        return True


def _ids(pair: Pair) -> frozenset[str]:
    return frozenset(record.cluster_id for record in pair)
