"""UMAP from a graph of neighbours, on the CPU, in little more memory than its edges take.

    graph = fuzzy_graph(indices, distances)
    embedding = lay_out([graph], vectors, n_components=10, min_dist=0.1, …)

Graph and start are made by the parts of umap-learn, and up to 10,000 rows they are equal to its own, bit for bit; the
steps from there are those of `common.umap_steps`. What its estimator holds beside the graph is not made: copies of it,
and, to find where rows start, as many vectors of all rows as the root of their number. From some 10,000 rows on those
are more than all that the layout takes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from common.grouping import cluster_members
from common.mapped import release, return_freed_memory

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

Share = Callable[[Callable[[], np.ndarray], np.random.RandomState], np.ndarray]

# Up to here as many epochs as umap-learn takes for few rows, and its own start, of at most a hundred Lanczos vectors.
_FEW_ROWS = 10_000
_EPOCHS_OF_FEW, _EPOCHS_OF_MANY = 500, 200
# Lanczos vectors for more rows: 320 bytes a row. With umap-learn's hundreds the same eigenvectors come later, as each
# of them is kept orthogonal to all others.
_N_LANCZOS = 40
# Of eigenvalues near 1, which differ by little where clusters hardly touch.
_TOLERANCE = 1e-6
_MAX_RESTARTS = 1000


@contextlib.contextmanager
def numba_threads(n_threads: int | None) -> Iterator[None]:
    """Within it, numba's parallel loops take so many threads; None: all."""
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(n_threads or numba.config.NUMBA_NUM_THREADS)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def fuzzy_graph(indices: np.ndarray, distances: np.ndarray) -> csr_matrix:
    """The symmetric graph of membership strengths: [n, n], float32, about 1.5 k edges a row.

    `indices` [n, k] integers and `distances` [n, k] float32 are the nearest rows of each row, itself first; -1 is none.
    """
    from scipy.sparse import csr_matrix
    from umap.umap_ import compute_membership_strengths, smooth_knn_dist

    from common.umap_steps import unite

    n, k = indices.shape
    distances = np.ascontiguousarray(distances, np.float32)
    scales, nearest = smooth_knn_dist(distances, float(k), local_connectivity=1.0)
    _, columns, strengths, _ = compute_membership_strengths(indices, distances, scales, nearest, False)
    for used in (indices, distances):
        release(used)
    directed = csr_matrix((strengths, columns, np.arange(0, n * k + 1, k, dtype=np.int32)), shape=(n, n), copy=False)
    del columns, strengths
    directed.eliminate_zeros()
    backward = directed.T.tocsr()
    directed.sort_indices()
    parts = unite(directed.indptr, directed.indices, directed.data, backward.indptr, backward.indices, backward.data)
    return csr_matrix(parts[::-1], shape=(n, n), copy=False)


def lay_out(
    given: list[csr_matrix],
    vectors: np.ndarray,
    *,
    n_components: int,
    min_dist: float,
    metric: str,
    random_state: int | None,
    n_epochs: int | None = None,
    start: str | np.ndarray = "spectral",
    share: Share | None = None,
) -> np.ndarray:
    """Embed the rows of a `fuzzy_graph`: [n, n_components] float32, NaN for rows without an edge.

    The graph is taken out of the list `given`, so that it is gone when its edges have become samples. `vectors` [n, d]
    and `metric` place parts of the graph that nothing connects; `start` is "spectral", "random" or [n, n_components].
    `share` may know the spectral start already; it is called with what finds it, and with the generator that this uses.
    With `random_state` None all cores take part, and the result differs from run to run.
    """
    from sklearn.utils import check_random_state
    from umap.umap_ import find_ab_params

    from common.umap_steps import count_samples, run_epochs

    graph = given.pop()
    n = graph.shape[0]
    is_alone = np.asarray(graph.sum(axis=1)).ravel() == 0
    n_epochs = n_epochs or (_EPOCHS_OF_FEW if n <= _FEW_ROWS else _EPOCHS_OF_MANY)
    _drop_weak_edges(graph, n_epochs)
    random = check_random_state(random_state)
    first = _first_places(graph, vectors, n_components, random, metric=metric, start=start, share=share)
    if n > _FEW_ROWS:
        return_freed_memory()  # of the graph's making and of the eigenvectors, which is as much as comes now
    indptr, tails, samples = graph.indptr, graph.indices, count_samples(graph.data, n_epochs)
    del graph
    embedding = run_epochs(
        first,
        indptr,
        tails,
        samples,
        curve=find_ab_params(1.0, min_dist),
        seeds=_draw_seeds(random),
        n_epochs=n_epochs,
        on_all_cores=random_state is None,
    )
    embedding[is_alone] = np.nan
    return embedding


def _drop_weak_edges(graph: csr_matrix, n_epochs: int) -> None:
    """Take away the edges that would not be sampled once."""
    n_counted = n_epochs if n_epochs > 10 else _EPOCHS_OF_FEW if graph.shape[0] <= _FEW_ROWS else _EPOCHS_OF_MANY
    graph.data[graph.data < graph.data.max() / float(n_counted)] = 0.0
    graph.eliminate_zeros()


def _draw_seeds(random: np.random.RandomState) -> np.ndarray:
    limits = np.iinfo(np.int32)
    return random.randint(limits.min + 1, limits.max - 1, 3).astype(np.int64)


# --- Where rows start ------------------------------------------------------------------------------------------------


def _first_places(
    graph: csr_matrix,
    vectors: np.ndarray,
    dim: int,
    random: np.random.RandomState,
    *,
    metric: str,
    start: str | np.ndarray,
    share: Share | None,
) -> np.ndarray:
    """Where rows start: [n, dim] float32 between 0 and 10."""
    from umap.umap_ import noisy_scale_coords

    if isinstance(start, np.ndarray):
        places = _apart(start.astype(np.float32), random)
    elif start == "random":
        places = random.uniform(-10.0, 10.0, size=(graph.shape[0], dim)).astype(np.float32)
    else:
        find = _spectral_of_few if graph.shape[0] <= _FEW_ROWS else _spectral_of_many

        def scaled() -> np.ndarray:
            return noisy_scale_coords(find(graph, vectors, dim, random, metric), random, max_coord=10, noise=0.0001)

        places = share(scaled, random) if share else scaled()
    low, high = places.min(axis=0), places.max(axis=0)
    return (10.0 * (places - low) / (high - low)).astype(np.float32, order="C")


def _apart(places: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Places [n, dim] with a little noise where some are equal: nothing would ever part those."""
    from sklearn.neighbors import KDTree

    if len(np.unique(places, axis=0)) == len(places):
        return places
    gap = float(KDTree(places).query(places, k=2)[0][:, 1].mean())
    return places + random.normal(scale=0.001 * gap, size=places.shape).astype(np.float32)


def _spectral_of_few(
    graph: csr_matrix, vectors: np.ndarray, dim: int, random: np.random.RandomState, metric: str
) -> np.ndarray:
    from umap.distances import named_distances
    from umap.spectral import spectral_layout

    return spectral_layout(vectors, graph.tocoo(), dim, random, metric=named_distances[metric])


def _spectral_of_many(
    graph: csr_matrix, vectors: np.ndarray, dim: int, random: np.random.RandomState, metric: str
) -> np.ndarray:
    """Eigenvectors of the graph; of each part of its own, around a place for the part, where it is not connected."""
    from scipy.sparse.csgraph import connected_components

    n_parts, part_of = connected_components(graph, directed=False)
    if n_parts == 1:
        return _low_eigenvectors(graph, dim, random)
    centers = _place_parts(vectors, n_parts, part_of, dim, random, metric)
    places = np.empty((graph.shape[0], dim), np.float32)
    for part, members in cluster_members(part_of, n_parts):
        gaps = np.linalg.norm(centers - centers[part], axis=1)
        reach = gaps[gaps > 0].min(initial=1.0) / 2
        if len(members) < 2 * dim or len(members) <= dim + 1:
            offsets = random.uniform(-reach, reach, size=(len(members), dim))
        else:
            offsets = _low_eigenvectors(graph[members][:, members], dim, random)
            offsets *= reach / np.abs(offsets).max()
        places[members] = centers[part] + offsets
    return places


def _place_parts(
    vectors: np.ndarray, n_parts: int, part_of: np.ndarray, dim: int, random: np.random.RandomState, metric: str
) -> np.ndarray:
    """Where the parts of a graph lie: [n_parts, dim], near ones near each other; a few of them on the axes."""
    from umap.distances import named_distances
    from umap.spectral import component_layout

    if n_parts <= 2 * dim:
        axes = np.eye((n_parts + 1) // 2, dim)
        return np.vstack([axes, -axes])[:n_parts]
    return component_layout(vectors, n_parts, part_of, dim, random, metric=named_distances[metric])


def _low_eigenvectors(graph: csr_matrix, dim: int, random: np.random.RandomState) -> np.ndarray:
    """The eigenvectors [n, dim] of the normalised Laplacian above the lowest, which is the degrees alone."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    from common.umap_steps import multiply_scaled

    n = graph.shape[0]
    inverse_root = 1.0 / np.sqrt(np.asarray(graph.sum(axis=1), np.float64).ravel())

    def multiply(vector: np.ndarray) -> np.ndarray:
        return multiply_scaled(graph.indptr, graph.indices, graph.data, inverse_root, vector.ravel())

    # I - L, whose highest eigenvectors are the lowest of L.
    adjacency = LinearOperator(graph.shape, multiply, dtype=np.float64)
    n_lanczos = min(n - 1, max(_N_LANCZOS, 2 * dim + 3))
    try:
        values, eigenvectors = eigsh(
            adjacency, dim + 1, which="LA", ncv=n_lanczos, tol=_TOLERANCE, v0=np.ones(n), maxiter=_MAX_RESTARTS
        )
    except ArpackError as problem:
        logger.warning("UMAP: no spectral start was found, so rows start anywhere (%s)", problem)
        return random.uniform(-10.0, 10.0, size=(n, dim))
    return eigenvectors[:, np.argsort(-values)[1:]]
