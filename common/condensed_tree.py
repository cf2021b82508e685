"""Condensed trees of HDBSCAN: a single-linkage tree seen at one smallest size of clusters, and its flat clusters.

    condensed = condense(merges, min_cluster_size=15)
    labels, probabilities = flat_clusters(condensed, method="eom", epsilon=0.0)

Condensing is compiled by numba and numbers clusters as the hdbscan package does, bit for bit. Which clusters are chosen
is left to that package; it is asked about a tree in which each cluster has a single point, since the label of a point
follows from the cluster that it falls out of. Imported only where it is called: the import of numba takes a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np


@dataclass(frozen=True, eq=False)
class CondensedTree:
    """Clusters 0 (the root) to c - 1, parents before children, and where each of n points falls out of them."""

    point_clusters: np.ndarray  # [n] int64: the last cluster that the point is in
    point_lambdas: np.ndarray  # [n] float64: the density, 1 / distance, at which it falls out
    parents: np.ndarray  # [c] int64; -1 for the root
    births: np.ndarray  # [c] float64: the density at which the cluster splits off its parent; 0 for the root
    deaths: np.ndarray  # [c] float64: the highest density at which something falls out or splits off
    sizes: np.ndarray  # [c] int64: points
    stabilities: np.ndarray  # [c] float64

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in vars(self).values())


def condense(merges: np.ndarray, *, min_cluster_size: int) -> CondensedTree:
    """Condense a single-linkage tree, `merges` [n - 1, 4] float64 as in scipy.cluster.hierarchy, of n >= 2 points.

    Source: Campello, Moulavi, Zimek and Sander, Hierarchical Density Estimates, ACM TKDD 10 (2015).
    """
    parts = _condense(np.ascontiguousarray(merges, np.float64), min_cluster_size)
    return CondensedTree(*parts)


@numba.njit(cache=True)
def _condense(merges: np.ndarray, min_cluster_size: int) -> tuple[np.ndarray, ...]:
    """Go through the merges from the root down, breadth first, which numbers clusters; smaller parts fall out."""
    n_points = len(merges) + 1
    point_clusters, point_lambdas = np.zeros(n_points, np.int64), np.zeros(n_points)
    capacity = 2 * (n_points // min_cluster_size) + 3  # no more clusters than that: each split leaves two large parts
    parents, sizes = np.full(capacity, -1, np.int64), np.zeros(capacity, np.int64)
    births, deaths, stabilities = np.zeros(capacity), np.zeros(capacity), np.zeros(capacity)
    queue, cluster_of = np.empty(2 * n_points, np.int64), np.empty(2 * n_points, np.int64)
    inner = np.empty(2 * n_points, np.int64)
    sizes[0], n_clusters = n_points, 1
    queue[0], cluster_of[0] = 2 * n_points - 2, 0
    first, last = 0, 1
    while first < last:
        node, cluster = queue[first] - n_points, cluster_of[first]
        first += 1
        density = 1.0 / merges[node, 2] if merges[node, 2] > 0.0 else np.inf
        children = (np.int64(merges[node, 0]), np.int64(merges[node, 1]))
        counts = [np.int64(merges[child - n_points, 3]) if child >= n_points else 1 for child in children]
        is_split = counts[0] >= min_cluster_size and counts[1] >= min_cluster_size
        deaths[cluster] = max(deaths[cluster], density)
        for side in range(2):
            if is_split:
                stabilities[cluster] += (density - births[cluster]) * counts[side]
                parents[n_clusters], births[n_clusters], sizes[n_clusters] = cluster, density, counts[side]
                queue[last], cluster_of[last] = children[side], n_clusters
                n_clusters, last = n_clusters + 1, last + 1
            elif counts[side] >= min_cluster_size:
                queue[last], cluster_of[last] = children[side], cluster
                last += 1
            else:
                n_inner, inner[0] = 1, children[side]
                while n_inner:
                    n_inner -= 1
                    part = inner[n_inner]
                    if part >= n_points:
                        inner[n_inner] = np.int64(merges[part - n_points, 0])
                        inner[n_inner + 1] = np.int64(merges[part - n_points, 1])
                        n_inner += 2
                    else:
                        point_clusters[part], point_lambdas[part] = cluster, density
                        # One after the other, as the package sums them: a product would round otherwise.
                        stabilities[cluster] += density - births[cluster]
    kept = slice(0, n_clusters)
    return (
        point_clusters, point_lambdas, parents[kept], births[kept], deaths[kept], sizes[kept], stabilities[kept],
    )  # fmt: skip


def flat_clusters(condensed: CondensedTree, *, method: str, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] int32, -1 for noise, and probabilities [n] float32 of the clusters that hdbscan selects."""
    label_of = _select(condensed, method, epsilon)
    labels = label_of[condensed.point_clusters]
    is_inside = labels >= 0
    # A cluster that was selected comes before those within it, which have its label.
    selected = np.unique(label_of, return_index=True)[1][int(label_of.min() < 0) :]
    deaths = condensed.deaths[selected[labels[is_inside]]]
    lambdas = condensed.point_lambdas[is_inside]
    probabilities = np.zeros(len(labels), np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # duplicates fall out at infinite density
        shares = np.minimum(lambdas, deaths) / deaths
    probabilities[is_inside] = np.where((deaths == 0) | ~np.isfinite(lambdas), 1.0, shares)
    return labels.astype(np.int32), probabilities


def _select(condensed: CondensedTree, method: str, epsilon: float) -> np.ndarray:
    """The label of each cluster's points, [c]: one cluster, one point, whose number is that of its cluster."""
    # A module of the package that its own estimator is made of, and not part of its promised interface.
    from hdbscan._hdbscan_tree import get_clusters

    n_clusters = len(condensed.parents)
    fields: list[Any] = [("parent", np.intp), ("child", np.intp), ("lambda_val", float), ("child_size", np.intp)]
    tree = np.zeros(2 * n_clusters - 1, fields)
    points, inner = tree[:n_clusters], tree[n_clusters:]
    points["parent"], points["child"] = np.arange(n_clusters) + n_clusters, np.arange(n_clusters)
    points["lambda_val"], points["child_size"] = condensed.deaths, 1
    inner["parent"], inner["child"] = condensed.parents[1:] + n_clusters, np.arange(1, n_clusters) + n_clusters
    inner["lambda_val"], inner["child_size"] = condensed.births[1:], condensed.sizes[1:]
    stability = dict(enumerate(condensed.stabilities.tolist(), start=n_clusters))
    with np.errstate(divide="ignore", invalid="ignore"):  # duplicates merge at distance 0
        labels, _, _ = get_clusters(
            tree,
            stability,
            method,
            cluster_selection_epsilon=float(epsilon),
            max_cluster_size=len(condensed.point_clusters) + 1,  # none; by itself it would count these points
        )
    return np.asarray(labels)
