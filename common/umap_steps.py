"""UMAP's layout of a graph: edges pull their ends together, rows drawn at random push off; compiled by numba.

    run_epochs(places, indptr, tails, periods, curve=(a, b), seeds=seeds, n_epochs=500)

The steps are those of umap-learn, in its order and with its random draws, so that the first epochs agree with it to
rounding; later ones amplify every rounding, there as here. What differs is how a step is computed. Both forces depend
on one number, the squared distance, so they are looked up instead of being computed from powers; all is float32, and
rows lie in whole vectors of the processor. Imported only where it is called: the import of numba takes a second.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

# Negative samples of each sample, and the first step: the defaults of UMAP.
_N_NEGATIVE = 5
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

_FAST = {"fastmath": True, "error_model": "numpy", "nogil": True}


def run_epochs(
    places: np.ndarray,
    indptr: np.ndarray,
    tails: np.ndarray,
    periods: np.ndarray,
    *,
    curve: tuple[float, float],
    seeds: np.ndarray,
    n_epochs: int,
    on_all_cores: bool = False,
) -> np.ndarray:
    """Lay out n rows from where they start, `places` [n, e] float32, which stay as they are: [n, e] float32.

    Row i has the edges `indptr[i]` to `indptr[i + 1]` - 1; they lead to `tails` [m] integers, and are due every
    `periods` [m] float64 epochs. A distance d counts as the strength 1 / (1 + a d^(2b)), with `curve` = (a, b). `seeds`
    [3] int64 start the generators. `on_all_cores` lets rows move at the same time, so that results differ from run to
    run; otherwise equal arguments give equal bits.
    Source: McInnes, Healy and Melville, UMAP, arXiv 1802.03426, algorithm 5.
    """
    n, dim = places.shape
    width = dim if dim < _LANES else -(-dim // _LANES) * _LANES
    moving = np.zeros((n, width), np.float32)
    moving[:, :dim] = places
    pulls, pushes = force_tables(*curve)
    states = first_states(seeds, places)
    next_pulls, next_pushes = periods.copy(), periods / _N_NEGATIVE
    step = _epoch_on_all_cores if on_all_cores else _epoch
    for epoch in range(n_epochs):
        # The second epoch is as bold as the first: umap-learn lowers the rate after it was used.
        rate = np.float32(_LEARNING_RATE * (1.0 - max(epoch - 1, 0) / n_epochs))
        step(moving, indptr, tails, periods, next_pulls, next_pushes, states, pulls, pushes, epoch, rate)
    return np.ascontiguousarray(moving[:, :dim])


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


@numba.njit(cache=True, error_model="numpy", nogil=True)
def _count_pushes(epoch: int, period: float, next_pushes: np.ndarray, edge: int) -> int:
    """How many pushes come with the pull of an edge; without fastmath, which could count one less or more."""
    gap = period / _N_NEGATIVE
    n_pushes = int((epoch - next_pushes[edge]) / gap)
    next_pushes[edge] += n_pushes * gap
    return n_pushes


def _steps_of_epoch(
    places: np.ndarray,
    indptr: np.ndarray,
    tails: np.ndarray,
    periods: np.ndarray,
    next_pulls: np.ndarray,
    next_pushes: np.ndarray,
    states: np.ndarray,
    pulls: np.ndarray,
    pushes: np.ndarray,
    epoch: int,
    rate: np.float32,
) -> None:
    """Go through the edges that are due, row by row. A row drawn as its own is at no distance, and stays."""
    n = len(places)
    for row in numba.prange(n):
        here = places[np.uintp(row)]
        for edge in range(indptr[row], indptr[row + 1]):
            if next_pulls[edge] <= epoch:
                there = places[np.uintp(tails[edge])]
                _pull_together(here, there, look_up(pulls, _squared_distance(here, there)), rate)
                next_pulls[edge] += periods[edge]
                for _ in range(_count_pushes(epoch, periods[edge], next_pushes, edge)):
                    there = places[np.uintp(draw(states[row]) % n)]
                    _push_off(here, there, look_up(pushes, _squared_distance(here, there)), rate)


_epoch = numba.njit(cache=True, **_FAST)(_steps_of_epoch)
# Not cached: numba would take one of the two for the other.
_epoch_on_all_cores = numba.njit(parallel=True, **_FAST)(_steps_of_epoch)
