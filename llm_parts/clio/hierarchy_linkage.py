"""The hierarchy that costs no judgement: the base clusters' centroids merged by Ward's criterion, then named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llm_parts.clio.levels import cut, levels_warning, link, plan_levels
from llm_parts.clio.parent_names import Questions, count_members, log_level, name_level
from llm_parts.clio.taxonomy import ClusterName, Hierarchy, Level

if TYPE_CHECKING:
    from llm_parts.client import LlmClient
    from llm_parts.clio.settings import ClioSettings


def build_linkage_hierarchy(
    base_names: Sequence[ClusterName],
    centroids: np.ndarray,
    sizes: np.ndarray,
    *,
    client: LlmClient,
    settings: ClioSettings,
    level_sizes: Sequence[int] | None = None,
) -> Hierarchy:
    """Build levels over base clusters with centroids [n_base, d] (unit rows) and sizes [n_base].

    `level_sizes` are the clusters of each level, the top first: give those that the hierarchy by LLM came to,
    `[len(level.names) for level in llm.levels]`, so that the two are compared at equal sizes; None takes the planned
    ones. Parents are named by the same namer. Raises BudgetExhausted.
    """
    questions = Questions(client, settings)
    planned = plan_levels(len(base_names), n_levels=settings.levels, n_top=settings.n_top)
    wanted = planned if level_sizes is None else [size for size in reversed(level_sizes) if size < len(base_names)]
    warning = levels_warning(len(base_names), n_levels=settings.levels, n_top=settings.n_top)
    levels: list[Level] = []
    children, vectors, weights = list(base_names), centroids, np.asarray(sizes, dtype=np.int64)
    group_of = np.arange(len(base_names))  # [n_base], the cluster of the highest level so far
    for n_wanted, above in zip(wanted, _cuts(centroids, wanted), strict=True):  # above: [n_base]
        if len(np.unique(above)) >= len(children):
            continue  # of very many base clusters, groups were linked: there may be no more of them than this
        parent_of = np.zeros(len(children), dtype=np.int64)
        parent_of[group_of] = above  # cuts of one tree are nested: all of a group agree
        level = name_level(
            children, parent_of, sizes=weights, vectors=vectors, questions=questions, step="linkage_rename"
        )
        log_level("linkage", level, n_wanted=n_wanted)
        levels.insert(0, level)
        vectors = _mean_vectors(vectors, level.parent_of, weights)
        children, weights, group_of = (
            level.names,
            count_members(level.parent_of, weights),
            level.parent_of[group_of],
        )
    found = tuple(text for text in [warning, *questions.warnings] if text)
    return Hierarchy("linkage", levels, calls=questions.calls, cost=questions.cost, warnings=found)


def _cuts(centroids: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """The group of each base cluster in cuts of one tree to these sizes, [n_base] each."""
    if not sizes:
        return []
    merges = link(centroids)
    return [cut(merges, size) for size in sizes]


def _mean_vectors(vectors: np.ndarray, parent_of: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of each parent's children by their sizes, at unit length: [n_parents, d]."""
    from common.grouping import cluster_sums
    from common.kmeans import unit_rows

    return unit_rows(cluster_sums(vectors, parent_of, int(parent_of.max()) + 1, weights=weights).astype(np.float32))
