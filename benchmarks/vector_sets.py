"""Unit vectors with known classes, on which searches and layouts are compared; neither sees a class."""

from __future__ import annotations

import numpy as np

# Vectors [n, d] float32 and their classes [n].
Labelled = tuple[np.ndarray, np.ndarray]

# Garments that look alike are of one family: shirts and coats, shoes, trousers and skirts; a bag is like nothing else.
FAMILIES = (0, 0, 0, 0, 1, 1, 1, 2, 2, 3)


def digit_vectors(n_rows: int) -> Labelled:
    """Digits of scikit-learn, and which digits they are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return unit_vectors(digits.data[:n_rows]), digits.target[:n_rows]


def separate_garments(n_rows: int) -> Labelled:
    """Ten garments: some far apart, some that overlap, of uneven size, in 64 dimensions."""
    rng = np.random.default_rng(3)
    kinds = rng.standard_normal((4, 64))
    families = (0, 0, 0, 1, 1, 1, 1, 2, 2, 3)
    means = np.stack([0.7 * kinds[family] + 0.8 * rng.standard_normal(64) for family in families])
    shares = np.array([0.16, 0.06, 0.1, 0.14, 0.1, 0.05, 0.1, 0.12, 0.07, 0.1])
    labels = rng.choice(10, size=n_rows, p=shares / shares.sum())
    widths = rng.uniform(0.8, 1.3, 10)
    return unit_vectors(means[labels] + widths[labels, None] * rng.standard_normal((n_rows, 64))), labels


def garments(n_rows: int, *, seed: int = 3) -> Labelled:
    """Ten garments with odd pieces: long tails, and one in seventeen halfway to a garment of another kind.

    Made for comparing searches, because every search finds the optimum on `separate_garments`. The seed is the first at
    which random search misses the optimum of 600 rows in a fifth of a thousand draws; no other search had seen it.
    """
    rng = np.random.default_rng(seed)
    families = 0.7 * rng.standard_normal((4, 64))
    means = np.stack([families[family] + 0.8 * rng.standard_normal(64) for family in FAMILIES])
    widths = rng.uniform(0.8, 1.3, 10)
    labels = rng.choice(10, size=n_rows, p=rng.dirichlet(np.full(10, 6.0)))
    spreads = widths[labels] * np.sqrt(4 / rng.chisquare(4, n_rows))  # Student's t with four degrees of freedom
    vectors = means[labels] + spreads[:, None] * rng.standard_normal((n_rows, 64))
    others = labels[rng.permutation(n_rows)]
    odd = rng.random(n_rows) < 0.06
    vectors[odd] = (vectors[odd] + means[others[odd]]) / 2
    return unit_vectors(vectors), labels


def uneven_groups(n_rows: int) -> Labelled:
    """Twenty-five groups of very uneven size and width in 48 dimensions, whose best clusterings are few."""
    rng = np.random.default_rng(5)
    means = 0.75 * rng.standard_normal((25, 48))
    shares = rng.gamma(2.0, size=25)
    labels = rng.choice(25, size=n_rows, p=shares / shares.sum())
    widths = rng.uniform(0.6, 1.4, 25)
    return unit_vectors(means[labels] + widths[labels, None] * rng.standard_normal((n_rows, 48))), labels


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    single = vectors.astype(np.float32)
    lengths: np.ndarray = np.linalg.norm(single, axis=1, keepdims=True)
    return single / lengths
