"""Condensed trees of HDBSCAN: a single-linkage tree seen at one smallest size of clusters, and its flat clusters.

    condensed = condense(merges, min_cluster_size=15)
    labels, probabilities = flat_clusters(condensed, method="eom", epsilon=0.0)

Condensing is compiled by numba and numbers clusters as the hdbscan package does, bit for bit, where all heights differ.
What comes together at one height comes together at once, as in the source; the package takes such merges one after the
other, so that its clusters depend on the order of the rows. Heights are often equal: a row that joins several parts by
way of its own neighbourhood joins them all at the height of that.

Which clusters are chosen is left to the package; it is asked about a tree in which each cluster has a single point,
since the label of a point follows from the cluster that it falls out of. Imported only where it is called: the import
of numba takes a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

_EXACT = {"cache": True, "error_model": "numpy", "nogil": True, "fastmath": False}


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


@numba.njit(**_EXACT)
def _condense(merges: np.ndarray, min_cluster_size: int) -> tuple[np.ndarray, ...]:
    """Go through the merges from the root down, breadth first, which numbers clusters; smaller parts fall out."""
    n_points = len(merges) + 1
    point_clusters, point_lambdas = np.zeros(n_points, np.int64), np.zeros(n_points)
    capacity = 2 * (n_points // min_cluster_size) + 3  # no more clusters than that: each split leaves two large parts
    parents, sizes = np.full(capacity, -1, np.int64), np.zeros(capacity, np.int64)
    births, deaths, stabilities = np.zeros(capacity), np.zeros(capacity), np.zeros(capacity)
    queue, cluster_of = np.empty(n_points, np.int32), np.empty(n_points, np.int32)
    parts, room = np.empty(n_points, np.int32), np.empty(n_points, np.int32)
    sizes[0], n_clusters = n_points, 1
    queue[0], cluster_of[0] = 2 * n_points - 2, 0
    first, last = 0, 1
    while first < last:
        node, cluster = queue[first], cluster_of[first]
        first += 1
        height = merges[node - n_points, 2]
        density = 1.0 / height if height > 0.0 else np.inf
        deaths[cluster] = max(deaths[cluster], density)
        n_parts = _parts_below(merges, node, parts, room)
        is_split = _count_large(merges, parts[:n_parts], min_cluster_size) > 1
        for part in parts[:n_parts]:
            size = _size(merges, part)
            if size < min_cluster_size:
                # One point after the other, as the package sums them: a product would round otherwise.
                for point in _points_below(merges, part, room):
                    point_clusters[point], point_lambdas[point] = cluster, density
                    stabilities[cluster] += density - births[cluster]
                continue
            queue[last], cluster_of[last] = part, cluster
            if is_split:
                stabilities[cluster] += (density - births[cluster]) * size
                parents[n_clusters], births[n_clusters], sizes[n_clusters] = cluster, density, size
                cluster_of[last] = n_clusters
                n_clusters += 1
            last += 1
    kept = slice(0, n_clusters)
    return (
        point_clusters, point_lambdas, parents[kept], births[kept], deaths[kept], sizes[kept], stabilities[kept],
    )  # fmt: skip


@numba.njit(**_EXACT)
def _parts_below(merges: np.ndarray, node: int, parts: np.ndarray, room: np.ndarray) -> int:
    """Write what comes together at the height of a node into `parts`, points and nodes; returns how many they are."""
    n_points = len(merges) + 1
    height = merges[node - n_points, 2]
    room[0], n_waiting, n_parts = node, 1, 0
    while n_waiting:
        n_waiting -= 1
        part = room[n_waiting]
        if part >= n_points and merges[part - n_points, 2] == height:
            # The first of the two is taken first.
            room[n_waiting], room[n_waiting + 1] = merges[part - n_points, 1], merges[part - n_points, 0]
            n_waiting += 2
        else:
            parts[n_parts] = part
            n_parts += 1
    return n_parts


@numba.njit(**_EXACT)
def _points_below(merges: np.ndarray, node: int, room: np.ndarray) -> np.ndarray:
    """The points of a node, in a part of `room`, which has an element for each of them or more."""
    n_points = len(merges) + 1
    room[0], n_found = node, 1
    place = 0
    while place < n_found:
        part = room[place]
        if part < n_points:
            place += 1
        else:
            room[place], room[n_found] = merges[part - n_points, 0], merges[part - n_points, 1]
            n_found += 1
    return room[:n_found]


@numba.njit(**_EXACT)
def _count_large(merges: np.ndarray, parts: np.ndarray, min_cluster_size: int) -> int:
    n_large = 0
    for part in parts:
        n_large += _size(merges, part) >= min_cluster_size
    return n_large


@numba.njit(**_EXACT)
def _size(merges: np.ndarray, node: int) -> int:
    n_points = len(merges) + 1
    return int(merges[node - n_points, 3]) if node >= n_points else 1


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
