"""From feature vectors to clusters: PCA, UMAP, HDBSCAN and the images that HDBSCAN calls noise.

    reduced = reduce_features(features.vectors, settings.reduction, backend=backend)
    clusters = find_clusters(reduced.embedding, settings.clustering, backend=backend)

Each step is a function of plain arrays and one section of the settings, so that a tuner calls them step by step. A step
that is shared by several settings gives the same bits as one that is made for a single setting: components of the PCA
do not depend on how many are asked for, nor neighbours on how many UMAP takes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from common.backend import Backend
from common.cells import cell_neighbors
from common.config import UserError
from common.density import (
    EXACT_GRAPH_MAX_ROWS,
    LinkageTree,
    SpectralStart,
    approximate_neighbors,
    cluster_hdbscan,
    cut_tree,
    embed_umap,
)
from common.mapped import matrix_beside, release, return_freed_memory
from common.neighbors import Neighbors, exact_neighbors
from common.progress import Stopwatch
from common.vectors import CovarianceSums, Pca, fit_pca
from image_parts.features import Features
from image_parts.records import NOISE, ClusteredImages
from image_parts.settings import ClusteringSettings, ImageSettings, ReductionSettings

log = logging.getLogger(__name__)

# Beyond this many dimensions the eigenvectors of a covariance take minutes.
_MAX_COVARIANCE = 4096
# Rows whose mean is near enough to the mean of all.
_SHIFT_ROWS = 4096
# Components are projected this many at a time: the bits of a product depend on its shape.
_PCA_BLOCK = 16
# Rows that are summed or projected before their memory is given back: whole tiles of both, so no bit depends on it.
_PIECE_ROWS = 8192
# Distances of noise to centroids that are held at once, float64: 4 MB.
_GAP_ELEMENTS = 1 << 19
# Up to here UMAP computes the distances of all pairs for metrics that have no exact graph here.
_ALL_PAIRS_MAX_ROWS = 4096
# Neighbours of the smallest graph; wider ones double. As quick as a graph of fifteen.
_MIN_GRAPH_WIDTH = 64


@dataclass(frozen=True)
class ReducedFeatures:
    """The vectors on their way to HDBSCAN."""

    pca: np.ndarray  # [u, p] float32
    embedding: np.ndarray  # [u, e] float32, by UMAP


@dataclass(frozen=True)
class ClusterAssignment:
    """The clusters of u distinct vectors, numbered as HDBSCAN does."""

    raw_labels: np.ndarray  # [u] int64, NOISE where HDBSCAN found none
    probabilities: np.ndarray  # [u] float32
    labels: np.ndarray  # [u] int64, after noise handling
    distances: np.ndarray  # [u] float32, to the centroid of the assigned cluster; NaN for noise


def check_enough_images(n_distinct: int, settings: ImageSettings) -> None:
    """Raise UserError where there are fewer distinct images than the settings can cluster."""
    clustering, reduction = settings.clustering, settings.reduction
    least = max(clustering.min_cluster_size, clustering.min_samples + 1, 4)
    if n_distinct < least:
        what = "1 distinct image is" if n_distinct == 1 else f"{n_distinct} distinct images are"
        raise UserError(
            f"{what} too few for clustering.min_cluster_size {clustering.min_cluster_size} and min_samples "
            f"{clustering.min_samples}: at least {least} are needed; add images or lower both"
        )
    if reduction.umap_n_neighbors >= n_distinct:
        log.warning("reduction.umap_n_neighbors %d is lowered to %d, as there are %d distinct images",
                    reduction.umap_n_neighbors, n_distinct - 1, n_distinct)  # fmt: skip


def reduce_features(vectors: np.ndarray, settings: ReductionSettings, *, backend: Backend) -> ReducedFeatures:
    """Reduce vectors [u, d] by PCA and UMAP; components and neighbours are capped by what u and d allow."""
    pca = project_pca(vectors, n_components=settings.pca_components, backend=backend)
    embedding = embed(pca, settings, backend=backend)
    return ReducedFeatures(pca, embedding)


def embed(
    pca: np.ndarray,
    settings: ReductionSettings,
    *,
    backend: Backend,
    n_components: int | None = None,
    graph: Neighbors | None = None,
    start: SpectralStart | None = None,
) -> np.ndarray:
    """Embed PCA vectors [u, p] by UMAP: [u, n_components or settings.umap_components] float32.

    `graph` is what `umap_graph` gave for these vectors, for callers that have it; `start` is shared by those that vary
    `umap_min_dist` alone.
    """
    if graph is None and has_graph(len(pca), settings, backend=backend):
        graph = umap_graph(pca, settings, backend=backend, n_kept=settings.umap_n_neighbors - 1)
        return_freed_memory()
    return embed_umap(
        pca,
        n_components=n_components or settings.umap_components,
        n_neighbors=min(settings.umap_n_neighbors, len(pca) - 1),
        min_dist=settings.umap_min_dist,
        metric=settings.umap_metric,
        random_state=settings.random_state,
        backend=backend,
        knn=graph,
        start=start,
    )


def has_graph(n_rows: int, settings: ReductionSettings, *, backend: Backend) -> bool:
    """Whether UMAP starts from a graph of `umap_graph`; cuML makes its own, and UMAP where all pairs are quick."""
    if backend.uses_cuml or n_rows < 3:
        return False
    return _has_exact_graph(n_rows, settings) or n_rows > _ALL_PAIRS_MAX_ROWS


def umap_graph(
    pca: np.ndarray, settings: ReductionSettings, *, backend: Backend, n_kept: int | None = None
) -> Neighbors:
    """The neighbours that UMAP starts from, where `has_graph`; exact up to 50,000 rows, nearly all of them beyond.

    As many as `graph_width` says, which other settings can share, or the first `n_kept` of these.
    """
    width, metric = graph_width(settings.umap_n_neighbors, n_rows=len(pca)), settings.umap_metric
    if metric not in ("cosine", "euclidean"):
        graph = approximate_neighbors(pca, width, metric=metric)
        return graph if n_kept is None else Neighbors(*(of[:, :n_kept].copy() for of in graph))
    if len(pca) > EXACT_GRAPH_MAX_ROWS:
        return cell_neighbors(pca, width, metric=metric, n_kept=n_kept)
    return exact_neighbors(pca, width, metric=metric, n_kept=n_kept, device=backend.device)


def _has_exact_graph(n_rows: int, settings: ReductionSettings) -> bool:
    return settings.umap_metric in ("cosine", "euclidean") and n_rows <= EXACT_GRAPH_MAX_ROWS


def graph_width(n_neighbors: int, *, n_rows: int) -> int:
    """Neighbours in the graph for `n_neighbors`: 64, 128, …, so that most settings share one graph, bit for bit."""
    width = _MIN_GRAPH_WIDTH
    while width < n_neighbors - 1:
        width *= 2
    return min(width, n_rows - 1)


def is_pca_nested(shape: tuple[int, ...], *, backend: Backend) -> bool:
    """Whether a PCA to fewer components is, bit for bit, the first columns of one to more."""
    n_rows, dimension = shape
    return not backend.uses_cuml and (dimension <= min(n_rows, _MAX_COVARIANCE) or n_rows <= _MAX_COVARIANCE)


def project_pca(vectors: np.ndarray, *, n_components: int, backend: Backend) -> np.ndarray:
    """Project vectors [u, d] on their first principal components: [u, min(n_components, u, d)] float32."""
    n_components = min(n_components, *vectors.shape)
    n_rows, dimension = vectors.shape
    if backend.uses_cuml:
        from cuml.decomposition import PCA

        projected = PCA(n_components=n_components, output_type="numpy").fit_transform(vectors)
        return np.ascontiguousarray(projected, dtype=np.float32)
    if dimension <= min(n_rows, _MAX_COVARIANCE):
        sums = CovarianceSums.empty(vectors[:_SHIFT_ROWS].mean(axis=0))
        for start in range(0, n_rows, _PIECE_ROWS):
            sums.add(vectors[start : start + _PIECE_ROWS], device=backend.device)
            release(vectors[start : start + _PIECE_ROWS])
        n_fitted = min(-(-n_components // _PCA_BLOCK) * _PCA_BLOCK, *vectors.shape)
        return _project_in_blocks(fit_pca(sums, n_fitted), vectors, n_components=n_components)
    from sklearn.decomposition import PCA

    solver = "full" if n_rows <= _MAX_COVARIANCE else "randomized"
    projected = PCA(n_components=n_components, svd_solver=solver, random_state=0).fit_transform(vectors)
    return np.ascontiguousarray(projected, dtype=np.float32)


def _project_in_blocks(fitted: Pca, vectors: np.ndarray, *, n_components: int) -> np.ndarray:
    projected = matrix_beside(vectors, (len(vectors), n_components))
    for start in range(0, len(vectors), _PIECE_ROWS):
        rows = slice(start, start + _PIECE_ROWS)
        for first in range(0, n_components, _PCA_BLOCK):
            block = replace(fitted, components=fitted.components[first : first + _PCA_BLOCK])
            width = min(_PCA_BLOCK, n_components - first)
            projected[rows, first : first + width] = block.transform(vectors[rows])[:, :width]
        release(vectors[rows])
        release(projected[rows])
    return projected


def find_clusters(
    embedding: np.ndarray, settings: ClusteringSettings, *, backend: Backend, tree: LinkageTree | None = None
) -> ClusterAssignment:
    """Cluster an embedding [u, e] by HDBSCAN and give noise to the nearest cluster if the settings say so.

    `tree` is the single-linkage tree of the embedding for these `min_samples`, for callers that have it.
    """
    cut = {
        "min_cluster_size": settings.min_cluster_size,
        "cluster_selection_epsilon": settings.cluster_selection_epsilon,
        "cluster_selection_method": settings.cluster_selection_method,
    }
    if tree is None:
        found = cluster_hdbscan(embedding, min_samples=settings.min_samples, backend=backend, **cut)  # type: ignore[arg-type]
    else:
        found = cut_tree(tree, **cut)  # type: ignore[arg-type]
    return assign_noise(embedding, found.labels.astype(np.int64), found.probabilities, settings=settings)


def assign_noise(
    embedding: np.ndarray, raw_labels: np.ndarray, probabilities: np.ndarray, *, settings: ClusteringSettings
) -> ClusterAssignment:
    """Handle noise: `nearest` gives each such row to the cluster of the nearest centroid, `separate` leaves it."""
    n_clusters = int(raw_labels.max(initial=NOISE)) + 1
    labels = raw_labels.copy()
    distances = np.full(len(labels), np.nan, np.float32)
    if n_clusters == 0:
        return ClusterAssignment(raw_labels, probabilities, labels, distances)
    centroids = np.stack([embedding[raw_labels == label].mean(axis=0, dtype=np.float64) for label in range(n_clusters)])
    if settings.noise_handling == "nearest":
        _join_nearest(embedding, labels, centroids)
    for start in range(0, len(labels), _PIECE_ROWS):
        inside = start + np.flatnonzero(labels[start : start + _PIECE_ROWS] >= 0)
        distances[inside] = np.linalg.norm(embedding[inside] - centroids[labels[inside]], axis=1)
    return ClusterAssignment(raw_labels, probabilities, labels, distances)


def _join_nearest(embedding: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> None:
    """Give the rows of noise in `labels` [u], which is written to, the nearest of the `centroids` [k, e]."""
    from scipy.spatial.distance import cdist

    noise = np.flatnonzero(labels == NOISE)
    step = max(1, _GAP_ELEMENTS // len(centroids))
    for start in range(0, len(noise), step):
        part = noise[start : start + step]
        labels[part] = cdist(embedding[part], centroids).argmin(axis=1)


def place_in_space(reduced: ReducedFeatures, settings: ImageSettings, *, backend: Backend) -> np.ndarray:
    """Coordinates x y z for pictures: [u, 3] float32."""
    if settings.visualization.projection == "umap" and settings.reduction.umap_components != 3:
        return embed(reduced.pca, settings.reduction, n_components=3, backend=backend)
    width = reduced.embedding.shape[1]
    flat = reduced.embedding if width <= 3 else project_pca(reduced.embedding, n_components=3, backend=backend)
    return np.pad(flat, ((0, 0), (0, 3 - flat.shape[1])))


def expand_to_images(features: Features, assignment: ClusterAssignment, coordinates: np.ndarray) -> ClusteredImages:
    """From distinct vectors to all images, duplicates too."""
    rows = features.rows
    return ClusteredImages(
        records=features.records,
        labels=assignment.labels[rows],
        raw_labels=assignment.raw_labels[rows],
        probabilities=assignment.probabilities[rows],
        distances=assignment.distances[rows],
        coordinates=coordinates[rows],
        value_range=features.value_range,
    )


def number_by_size(assignment: ClusterAssignment, rows: np.ndarray) -> ClusterAssignment:
    """Number clusters by falling size, counted in images: `rows` [n] is the distinct vector of each image."""
    labels = assignment.labels[rows]
    sizes = np.bincount(labels[labels >= 0], minlength=int(assignment.labels.max(initial=NOISE)) + 1)
    new_numbers = np.empty(len(sizes) + 1, np.int64)
    new_numbers[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    new_numbers[NOISE] = NOISE  # the last place, which is where index -1 points
    return replace(assignment, labels=new_numbers[assignment.labels], raw_labels=new_numbers[assignment.raw_labels])


def cluster_features(
    features: Features, settings: ImageSettings, *, backend: Backend
) -> tuple[ReducedFeatures, ClusterAssignment]:
    """Reduce and cluster the distinct vectors; clusters come numbered by falling size."""
    watch = Stopwatch()
    check_enough_images(len(features.vectors), settings)
    reduced = reduce_features(features.vectors, settings.reduction, backend=backend)
    return_freed_memory()
    log.info("reduction: %d x %d -> %d -> %d dimensions, %.1f s", *features.vectors.shape, reduced.pca.shape[1],
             reduced.embedding.shape[1], watch.seconds)  # fmt: skip
    watch = Stopwatch()
    assignment = number_by_size(find_clusters(reduced.embedding, settings.clustering, backend=backend), features.rows)
    n_noise = int((assignment.raw_labels == NOISE).sum())
    log.info("clustering: %d clusters, %d of %d distinct images were noise (%s), %.1f s",
             int(assignment.labels.max(initial=NOISE)) + 1, n_noise, len(assignment.labels),
             settings.clustering.noise_handling, watch.seconds)  # fmt: skip
    return reduced, assignment
