"""A k-d tree over rows, and what is near each of them: its k-th nearest, and the nearest outside its own group.

    tree = build_kd_tree(vectors)        # its points are the rows in the order of its leaves
    squares = kth_squares(tree, 10)      # [n] squared distance of each point to its 10th nearest other

Distances are compared as squares, in float64, whatever the rows are. Compiled by numba and imported only where it is
called: the import takes a second, and the first call on a machine compiles.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from common.threads import share_tiles

# A part of no more rows is not split.
_LEAF_ROWS = 24
# The smaller side of a split has at least a fourth of the rows, so that no tree is deeper than a search has room for.
_LEAST_SHARE = 4
# Where clusters end a box is to end, too: a gap so many times the mean one is split at, and else the middle.
_WIDE_GAP = 8
# Nodes that wait while a search goes down: one a level, of which two billion rows have 64 at most.
_MOST_WAITING = 128
# Points whose search is one piece of work.
_TILE = 512

_EXACT = {"cache": True, "error_model": "numpy", "nogil": True, "fastmath": False}


class KdTree(NamedTuple):
    """A tree of m nodes over n points; node 0 is the root, and parents come before children."""

    points: np.ndarray  # [n, d] float32 or float64, in the order of the leaves
    order: np.ndarray  # [n] int32: the row that each point was
    spans: np.ndarray  # [m, 2] int32: the points of a node, from and to
    children: np.ndarray  # [m] int32: the first child of a node, which the second follows; -1 for a leaf
    lows: np.ndarray  # [m, d]: the least of a node's points in each dimension
    highs: np.ndarray  # [m, d]: the greatest


class Ways(NamedTuple):
    """The groups of n points, and what each point knows of the way out of its own."""

    groups: np.ndarray  # [n] int32, from 0
    nearest: np.ndarray  # [n] int32: the nearest point of another group; -1 where it is not known
    squares: np.ndarray  # [n] float64: how far that is, squared; where it is not known, no such point is nearer


def build_kd_tree(vectors: np.ndarray) -> KdTree:
    """Build the tree of rows [n, d], n >= 1; float32 stays as it is, all else becomes float64.

    Equal rows give equal trees on every machine.
    Source: Bentley, Multidimensional binary search trees, CACM 18 (1975), but for where parts are split.
    """
    points = np.array(vectors, np.float32 if vectors.dtype == np.float32 else np.float64, order="C")
    order = np.arange(len(points), dtype=np.int32)
    spans, children, lows, highs = [(0, len(points))], [], [], []
    for start, end in spans:  # which grows meanwhile
        part = points[start:end]
        lows.append(part.min(axis=0))
        highs.append(part.max(axis=0))
        if end - start <= _LEAF_ROWS:
            children.append(-1)
            continue
        sides = highs[-1].astype(np.float64) - lows[-1]
        middle = start + _split(part, order[start:end], axis=int(np.argmax(sides)))
        children.append(len(spans))
        spans += [(start, middle), (middle, end)]
    return KdTree(
        points, order, np.array(spans, np.int32), np.array(children, np.int32), np.array(lows), np.array(highs)
    )


def _split(part: np.ndarray, order: np.ndarray, *, axis: int) -> int:
    """Sort points and their row numbers along an axis, in place; returns how many of them are the first side."""
    by = np.argsort(part[:, axis], kind="stable")  # a partition would depend on the processor
    part[:], order[:] = part[by], order[by]
    least = len(part) // _LEAST_SHARE
    values = part[:, axis].astype(np.float64)
    gaps = np.diff(values[least - 1 : len(part) - least + 1])
    widest = int(np.argmax(gaps))
    is_wide = gaps[widest] > _WIDE_GAP * (values[-1] - values[0]) / len(part)
    return least + widest if is_wide else len(part) // 2


def kth_squares(tree: KdTree, k: int) -> np.ndarray:
    """The squared distance of each point to its k-th nearest other point, 1 <= k < n: [n] float64."""
    squares = np.empty(len(tree.points))

    def search(starts: range) -> None:
        for start in starts:
            _search_kth(tree, k, start, squares[start : start + _TILE])

    share_tiles(search, n_rows=len(squares), tile_rows=_TILE)
    return squares


@numba.njit(**_EXACT)
def _search_kth(tree: KdTree, k: int, start: int, squares: np.ndarray) -> None:
    """Fill `squares` for the points from `start` on."""
    nodes, gaps = np.empty(_MOST_WAITING, np.int32), np.empty(_MOST_WAITING)
    point, nearest = np.empty(tree.points.shape[1]), np.empty(k)
    for place in range(len(squares)):
        row = start + place
        point[:] = tree.points[row]
        nearest[:] = np.inf  # a heap, the farthest first
        nodes[0], gaps[0], n_waiting = 0, 0.0, 1
        while n_waiting:
            n_waiting -= 1
            node = nodes[n_waiting]
            if gaps[n_waiting] >= nearest[0]:
                continue
            if tree.children[node] >= 0:
                n_waiting = _add_children(tree, node, point, nodes, gaps, n_waiting)
                continue
            for other in range(tree.spans[node, 0], tree.spans[node, 1]):
                square = _square_to_point(tree, point, other)
                if square < nearest[0] and other != row:
                    _replace_farthest(nearest, square)
        squares[place] = nearest[0]


@numba.njit(**_EXACT)
def search_outside(
    tree: KdTree, cores: np.ndarray, ways: Ways, group_of_node: np.ndarray, bounds: np.ndarray, start: int, end: int
) -> None:
    """Find the way out for the points from `start` to `end` - 1 that know none, and leave it in `ways`.

    Two points are as near as their distance or the greater of their `cores` [n], whichever is more; all are squares.
    `group_of_node` [m] is -1 where a node has points of several groups. A way of `bounds` [g] or more is of no use to a
    group; where a point has none below, it is noted that it has none below the bound.
    """
    nodes, gaps = np.empty(_MOST_WAITING, np.int32), np.empty(_MOST_WAITING)
    point = np.empty(tree.points.shape[1])
    group, bound = -1, np.inf
    for row in range(start, end):
        if ways.groups[row] != group:
            group, bound = ways.groups[row], bounds[ways.groups[row]]
        if ways.nearest[row] >= 0 or ways.squares[row] >= bound:
            continue
        point[:] = tree.points[row]
        nodes[0], gaps[0], n_waiting = 0, 0.0, 1
        while n_waiting and bound > cores[row]:
            n_waiting -= 1
            node = nodes[n_waiting]
            if gaps[n_waiting] >= bound or group_of_node[node] == group:
                continue
            if tree.children[node] >= 0:
                n_waiting = _add_children(tree, node, point, nodes, gaps, n_waiting)
                continue
            for other in range(tree.spans[node, 0], tree.spans[node, 1]):
                if ways.groups[other] != group and cores[other] < bound:
                    square = max(_square_to_point(tree, point, other), cores[row], cores[other])
                    if square < bound:
                        bound, ways.nearest[row] = square, other
        ways.squares[row] = bound


@numba.njit(**_EXACT)
def _add_children(
    tree: KdTree, node: int, point: np.ndarray, nodes: np.ndarray, gaps: np.ndarray, n_waiting: int
) -> int:
    """Put the children of a node on the stack, the nearer one on top; returns how many nodes wait now."""
    near = tree.children[node]
    far = near + 1
    near_gap, far_gap = _square_to_box(tree, point, near), _square_to_box(tree, point, far)
    if far_gap < near_gap:
        near, far, near_gap, far_gap = far, near, far_gap, near_gap
    nodes[n_waiting], gaps[n_waiting] = far, far_gap
    nodes[n_waiting + 1], gaps[n_waiting + 1] = near, near_gap
    return n_waiting + 2


@numba.njit(**_EXACT)
def _square_to_box(tree: KdTree, point: np.ndarray, node: int) -> float:
    """The squared distance to the box of a node: added up as that to a point is, so that rounding puts none below."""
    square = 0.0
    for axis in range(len(point)):
        outside = max(tree.lows[node, axis] - point[axis], point[axis] - tree.highs[node, axis], 0.0)
        square += outside * outside
    return square


@numba.njit(**_EXACT)
def _square_to_point(tree: KdTree, point: np.ndarray, other: int) -> float:
    square = 0.0
    for axis in range(len(point)):
        difference = point[axis] - tree.points[other, axis]
        square += difference * difference
    return square


@numba.njit(**_EXACT)
def _replace_farthest(heap: np.ndarray, square: float) -> None:
    """Put a smaller value in the place of the first, which is the greatest, of a heap [k]."""
    place = 0
    while 2 * place + 1 < len(heap):
        child = 2 * place + 1
        if child + 1 < len(heap) and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= square:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = square
