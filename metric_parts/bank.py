"""The bank: the training vectors of the last steps, as they fell out of training, to search among in validation."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.separation import effective_rank

# Rows that are encoded anew to see how far the stored vectors have drifted.
DRIFT_ROWS = 256


@dataclass(frozen=True)
class Reference:
    """Vectors to search among, one a training row."""

    rows: np.ndarray  # [n] int64: row numbers of the training set
    vectors: np.ndarray  # [n, d] float32
    codes: np.ndarray  # [n] int64: label numbers
    text_keys: np.ndarray  # [n] int64


class Bank:
    """Vectors of the last `n_steps` optimizer steps; they come from older weights and with dropout on."""

    def __init__(self, *, n_steps: int, codes: np.ndarray, text_keys: np.ndarray) -> None:
        self._codes = codes
        self._text_keys = text_keys
        self._steps: deque[tuple[int, np.ndarray, np.ndarray]] = deque(maxlen=n_steps)

    def __len__(self) -> int:
        return sum(len(rows) for _, rows, _ in self._steps)

    def add(self, rows: np.ndarray, vectors: np.ndarray, *, step: int) -> None:
        """Store the vectors [m, d] of training rows [m] at a step."""
        self._steps.append((step, rows, vectors.astype(np.float32, copy=False)))

    def reference(self) -> Reference:
        """The newest vector of each row: a row that came twice has one vote."""
        rows, vectors, _ = self._newest()
        return Reference(rows, vectors, self._codes[rows], self._text_keys[rows])

    def drift_rows(self) -> np.ndarray:
        """Some rows, spread evenly over the bank, to encode anew for `statistics`."""
        rows, _, _ = self._newest()
        return rows[np.unique(np.linspace(0, len(rows) - 1, min(DRIFT_ROWS, len(rows))).astype(np.int64))]

    def statistics(self, *, step: int, n_labels: int, drift_vectors: np.ndarray) -> dict[str, float]:
        """Size, cover, age and shape of the bank; `drift_vectors` are those of `drift_rows` under today's weights.

        Drift is 1 minus the mean cosine between stored and new vectors. Intra and inter are mean cosines of pairs of
        one label and of two; effective rank is the exponential of the entropy of the spectrum (Roy and Vetterli 2007).
        """
        rows, vectors, steps = self._newest()
        units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        intra, inter = _pair_cosines(units, self._codes[rows])
        fresh = drift_vectors / np.maximum(np.linalg.norm(drift_vectors, axis=1, keepdims=True), 1e-12)
        stored = units[np.searchsorted(rows, self.drift_rows())]
        return {
            "bank/rows": float(len(self)),
            "bank/unique_rows": float(len(rows)),
            "bank/labels_covered": len(np.unique(self._codes[rows])) / n_labels,
            "bank/age_steps": float(np.mean(step - steps)),
            "bank/drift": float(1.0 - np.mean(np.sum(stored * fresh, axis=1))),
            "bank/intra_cosine": intra,
            "bank/inter_cosine": inter,
            "bank/norm": float(np.linalg.norm(vectors, axis=1).mean()),
            "bank/effective_rank": float(effective_rank(units)),
        }

    def _newest(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers, ascending, with their newest vectors and the steps those are of."""
        rows = np.concatenate([entry[1] for entry in self._steps])
        vectors = np.concatenate([entry[2] for entry in self._steps])
        steps = np.concatenate([np.full(len(entry[1]), entry[0]) for entry in self._steps])
        unique, newest = np.unique(rows[::-1], return_index=True)
        places = len(rows) - 1 - newest
        return unique, vectors[places], steps[places]

    def state_dict(self) -> dict[str, Any]:
        """Arrays from which an equal bank can be made."""
        steps = list(self._steps)
        return {
            "steps": np.array([entry[0] for entry in steps], np.int64),
            "sizes": np.array([len(entry[1]) for entry in steps], np.int64),
            "rows": np.concatenate([entry[1] for entry in steps]) if steps else np.zeros(0, np.int64),
            "vectors": np.concatenate([entry[2] for entry in steps]) if steps else np.zeros((0, 1), np.float32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        ends = np.cumsum(state["sizes"])[:-1]
        parts = zip(state["steps"], np.split(state["rows"], ends), np.split(state["vectors"], ends), strict=True)
        self._steps.clear()
        for step, rows, vectors in parts:
            self._steps.append((int(step), rows, vectors))


def _pair_cosines(units: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """Mean cosine of pairs of rows with one code, and of pairs with two; NaN where there is no such pair.

    From sums alone: the cosines of all pairs of a set add up to the squared norm of its sum, less its size.
    """
    _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), units.shape[1]))
    np.add.at(sums, inverse, units.astype(np.float64))
    n_intra = float(np.sum(counts * (counts - 1.0)))
    n_all = len(units) * (len(units) - 1.0)
    lengths = float(np.sum(units.astype(np.float64) ** 2))
    intra = float(np.sum(sums**2)) - lengths
    everything = float(np.sum(sums.sum(axis=0) ** 2)) - lengths
    n_inter = n_all - n_intra
    return (intra / n_intra if n_intra else float("nan")), ((everything - intra) / n_inter if n_inter else float("nan"))
