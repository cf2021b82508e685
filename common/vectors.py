"""L2 normalisation and exact PCA in one streaming pass: numerics and nothing else.

The covariance of any number of rows is gathered from batches as (n, sum, gram), shifted by a vector near the mean so
that nothing cancels: products in float32, sums in float64. Sums of shards add up, so shards can be gathered anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.config import UserError
from common.threads import one_blas_thread, share_tiles

# Rows that go through one float32 product; longer products would round in the last digits.
_PRODUCT_ROWS = 2048
# Rows that are scaled at a time, so that they stay in the cache between being read and being scaled.
_SCALE_ROWS = 1024

_SMALLEST_NORM = 1.0 / float(np.finfo(np.float32).max)
# Between these, the sum of a row's squares in float32 has lost nothing to underflow or overflow.
_SAFE_SQUARES = 1e-24, 1e36


def l2_normalize(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale rows to unit length.

    `vectors` is [n, d]. Returns unit rows [n, d] float32 and `nonzero` [n] bool: a zero row has no direction and
    becomes zeros, and so does one that is too near to zero for the reciprocal of its length to be a float32.
    """
    unit, nonzero = np.empty(vectors.shape, np.float32), np.empty(len(vectors), bool)

    def work(starts: range) -> None:
        for start in starts:
            rows = vectors[start : start + _SCALE_ROWS]
            norms = _row_norms(rows)
            has_length = norms > _SMALLEST_NORM
            scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=has_length).astype(np.float32)
            np.multiply(rows.astype(np.float32, copy=False), scale[:, None], out=unit[start : start + len(rows)])
            nonzero[start : start + len(rows)] = has_length

    share_tiles(work, n_rows=len(vectors), tile_rows=_SCALE_ROWS)
    return unit, nonzero


def _row_norms(rows: np.ndarray) -> np.ndarray:
    """Lengths of rows [n, d] as [n] float64; sums are float32 as the rows are, but where that would lose digits."""
    with np.errstate(under="ignore", over="ignore"):  # such rows are looked at again below
        squares = np.vecdot(rows, rows).astype(np.float64)
    smallest, largest = _SAFE_SQUARES
    odd = np.flatnonzero(~((squares > smallest) & (squares < largest)))
    if len(odd):
        squares[odd] = np.einsum("ij,ij->i", rows[odd], rows[odd], dtype=np.float64)
    return np.sqrt(squares)


@dataclass
class CovarianceSums:
    """What covariance needs of some rows: their number, sum and gram matrix, all about a common shift."""

    shift: np.ndarray  # [d] float32
    n_rows: int
    total: np.ndarray  # [d] float64, sum of shifted rows
    gram: np.ndarray  # [d, d] float64, sum of outer products of shifted rows

    @classmethod
    def empty(cls, shift: np.ndarray) -> CovarianceSums:
        """Sums of no rows; `shift` [d] should lie near the mean, such as the mean of the first batch."""
        dimension = len(shift)
        return cls(shift.astype(np.float32), 0, np.zeros(dimension), np.zeros((dimension, dimension)))

    def add(self, vectors: np.ndarray, *, device: str = "cpu") -> None:
        """Add rows, [n, d] float32."""
        parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # sum and gram of the rows from a start on

        def work(starts: range) -> None:
            for start in starts:
                shifted = vectors[start : start + _PRODUCT_ROWS] - self.shift
                parts[start] = shifted.sum(axis=0, dtype=np.float64), _gram(shifted, device)

        share_tiles(work, n_rows=len(vectors), tile_rows=_PRODUCT_ROWS, n_threads=None if device == "cpu" else 1)
        for start in sorted(parts):  # in the order of rows, so that the last digits are the same in every run
            total, gram = parts[start]
            self.total += total
            self.gram += gram
        self.n_rows += len(vectors)

    def merge(self, other: CovarianceSums) -> None:
        """Add the sums of other rows about the same shift."""
        self.n_rows += other.n_rows
        self.total += other.total
        self.gram += other.gram

    @property
    def mean(self) -> np.ndarray:
        """[d] float64."""
        return self.shift + self.total / max(self.n_rows, 1)

    @property
    def covariance(self) -> np.ndarray:
        """[d, d] float64, with n - 1 in the denominator as scikit-learn's PCA has it."""
        centered = self.gram - np.outer(self.total, self.total) / max(self.n_rows, 1)
        return centered / max(self.n_rows - 1, 1)


def _gram(rows: np.ndarray, device: str) -> np.ndarray:
    if device == "cpu":
        return (rows.T @ rows).astype(np.float64)
    import torch

    on_device = torch.from_numpy(rows).to(device)
    # Without this, a GPU of late would round the factors to TF32's ten bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    return (on_device.T @ on_device).double().cpu().numpy()


@dataclass(frozen=True)
class Pca:
    """A fitted PCA: arrays alone, so that any program can apply it."""

    mean: np.ndarray  # [d] float32
    components: np.ndarray  # [c, d] float32, orthonormal rows, by falling variance
    explained_variance: np.ndarray  # [c] float64
    explained_variance_ratio: np.ndarray  # [c] float64

    @property
    def n_components(self) -> int:
        """Number of components."""
        return len(self.components)

    def transform(self, vectors: np.ndarray, *, whiten: bool = False) -> np.ndarray:
        """Project rows [n, d] to [n, c] float32; `whiten` scales each component to unit variance."""
        projected = np.empty((len(vectors), self.n_components), np.float32)
        # (x - mean) P = x P - mean P: the second term once, instead of a copy of x.
        projected_mean = self.mean @ self.components.T

        def work(starts: range) -> None:
            for start in starts:
                rows = vectors[start : start + _PRODUCT_ROWS]
                projected[start : start + len(rows)] = rows @ self.components.T - projected_mean

        share_tiles(work, n_rows=len(vectors), tile_rows=_PRODUCT_ROWS)
        if whiten:
            projected /= np.sqrt(np.maximum(self.explained_variance, 1e-12)).astype(np.float32)
        return projected


def fit_pca(sums: CovarianceSums, n_components: int | float) -> Pca:
    """Exact PCA from gathered sums; `n_components` is a number, or a fraction of variance between 0 and 1.

    Component signs follow scikit-learn: the entry of largest magnitude is positive.
    Raises UserError where `n_components` exceeds the dimension or the rows, or where all rows are equal.
    """
    dimension = len(sums.shift)
    if n_components >= 1 and n_components > min(dimension, sums.n_rows):
        raise UserError(
            f"n_components={n_components} is more than {sums.n_rows} rows of {dimension} dimensions can give; "
            f"set n_components to at most {min(dimension, sums.n_rows)}"
        )
    covariance = sums.covariance
    if not np.isfinite(covariance).all():
        raise UserError(
            "the vectors are too large for PCA: their squares overflow; scale them, or set l2_normalize: true"
        )
    with one_blas_thread():
        eigenvalues, eigenvectors = np.linalg.eigh(covariance)  # rising order
    variances = np.maximum(eigenvalues[::-1], 0)
    if variances.sum() <= 0:
        what = "there is a single vector" if sums.n_rows == 1 else f"all {sums.n_rows} vectors are equal"
        raise UserError(f"{what}, so PCA has nothing to keep; check the input vectors")
    ratios = variances / variances.sum()
    n_kept = int(n_components) if n_components >= 1 else int(np.searchsorted(np.cumsum(ratios), n_components) + 1)
    components = eigenvectors.T[::-1][: min(n_kept, dimension)]
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(len(components)), largest])[:, None]
    return Pca(
        mean=sums.mean.astype(np.float32),
        components=np.ascontiguousarray(components, dtype=np.float32),
        explained_variance=variances[: len(components)],
        explained_variance_ratio=ratios[: len(components)],
    )
