"""How many clusters each level of a hierarchy has, the tree of merges behind it, and what it will ask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.grouping import cluster_members, cluster_sums

NEIGHBORHOOD_SIZE = 40  # clusters that are shown together when parents are proposed
NAMES_TOGETHER = 100  # proposed names that are shown together to be told apart
MAX_LINKED = 5_000  # a tree of merges needs the distances of all pairs: 100 MB of them
N_LINKED_GROUPS = 2_500  # into which more vectors are put before they are linked
_N_PASSES = 5  # of k-means where its groups need not be the best: those to be linked, and parts to be cut further
MAX_COMPARED = 1 << 19  # vectors times neighbourhoods up to which these are found at once


@dataclass(frozen=True)
class Merges:
    """A tree of merges over vectors, or over groups of them where there are too many."""

    matrix: Any  # scipy's linkage matrix [m - 1, 4]
    leaf_of: np.ndarray  # [n] int64, the leaf that each vector is under


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
    n_renames = round(sum(map(_expected_families, children, sizes)))
    return {
        "hierarchy_propose": sum(count_groups(n, NEIGHBORHOOD_SIZE) for n in children),
        "hierarchy_dedupe": sum(count_groups(size, NAMES_TOGETHER) for size in sizes if size > 1),
        "hierarchy_assign": sum(n for n, size in zip(children, sizes, strict=True) if size > 1),
        "hierarchy_rename": n_renames,
        "linkage_rename": n_renames,
    }


def _expected_families(n_children: int, n_parents: int) -> float:
    """Parents of two children or more, where each has one and all further children fall to parents by chance."""
    return n_parents * (1 - (1 - 1 / n_parents) ** (n_children - n_parents))


def count_groups(n_items: int, size: int) -> int:
    """How many groups of about `size` hold all items; the last quarter of one is shared out among the others."""
    return max(1, math.ceil(n_items / size - 0.25))


def link(vectors: np.ndarray) -> Merges:
    """The tree of merges of vectors [n, d] by Ward's criterion; beyond MAX_LINKED of them, of N_LINKED_GROUPS means."""
    from scipy.cluster.hierarchy import linkage

    rows, leaf_of = np.asarray(vectors, dtype=np.float64), np.arange(len(vectors))
    if len(rows) > MAX_LINKED:
        leaf_of = _group(vectors, N_LINKED_GROUPS)
        sizes = np.bincount(leaf_of)
        rows = cluster_sums(rows, leaf_of, len(sizes)) / sizes[:, None]
    return Merges(linkage(rows, method="ward"), leaf_of)


def _group(vectors: np.ndarray, n_groups: int) -> np.ndarray:
    """Vectors [n, d] in as many groups by k-means, fewer only where fewer differ: [n] int64 from 0, without gaps."""
    from common.kmeans import assign, train_lloyd

    rows = np.ascontiguousarray(vectors, np.float32)
    found = train_lloyd(lambda: [rows], n_clusters=n_groups, max_epochs=_N_PASSES, init="random", random_state=0)
    return np.unique(assign(rows, found.centroids)[0], return_inverse=True)[1]


def cut(merges: Merges, n_groups: int) -> np.ndarray:
    """The groups after all but the last n_groups - 1 merges, exactly as many as asked for: [n] int64 from 0.

    fcluster cuts by a height and gives fewer groups where heights are equal; a cut by number never does. There are
    fewer groups only where there are fewer leaves.
    """
    from scipy.cluster.hierarchy import cut_tree

    n_leaves = len(merges.matrix) + 1
    groups = cut_tree(merges.matrix, n_clusters=min(n_groups, n_leaves))[:, 0]  # [n_leaves]
    return groups[merges.leaf_of].astype(np.int64)


def group_vectors(vectors: np.ndarray, n_groups: int) -> np.ndarray:
    """Vectors [n, d] in exactly n_groups groups by their tree of merges: [n] int64; one each where n is no more."""
    if len(vectors) <= n_groups:
        return np.arange(len(vectors))
    return cut(link(vectors), n_groups)


def neighborhoods(vectors: np.ndarray, *, seed: int, size: int = NEIGHBORHOOD_SIZE) -> list[np.ndarray]:
    """Row numbers of what lies together, about `size` in each; equal vectors are in one.

    Very many vectors are cut into the root of so many parts first, and each part into its neighbourhoods.
    """
    n_groups = min(count_groups(len(vectors), size), len(np.unique(vectors, axis=0)))
    if n_groups < 2:
        return [np.arange(len(vectors))]
    from sklearn.cluster import KMeans

    is_small = len(vectors) * n_groups <= MAX_COMPARED
    n_parts = n_groups if is_small else round(n_groups**0.5)
    found = KMeans(n_parts, n_init=4 if is_small else 1, max_iter=300 if is_small else _N_PASSES, random_state=seed)
    labels = found.fit_predict(vectors)
    parts = [rows for _, rows in cluster_members(labels, n_parts)]
    if is_small:
        return parts
    return [rows[group] for rows in parts for group in neighborhoods(vectors[rows], seed=seed, size=size)]
