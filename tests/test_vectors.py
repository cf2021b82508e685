"""L2 and exact PCA by sums: against scikit-learn, by hand, and where floating point usually loses."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from common.commit import Identity
from common.config import UserError
from common.pca_file import load_pca, save_pca
from common.vectors import CovarianceSums, Pca, fit_pca, l2_normalize


def clouds(n_rows: int = 3000, dimension: int = 12, *, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    """Correlated rows whose components have well separated variances."""
    rng = np.random.default_rng(seed)
    scales = 0.8 ** np.arange(dimension)
    rotation, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
    return (rng.normal(size=(n_rows, dimension)) * scales @ rotation + offset).astype(np.float32)


def gather(vectors: np.ndarray, *, batch: int = 700, shift: np.ndarray | None = None) -> CovarianceSums:
    sums = CovarianceSums.empty(vectors[:batch].mean(axis=0) if shift is None else shift)
    for start in range(0, len(vectors), batch):
        sums.add(vectors[start : start + batch])
    return sums


# --- L2 --------------------------------------------------------------------------------------------------------------


def test_l2_by_hand():
    unit, nonzero = l2_normalize(np.array([[3, 4], [0, 0], [0, -2]], np.float32))
    assert np.allclose(unit, [[0.6, 0.8], [0, 0], [0, -1]])
    assert nonzero.tolist() == [True, False, True]
    assert unit.dtype == np.float32


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_l2_at_every_magnitude(scale):
    unit, nonzero = l2_normalize(np.array([[3, 4]], np.float32) * np.float32(scale))
    assert nonzero.all()
    assert np.allclose(unit, [[0.6, 0.8]], atol=1e-6)


def test_l2_of_what_is_too_small_for_a_direction():
    with np.errstate(all="raise"):
        unit, nonzero = l2_normalize(np.array([[1e-40, 0], [1e-45, 1e-45], [1, 0]], np.float32))
    assert nonzero.tolist() == [False, False, True]
    assert unit.tolist() == [[0, 0], [0, 0], [1, 0]]


def test_l2_of_no_rows():
    unit, nonzero = l2_normalize(np.zeros((0, 5), np.float32))
    assert unit.shape == (0, 5) and nonzero.shape == (0,)


# --- PCA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_components", [1, 7, 12])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_components_equal_scikit_learn_with_their_signs(n_components, offset):
    vectors = clouds(offset=offset)
    ours, theirs = (
        fit_pca(gather(vectors), n_components),
        PCA(n_components, svd_solver="full").fit(vectors.astype(float)),
    )
    assert np.abs(ours.components - theirs.components_).max() < 1e-5
    assert np.allclose(ours.explained_variance, theirs.explained_variance_, rtol=1e-5)
    assert np.allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio_, atol=1e-6)
    assert np.abs(ours.mean - theirs.mean_).max() < 1e-5


def test_every_component_of_embedding_like_vectors_equals_scikit_learn():
    rng = np.random.default_rng(1)
    vectors, _ = l2_normalize((rng.normal(size=(4000, 32)) * np.linspace(3, 1, 32) + 0.3).astype(np.float32))
    ours, theirs = fit_pca(gather(vectors), 32), PCA(32, svd_solver="full").fit(vectors.astype(float))
    assert np.abs(ours.components - theirs.components_).max() < 1e-5
    assert np.abs(ours.transform(vectors) - theirs.transform(vectors.astype(float))).max() < 1e-5


def test_largest_entry_of_each_component_is_positive():
    components = fit_pca(gather(clouds()), 10).components
    assert (components[np.arange(10), np.abs(components).argmax(axis=1)] > 0).all()
    assert np.allclose(components @ components.T, np.eye(10), atol=1e-5)


def test_transform_equals_scikit_learn():
    vectors = clouds(offset=2.0)
    ours, theirs = fit_pca(gather(vectors), 6), PCA(6, svd_solver="full").fit(vectors.astype(float))
    reduced = ours.transform(vectors)
    assert reduced.dtype == np.float32 and reduced.flags["C_CONTIGUOUS"]
    assert np.abs(reduced - theirs.transform(vectors.astype(float))).max() < 1e-5


def test_whitened_components_have_unit_variance():
    vectors = clouds()
    reduced = fit_pca(gather(vectors), 5).transform(vectors, whiten=True)
    assert np.allclose(reduced.var(axis=0, ddof=1), 1.0, atol=1e-3)
    assert np.allclose(reduced, PCA(5, whiten=True, svd_solver="full").fit_transform(vectors.astype(float)), atol=1e-3)


def test_points_on_a_line_by_hand():
    # (0,0), (1,2), (2,4): direction (1,2)/sqrt 5, variance of 0, sqrt 5, 2 sqrt 5 about their mean: 5.
    pca = fit_pca(gather(np.array([[0, 0], [1, 2], [2, 4]], np.float32)), 1)
    assert np.allclose(pca.components, [[1 / 5**0.5, 2 / 5**0.5]])
    assert np.allclose(pca.explained_variance, [5.0])
    assert np.allclose(pca.explained_variance_ratio, [1.0])
    assert np.allclose(pca.mean, [1, 2])


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_mean_far_from_the_origin_cancels_nothing(offset):
    # Steps of 1/16 are exact beside 10,000 in float32, so the far cloud is the near one, moved.
    rng = np.random.default_rng(0)
    near = rng.integers(-64, 64, size=(5000, 6)).astype(np.float32) * np.linspace(1, 2, 6).round(1).astype(np.float32)
    near = np.round(near * 16) / 16
    far = (near + np.float32(offset)).astype(np.float32)
    at_origin, moved = gather(near).covariance, gather(far).covariance
    assert np.abs(moved - at_origin).max() < 1e-6 * np.abs(at_origin).max()
    without_shift = gather(far, shift=np.zeros(6)).covariance  # the negative control: this is what a shift prevents
    if offset == 1e4:
        assert np.abs(without_shift - at_origin).max() > 1e-4 * np.abs(at_origin).max()


@pytest.mark.parametrize("batch", [1, 17, 8192, 10_000])
def test_batches_change_nothing(batch):
    vectors = clouds(2500, 8)
    shift = vectors[:100].mean(axis=0)
    whole, parts = gather(vectors, batch=2500, shift=shift), gather(vectors, batch=batch, shift=shift)
    assert parts.n_rows == 2500
    assert np.allclose(parts.covariance, whole.covariance, rtol=1e-6, atol=1e-9)
    assert np.allclose(parts.covariance, np.cov(vectors.astype(float).T), rtol=1e-5, atol=1e-8)


def test_merged_sums_of_shards_equal_one_pass():
    vectors = clouds(2000, 8)
    shift = vectors[:100].mean(axis=0)
    whole = gather(vectors, batch=500, shift=shift)
    merged = CovarianceSums.empty(shift)
    for start in range(0, 2000, 500):
        merged.merge(gather(vectors[start : start + 500], batch=500, shift=shift))
    assert merged.n_rows == whole.n_rows
    assert np.array_equal(merged.gram, whole.gram)
    assert np.array_equal(merged.total, whole.total)


def test_fraction_of_variance_keeps_the_fewest_components_that_reach_it():
    # Axes with variances 6, 3, 1: the first has 60%, two have 90%.
    rows = np.zeros((6, 3), np.float32)
    rows[0:2, 0], rows[2:4, 1], rows[4:6, 2] = [6**0.5, -(6**0.5)], [3**0.5, -(3**0.5)], [1, -1]
    sums = gather(rows)
    for fraction, n_kept in ((0.5, 1), (0.59, 1), (0.61, 2), (0.89, 2), (0.91, 3), (0.9999, 3)):
        assert fit_pca(sums, fraction).n_components == n_kept, fraction


@pytest.mark.parametrize(("n_rows", "n_components"), [(5, 6), (100, 9)])
def test_more_components_than_there_are_names_both(n_rows, n_components):
    with pytest.raises(UserError, match=f"n_components={n_components} is more than {n_rows} rows of 8 dimensions"):
        fit_pca(gather(clouds(n_rows, 8)), n_components)


def test_equal_vectors_and_a_single_one_have_no_components():
    with pytest.raises(UserError, match="all 50 vectors are equal"):
        fit_pca(gather(np.full((50, 4), 0.1, np.float32)), 1)
    with pytest.raises(UserError, match="there is a single vector"):
        fit_pca(gather(np.full((1, 4), 0.1, np.float32)), 1)


def test_constant_dimension_is_no_trouble():
    vectors = clouds(500, 4)
    vectors[:, 2] = 7.0
    pca = fit_pca(gather(vectors), 4)
    assert np.abs(pca.components[:3, 2]).max() < 1e-6
    assert np.isfinite(pca.transform(vectors, whiten=True)).all()


def test_vectors_whose_squares_overflow_are_an_error():
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(UserError, match="too large for PCA"):
        fit_pca(gather(clouds(100, 4) * np.float32(1e25)), 2)


def test_saved_pca_is_read_back_equal(tmp_path):
    pca = fit_pca(gather(clouds()), 6)
    identity = Identity("normalize_and_pca", {"n_components": 6}, {})
    save_pca(tmp_path / "pca.safetensors", pca, identity, n_rows=3000)
    again = load_pca(tmp_path / "pca.safetensors")
    assert again.fingerprint == identity.fingerprint
    for name in ("mean", "components", "explained_variance", "explained_variance_ratio"):
        assert np.array_equal(getattr(again, name), getattr(pca, name))
    assert isinstance(again, Pca)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"no safetensors at all"])
def test_damaged_pca_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "pca.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"pca\.safetensors cannot be read"):
        load_pca(tmp_path / "pca.safetensors")
