"""One step of k-means: nearest centroids (map), sums per cluster (map), new centroids (reduce).

The CPU kernel is a float32 matrix product and an argmin over small tiles, so that the rows-by-clusters matrix never
exists; a torch kernel does the same on a GPU, or in bfloat16. Sums and statistics are float64 and follow row order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.backend import cpu_has_amx
from common.threads import share_tiles

Precision = Literal["float32", "bf16"]

TILE_SCORES = 1 << 20  # 4 MB of float32 scores per thread: a tile stays in the second or third cache level
TILE_ROWS = 8192
GPU_TILE_SCORES = 1 << 28  # 1 GiB of float32 scores on a GPU
SUM_ROWS = 8192  # rows turned to float64 at a time
LONG_STEP = 1.7  # how far a centroid goes towards the mean of its rows and beyond, in all passes but the last
N_WORST_ROWS = 64  # farthest rows a pass remembers: seeds for the clusters that it leaves empty


# ---- nearest centroids ---------------------------------------------------------------------------------------------


def assign(
    vectors: np.ndarray, centroids: np.ndarray, *, device: str = "cpu", n_threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest centroid of every row in float32, as scikit-learn's `KMeans.predict` does.

    vectors [n, d], centroids [k, d] -> labels [n] int32, squared Euclidean distances [n] float32. Equal scores go to
    the lowest centroid. Distances are taken from residuals, so that they stay exact near zero.

    Raises ValueError when the shapes differ or a distance is not finite (NaN or infinity in the input).
    """
    vectors, centroids = _as_float32(vectors, centroids)
    if device == "cpu":
        labels, distances = _nearest_numpy(vectors, centroids, n_threads=n_threads)
    else:
        labels, distances = _nearest_torch(vectors, centroids, device=device, precision="float32")
    _require_finite(distances)
    return labels, distances


def _as_float32(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if vectors.ndim != 2 or centroids.ndim != 2 or vectors.shape[1] != centroids.shape[1] or not len(centroids):
        raise ValueError(f"vectors of shape {vectors.shape} do not fit centroids of shape {centroids.shape}")
    return np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(centroids, np.float32)


def _require_finite(distances: np.ndarray) -> None:
    n_bad = int(distances.size - np.isfinite(distances).sum())
    if n_bad:
        raise ValueError(f"{n_bad} of {distances.size} rows have no finite distance: NaN, infinity or huge values")


def _nearest_numpy(
    vectors: np.ndarray, centroids: np.ndarray, *, n_threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tile by tile, |c|^2 - 2 x.c and its argmin; each thread works on its own tiles with single-threaded BLAS."""
    n_rows, n_clusters = len(vectors), len(centroids)
    labels, distances = np.empty(n_rows, np.int32), np.empty(n_rows, np.float32)
    minus_two_centroids = np.ascontiguousarray(centroids.T * np.float32(-2))  # [d, k]
    squared_norms = np.einsum("ij,ij->i", centroids, centroids)  # [k]
    tile_rows = min(TILE_ROWS, max(64, TILE_SCORES // n_clusters))

    def work(starts: range) -> None:
        scores = np.empty((min(tile_rows, n_rows), n_clusters), np.float32)
        for start in starts:
            rows = vectors[start : start + tile_rows]
            with np.errstate(all="ignore"):  # a row that is not finite shows in its distance, which callers check
                tile = np.matmul(rows, minus_two_centroids, out=scores[: len(rows)])
                tile += squared_norms
                nearest = tile.argmin(axis=1)
                residuals = rows - centroids[nearest]
                np.einsum("ij,ij->i", residuals, residuals, out=distances[start : start + len(rows)])
            labels[start : start + len(rows)] = nearest

    share_tiles(work, n_rows=n_rows, tile_rows=tile_rows, n_threads=n_threads)
    return labels, distances


def _nearest_torch(
    vectors: np.ndarray, centroids: np.ndarray, *, device: str, precision: Precision
) -> tuple[np.ndarray, np.ndarray]:
    """The same argmin with torch, on any device; bfloat16 rounds the products only, never the distances."""
    import torch

    n_rows, n_clusters = len(vectors), len(centroids)
    tile_rows = TILE_ROWS if device == "cpu" else max(1024, GPU_TILE_SCORES // n_clusters)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    on_device = torch.from_numpy(centroids).to(device)
    products_side = on_device.to(dtype).T
    half_norms = (on_device.square().sum(dim=1) / -2).to(dtype)
    labels, distances = np.empty(n_rows, np.int32), np.empty(n_rows, np.float32)
    for start in range(0, n_rows, tile_rows):
        rows = torch.from_numpy(vectors[start : start + tile_rows]).to(device)
        nearest = torch.addmm(half_norms, rows.to(dtype), products_side).max(dim=1).indices
        labels[start : start + tile_rows] = nearest.cpu().numpy()
        distances[start : start + tile_rows] = (rows - on_device[nearest]).square().sum(dim=1).cpu().numpy()
    return labels, distances


def best_precision(device: str = "cpu") -> Precision:
    """Choose the precision of the products in training: bfloat16 on a GPU or on a CPU with AMX, else float32.

    A CPU with avx512_bf16 alone stays with float32: it multiplies a little faster, and loses that again on the argmin.
    """
    if device != "cpu":
        return "bf16"
    return "bf16" if cpu_has_amx() else "float32"


# ---- map: sums per cluster -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterSums:
    """What one part of the data adds to the next centroids; parts merge in any grouping, in row order."""

    sums: np.ndarray  # [k, d] float64
    counts: np.ndarray  # [k] int64
    cluster_inertia: np.ndarray  # [k] float64, squared distances to the centroid
    worst_rows: np.ndarray  # [m, d] float32, the rows farthest from their centroid, farthest first
    worst_distances: np.ndarray  # [m] float32, squared

    @property
    def inertia(self) -> float:
        """The sum of squared distances to the centroids."""
        return float(self.cluster_inertia.sum())

    @property
    def n_rows(self) -> int:
        """The number of rows summed."""
        return int(self.counts.sum())

    def merge(self, other: ClusterSums) -> ClusterSums:
        """Add a later part to this one; of the worst rows the worse stay, earlier ones first."""
        distances = np.concatenate([self.worst_distances, other.worst_distances])
        kept = _largest(distances, N_WORST_ROWS)
        return ClusterSums(
            self.sums + other.sums,
            self.counts + other.counts,
            self.cluster_inertia + other.cluster_inertia,
            np.concatenate([self.worst_rows, other.worst_rows])[kept],
            distances[kept],
        )


def partial_sums(
    vectors: np.ndarray,
    centroids: np.ndarray,
    *,
    precision: Precision = "float32",
    spherical: bool = False,
    device: str = "cpu",
    n_threads: int | None = None,
) -> ClusterSums:
    """Sum the rows of each cluster: the map of one Lloyd pass.

    vectors [n, d], centroids [k, d]. With `spherical` the rows are first scaled to unit length. Labels are found about
    the mean of the centroids, so that data far from the origin keeps its float32 digits.

    Raises ValueError as `assign` does.
    """
    vectors, centroids = _as_float32(vectors, centroids)
    vectors = unit_rows(vectors) if spherical else vectors
    origin = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
    if device == "cpu" and precision == "float32":
        labels, distances = _nearest_numpy(vectors - origin, centroids - origin, n_threads=n_threads)
    else:
        labels, distances = _nearest_torch(vectors - origin, centroids - origin, device=device, precision=precision)
    _require_finite(distances)
    worst = _largest(distances, N_WORST_ROWS)
    return ClusterSums(
        *_sums_and_counts(vectors, labels, n_clusters=len(centroids)),
        np.bincount(labels, weights=distances, minlength=len(centroids)),
        vectors[worst],
        distances[worst],
    )


def _sums_and_counts(vectors: np.ndarray, labels: np.ndarray, *, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Add rows up by label in float64: a sparse one-hot product, which goes through the rows in order."""
    from scipy.sparse import csc_array

    sums = np.zeros((n_clusters, vectors.shape[1]))
    for start in range(0, len(vectors), SUM_ROWS):
        rows = vectors[start : start + SUM_ROWS].astype(np.float64)
        one_hot = (np.ones(len(rows)), labels[start : start + SUM_ROWS], np.arange(len(rows) + 1, dtype=np.int32))
        sums += csc_array(one_hot, shape=(n_clusters, len(rows))) @ rows
    return sums, np.bincount(labels, minlength=n_clusters).astype(np.int64)


def _largest(values: np.ndarray, n_kept: int) -> np.ndarray:
    """Indices of the `n_kept` largest values, largest first, equal ones in their order."""
    if n_kept < len(values):
        smallest_kept = np.partition(values, len(values) - n_kept)[len(values) - n_kept]
        candidates = np.flatnonzero(values >= smallest_kept)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:n_kept]


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Scale rows [n, d] to length one; a zero row stays zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    return (vectors / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32)


# ---- reduce: new centroids -----------------------------------------------------------------------------------------


def update_centroids(
    sums: ClusterSums, previous: np.ndarray, *, spherical: bool = False, step: float = 1.0
) -> np.ndarray:
    """Turn the merged sums of a pass into the next centroids [k, d] float32: the reduce of one Lloyd pass.

    `step` 1 moves each centroid to the mean of its rows. Up to 2 it moves beyond, previous + step (mean - previous):
    with the labels held, inertia falls by the factor 1 - (1 - step)^2 of what the mean would win, so it still never
    rises, and a series of such steps converges in fewer passes.

    An empty cluster is seeded again at the row farthest from all centroids, the next one at the row farthest from
    those and from the first, and so on; with no such row left it keeps its place.
    """
    centroids = np.array(previous, np.float64)
    filled = sums.counts > 0
    means = sums.sums[filled] / sums.counts[filled, None]
    means = unit_rows(means) if spherical else means
    centroids[filled] += step * (means - centroids[filled])
    rows, distances = sums.worst_rows, sums.worst_distances.astype(np.float64)
    for cluster in np.flatnonzero(~filled):
        if not distances.size or distances.max() <= 0:
            break
        centroids[cluster] = rows[distances.argmax()]
        distances = np.minimum(distances, np.square(rows - centroids[cluster]).sum(axis=1))
    return unit_rows(centroids) if spherical else centroids.astype(np.float32)
