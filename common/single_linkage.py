"""The single-linkage tree of HDBSCAN: rows joined by the shortest edges that connect them all.

    merges = single_linkage(vectors, min_samples=10)      # [n - 1, 4] float64, as in scipy.cluster.hierarchy

Two rows are as far apart as their distance or the farther of their `min_samples`-th neighbours, whichever is more. The
tree is exact, and the same for any number of threads. Edges are often equally long, as those about a row share its
`min_samples`-th neighbour: then there are several trees, in which any two rows still come together at the same height.
Memory is some 150 bytes a row of ten float32 dimensions, and up to 8 for each further one: no table of neighbours is
made. For few dimensions; in a hundred no box is far from a row. Imported only where it is called, as numba is.
Source: Campello, Moulavi and Sander, Density-based clustering based on hierarchical density estimates, PAKDD 2013;
Boruvka's algorithm, whose rounds take over what earlier ones found, as March, Ram and Gray do, Fast Euclidean minimum
spanning tree, KDD 2010.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from common.config import UserError
from common.disjoint_sets import find_root
from common.kd_tree import KdTree, Ways, build_kd_tree, kth_squares, search_outside
from common.threads import share_tiles

# Rows that are searched for before the others of their group know what was found, and those that a thread takes at
# once: no number of threads may change either.
_BLOCK, _TILE = 8192, 512

_EXACT = {"cache": True, "error_model": "numpy", "nogil": True, "fastmath": False}


class SpanningTree(NamedTuple):
    """The n - 1 edges between n rows."""

    ends: np.ndarray  # [n - 1, 2] int32, row numbers
    squares: np.ndarray  # [n - 1] float64, squared lengths


def single_linkage(vectors: np.ndarray, *, min_samples: int) -> np.ndarray:
    """Join rows [n, d] of finite values, n >= 2: merges [n - 1, 4] float64 as in scipy.cluster.hierarchy.

    `min_samples`, at least 1, leaves the row itself out and is capped at n - 1. Raises UserError where squared
    distances are beyond float64, and ValueError for fewer rows or samples.
    """
    edges = spanning_tree(vectors, min_samples=min_samples)
    return _link(edges.ends, np.sqrt(edges.squares), np.argsort(edges.squares, kind="stable"))


def spanning_tree(vectors: np.ndarray, *, min_samples: int) -> SpanningTree:
    """The shortest tree over rows [n, d], n >= 2, as `single_linkage` measures them."""
    if len(vectors) < 2 or min_samples < 1:
        raise ValueError(f"{len(vectors)} rows and min_samples {min_samples}: two rows and 1 are the least")
    _check_extent(vectors)
    tree = build_kd_tree(vectors)
    cores = kth_squares(tree, min(min_samples, len(vectors) - 1))
    forest = _Forest(cores)
    while forest.n_groups > 1:
        forest.join(_shortest_ways_out(tree, cores, forest))
    return SpanningTree(tree.order[forest.ends], forest.squares)


class _Forest:
    """The edges found so far between n points, and the groups that they make of them."""

    def __init__(self, cores: np.ndarray) -> None:
        n = self.n_groups = len(cores)
        # That nothing is nearer to a point than its core is known from the start.
        self.ways = Ways(np.arange(n, dtype=np.int32), np.full(n, -1, np.int32), cores.copy())
        self.ends = np.empty((n - 1, 2), np.int32)
        self.squares = np.empty(n - 1)

    def join(self, bounds: np.ndarray) -> None:
        """Join each group with that to which its shortest way leads, `bounds` [g] long."""
        n_edges = len(self.ways.groups) - self.n_groups
        self.n_groups = _join(self.ways, bounds, self.ends[n_edges:], self.squares[n_edges:])


def _shortest_ways_out(tree: KdTree, cores: np.ndarray, forest: _Forest) -> np.ndarray:
    """How long the shortest way out of each group is, squared: [g] float64; which it is stands in `forest.ways`."""
    ways, n = forest.ways, len(cores)
    _forget_inside(ways)
    group_of_node = _groups_of_nodes(tree.spans, tree.children, ways.groups)
    bounds = np.full(forest.n_groups, np.inf)
    _lower_bounds(ways, bounds, 0, n)
    for first in range(0, n, _BLOCK):
        end = min(first + _BLOCK, n)

        def search(starts: range, first: int = first, end: int = end) -> None:
            for start in starts:
                rows = first + start, min(first + start + _TILE, end)
                search_outside(tree, cores, ways, group_of_node, bounds, *rows)

        share_tiles(search, n_rows=end - first, tile_rows=_TILE)
        _lower_bounds(ways, bounds, first, end)
    return bounds


def _check_extent(vectors: np.ndarray) -> None:
    """Leave room for what sums in another order are rounded to: with an infinite one no edge would be found."""
    with np.errstate(over="ignore"):
        sides = vectors.max(axis=0).astype(np.float64) - vectors.min(axis=0)
        square = np.square(sides).sum()
    if square > np.finfo(np.float64).max / 2:
        raise UserError("the values are too large for their squared distances; scale the vectors down")


@numba.njit(**_EXACT)
def _forget_inside(ways: Ways) -> None:
    """Set to -1 what has come into the point's own group."""
    for row in range(len(ways.groups)):
        if ways.nearest[row] >= 0 and ways.groups[ways.nearest[row]] == ways.groups[row]:
            ways.nearest[row] = -1


@numba.njit(**_EXACT)
def _lower_bounds(ways: Ways, bounds: np.ndarray, start: int, end: int) -> None:
    """Lower the bounds of groups to what the points from `start` to `end` - 1 know."""
    for row in range(start, end):
        if ways.nearest[row] >= 0:
            bounds[ways.groups[row]] = min(bounds[ways.groups[row]], ways.squares[row])


@numba.njit(**_EXACT)
def _groups_of_nodes(spans: np.ndarray, children: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The group of each node, [m] int32, -1 where its points are of several."""
    found = np.empty(len(spans), np.int32)
    for node in range(len(spans) - 1, -1, -1):  # children come after their parents
        child = children[node]
        if child >= 0:
            found[node] = found[child] if found[child] == found[child + 1] else -1
            continue
        found[node] = groups[spans[node, 0]]
        for row in range(spans[node, 0], spans[node, 1]):
            if groups[row] != found[node]:
                found[node] = -1
                break
    return found


@numba.njit(**_EXACT)
def _join(ways: Ways, bounds: np.ndarray, ends: np.ndarray, squares: np.ndarray) -> int:
    """Add the shortest edge out of each group, unless others have joined its ends; number the groups anew.

    Returns how many they are. Where edges are equally long any choice is right: in a round of them that would close,
    all are equally long, and one is left out.
    """
    n_groups, n_edges, groups = len(bounds), 0, ways.groups
    parents = np.arange(n_groups).astype(np.int32)
    is_done = np.zeros(n_groups, np.bool_)
    for row in range(len(groups)):
        group = groups[row]
        if ways.nearest[row] < 0 or is_done[group] or ways.squares[row] > bounds[group]:
            continue
        is_done[group] = True
        one, other = find_root(parents, group), find_root(parents, groups[ways.nearest[row]])
        if one != other:
            parents[max(one, other)] = min(one, other)
            ends[n_edges, 0], ends[n_edges, 1], squares[n_edges] = row, ways.nearest[row], ways.squares[row]
            n_edges += 1
    numbers, n_left = np.empty(n_groups, np.int32), 0
    for group in range(n_groups):
        if parents[group] == group:
            numbers[group], n_left = n_left, n_left + 1
        else:
            numbers[group] = numbers[find_root(parents, group)]  # which is smaller
    for row in range(len(groups)):
        groups[row] = numbers[groups[row]]
    return n_left


@numba.njit(**_EXACT)
def _link(ends: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Merge by the edges in `order` [n - 1]: each row of [n - 1, 4] two nodes, the length and how many rows."""
    n = len(order) + 1
    merges, parents = np.empty((n - 1, 4)), np.arange(2 * n - 1).astype(np.int32)
    for step in range(n - 1):
        edge = order[step]
        one, other = find_root(parents, ends[edge, 0]), find_root(parents, ends[edge, 1])
        parents[one] = parents[other] = n + step
        merges[step, 0], merges[step, 1], merges[step, 2] = min(one, other), max(one, other), lengths[edge]
        merges[step, 3] = (merges[one - n, 3] if one >= n else 1.0) + (merges[other - n, 3] if other >= n else 1.0)
    return merges
