"""The clustering algorithms of Clio, and what several clusterings of one set of vectors share.

    space = Space(vectors, seed=7)
    labels = label_rows(space, settings=settings)      # a second call with other settings uses the same UMAP and tree

Density clustering of embeddings in hundreds of dimensions compares all pairs of rows, and is refused above 20,000.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import UserError
from common.grouping import cluster_members
from llm_parts.clio.taxonomy import NOISE
from llm_parts.clio.vector_settings import VectorSettings

if TYPE_CHECKING:
    from common.density import LinkageTree
    from common.kmeans import KMeansResult

log = logging.getLogger(__name__)

# In hundreds of dimensions density clustering compares all pairs of rows.
MAX_ROWS_WITHOUT_UMAP = 20_000
# Fewer rows have no neighbourhoods that UMAP could keep.
MIN_ROWS_OF_UMAP = 5
# Up to here all pairs of rows are compared for UMAP's neighbours, and it starts from eigenvectors of their graph; both
# take time with the square of the rows, and here no longer than the rest.
MAX_ROWS_COMPARED = 10_000
_N_INIT_ROWS = 5000
# Rows times clusters up to which k-means compares all with all: a minute on a core.
MAX_COMPARED = 1 << 27
# Neighbours within eps that DBSCAN may list in all: 8 bytes each.
_MAX_NEIGHBORS_WITHIN_EPS = 1 << 27
_SAMPLED_ROWS = 256
# Distances of sampled rows to all rows that are held at once, float64: 256 MB.
_SAMPLED_DISTANCES = 1 << 25


class Space:
    """Unit vectors, and what clusterings of them share: UMAP embeddings and trees of HDBSCAN, each made once."""

    def __init__(self, vectors: np.ndarray, *, seed: int) -> None:
        self.vectors = _checked(vectors)  # [n, d]
        self.seed = seed
        self.rows = np.flatnonzero(self.vectors.any(axis=1))  # [m] of those that have a direction
        self.directed = self.vectors if len(self.rows) == len(self.vectors) else self.vectors[self.rows]  # [m, d]
        self.firsts, self.places = distinct_rows(self.directed)
        self._points: dict[tuple[Any, ...], np.ndarray] = {}
        self._trees: dict[tuple[Any, ...], LinkageTree] = {}

    @property
    def n_distinct(self) -> int:
        """How many of the rows with a direction differ."""
        return len(self.firsts)

    def points(self, settings: VectorSettings) -> np.ndarray:
        """What is clustered: the embeddings [m, d] of the rows with a direction, or their UMAP [m, c]."""
        options = settings.clustering
        if not self.is_umap(settings):
            return self.directed
        key = (options.umap_n_neighbors, options.umap_n_components, options.umap_min_dist)
        if key not in self._points:
            self._points[key] = self.embed(
                n_neighbors=options.umap_n_neighbors,
                n_components=options.umap_n_components,
                min_dist=options.umap_min_dist,
            )
        return self._points[key]

    def embed(self, *, n_neighbors: int, n_components: int, min_dist: float) -> np.ndarray:
        """UMAP of the rows with a direction, [m, n_components] float32; equal rows come to one place.

        UMAP itself would tear them apart: a row with more duplicates than neighbours knows nothing else.
        """
        from common.density import embed_umap

        differing = self.directed if self.n_distinct == len(self.directed) else self.directed[self.firsts]
        directions = centered(differing)
        n_neighbors = min(n_neighbors, self.n_distinct - 1)
        embedded = embed_umap(
            directions,
            n_neighbors=n_neighbors,
            n_components=n_components,
            min_dist=min_dist,
            metric="cosine",
            random_state=self.seed,
            **_neighbors_and_start(directions, n_neighbors, n_components, seed=self.seed),
        )
        lost = ~np.isfinite(embedded).all(axis=1)
        if lost.any():
            log.warning("UMAP gave %d of %d rows no place; they are put into the middle", lost.sum(), len(lost))
            embedded[lost] = np.median(embedded[~lost], axis=0) if not lost.all() else 0.0
        return embedded[self.places]

    def is_umap(self, settings: VectorSettings) -> bool:
        """Whether there is a UMAP to cluster: it is asked for, and there are rows enough that differ."""
        return settings.clustering.space == "umap" and self.n_distinct >= MIN_ROWS_OF_UMAP

    def tree(self, settings: VectorSettings) -> LinkageTree:
        """HDBSCAN's tree, which all cluster sizes share."""
        from common.density import single_linkage_tree

        options = settings.clustering
        umap = (options.umap_n_neighbors, options.umap_n_components, options.umap_min_dist)
        key = (options.hdbscan_min_samples, *(umap if self.is_umap(settings) else ()))
        if key not in self._trees:
            self._trees[key] = single_linkage_tree(self.points(settings), min_samples=options.hdbscan_min_samples)
        return self._trees[key]


def distinct_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers [u] of the first of equal rows, and for each row [n] the place of its equal among them."""
    numbers: dict[bytes, int] = {}
    places = np.empty(len(vectors), np.int64)
    firsts: list[int] = []
    for row, vector in enumerate(vectors):
        # Of fixed size, so that the table does not hold all vectors once more.
        digest = hashlib.blake2b(vector.tobytes(), digest_size=16).digest()
        places[row] = numbers.setdefault(digest, len(numbers))
        if len(firsts) < len(numbers):
            firsts.append(row)
    return np.array(firsts, np.int64), places


def centered(vectors: np.ndarray) -> np.ndarray:
    """Directions [n, d] float32 of unit vectors from their mean, of unit length: what UMAP sees.

    What all facets share says nothing of their topics and makes all cosines alike. Source: Mu, Viswanath, All-but-the-
    top, ICLR 2018, section 3, of which this is the first step. Rows that equal the mean are zeros.
    """
    from common.kmeans import unit_rows

    return unit_rows(vectors - vectors.mean(axis=0, dtype=np.float64).astype(np.float32))


def _neighbors_and_start(points: np.ndarray, n_neighbors: int, n_components: int, *, seed: int) -> dict[str, Any]:
    """What UMAP would take time with the square of the rows [n, d] to find: neighbours, and where rows start.

    Nothing for few rows, for which it finds both as well as can be. The start is that of the main directions, which
    keeps what lies together over the whole map at least as well. Source: Kobak, Linderman, Initialization is critical
    for preserving global data structure in both t-SNE and UMAP, Nature Biotechnology 39 (2021).
    """
    if len(points) <= MAX_ROWS_COMPARED:
        return {}
    from common.cells import cell_neighbors
    from common.vectors import CovarianceSums, fit_pca

    knn = cell_neighbors(points, n_neighbors - 1, metric="cosine", random_state=seed)
    sums = CovarianceSums.empty(np.zeros(points.shape[1]))
    sums.add(points)
    start = fit_pca(sums, min(n_components, points.shape[1])).transform(points)
    return {"knn": knn, "start": start if start.shape[1] == n_components else None}


def label_rows(space: Space, *, settings: VectorSettings) -> np.ndarray:
    """The cluster of each row, [n] int64: 0 for the largest, -1 for noise and for rows without a direction."""
    labels = np.full(len(space.vectors), NOISE, np.int64)
    if len(space.rows):
        labels[space.rows] = _by_size(_ALGORITHMS[settings.algorithm](space, settings))
    return labels


def count_clusters(settings: VectorSettings, *, n_rows: int) -> int:
    """The number of clusters that k-means is asked for among `n_rows` rows: at least 1, at most as many as rows."""
    wanted = settings.n_clusters
    if wanted == "auto":
        wanted = max(2, round(n_rows**0.6))
    elif wanted < 1:
        wanted = max(2, round(wanted * n_rows))
    return max(1, min(int(wanted), n_rows))


def _kmeans(space: Space, settings: VectorSettings) -> np.ndarray:
    points = space.points(settings)
    n_clusters = min(count_clusters(settings, n_rows=len(points)), space.n_distinct)
    if len(points) * n_clusters > MAX_COMPARED:
        return _nested_kmeans(points, n_clusters, space=space, settings=settings)
    starts = range(settings.clustering.n_init if len(points) <= _N_INIT_ROWS else 1)
    return _label_by_lloyd(points, n_clusters, starts=starts, space=space, settings=settings)


def _nested_kmeans(points: np.ndarray, n_clusters: int, *, space: Space, settings: VectorSettings) -> np.ndarray:
    """Cut rows [m, d] into the root of `n_clusters` groups, and each group into its share of clusters.

    Where clusters are a share of the rows, comparing all rows with all clusters takes time with the square of the rows;
    this takes rows ** 1.5.
    """
    groups = _label_by_lloyd(points, round(n_clusters**0.5), starts=range(1), space=space, settings=settings)
    sizes = np.bincount(groups)
    labels, n_before = np.empty(len(points), np.int64), 0
    for (_, rows), n_own in zip(cluster_members(groups, len(sizes)), share_out(n_clusters, sizes), strict=True):
        if n_own:
            found = _label_by_lloyd(points[rows], n_own, starts=range(1), space=space, settings=settings)
            labels[rows], n_before = found + n_before, n_before + n_own
    return labels


def share_out(n_clusters: int, sizes: np.ndarray) -> list[int]:
    """Clusters for each group of `sizes` [g] rows in proportion, one at least for any row, `n_clusters` in all.

    There are no fewer rows than clusters, and no fewer clusters than groups with rows.
    """
    wanted = sizes / sizes.sum() * n_clusters
    counts = np.minimum(np.maximum(np.floor(wanted), sizes > 0), sizes).astype(np.int64)
    while (n_missing := n_clusters - int(counts.sum())) != 0:
        step = 1 if n_missing > 0 else -1
        may_change = np.flatnonzero(counts < sizes if step > 0 else counts > 1)
        furthest = np.argsort(step * (counts - wanted)[may_change], kind="stable")
        counts[may_change[furthest[: abs(n_missing)]]] += step
    return [int(count) for count in counts]


def _label_by_lloyd(
    points: np.ndarray, n_clusters: int, *, starts: range, space: Space, settings: VectorSettings
) -> np.ndarray:
    from common.kmeans import assign

    runs = (_lloyd(points, n_clusters, start=start, space=space, settings=settings) for start in starts)
    return assign(points, min(runs, key=lambda run: run.inertia).centroids)[0]


def _lloyd(points: np.ndarray, n_clusters: int, *, start: int, space: Space, settings: VectorSettings) -> KMeansResult:
    from common.kmeans import train_lloyd

    return train_lloyd(
        lambda: [points],
        n_clusters=n_clusters,
        max_epochs=settings.clustering.max_epochs,
        tol=1e-4,
        spherical=not space.is_umap(settings),
        random_state=int(np.random.SeedSequence((space.seed, start)).generate_state(1)[0]),
    )


def _hdbscan(space: Space, settings: VectorSettings) -> np.ndarray:
    from common.density import cut_tree

    _require_umap(space, settings)
    if len(space.rows) < settings.hdbscan_min_cluster_size:
        return np.full(len(space.rows), NOISE)
    if space.n_distinct == 1:
        return np.zeros(len(space.rows), np.int64)  # HDBSCAN looks for a split, and calls rows without one noise
    return cut_tree(
        space.tree(settings),
        min_cluster_size=settings.hdbscan_min_cluster_size,
        cluster_selection_method=settings.clustering.hdbscan_selection,
    ).labels


def _dbscan(space: Space, settings: VectorSettings) -> np.ndarray:
    from common.density import cluster_dbscan

    _require_umap(space, settings)
    options, points = settings.clustering, space.points(settings)
    metric: Any = "euclidean" if space.is_umap(settings) else "cosine"
    sample = _sampled_distances(points, metric=metric, seed=space.seed)  # [s, m], sorted
    eps = options.dbscan_eps
    if eps == "auto":
        eps = _bend(sample[:, min(options.dbscan_min_samples - 1, sample.shape[1] - 1)])
        log.info("DBSCAN: eps %.4g, where the distances to neighbour %d bend", eps, options.dbscan_min_samples - 1)
    _check_reach(float((sample <= eps).sum(axis=1).mean()), eps=eps, n_rows=len(points))
    return cluster_dbscan(points, eps=eps, min_samples=options.dbscan_min_samples, metric=metric)


_ALGORITHMS = {"kmeans": _kmeans, "hdbscan": _hdbscan, "dbscan": _dbscan}


def _by_size(labels: np.ndarray) -> np.ndarray:
    """Number clusters anew by falling size, equal ones by their first row; -1 stays."""
    clustered = labels >= 0
    ids, first, counts = np.unique(labels[clustered], return_index=True, return_counts=True)
    new = np.full(int(ids.max(initial=-1)) + 1, NOISE, np.int64)
    new[ids[np.lexsort((first, -counts))]] = np.arange(len(ids))
    result = np.full(len(labels), NOISE, np.int64)
    result[clustered] = new[labels[clustered]]
    return result


def _sampled_distances(points: np.ndarray, *, metric: str, seed: int) -> np.ndarray:
    """Distances [s, m] of sampled rows to all rows, each row ascending, itself the first."""
    from scipy.spatial.distance import cdist

    n_sampled = max(1, min(_SAMPLED_ROWS, _SAMPLED_DISTANCES // len(points)))
    rows = np.random.default_rng(seed).permutation(len(points))[:n_sampled]
    distances = np.maximum(cdist(points[rows], points, metric), 0.0)
    distances.sort(axis=1)
    return distances


def _bend(distances: np.ndarray) -> float:
    """The distance at the bend of the ascending curve: the point farthest below the line from first to last.

    Source of the k-distance curve: Ester et al., KDD 1996, section 4.2. All equal distances are their own bend.
    """
    curve = np.sort(distances)
    low, high = float(curve[0]), float(curve[-1])
    if high <= 0:
        return 1e-6  # duplicates alone: any eps finds them
    line = low + (high - low) * np.arange(len(curve)) / max(len(curve) - 1, 1)
    bend = float(curve[int(np.argmax(line - curve))])
    return max(bend, 1e-6)


def _check_reach(n_near: float, *, eps: float, n_rows: int) -> None:
    """Refuse an eps within which DBSCAN would list more neighbours than memory holds."""
    if n_near * n_rows > _MAX_NEIGHBORS_WITHIN_EPS:
        raise UserError(
            f"clio.clustering.dbscan_eps: within {eps:g} of a row lie {n_near:,.0f} of {n_rows:,} rows on the average, "
            "more than memory holds for all; lower it, or set clio.algorithm: kmeans"
        )


def _require_umap(space: Space, settings: VectorSettings) -> None:
    if not space.is_umap(settings) and len(space.rows) > MAX_ROWS_WITHOUT_UMAP:
        raise UserError(
            f"clio.algorithm: {settings.algorithm} on {len(space.rows):,} embeddings of {space.vectors.shape[1]} "
            f"dimensions compares all pairs; set clio.clustering.space: umap, or clio.algorithm: kmeans"
        )


def _checked(vectors: np.ndarray) -> np.ndarray:
    """The vectors as float32 rows; raises UserError where one is not finite."""
    rows = np.ascontiguousarray(vectors, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"vectors of shape {rows.shape} are not [n, d]")
    bad = np.flatnonzero(~np.isfinite(rows.sum(axis=1, dtype=np.float64)))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(rows)} vectors have NaN or infinite values, row {bad[0]} first; check clio.embedding"
        )
    return rows
