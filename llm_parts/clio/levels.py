"""How many clusters each level of a hierarchy has, the tree of merges behind it, and what it will ask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from common.config import UserError

NEIGHBORHOOD_SIZE = 40  # clusters that are shown together when parents are proposed
MAX_LINKED = 15_000  # a tree of merges needs all pairs: 900 MB of distances from here on


def plan_levels(n_base: int, *, n_levels: int, n_top: int) -> list[int]:
    """Clusters of each level above the base, the lowest first: n_l / n_(l-1) = (n_top / n_base)^(1 / n_levels).

    Every level is smaller than the one below it; where the base clusters do not allow `n_levels` of those, there are
    fewer, and none where there are no more base clusters than `n_top`. The ratio is that of Clio (appendix G.7 of
    arXiv 2412.13678).
    """
    if n_base <= n_top:
        return []
    ratio = (n_top / n_base) ** (1 / n_levels)
    sizes = [max(n_top, round(n_base * ratio**level)) for level in range(1, n_levels)] + [n_top]
    below = [n_base, *sizes]
    return [size for size, under in zip(sizes, below, strict=False) if size < under]


def levels_warning(n_base: int, *, n_levels: int, n_top: int) -> str:
    """What to tell where the base clusters do not allow as many levels as asked for; empty where they do."""
    n_planned = len(plan_levels(n_base, n_levels=n_levels, n_top=n_top))
    if n_planned == n_levels:
        return ""
    return (
        f"{n_base} base clusters allow {n_planned} of {n_levels} levels that each have fewer clusters than the one "
        f"below, with {n_top} on top; lower clio.levels or clio.n_top, or find more base clusters"
    )


def count_hierarchy_calls(n_base: int, *, n_levels: int, n_top: int) -> dict[str, int]:
    """Calls of both hierarchies by step, as far as they are known before: a parent of one child needs no new name."""
    sizes = plan_levels(n_base, n_levels=n_levels, n_top=n_top)
    children = [n_base, *sizes][: len(sizes)]
    n_renames = sum(min(size, n_children - size) for size, n_children in zip(sizes, children, strict=True))
    return {
        "hierarchy_propose": sum(count_neighborhoods(n) for n in children),
        "hierarchy_dedupe": sum(size > 1 for size in sizes),
        "hierarchy_assign": sum(n for n, size in zip(children, sizes, strict=True) if size > 1),
        "hierarchy_rename": n_renames,
        "linkage_rename": n_renames,
    }


def count_neighborhoods(n_clusters: int) -> int:
    """How many neighbourhoods of about NEIGHBORHOOD_SIZE hold all clusters."""
    return max(1, math.ceil(n_clusters / NEIGHBORHOOD_SIZE - 0.25))


def link(vectors: np.ndarray) -> Any:
    """The tree of merges of vectors [n, d] by Ward's criterion: scipy's linkage matrix [n - 1, 4].

    Raises UserError for so many vectors that all their pairs cannot be held.
    """
    from scipy.cluster.hierarchy import linkage

    if len(vectors) > MAX_LINKED:
        raise UserError(
            f"clio: a linkage hierarchy over {len(vectors):,} base clusters would need the distances of all pairs; "
            f"set clio.n_clusters to {MAX_LINKED:,} at most"
        )
    return linkage(np.asarray(vectors, dtype=np.float64), method="ward")


def cut(merges: Any, n_groups: int) -> np.ndarray:
    """The groups after all but the last n_groups - 1 merges, exactly as many as asked for: [n] int64 from 0.

    fcluster cuts by a height and gives fewer groups where heights are equal; a cut by number never does.
    """
    from scipy.cluster.hierarchy import cut_tree

    return cut_tree(merges, n_clusters=n_groups)[:, 0].astype(np.int64)


def group_vectors(vectors: np.ndarray, n_groups: int) -> np.ndarray:
    """Vectors [n, d] in exactly n_groups groups by their tree of merges: [n] int64; one each where n is no more."""
    if len(vectors) <= n_groups:
        return np.arange(len(vectors))
    return cut(link(vectors), n_groups)


def neighborhoods(vectors: np.ndarray, *, seed: int) -> list[np.ndarray]:
    """Row numbers of clusters that lie together, about NEIGHBORHOOD_SIZE in each; equal vectors count once."""
    n_groups = min(count_neighborhoods(len(vectors)), len(np.unique(vectors, axis=0)))
    if n_groups < 2:
        return [np.arange(len(vectors))]
    from sklearn.cluster import KMeans

    labels = KMeans(n_groups, n_init=4, random_state=seed).fit_predict(vectors)
    return [np.flatnonzero(labels == group) for group in range(n_groups)]
