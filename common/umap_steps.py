"""UMAP's layout of a graph: edges pull their ends together, rows drawn at random push off; compiled by numba.

    run_epochs(places, indptr, tails, samples, curve=(a, b), seeds=seeds, n_epochs=500)

The steps are those of umap-learn, in its order and with its random draws, so that the first epochs agree with it to
rounding; later ones amplify every rounding, there as here. What differs is how a step is computed. Both forces depend
on one number, the squared distance, so they are looked up instead of being computed from powers; all is float32, and
rows lie in whole vectors of the processor. Imported only where it is called: the import of numba takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numba
import numpy as np

from common.mapped import matrix_beside, pieces, release

# Negative samples of each sample, and the first step: the defaults of UMAP.
N_NEGATIVE = 5
_LEARNING_RATE = 1.0
# A step in one dimension is cut at this.
_MAX_STEP = np.float32(4.0)

# Each power of two is parted into 32 intervals, in each of which a force is a cubic of where one is in it: right
# to some units in the last place of float32.
_PARTS_BITS = 5
_PLACE_BITS = 23 - _PARTS_BITS
_PLACE_MASK = np.uint32((1 << _PLACE_BITS) - 1)
_PLACE_UNIT = np.float32(1.0 / (1 << _PLACE_BITS))
_N_INTERVALS = 1 << (8 + _PARTS_BITS)

# Rows of at least so many values are filled up to a multiple of it.
_LANES = 8
# Rows whose edges are gone through before their memory is given back.
_ROWS = 1 << 14
_EDGES = 1 << 18

# What the sums of n epochs are rounded by is below n^2 of this: each of at most n sums by half a unit in its last
# place, counted in steps of at least a fifth of an epoch.
_ROUNDING = 16 * np.finfo(np.float64).eps

_FAST = {"fastmath": True, "error_model": "numpy", "nogil": True}
# Said, as a function that says nothing is compiled with the fastmath of the first that calls it.
_EXACT = {"cache": True, "error_model": "numpy", "nogil": True, "fastmath": False}


def run_epochs(
    places: np.ndarray,
    indptr: np.ndarray,
    tails: np.ndarray,
    samples: np.ndarray,
    *,
    curve: tuple[float, float],
    seeds: np.ndarray,
    n_epochs: int,
    on_all_cores: bool = False,
) -> np.ndarray:
    """Lay out n rows from where they start, `places` [n, e] float32, which stay as they are: [n, e] float32.

    Row i has the edges `indptr[i]` to `indptr[i + 1]` - 1; they lead to `tails` [m] integers, and are sampled `samples`
    [m] float32 times, of `count_samples`. A distance d counts as the strength 1 / (1 + a d^(2b)), with `curve` =
    (a, b). `seeds` [3] int64 start the generators. `on_all_cores` lets rows move at the same time, so that results
    differ from run to run; otherwise equal arguments give equal bits.
    Source: McInnes, Healy and Melville, UMAP, arXiv 1802.03426, algorithm 5.
    """
    moving, states = _first_of_rows(places, seeds)
    pulls, pushes = force_tables(*curve)
    due, of_strongest = first_due(samples, n_epochs), pushes_of_strongest(n_epochs)
    step = _epoch_on_all_cores if on_all_cores else _epoch
    for epoch in range(n_epochs):
        # The second epoch is as bold as the first: umap-learn lowers the rate after it was used.
        rate = np.float32(_LEARNING_RATE * (1.0 - max(epoch - 1, 0) / n_epochs))
        for rows in _row_parts(len(places)):
            step(moving, indptr, tails, samples, due, of_strongest, states, pulls, pushes, epoch, rate, *rows)
            for of_edges in (tails, samples, due):
                release(of_edges[indptr[rows[0]] : indptr[rows[1]]])
    return np.ascontiguousarray(moving[:, : places.shape[1]])


def _first_of_rows(places: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows where they start, filled up to whole vectors of the processor, and their generators."""
    n, dim = places.shape
    moving = np.zeros((n, dim if dim < _LANES else -(-dim // _LANES) * _LANES), np.float32)
    states = np.empty((n, 3), np.int64)
    for first, last in _row_parts(n):
        moving[first:last, :dim] = places[first:last]
        states[first:last] = first_states(seeds, places[first:last])
        release(places[first:last])
    return moving, states


def _row_parts(n: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n, _ROWS):
        yield first, min(first + _ROWS, n)


# --- Forces ----------------------------------------------------------------------------------------------------------


def force_tables(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """What pulls and what pushes at every squared distance, for each unit of the way: two tables for `look_up`."""

    def pull(squares: np.ndarray) -> np.ndarray:
        return 2.0 * a * b * squares ** (b - 1.0) / (1.0 + a * squares**b)

    def push(squares: np.ndarray) -> np.ndarray:
        return 2.0 * b / ((0.001 + squares) * (1.0 + a * squares**b))

    return _tabulate(pull), _tabulate(push)


def _tabulate(force: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Cubics [_N_INTERVALS, 4] float32 through four Chebyshev points of each interval of positive float32.

    Intervals where the force is not finite, at zero and beyond the largest number, hold zeros.
    """
    edges = (np.arange(_N_INTERVALS - (1 << _PARTS_BITS) + 1, dtype=np.uint32) << _PLACE_BITS).view(np.float32)
    low, high = edges[:-1].astype(np.float64), edges[1:].astype(np.float64)
    high[-1] = np.finfo(np.float32).max
    nodes = 0.5 - 0.5 * np.cos(np.pi * (np.arange(4) + 0.5) / 4)
    with np.errstate(all="ignore"):
        values = force(low + (high - low) * nodes[:, None])  # [4, intervals]
    cubics = np.linalg.solve(np.vander(nodes, increasing=True), values).T
    table = np.zeros((_N_INTERVALS, 4), np.float32)
    is_finite = np.isfinite(cubics).all(axis=1)
    table[: len(cubics)][is_finite] = cubics[is_finite]
    return table


@numba.njit(cache=True, **_FAST)
def look_up(table: np.ndarray, square: np.float32) -> np.float32:
    """The force at a squared distance: the head of its bits is the interval, the rest the place in it."""
    bits = np.float32(square).view(np.uint32)
    # Without its sign, which only what is not a number can have here.
    line = table[np.uintp((bits >> np.uint32(_PLACE_BITS)) & np.uint32(_N_INTERVALS - 1))]
    place = np.float32(bits & _PLACE_MASK) * _PLACE_UNIT
    return (line[0] + place * line[1]) + place * place * (line[2] + place * line[3])


# --- Random draws ----------------------------------------------------------------------------------------------------

_LOW_32 = 0xFFFFFFFF


def first_states(seeds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A generator for each row, [n, 3] int64, as umap-learn sets them: by the bits of where the row starts."""
    return seeds[None, :] + places[:, :1].astype(np.float64).view(np.int64)


@numba.njit(cache=True, nogil=True)
def _shifted(value: np.int64, kept: int, by: int) -> np.int64:
    """Its bits that are kept, shifted to the left within 32 bits."""
    return ((value & kept) << by) & _LOW_32


@numba.njit(cache=True, nogil=True)
def draw(state: np.ndarray) -> np.int32:
    """The next number of a generator, whose state [3] int64 goes on.

    Source: L'Ecuyer, Maximally equidistributed combined Tausworthe generators, Math. Comp. 65 (1996).
    """
    first, second, third = state[0], state[1], state[2]
    first = _shifted(first, 0xFFFFFFFE, 12) ^ ((_shifted(first, _LOW_32, 13) ^ first) >> 19)
    second = _shifted(second, 0xFFFFFFF8, 4) ^ ((_shifted(second, _LOW_32, 2) ^ second) >> 25)
    third = _shifted(third, 0xFFFFFFF0, 17) ^ ((_shifted(third, _LOW_32, 3) ^ third) >> 11)
    state[0], state[1], state[2] = first, second, third
    return np.int32(first ^ second ^ third)


# --- When edges are due ----------------------------------------------------------------------------------------------
#
# umap-learn keeps two float64 sums for each edge, of the epochs between its pulls and of those between its pushes, and
# samples the edge when they are reached. Both grow by equal steps, so they follow from the number of steps but for
# their rounding, and that matters only next to a whole epoch. There, and nowhere else, they are summed anew: what comes
# out is the same, edge by edge and epoch by epoch, for ten bytes an edge instead of 28.


def count_samples(strengths: np.ndarray, n_epochs: int) -> np.ndarray:
    """How often each edge is sampled in all epochs: [m] float32, in the place of its `strengths` [m] float32."""
    strongest = max((part.max() for part in pieces(strengths, n_rows=_EDGES)), default=np.float32(0))
    for part in pieces(strengths, n_rows=_EDGES):
        part /= strongest
        part *= np.float32(n_epochs)
    return strengths


def first_due(samples: np.ndarray, n_epochs: int) -> np.ndarray:
    """The first epoch of each edge that is sampled `samples` [m] float32 times: [m] int16, n_epochs where none is."""
    kind = np.int16 if n_epochs <= np.iinfo(np.int16).max else np.int32
    due = matrix_beside(samples, samples.shape, dtype=kind)
    for part, of in zip(pieces(samples, n_rows=_EDGES), pieces(due, n_rows=_EDGES), strict=True):
        _fill_first_due(part, n_epochs, of)
    return due


def pushes_of_strongest(n_epochs: int) -> np.ndarray:
    """How many pushes come with the pull of an edge that is sampled in every epoch: [n_epochs] int64."""
    return np.array([0] + [_sum_anew(np.float32(n_epochs), epoch, n_epochs)[0] for epoch in range(1, n_epochs)])


@numba.njit(**_EXACT)
def _fill_first_due(samples: np.ndarray, n_epochs: int, due: np.ndarray) -> None:
    for edge in range(len(samples)):
        due[edge] = _at_most(n_epochs / np.float64(samples[edge]), n_epochs)


@numba.njit(**_EXACT)
def _at_most(moment: float, n_epochs: int) -> int:
    """The first epoch that is not before a moment, or n_epochs, which never comes."""
    return int(np.ceil(moment)) if moment < n_epochs else n_epochs


@numba.njit(**_EXACT)
def go_on(samples: np.float32, epoch: int, n_epochs: int, of_strongest: np.ndarray) -> tuple[int, int]:
    """How many pushes come with the pull in an epoch in which an edge is due, and when it is due next.

    An edge is pulled once in each `period`, and pushed off five times as often, as far as is due with the pull.
    """
    if samples == n_epochs:
        return of_strongest[epoch], epoch + 1
    period = n_epochs / np.float64(samples)
    tolerance = _ROUNDING * n_epochs * n_epochs
    turns = epoch / period
    pulls = np.floor(turns)  # with this one
    after = (pulls + 1) * period
    is_clear = _is_clear(turns, tolerance) and _is_clear(after, tolerance) and _is_clear(N_NEGATIVE * turns, tolerance)
    pushes = 1.0  # that fell due until the pull before: the first one of all is due, and not made, before there is any
    if pulls > 1:
        before = (pulls - 1) * period
        pushes = N_NEGATIVE * (np.ceil(before) / period)
        is_clear = is_clear and _is_clear(before, tolerance) and _is_clear(pushes, tolerance)
    if not is_clear:
        return _sum_anew(samples, epoch, n_epochs)
    return int(np.floor(N_NEGATIVE * turns) - np.floor(pushes)), _at_most(after, n_epochs)


@numba.njit(**_EXACT)
def _is_clear(value: float, tolerance: float) -> bool:
    """Whether rounding cannot put a value on the other side of a whole number."""
    return abs(value - np.rint(value)) > tolerance


@numba.njit(**_EXACT)
def _sum_anew(samples: np.float32, epoch: int, n_epochs: int) -> tuple[int, int]:
    """The same by the sums of umap-learn, from the first epoch on."""
    period = n_epochs / np.float64(samples)
    gap = period * (1.0 / N_NEGATIVE)
    next_pull, next_push, n_pushes, now = period, period / N_NEGATIVE, 0, 0
    while now < epoch:
        now = int(np.ceil(next_pull))
        n_pushes = int((now - next_push) / gap)
        next_push = _add_product(next_push, n_pushes, gap)
        next_pull += period
    return n_pushes, _at_most(next_pull, n_epochs)


@numba.njit(**_EXACT | {"fastmath": {"contract"}})
def _add_product(total: float, count: int, each: float) -> float:
    """Rounded once, where the processor can: as the loop of umap-learn is compiled, for which fastmath is on."""
    return total + count * each


# --- Steps -----------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, **_FAST)
def _squared_distance(here: np.ndarray, there: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for d in range(len(here)):
        gap = here[d] - there[d]
        total += gap * gap
    return total


@numba.njit(cache=True, **_FAST)
def _pull_together(here: np.ndarray, there: np.ndarray, force: np.float32, rate: np.float32) -> None:
    for d in range(len(here)):
        step = min(max(force * (there[d] - here[d]), -_MAX_STEP), _MAX_STEP) * rate
        here[d] += step
        there[d] -= step


@numba.njit(cache=True, **_FAST)
def _push_off(here: np.ndarray, there: np.ndarray, force: np.float32, rate: np.float32) -> None:
    for d in range(len(here)):
        here[d] += min(max(force * (here[d] - there[d]), -_MAX_STEP), _MAX_STEP) * rate


def _steps_of_epoch(
    places: np.ndarray,
    indptr: np.ndarray,
    tails: np.ndarray,
    samples: np.ndarray,
    due: np.ndarray,
    of_strongest: np.ndarray,
    states: np.ndarray,
    pulls: np.ndarray,
    pushes: np.ndarray,
    epoch: int,
    rate: np.float32,
    first_row: int,
    end_row: int,
) -> None:
    """Go through the edges of some rows that are due. A row drawn as its own is at no distance, and stays."""
    n, n_epochs = len(places), len(of_strongest)
    for row in numba.prange(first_row, end_row):
        here = places[np.uintp(row)]
        for edge in range(indptr[row], indptr[row + 1]):
            if due[edge] == epoch:
                there = places[np.uintp(tails[edge])]
                _pull_together(here, there, look_up(pulls, _squared_distance(here, there)), rate)
                n_pushes, due[edge] = go_on(samples[edge], epoch, n_epochs, of_strongest)
                for _ in range(n_pushes):
                    there = places[np.uintp(draw(states[row]) % n)]
                    _push_off(here, there, look_up(pushes, _squared_distance(here, there)), rate)


_epoch = numba.njit(cache=True, **_FAST)(_steps_of_epoch)
# Not cached: numba would take one of the two for the other.
_epoch_on_all_cores = numba.njit(parallel=True, **_FAST)(_steps_of_epoch)
