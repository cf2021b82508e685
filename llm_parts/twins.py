"""Twins: clusters that turn out to be one and the same once requests of both are known."""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np

from llm_parts.crew import Crew
from llm_parts.merge import Merger, cluster_similarities
from llm_parts.registry import ClusterRecord, ClusterRegistry
from llm_parts.shortlist import TextVectors

log = logging.getLogger(__name__)

Pair = tuple[ClusterRecord, ClusterRecord]


def merge_twins(
    registry: ClusterRegistry,
    *,
    fresh: Collection[str],
    crew: Crew,
    merger: Merger,
    vectors: TextVectors,
    similarity: float,
) -> int:
    """Compare each cluster of `fresh` with the one nearest to it and merge equals; returns how many were merged."""
    asked: set[frozenset[str]] = set()
    n_merged = 0
    while True:
        pairs = [pair for pair in _candidates(registry, fresh, vectors, similarity) if _ids(pair) not in asked]
        asked |= {_ids(pair) for pair in pairs}
        words = crew.results([crew.start(merger.compare(*pair)) for pair in pairs])
        same = [pair for pair, word in zip(pairs, words, strict=True) if word == "same"]
        n_merged += sum(_merge(registry, first.cluster_id, second.cluster_id) for first, second in same)
        if not same:
            return n_merged


def _candidates(
    registry: ClusterRegistry, fresh: Collection[str], vectors: TextVectors, least_similarity: float
) -> list[Pair]:
    """Each new cluster with its nearest neighbour, the newer one first."""
    live = registry.live()
    if len(live) < 2:
        return []
    similarity = cluster_similarities(live, vectors)
    np.fill_diagonal(similarity, -2.0)
    rows = [row for row, record in enumerate(live) if record.cluster_id in fresh]
    best = {row: int(np.argmax(similarity[row])) for row in rows}
    near = {tuple(sorted((row, best[row]))) for row in rows if similarity[row, best[row]] >= least_similarity}
    return [(live[newer], live[older]) for older, newer in sorted(near)]


def _ids(pair: Pair) -> frozenset[str]:
    return frozenset(record.cluster_id for record in pair)


def _merge(registry: ClusterRegistry, first: str, second: str) -> bool:
    """Merge two live clusters, the smaller into the larger; of equals the newer into the older."""
    one, other = registry.resolve(first), registry.resolve(second)
    if one is None or other is None or one == other:
        return False
    if registry.get(one).count > registry.get(other).count:
        one, other = other, one
    registry.merge(one, other)
    log.info("cluster %s is the same as %s and was merged into it", one, other)
    return True
