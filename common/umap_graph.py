"""The graph that UMAP lays out: how strongly each row belongs to its neighbours, or they to it; edges lie in files.

    graph = fuzzy_graph(indices, distances)      # bit for bit what umap-learn makes of them
    graph.tails[graph.indptr[i] : graph.indptr[i + 1]]

An edge takes eight bytes, and a row has some twenty, which is more than its embedding takes. So edges lie where the
neighbours do, in files (`common.mapped`), and everything here goes through them some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np

from common.disjoint_sets import find_root
from common.mapped import matrix_beside, pieces, release

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Rows whose edges are gone through at a time, and those whose incoming edges are: each time all edges are looked at.
_ROWS = 8192
_LEAST_TARGETS, _MOST_PASSES = 1 << 15, 64

# Said, as a function that says nothing is compiled with the fastmath of the first that calls it.
_EXACT = {"cache": True, "error_model": "numpy", "nogil": True, "fastmath": False}


@dataclass(frozen=True, eq=False)
class FuzzyGraph:
    """A symmetric graph of n rows and m directed edges; the edges of row i are `indptr[i]` to `indptr[i + 1]` - 1."""

    indptr: np.ndarray  # [n + 1] int64
    tails: np.ndarray  # [m] int32, ascending in each row
    strengths: np.ndarray  # [m] float32, above 0

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def is_alone(self) -> np.ndarray:
        """Whether a row has no edge: [n] bool."""
        return np.diff(self.indptr) == 0

    def row_parts(self) -> Iterator[slice]:
        """All rows, some at a time; the memory of their edges is given back after them."""
        for start in range(0, len(self), _ROWS):
            rows = slice(start, min(start + _ROWS, len(self)))
            yield rows
            self.release_edges(rows)

    def release_edges(self, rows: slice) -> None:
        """Give back the memory of the edges of some rows."""
        for of_edges in (self.tails, self.strengths):
            release(of_edges[self.indptr[rows.start] : self.indptr[rows.stop]])

    def drop_weak_edges(self, least: float) -> FuzzyGraph:
        """The edges of at least this strength, which take the places of all; this graph is not to be used again."""
        indptr = np.zeros_like(self.indptr)
        for rows in self.row_parts():
            _keep_strong(self.indptr, self.tails, self.strengths, np.float32(least), rows.start, rows.stop, indptr)
            for moved in (self.tails, self.strengths):
                release(moved[indptr[rows.start] : indptr[rows.stop]])
        return FuzzyGraph(indptr, self.tails[: indptr[-1]], self.strengths[: indptr[-1]])

    def strongest(self) -> np.float32:
        """The highest strength, 0 where there is no edge."""
        return max((part.max() for part in pieces(self.strengths, n_rows=_ROWS)), default=np.float32(0))

    def sum_strengths(self) -> np.ndarray:
        """The strengths of each row's edges, [n] float64."""
        sums = np.zeros(len(self))
        for rows in self.row_parts():
            _sum_rows(self.indptr, self.strengths, rows.start, rows.stop, sums)
        return sums

    def connected_parts(self) -> tuple[int, np.ndarray]:
        """How many parts nothing connects, and that of each row, [n] int32, numbered by their first rows."""
        roots = np.arange(len(self), dtype=np.int32)
        for rows in self.row_parts():
            _join_ends(self.indptr, self.tails, rows.start, rows.stop, roots)
        first_rows, part_of = np.unique(_find_roots(roots), return_inverse=True)
        return len(first_rows), part_of.astype(np.int32)

    def take(self, members: np.ndarray, place_of: np.ndarray) -> FuzzyGraph:
        """The graph of some rows that no edge leaves: `members` [m], ascending, and `place_of` [n] each in them."""
        indptr = np.zeros(len(members) + 1, np.int64)
        np.cumsum(self.indptr[members + 1] - self.indptr[members], out=indptr[1:])
        tails, strengths = (matrix_beside(self.tails, (int(indptr[-1]),), dtype=of) for of in (np.int32, np.float32))
        part = FuzzyGraph(indptr, tails, strengths)
        for rows in part.row_parts():
            some = members[rows]
            _copy_edges(
                self.indptr, self.tails, self.strengths, some, place_of, int(indptr[rows.start]), tails, strengths
            )
            self.release_edges(slice(int(some[0]), int(some[-1]) + 1))
        return part

    def to_scipy(self) -> csr_matrix:
        """The same as a table [n, n] float32 in memory."""
        from scipy.sparse import csr_matrix

        return csr_matrix((self.strengths, self.tails, self.indptr), shape=(len(self), len(self)))


class ScaledGraph:
    """A graph as an operator: S[i, j] / sqrt(s[i] s[j]), where s sums the strengths of each row; none may be alone.

    It is I - L of the normalised Laplacian L, which is never made: it would be as large as the graph.
    """

    def __init__(self, graph: FuzzyGraph) -> None:
        self._graph = graph
        self._scales = 1.0 / np.sqrt(graph.sum_strengths())

    def multiply(self, vector: np.ndarray) -> np.ndarray:
        """The operator times a vector [n]: [n] float64."""
        graph, scaled, product = self._graph, (vector * self._scales).astype(np.float32), np.empty(len(vector))
        for rows in graph.row_parts():
            _multiply_rows(graph.indptr, graph.tails, graph.strengths, scaled, rows.start, rows.stop, product)
        product *= self._scales
        return product

    def to_table(self) -> np.ndarray:
        """The operator as a table [n, n] float64, for few rows."""
        return self._graph.to_scipy().toarray() * self._scales * self._scales[:, None]


def fuzzy_graph(indices: np.ndarray, distances: np.ndarray) -> FuzzyGraph:
    """The symmetric graph of membership strengths, about 1.5 k edges a row; beside `indices`, in a file or in memory.

    `indices` [n, k] integers and `distances` [n, k] float32 are the nearest rows of each row, itself first; -1 is none.
    Source: McInnes, Healy and Melville, UMAP, arXiv 1802.03426, algorithms 2 and 3.
    """
    columns, strengths = _memberships(indices, distances)
    n, k = columns.shape
    tails, united = (matrix_beside(indices, (2 * n * k,), dtype=kind) for kind in (np.int32, np.float32))
    graph = FuzzyGraph(np.zeros(n + 1, np.int64), tails, united)  # with room for as many edges as there can be
    step = max(_LEAST_TARGETS, -(-n // _MOST_PASSES))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        incoming = _incoming_edges(columns, strengths, rows)
        _unite_rows(columns, strengths, *incoming, start, graph.indptr, tails, united)
        graph.release_edges(rows)
        for used in (columns, strengths):
            release(used[rows])
    return FuzzyGraph(graph.indptr, tails[: graph.indptr[-1]], united[: graph.indptr[-1]])


def _memberships(indices: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of each row, ascending, and how strongly it belongs to them: [n, k]; n where none is."""
    from umap.umap_ import compute_membership_strengths, smooth_knn_dist

    n, k = indices.shape
    distances = np.ascontiguousarray(distances, np.float32)
    scales, nearest = smooth_knn_dist(distances, float(k), local_connectivity=1.0)
    release(distances)
    columns, strengths = matrix_beside(indices, (n, k), dtype=np.int32), matrix_beside(indices, (n, k))
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        # As if these rows were others than their neighbours: their numbers in `indices` are not those in this part.
        of_rows = (part[rows] for part in (indices, distances, scales, nearest))
        found = compute_membership_strengths(*of_rows, False, True)[2].reshape(-1, k)
        is_edge = (found > 0) & (indices[rows] != np.arange(rows.start, rows.stop)[:, None])
        near = np.where(is_edge, indices[rows], n)
        order = np.argsort(near, axis=1, kind="stable")
        columns[rows] = np.take_along_axis(near, order, axis=1)
        strengths[rows] = np.take_along_axis(found, order, axis=1)
        for used in (indices, distances, columns, strengths):
            release(used[rows])
    return columns, strengths


def _incoming_edges(
    columns: np.ndarray, strengths: np.ndarray, rows: slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edges that lead to some rows [r]: where each one's begin, [r + 1], where they come from, and strengths."""
    starts = np.zeros(rows.stop - rows.start + 1, np.int64)
    for part in pieces(columns, n_rows=_ROWS):
        _count_incoming(part, rows.start, starts)
    np.cumsum(starts, out=starts)
    heads, incoming = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    places = starts[:-1].copy()
    for start in range(0, len(columns), _ROWS):
        some = slice(start, start + _ROWS)
        _place_incoming(columns[some], strengths[some], start, rows.start, places, heads, incoming)
        release(columns[some])
        release(strengths[some])
    return starts, heads, incoming


# --- Compiled --------------------------------------------------------------------------------------------------------


@numba.njit(**_EXACT)
def _count_incoming(columns: np.ndarray, first_target: int, counts: np.ndarray) -> None:
    """Count in `counts` [r + 1], one place later, the edges to each of r rows from the first one on."""
    for column in columns.ravel():
        if first_target <= column < first_target + len(counts) - 1:
            counts[column - first_target + 1] += 1


@numba.njit(**_EXACT)
def _place_incoming(
    columns: np.ndarray,
    strengths: np.ndarray,
    first_row: int,
    first_target: int,
    places: np.ndarray,
    heads: np.ndarray,
    incoming: np.ndarray,
) -> None:
    """Put the edges of some rows where those that lead to the same one are: by `places` [r], which go on."""
    for row in range(len(columns)):
        for edge in range(columns.shape[1]):
            target = columns[row, edge] - first_target
            if 0 <= target < len(places):
                heads[places[target]], incoming[places[target]] = first_row + row, strengths[row, edge]
                places[target] += 1


@numba.njit(**_EXACT)
def _unite_rows(
    columns: np.ndarray,
    strengths: np.ndarray,
    starts: np.ndarray,
    heads: np.ndarray,
    incoming: np.ndarray,
    first_row: int,
    indptr: np.ndarray,
    tails: np.ndarray,
    united: np.ndarray,
) -> None:
    """Unite the edges from and to each of some rows by a + b - ab: that one of two memberships is there."""
    n, k = columns.shape
    for row in range(first_row, first_row + len(starts) - 1):
        place, here, there, end = indptr[row], 0, starts[row - first_row], starts[row - first_row + 1]
        while (here < k and columns[row, here] < n) or there < end:
            left = columns[row, here] if here < k else n
            right = heads[there] if there < end else n
            one = strengths[row, here] if left <= right else np.float32(0)
            other = incoming[there] if right <= left else np.float32(0)
            tails[place], united[place] = min(left, right), (one + other) - one * other
            here, there, place = here + (left <= right), there + (right <= left), place + 1
        indptr[row + 1] = place


@numba.njit(**_EXACT)
def _keep_strong(
    indptr: np.ndarray,
    tails: np.ndarray,
    strengths: np.ndarray,
    least: np.float32,
    first: int,
    last: int,
    new_indptr: np.ndarray,
) -> None:
    """Move the strong edges of some rows up to those of the rows before."""
    for row in range(first, last):
        place = new_indptr[row]
        for edge in range(indptr[row], indptr[row + 1]):
            if strengths[edge] >= least:
                tails[place], strengths[place] = tails[edge], strengths[edge]
                place += 1
        new_indptr[row + 1] = place


@numba.njit(**_EXACT)
def _sum_rows(indptr: np.ndarray, strengths: np.ndarray, first: int, last: int, sums: np.ndarray) -> None:
    for row in range(first, last):
        for edge in range(indptr[row], indptr[row + 1]):
            sums[row] += strengths[edge]


@numba.njit(**_EXACT)
def _join_ends(indptr: np.ndarray, tails: np.ndarray, first: int, last: int, roots: np.ndarray) -> None:
    """Let both ends of each edge have one root, the lower row."""
    for row in range(first, last):
        for edge in range(indptr[row], indptr[row + 1]):
            one, other = find_root(roots, row), find_root(roots, tails[edge])
            roots[max(one, other)] = min(one, other)


@numba.njit(**_EXACT)
def _find_roots(roots: np.ndarray) -> np.ndarray:
    for row in range(len(roots)):
        roots[row] = find_root(roots, row)
    return roots


@numba.njit(**_EXACT)
def _copy_edges(
    indptr: np.ndarray,
    tails: np.ndarray,
    strengths: np.ndarray,
    members: np.ndarray,
    place_of: np.ndarray,
    place: int,
    into_tails: np.ndarray,
    into_strengths: np.ndarray,
) -> None:
    for row in members:
        for edge in range(indptr[row], indptr[row + 1]):
            into_tails[place], into_strengths[place] = place_of[tails[edge]], strengths[edge]
            place += 1


@numba.njit(**_EXACT)
def _multiply_rows(
    indptr: np.ndarray,
    tails: np.ndarray,
    strengths: np.ndarray,
    vector: np.ndarray,
    first: int,
    last: int,
    product: np.ndarray,
) -> None:
    for row in range(first, last):
        total = 0.0
        for edge in range(indptr[row], indptr[row + 1]):
            total += strengths[edge] * vector[tails[edge]]
        product[row] = total
