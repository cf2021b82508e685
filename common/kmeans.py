"""k-means over streams larger than memory: mini-batch, Lloyd, spherical, and cuML's, with one kind of result.

`train_minibatch` and `train_lloyd` read a stream pass by pass. `lloyd_passes` takes any way of making one pass, so
that a caller may map `partial_sums` over shards, in processes or on a cluster, and merge in shard order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from common.kmeans_init import (
    FIRST_ROWS,
    FIRST_ROWS_PER_CLUSTER,
    Batches,
    fixed_blocks,
    kmeans_plus_plus,
    sample_rows,
    warm_start,
)
from common.kmeans_steps import (
    LONG_STEP,
    ClusterSums,
    Precision,
    assign,
    best_precision,
    partial_sums,
    unit_rows,
    update_centroids,
)

if TYPE_CHECKING:
    from sklearn.cluster import KMeans, MiniBatchKMeans

__all__ = [
    "Batches",
    "ClusterSums",
    "KMeansResult",
    "Precision",
    "as_estimator",
    "assign",
    "best_precision",
    "fixed_blocks",
    "kmeans_plus_plus",
    "lloyd_passes",
    "partial_sums",
    "sample_rows",
    "stream_sums",
    "train_cuml",
    "train_lloyd",
    "train_minibatch",
    "unit_rows",
    "update_centroids",
    "warm_start",
]

BLOCK_ROWS = 65_536  # rows of a stream that are held and summed at a time, however the stream is cut

Report = Callable[[str], None]
Start = Literal["nested", "k-means++", "random"]


@dataclass(frozen=True)
class KMeansResult:
    """Centroids, and what one full float32 pass over the data measured at exactly these centroids."""

    centroids: np.ndarray  # [k, d] float32
    sizes: np.ndarray  # [k] int64
    cluster_inertia: np.ndarray  # [k] float64, sums of squared distances
    n_passes: int  # passes that moved centroids
    converged: bool
    history: tuple[float, ...]  # inertia at the start of each pass, and at the end

    @property
    def inertia(self) -> float:
        """The sum of squared distances to the centroids."""
        return float(self.cluster_inertia.sum())


def no_report(_message: str) -> None:
    """Say nothing: the default of `report`."""


# ---- Lloyd ---------------------------------------------------------------------------------------------------------


def lloyd_passes(
    centroids: np.ndarray,
    *,
    one_pass: Callable[[np.ndarray], ClusterSums],
    measure: Callable[[np.ndarray], ClusterSums] | None = None,
    max_epochs: int,
    tol: float = 1e-3,
    spherical: bool = False,
    report: Report = no_report,
) -> KMeansResult:
    """Move centroids [k, d] by full passes until inertia falls by less than `tol` of itself, or `max_epochs` times.

    `one_pass(centroids)` maps `partial_sums` over all the data and merges the parts in row order. Steps are long (see
    `update_centroids`), the last one goes to the means. One more pass measures sizes and inertia, so that they belong
    to the centroids that come back; `measure` makes it where `one_pass` is not float32.
    """
    history: list[float] = []
    converged, finished = False, max_epochs <= 0
    while True:
        sums = measure(centroids) if finished and measure else one_pass(centroids)
        history.append(sums.inertia)
        n_empty = int((sums.counts == 0).sum())
        what = "measured" if finished else f"full pass {len(history)}"
        report(f"{what}: inertia {sums.inertia / sums.counts.sum():.6g} a row, empty clusters {n_empty}")
        if finished:
            break
        placed = not n_empty or sums.inertia == 0  # with fewer different rows than clusters some stay empty
        converged = len(history) > 1 and placed and history[-2] - history[-1] <= tol * history[-2]
        finished = converged or len(history) == max_epochs
        centroids = update_centroids(sums, centroids, spherical=spherical, step=1.0 if finished else LONG_STEP)
    return KMeansResult(
        np.asarray(centroids, np.float32),
        sums.counts,
        sums.cluster_inertia,
        len(history) - 1,
        converged,
        tuple(history),
    )


def stream_sums(centroids: np.ndarray, *, batches: Batches, **settings: Any) -> ClusterSums:
    """Make one pass over a stream: `partial_sums` of fixed blocks, merged in order. `settings` are those of the map."""
    total: ClusterSums | None = None
    for block in fixed_blocks(batches(), n_rows=BLOCK_ROWS):
        sums = partial_sums(block, centroids, **settings)
        total = sums if total is None else total.merge(sums)
    if total is None:
        raise ValueError("no rows to cluster: the stream is empty")
    return total


def train_lloyd(
    batches: Batches,
    *,
    n_clusters: int,
    max_epochs: int = 10,
    tol: float = 1e-3,
    init: Start | np.ndarray = "nested",
    init_size: int = 0,
    spherical: bool = False,
    precision: Precision = "float32",
    device: str = "cpu",
    n_threads: int | None = None,
    random_state: int = 0,
    report: Report = no_report,
) -> KMeansResult:
    """Train by full Lloyd passes over a stream, from centroids that are given or found on a sample in memory.

    `init` "nested" converges on growing parts of a sample first (see `warm_start`), "k-means++" only seeds there,
    "random" takes rows, and an array [n_clusters, d] is a start to polish. `init_size` is the number of sampled rows,
    0 for the default of 128 a cluster (65,536 at least). `spherical` clusters by cosine: rows and centroids are kept
    at length one.
    The result depends on the seed and the order of rows, not on how the stream is cut into batches.

    Raises ValueError when there are fewer rows than clusters, or a row is not finite.
    """
    step: dict[str, Any] = {"spherical": spherical, "precision": precision, "device": device, "n_threads": n_threads}
    if isinstance(init, np.ndarray):
        centroids = init
    else:
        rng = np.random.default_rng(random_state)
        n_sampled = max(n_clusters, init_size or max(4 * FIRST_ROWS, 128 * n_clusters))
        sample = sample_rows(batches, n_rows=n_sampled, rng=rng)
        centroids = _start(sample, n_clusters=n_clusters, init=init, rng=rng, step=step, report=report)
    centroids = unit_rows(centroids) if spherical else centroids
    return lloyd_passes(
        centroids,
        one_pass=partial(stream_sums, batches=batches, **step),
        measure=partial(stream_sums, batches=batches, **{**step, "precision": "float32"}),
        max_epochs=max_epochs,
        tol=tol,
        spherical=spherical,
        report=report,
    )


def _start(
    sample: np.ndarray, *, n_clusters: int, init: Start, rng: np.random.Generator, step: dict[str, Any], report: Report
) -> np.ndarray:
    if len(sample) < n_clusters:
        raise ValueError(f"{n_clusters} clusters need at least as many rows, and there are {len(sample)}")
    sample = unit_rows(sample) if step["spherical"] else sample
    if init == "random":
        return sample[:n_clusters]  # the sample is in random order
    if init == "k-means++":
        return kmeans_plus_plus(sample, n_clusters=n_clusters, rng=rng)
    return warm_start(sample, n_clusters=n_clusters, rng=rng, report=report, **step)


# ---- mini-batch ----------------------------------------------------------------------------------------------------


def train_minibatch(
    batches: Batches,
    *,
    n_clusters: int,
    batch_size: int = 8192,
    max_epochs: int = 5,
    init_size: int = 0,
    tol: float = 1e-3,
    n_threads: int | None = None,
    random_state: int = 0,
    report: Report = no_report,
) -> KMeansResult:
    """Train scikit-learn's MiniBatchKMeans over a stream: a warm start on a sample, then at most `max_epochs` passes.

    Batches have `batch_size` rows, however the stream is cut. Training stops when the inertia per row of a pass, as
    its batches meet it, falls by less than `tol` of itself. Clusters that got no row in a pass are seeded again by
    squared distance on the sample. `init_size` is the number of sampled rows, 0 for the default of 32 a cluster (16,384
    at least).

    Raises ValueError when there are fewer rows than clusters, or a row is not finite.
    """
    rng = np.random.default_rng(random_state)
    n_sampled = max(n_clusters, init_size or max(FIRST_ROWS, FIRST_ROWS_PER_CLUSTER * n_clusters))
    sample = sample_rows(batches, n_rows=n_sampled, rng=rng)
    centroids = warm_start(sample, n_clusters=n_clusters, rng=rng, report=report, n_threads=n_threads)
    estimator = _minibatch_estimator(centroids, sample, batch_size=batch_size)
    history: list[float] = []
    converged = False
    while not converged and len(history) < max_epochs:
        mean_inertia, empty = _minibatch_pass(estimator, batches, n_rows=batch_size)
        history.append(mean_inertia)
        report(f"mini-batch pass {len(history)}: inertia {mean_inertia:.6g} a row, empty clusters {empty.sum()}")
        if empty.any():
            kept = np.array(estimator.cluster_centers_[~empty], np.float32)
            centroids = kmeans_plus_plus(sample, n_clusters=n_clusters, rng=rng, initial=kept)
            estimator = _minibatch_estimator(centroids, sample, batch_size=batch_size)
        converged = len(history) > 1 and not empty.any() and history[-2] - history[-1] <= tol * history[-2]
    centroids = np.array(estimator.cluster_centers_, np.float32)
    measured = stream_sums(centroids, batches=batches, n_threads=n_threads)
    inertias = (*(mean * measured.n_rows for mean in history), measured.inertia)
    return KMeansResult(centroids, measured.counts, measured.cluster_inertia, len(history), converged, inertias)


def _minibatch_estimator(centroids: np.ndarray, sample: np.ndarray, *, batch_size: int) -> MiniBatchKMeans:
    """Start an estimator at centroids, with the sample as its first batch, so that they have weight from the start."""
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(
        len(centroids),
        init=centroids,
        n_init=1,
        batch_size=batch_size,
        reassignment_ratio=0,  # its reassignment picks rows uniformly; ours, between passes, by squared distance
        random_state=0,  # nothing random is left to it
    ).partial_fit(sample)


def _minibatch_pass(estimator: MiniBatchKMeans, batches: Batches, *, n_rows: int) -> tuple[float, np.ndarray]:
    """Feed one pass of the stream to the estimator; give the inertia per row as met, and which clusters got no row."""
    inertia, counts = 0.0, np.zeros(len(estimator.cluster_centers_), np.int64)
    for batch in fixed_blocks(batches(), n_rows=n_rows):
        estimator.partial_fit(batch)
        inertia += float(estimator.inertia_)
        counts += np.bincount(estimator.labels_, minlength=len(counts))
    return inertia / counts.sum(), counts == 0


def as_estimator(centroids: np.ndarray, *, random_state: int = 0) -> KMeans:
    """Wrap centroids [k, d] in a fitted scikit-learn KMeans, whose `predict` gives the labels of `assign`."""
    from sklearn.cluster import KMeans

    centers = np.array(centroids, np.float32)
    estimator = KMeans(len(centers), init=centers, n_init=1, max_iter=1, random_state=random_state).fit(centers)
    estimator.cluster_centers_ = centers
    return estimator


# ---- cuML ----------------------------------------------------------------------------------------------------------


def train_cuml(
    vectors: np.ndarray,
    *,
    n_clusters: int,
    max_iter: int = 300,
    tol: float = 1e-4,
    init_size: int = 0,
    device_buffer_samples: int = 0,
    random_state: int = 0,
    report: Report = no_report,
) -> KMeansResult:
    """Train cuML's KMeans on vectors [n, d] in host memory; its sums on the GPU are not repeatable to the bit.

    `device_buffer_samples` above 0 streams the rows to the GPU by that many, for data larger than its memory.

    Raises ImportError where cuML is not installed.
    """
    import torch
    from cuml.cluster import KMeans

    vectors = np.ascontiguousarray(vectors, np.float32)
    estimator = KMeans(
        n_clusters=n_clusters,
        max_iter=max_iter,
        tol=tol,
        init="k-means++",
        n_init=1,
        random_state=random_state,
        init_size=init_size or min(len(vectors), 32 * n_clusters),
        device_buffer_samples=device_buffer_samples,
        output_type="numpy",
    ).fit(vectors)
    n_passes = int(estimator.n_iter_)
    report(f"cuML KMeans: {n_passes} passes")
    centroids = np.asarray(estimator.cluster_centers_, np.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # cuML may stand beside a torch without CUDA
    measured = partial_sums(vectors, centroids, device=device)
    return KMeansResult(
        centroids, measured.counts, measured.cluster_inertia, n_passes, n_passes < max_iter, (measured.inertia,)
    )
