"""Eigenvectors by a basis in a file: those of the whole table."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import common.lanczos as lanczos
from common.lanczos import highest_eigenvectors
from common.mapped import mapped_matrix


def table_of(values: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric table with these eigenvalues, and its eigenvectors in their order, as columns."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (rotation * values) @ rotation.T, rotation


def largest_angle(found: np.ndarray, expected: np.ndarray) -> float:
    """Of each column to the expected one, by its sine; signs do not count."""
    cosines = np.abs(np.sum(found.astype(np.float64) * expected, axis=0))
    return float(np.sqrt(np.maximum(1 - np.minimum(cosines, 1) ** 2, 0)).max())


# Far apart, so that the operator itself finds them; so near 1 and each other that the polynomial must; below 0.
SPECTRA = {
    "apart": np.concatenate([[1.0, 0.8, 0.6, 0.4], np.linspace(-0.9, 0.1, 396)]),
    "crowded": np.concatenate([1 - 1e-3 * np.arange(4), np.linspace(-0.9, 0.99, 396)]),
    "negative": np.concatenate([[-0.1, -0.2, -0.3, -0.35], np.linspace(-1.0, -0.4, 396)]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvectors_are_those_of_the_table(name):
    table, vectors = table_of(SPECTRA[name])
    found = highest_eigenvectors(lambda vector: table @ vector, 400, 4, beside=table, n_vectors=24, tolerance=1e-8)
    assert found.shape == (400, 4) and found.dtype == np.float32
    assert largest_angle(found, vectors[:, :4]) < 1e-4
    assert largest_angle(found[:, ::-1], vectors[:, :4]) > 0.9  # the highest comes first
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), 1.0, rtol=1e-6)


def test_a_basis_in_a_file_gives_the_same_bits_in_parts(tmp_path, monkeypatch):
    """20,000 rows: twenty vectors of them are above the least size of a file."""
    values = np.concatenate([[1.0, 0.9, 0.8], np.linspace(-0.5, 0.5, 19_997)])
    beside = mapped_matrix((20_000, 30), folder=tmp_path)
    found = [highest_eigenvectors(lambda vector: values * vector, 20_000, 3, beside=of, n_vectors=20)
             for of in (np.zeros(1), beside)]  # fmt: skip
    assert np.array_equal(*found)
    np.testing.assert_allclose(np.abs(found[0][:3]), np.eye(3), atol=1e-4)  # of a diagonal they are the axes
    monkeypatch.setattr(lanczos, "_COLUMNS", 3000)
    others = highest_eigenvectors(lambda vector: values * vector, 20_000, 3, beside=beside, n_vectors=20)
    assert largest_angle(others, found[0]) < 1e-4


def test_an_operator_that_makes_nothing_new_is_no_end():
    """Of the unit operator every vector is an eigenvector: the basis goes on with directions of its own."""
    found = highest_eigenvectors(lambda vector: vector.copy(), 50, 3, beside=np.zeros(1))
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-5)


def test_what_is_not_found_in_time_is_said(caplog):
    table, vectors = table_of(SPECTRA["crowded"])
    with caplog.at_level(logging.INFO):
        found = highest_eigenvectors(
            lambda vector: table @ vector, 400, 4, beside=table, n_vectors=10, tolerance=1e-12, max_restarts=1
        )
    assert "best after 1 restarts" in caplog.text
    assert largest_angle(found, vectors[:, :4]) > 1e-4


def walk_on_a_path(n: int) -> np.ndarray:
    """Its eigenvalues are cos(pi k / (n - 1)): as many next to -1 as next to 1, and none far from the next."""
    table = np.diag(np.ones(n - 1), 1)
    table[0, 1] = table[n - 2, n - 1] = 2**-0.5
    table[np.arange(1, n - 2), np.arange(2, n - 1)] = 0.5
    return table + table.T


@pytest.mark.parametrize(("n", "count"), [(60, 1), (60, 5), (200, 3), (400, 50)])
def test_what_counts_as_found_has_the_residual_that_was_asked_for(n, count):
    table = walk_on_a_path(n)
    found = highest_eigenvectors(lambda vector: table @ vector, n, count, beside=table).astype(np.float64)
    values = np.cos(np.pi * np.arange(count) / (n - 1))
    assert np.abs(table @ found - found * values).max() < 2e-6


@pytest.mark.parametrize("count", [0, 9, 10])
def test_more_vectors_than_are_asked_for_are_needed(count):
    with pytest.raises(ValueError, match=f"{count} eigenvectors of 10 rows are asked for by 9"):
        highest_eigenvectors(lambda vector: vector, 10, count, beside=np.zeros(1))
