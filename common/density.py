"""UMAP, HDBSCAN and DBSCAN behind one face, on the CPU or with cuML.

    embedding = embed_umap(vectors, n_components=10, n_neighbors=15, min_dist=0.1, random_state=0)
    labels, probabilities = cluster_hdbscan(embedding, min_cluster_size=50, min_samples=10)

    tree = single_linkage_tree(embedding, min_samples=10)          # dear, once
    labels, probabilities = cut_tree(tree, min_cluster_size=50)    # cheap, for every setting

HDBSCAN goes by an exact tree of ours, from which the hdbscan package chooses clusters, or is cuML's; `min_samples`
leaves the point itself out, as both packages have it. scikit-learn's counts it in, so it is no stand-in for them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from common.backend import CPU, Backend
from common.config import UserError
from common.mapped import matrix_beside, pieces
from common.neighbors import Neighbors, exact_neighbors

if TYPE_CHECKING:
    from common.condensed_tree import CondensedTree

logger = logging.getLogger(__name__)

SelectionMethod = Literal["eom", "leaf"]

# Up to here an exact neighbour graph is as quick as an approximate one, which also takes seconds to compile.
EXACT_GRAPH_MAX_ROWS = 50_000
# Beyond, comparing all pairs is quicker than passing over boxes of rows, and the hdbscan package does that.
_MOST_BOXED_DIMENSIONS = 60
# cuML refuses more.
_CUML_MAX_MIN_SAMPLES = 1023


class Clusters(NamedTuple):
    """A clustering of n rows."""

    labels: np.ndarray  # [n] int32, -1 for noise
    probabilities: np.ndarray  # [n] float32, strength of membership, 0 for noise


@dataclass(frozen=True, eq=False)
class LinkageTree:
    """The single-linkage tree of the mutual reachability graph of n rows; holds what cuts of one size share."""

    merges: np.ndarray  # [n - 1, 4] float64, as in scipy.cluster.hierarchy
    n_rows: int
    _condensed: dict[int, CondensedTree] = field(default_factory=dict, repr=False, compare=False)


class SpectralStart:
    """Where UMAP begins for one graph, number of components and seed: embeddings that differ in min_dist share it."""

    def __init__(self) -> None:
        self._found: tuple[np.ndarray, Any] | None = None

    def get(self, find: Callable[[], np.ndarray], random_state: np.random.RandomState) -> np.ndarray:
        """The coordinates [n, e] float32 that `find` makes, by the first who asks.

        `random_state`, which `find` draws from, is left as it left it then.
        """
        if self._found is None:
            self._found = find(), random_state.get_state()
        coordinates, state = self._found
        random_state.set_state(state)
        return coordinates


def embed_umap(
    vectors: np.ndarray,
    *,
    n_components: int = 10,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    metric: str = "cosine",
    random_state: int | None = 0,
    backend: Backend = CPU,
    knn: Neighbors | None = None,
    n_epochs: int | None = None,
    start: np.ndarray | SpectralStart | None = None,
) -> np.ndarray:
    """Embed vectors [n, d] by UMAP into [n, n_components] float32.

    `n_neighbors` counts the row itself, as UMAP does. `knn` is a graph from `exact_neighbors` or
    `approximate_neighbors` with the same metric and at least n_neighbors - 1 columns; without one an exact graph is
    made up to 50,000 rows. With `random_state` None the
    CPU version runs in parallel and differs from run to run. `start` [n, n_components] is where rows begin; without it
    the graph's eigenvectors are found, which takes longer than all else for very many rows, or those that a
    `SpectralStart` holds.
    Raises UserError if n_neighbors is not between 2 and n - 1, if the graph is too small or a value is not finite.
    """
    n = len(vectors)
    _check_umap(vectors, n_neighbors, n_components, knn)
    if knn is None and n <= EXACT_GRAPH_MAX_ROWS and metric in ("cosine", "euclidean") and not backend.uses_cuml:
        knn = exact_neighbors(vectors, n_neighbors - 1, metric=metric, device=backend.device)  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "n_components": n_components,
        "n_neighbors": n_neighbors,
        "min_dist": min_dist,
        "metric": metric,
        "random_state": random_state,
        "n_epochs": n_epochs,
        # The spectral start needs more rows than it has dimensions.
        "init": start if isinstance(start, np.ndarray) else "random" if n <= n_components + 1 else "spectral",
    }
    if random_state is None:
        logger.info("UMAP: without random_state the embedding differs from run to run")
    if backend.uses_cuml:
        return _umap_by_cuml(
            vectors, options | {"precomputed_knn": None if knn is None else _with_self(knn, n_neighbors)}
        )
    if knn is None:
        return _umap_by_umap_learn(vectors, options)
    return _umap_of_graph(vectors, knn, shared=start if isinstance(start, SpectralStart) else None, **options)


def approximate_neighbors(vectors: np.ndarray, k: int, *, metric: str) -> Neighbors:
    """Return the `k` nearest other rows of every row as UMAP would find them itself: by NN-descent, some wrong.

    One graph serves every `embed_umap` that asks for fewer neighbours; its seed is fixed. Where fewer than k are found
    the rest are -1, at infinite distance, which UMAP passes over.
    """
    from umap.umap_ import nearest_neighbors

    _check_finite(vectors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that not all rows have k + 1 neighbours
        indices, distances, _ = nearest_neighbors(
            vectors, k + 1, metric, {}, False, np.random.RandomState(0), use_pynndescent=True, n_jobs=1
        )
    # A row mostly finds itself first; where it does not, its last neighbour makes room.
    is_self = indices == np.arange(len(vectors))[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    shape = (len(vectors), k)
    return Neighbors(
        indices[~is_self].reshape(shape).astype(np.int32), distances[~is_self].reshape(shape).astype(np.float32)
    )


def cluster_hdbscan(
    vectors: np.ndarray,
    *,
    min_cluster_size: int = 50,
    min_samples: int = 10,
    cluster_selection_epsilon: float = 0.0,
    cluster_selection_method: SelectionMethod = "eom",
    backend: Backend = CPU,
) -> Clusters:
    """Cluster vectors [n, d] by HDBSCAN with euclidean distances; labels are -1 for noise.

    `min_samples` leaves the point itself out and is capped at n - 1. Raises UserError for values out of range and for
    values that are not finite.
    """
    settings: dict[str, Any] = {
        "min_cluster_size": min_cluster_size,
        "cluster_selection_epsilon": cluster_selection_epsilon,
        "cluster_selection_method": cluster_selection_method,
    }
    _check_cut(**settings)
    _check_min_samples(min_samples)
    if len(vectors) < max(2, min_cluster_size):
        return _all_noise(len(vectors))
    if backend.uses_cuml and min_samples <= _CUML_MAX_MIN_SAMPLES:
        return _hdbscan_by_cuml(vectors, {**settings, "min_samples": min(min_samples, len(vectors) - 1)})
    if backend.uses_cuml:
        logger.warning("HDBSCAN: cuML takes min_samples up to %d; the CPU is used", _CUML_MAX_MIN_SAMPLES)
    return cut_tree(single_linkage_tree(vectors, min_samples=min_samples), **settings)


def single_linkage_tree(vectors: np.ndarray, *, min_samples: int) -> LinkageTree:
    """Build HDBSCAN's single-linkage tree of vectors [n, d], the part that depends on `min_samples` alone.

    Raises UserError if min_samples is below 1, a value is not finite or a squared distance would not be.
    """
    _check_min_samples(min_samples)
    _check_finite(vectors)
    n = len(vectors)
    if n < 2:
        return LinkageTree(np.zeros((0, 4)), n)
    if vectors.shape[1] > _MOST_BOXED_DIMENSIONS:
        return LinkageTree(_linkage_by_package(vectors, min_samples), n)
    from common.single_linkage import single_linkage

    return LinkageTree(single_linkage(vectors, min_samples=min_samples), n)


def _linkage_by_package(vectors: np.ndarray, min_samples: int) -> np.ndarray:
    """The merges [n - 1, 4] by the hdbscan package, which goes through all pairs: exact, too."""
    import hdbscan

    rows = vectors.astype(np.float64)
    # The flat clusters that it also makes cost little.
    parts = hdbscan.hdbscan(rows, min_cluster_size=len(rows), min_samples=min_samples, algorithm="prims_kdtree")
    return np.asarray(parts[4])


def cut_tree(
    tree: LinkageTree,
    *,
    min_cluster_size: int,
    cluster_selection_epsilon: float = 0.0,
    cluster_selection_method: SelectionMethod = "eom",
) -> Clusters:
    """Cut a tree into flat clusters, which do not depend on the order of the rows.

    Rows come together where they do in hdbscan.HDBSCAN(approx_min_span_tree=False, ...). Its clusters have other
    numbers, and where heights are equal, as with `min_samples` above 1 some are, a few rows on borders may be in others
    (`common.condensed_tree`). Cuts of one `min_cluster_size` share its condensed tree. Raises UserError for values out
    of range.
    """
    _check_cut(min_cluster_size, cluster_selection_epsilon, cluster_selection_method)
    if tree.n_rows < max(2, min_cluster_size):
        return _all_noise(tree.n_rows)
    from common.condensed_tree import condense, flat_clusters

    if min_cluster_size not in tree._condensed:
        tree._condensed[min_cluster_size] = condense(tree.merges, min_cluster_size=min_cluster_size)
    labels, probabilities = flat_clusters(
        tree._condensed[min_cluster_size], method=cluster_selection_method, epsilon=cluster_selection_epsilon
    )
    return Clusters(labels, probabilities)


def cluster_dbscan(
    vectors: np.ndarray,
    *,
    eps: float,
    min_samples: int,
    metric: Literal["cosine", "euclidean"] = "euclidean",
    backend: Backend = CPU,
) -> np.ndarray:
    """Cluster vectors [n, d] by DBSCAN; labels [n] int32, -1 for noise. Here `min_samples` counts the point itself.

    Raises UserError for eps <= 0, min_samples < 1 and values that are not finite.
    """
    if eps <= 0:
        raise UserError(f"DBSCAN: eps is {eps}; it must be above 0")
    _check_min_samples(min_samples)
    _check_finite(vectors)
    if len(vectors) == 0:
        return np.zeros(0, np.int32)
    if backend.uses_cuml:
        from cuml.cluster import DBSCAN

        model = DBSCAN(eps=eps, min_samples=min_samples, metric=metric, output_type="numpy")
    else:
        from sklearn.cluster import DBSCAN

        model = DBSCAN(eps=eps, min_samples=min_samples, metric=metric)
    return np.asarray(model.fit(np.ascontiguousarray(vectors, np.float32)).labels_).astype(np.int32)


def _umap_by_umap_learn(vectors: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """By the estimator of umap-learn, which makes the graph itself."""
    import umap

    # umap-learn runs a seeded embedding in one thread, and warns if more are asked for.
    n_jobs = -1 if options["random_state"] is None else 1
    with _warnings_in_log():
        embedding = umap.UMAP(**options, n_jobs=n_jobs).fit_transform(vectors)
    return np.ascontiguousarray(embedding, dtype=np.float32)


def _umap_of_graph(
    vectors: np.ndarray,
    knn: Neighbors,
    *,
    shared: SpectralStart | None,
    init: str | np.ndarray,
    n_neighbors: int,
    **options: Any,
) -> np.ndarray:
    """The same from a graph that is there, in less memory and time; its steps agree with umap-learn's to rounding."""
    from common.umap_graph import fuzzy_graph
    from common.umap_layout import lay_out, numba_threads

    # One thread where there is a seed, as umap-learn has it.
    with _warnings_in_log(), numba_threads(None if options["random_state"] is None else 1):
        graph = fuzzy_graph(*_with_self(knn, n_neighbors))
        return lay_out(graph, vectors, start=init, share=shared.get if shared else None, **options)


@contextmanager
def _warnings_in_log() -> Iterator[None]:
    """Within it, what UMAP warns of goes to the log, in one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in sorted({str(entry.message) for entry in caught if issubclass(entry.category, UserWarning)}):
        if "transform" not in message:  # new data are never transformed here
            logger.warning("UMAP: %s", " ".join(message.split()))


def _umap_by_cuml(vectors: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    from cuml.manifold import UMAP

    embedding = UMAP(**options, output_type="numpy").fit_transform(np.ascontiguousarray(vectors, np.float32))
    return np.ascontiguousarray(embedding, dtype=np.float32)


def _hdbscan_by_cuml(vectors: np.ndarray, settings: dict[str, Any]) -> Clusters:
    from cuml.cluster import HDBSCAN

    _check_finite(vectors)
    logger.info("HDBSCAN: cuML may break ties between equal distances differently from run to run")
    model = HDBSCAN(**settings, metric="euclidean", output_type="numpy").fit(np.ascontiguousarray(vectors, np.float32))
    return Clusters(np.asarray(model.labels_).astype(np.int32), np.asarray(model.probabilities_).astype(np.float32))


def _with_self(knn: Neighbors, n_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """The graph as UMAP wants it: the row itself first, n_neighbors columns in all.

    Cut here, as umap-learn leaves a wider graph as it is below 4,096 rows, and ignores a narrower one.
    """
    n = len(knn.indices)
    indices = matrix_beside(knn.indices, (n, n_neighbors), dtype=np.int32)
    distances = matrix_beside(knn.indices, (n, n_neighbors))
    indices[:, 0] = np.arange(n)
    for whole, others in zip((indices, distances), knn, strict=True):
        for to, part in zip(pieces(whole), pieces(others), strict=True):
            to[:, 1:] = part[:, : n_neighbors - 1]
    return indices, distances


def _all_noise(n: int) -> Clusters:
    return Clusters(np.full(n, -1, np.int32), np.zeros(n, np.float32))


def _check_umap(vectors: np.ndarray, n_neighbors: int, n_components: int, knn: Neighbors | None) -> None:
    n = len(vectors)
    if not 2 <= n_neighbors < n:
        hint = f"use 2 to {n - 1}" if n > 2 else "three rows are the least"
        raise UserError(f"UMAP: n_neighbors is {n_neighbors} but there are {n} rows; {hint}")
    if n_components < 1:
        raise UserError(f"UMAP: n_components is {n_components}; it must be at least 1")
    if knn is not None and (len(knn.indices) != n or knn.indices.shape[1] < n_neighbors - 1):
        rows, columns = knn.indices.shape
        raise UserError(
            f"UMAP: the neighbour graph is {rows} x {columns}, but {n} rows with n_neighbors {n_neighbors} "
            f"need {n} x {n_neighbors - 1}; make it with exact_neighbors(vectors, {n_neighbors - 1})"
        )
    _check_finite(vectors)


def _check_finite(vectors: np.ndarray) -> None:
    # The sum over a row is NaN or infinite where one of its values is, and needs no array of n x d.
    sums = [np.sum(part, axis=1, dtype=np.float64) for part in pieces(vectors)]
    bad = np.flatnonzero(~np.isfinite(np.concatenate(sums))) if sums else np.zeros(0, np.int64)
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(vectors)} rows have NaN or infinite values, row {bad[0]} first; drop such rows first"
        )


def _check_min_samples(min_samples: int) -> None:
    if min_samples < 1:
        raise UserError(f"min_samples is {min_samples}; it must be at least 1")


def _check_cut(min_cluster_size: int, cluster_selection_epsilon: float, cluster_selection_method: str) -> None:
    if min_cluster_size < 2:
        raise UserError(f"HDBSCAN: min_cluster_size is {min_cluster_size}; it must be at least 2")
    if cluster_selection_epsilon < 0:
        raise UserError(f"HDBSCAN: cluster_selection_epsilon is {cluster_selection_epsilon}; it must not be negative")
    if cluster_selection_method not in ("eom", "leaf"):
        raise UserError(f'HDBSCAN: cluster_selection_method "{cluster_selection_method}" is unknown; use eom or leaf')
