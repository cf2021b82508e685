"""The highest eigenvectors of a large symmetric operator, with a basis that lies in a file and not in memory.

    vectors = highest_eigenvectors(multiply, n, 11, beside=matrix)    # [n, 11]; multiply([n]) -> [n]

ARPACK keeps its basis in memory, 320 bytes a row for forty vectors, which is more than all else that a graph of
neighbours needs. Here it is gone through some columns at a time, as every mapped matrix is (`common.mapped`). That is
slower than memory, so the basis is not made of powers of the operator, but of powers of a polynomial in it that lifts
the wanted eigenvalues far above the others: a vector of it takes eight products, and one pass through the basis.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np

from common.mapped import matrix_beside, release

log = logging.getLogger(__name__)

Operator = Callable[[np.ndarray], np.ndarray]

# Columns of the basis that are worked on at a time: 64 KiB of each vector.
_COLUMNS = 8192
# Times that the basis is filled by the operator itself, which shows where the wanted eigenvalues begin.
_PLAIN_FILLS = 2
# Products for one vector of the basis thereafter.
_DEGREE = 8
# What is left of a vector when rounding is all that is left.
_NOTHING = 1e-12


def highest_eigenvectors(
    multiply: Operator,
    n: int,
    count: int,
    *,
    beside: np.ndarray,
    n_vectors: int = 40,
    tolerance: float = 1e-6,
    max_restarts: int = 1000,
) -> np.ndarray:
    """Return the eigenvectors of the `count` highest eigenvalues, the highest first: [n, count] float32, unit length.

    `multiply` is a symmetric operator of [n] float64 with eigenvalues from -1 to 1. The basis of `n_vectors` (more than
    twice the count, and at most n - 1) lies where `beside` does, in a file or in memory. An eigenpair is found when its
    residual is at most `tolerance`; after `max_restarts` the best so far are returned, with a warning. Equal arguments
    give equal bits. Raises ValueError unless there are more vectors than are asked for.
    Sources: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal.
    Appl. 22 (2000); Saad, Chebyshev acceleration techniques, Math. Comp. 42 (1984).
    """
    n_vectors = min(max(n_vectors, 2 * count + 1), n - 1)
    if not 0 < count < n_vectors:
        raise ValueError(f"{count} eigenvectors of {n} rows are asked for by {n_vectors} basis vectors")
    basis = _Basis(n_vectors + 1, n, beside=beside)
    search = _Search(multiply, basis, np.random.default_rng(0).standard_normal(n), count)
    if not search.run(_PLAIN_FILLS, tolerance):
        lifted = _Lifted(multiply, above=search.highest_unwanted)
        search = _Search(lifted.multiply, basis, search.best.sum(axis=1, dtype=np.float64), count, slope=lifted.slope)
        if not search.run(max_restarts, tolerance):
            log.warning("eigenvectors: the best after %d restarts are taken", max_restarts)
    return search.best


class _Lifted:
    """A Chebyshev polynomial of an operator: within -1 and 1 up to some eigenvalue, and steep above it."""

    def __init__(self, multiply: Operator, *, above: float) -> None:
        self._multiply, self._above = multiply, above

    def multiply(self, vector: np.ndarray) -> np.ndarray:
        before, now = vector, self._shifted(vector)
        for _ in range(_DEGREE - 1):
            before, now = now, 2.0 * self._shifted(now) - before
        return now

    def _shifted(self, vector: np.ndarray) -> np.ndarray:
        """The operator with -1 to `above` stretched to -1 to 1."""
        return (2.0 * self._multiply(vector) + (1.0 - self._above) * vector) / (1.0 + self._above)

    def slope(self, value: float) -> float:
        """How far the polynomial moves for each unit of the operator's eigenvalue, where it has this value."""
        angle = np.arccosh(max(value, 1.0)) / _DEGREE
        steepness = np.sinh(_DEGREE * angle) / np.sinh(angle) if angle > _NOTHING else _DEGREE
        return float(_DEGREE * steepness * 2.0 / (1.0 + self._above))


class _Search:
    """A basis that spans what powers of an operator make of a first vector, with the best of it kept on the way."""

    def __init__(
        self,
        multiply: Operator,
        basis: _Basis,
        first: np.ndarray,
        count: int,
        *,
        slope: Callable[[float], float] = lambda _: 1.0,
    ) -> None:
        self._multiply, self._basis, self._count, self._slope = multiply, basis, count, slope
        n_vectors = len(basis) - 1
        # Those next to the wanted ones, too: they speed up what follows.
        self._n_best = count + (n_vectors - count) // 2
        self._n_kept = 0
        self._projected = np.zeros((n_vectors, n_vectors))  # the operator, on the basis
        self._gap = 0.0  # the length of what the operator makes of the basis beyond it
        self._rng = np.random.default_rng(1)
        self._append(first, 0)

    @property
    def best(self) -> np.ndarray:
        """The eigenvectors that are wanted, as they are now: [n, count] float32, the highest first."""
        return self._basis.combine(self._weights[:, : -self._count - 1 : -1])

    @property
    def lowest_wanted(self) -> float:
        return float(self._values[-self._count])

    @property
    def highest_unwanted(self) -> float:
        """At or below the first eigenvalue that is not wanted, as what a basis shows of them always is."""
        return float(self._values[-self._count - 1])

    def run(self, max_fills: int, tolerance: float) -> bool:
        """Fill the basis until all that are wanted are found; False where they are not, after `max_fills`."""
        for fill in range(max_fills):
            if fill:
                self._keep_best()
            self._fill()
            if self._are_found(tolerance):
                return True
        return False

    def _fill(self) -> None:
        for place in range(self._n_kept, len(self._projected)):
            image = self._multiply(self._basis.copy_of(place))
            inside = self._basis.take_out(image, place + 1)
            self._projected[: place + 1, place] = self._projected[place, : place + 1] = inside
            self._gap = self._append(image, place + 1)
        self._values, self._weights = np.linalg.eigh(self._projected)

    def _are_found(self, tolerance: float) -> bool:
        residuals = self._gap * np.abs(self._weights[-1, -self._count :])
        return bool((residuals <= tolerance * self._slope(self.lowest_wanted)).all())

    def _keep_best(self) -> None:
        """Let the basis begin with its best eigenvectors, and the vector that comes after it."""
        last = self._basis.copy_of(len(self._projected))
        self._basis.replace(self._weights[:, -self._n_best :])
        self._basis.put(self._n_best, last)
        self._n_kept = self._n_best
        self._projected[:] = 0.0
        kept = np.arange(self._n_best)
        self._projected[kept, kept] = self._values[-self._n_best :]

    def _append(self, vector: np.ndarray, place: int) -> float:
        """Put a vector, orthogonal to those before it, at `place` and at length 1; returns the length it had.

        Where nothing is left of it the basis holds all that the operator makes of it, and a new direction is drawn.
        """
        length = float(np.linalg.norm(vector))
        if length <= _NOTHING:
            vector, length = self._rng.standard_normal(len(vector)), 0.0
            self._basis.take_out(vector, place)
        self._basis.put(place, vector / np.linalg.norm(vector))
        return length


class _Basis:
    """Orthonormal vectors [m, n] float64, gone through some columns at a time."""

    def __init__(self, n_vectors: int, n: int, *, beside: np.ndarray) -> None:
        self._vectors = matrix_beside(beside, (n_vectors, n), dtype=np.float64)

    def __len__(self) -> int:
        return len(self._vectors)

    def copy_of(self, place: int) -> np.ndarray:
        vector = self._vectors[place].copy()
        release(self._vectors[place])
        return vector

    def put(self, place: int, vector: np.ndarray) -> None:
        self._vectors[place] = vector
        release(self._vectors[place])

    def take_out(self, vector: np.ndarray, count: int) -> np.ndarray:
        """Make `vector` [n] orthogonal to the first `count`; returns its coefficients [count] in them.

        Twice, since what rounding leaves of the first time would grow from step to step.
        """
        first, second = np.zeros(count), np.zeros(count)
        for columns, block in self._blocks(count):
            first += block @ vector[columns]
        for columns, block in self._blocks(count):
            vector[columns] -= first @ block
            second += block @ vector[columns]
        for columns, block in self._blocks(count):
            vector[columns] -= second @ block
        return first + second

    def replace(self, weights: np.ndarray) -> None:
        """Put k combinations of the first m vectors in the place of the first k: `weights` [m, k]."""
        for _, block in self._blocks(len(weights)):
            block[: weights.shape[1]] = weights.T @ block

    def combine(self, weights: np.ndarray) -> np.ndarray:
        """The same combinations as a table, [n, k] float32."""
        combined = np.empty((self._vectors.shape[1], weights.shape[1]), np.float32)
        for columns, block in self._blocks(len(weights)):
            combined[columns] = block.T @ weights
        return combined

    def _blocks(self, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The first `count` vectors, some columns at a time, whose memory is given back after them."""
        for start in range(0, self._vectors.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            yield columns, self._vectors[:count, columns]
            for vector in self._vectors[:count]:
                release(vector[columns])
