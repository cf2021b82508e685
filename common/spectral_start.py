"""Where UMAP's rows start: by the eigenvectors of their graph, at given places, or anywhere.

    places = first_places(graph, vectors, 10, random, metric="cosine")     # [n, 10], between 0 and 10

Up to 10,000 rows the eigenvectors are found as umap-learn finds them, bit for bit. It takes as many Lanczos vectors as
the root of the number of rows, all in memory; for more rows the basis is small, and lies in a file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from common.grouping import cluster_members
from common.lanczos import highest_eigenvectors
from common.mapped import matrix_beside, pieces
from common.umap_graph import FuzzyGraph, ScaledGraph

Share = Callable[[Callable[[], np.ndarray], np.random.RandomState], np.ndarray]

# Up to here umap-learn's own start, of at most a hundred Lanczos vectors.
FEW_ROWS = 10_000
# Up to here the eigenvectors of a part are found from its whole table, in milliseconds.
_FEW_IN_PART = 200
# Of coordinates that reach from -10 to 10, so that equal rows part.
_REACH, _NOISE = 10.0, 0.0001


def first_places(
    graph: FuzzyGraph,
    vectors: np.ndarray,
    dim: int,
    random: np.random.RandomState,
    *,
    metric: str,
    start: str | np.ndarray = "spectral",
    share: Share | None = None,
) -> np.ndarray:
    """Where rows start: [n, dim] float32 between 0 and 10, beside the edges of the graph.

    `vectors` [n, d] and `metric` place parts of the graph that nothing connects; `start` is "spectral", "random" or
    [n, dim]. `share` may know the spectral start already; it is called with what finds it, and with the generator.
    """
    if isinstance(start, np.ndarray):
        places = _apart(start.astype(np.float32), random)
    elif start == "random":
        places = random.uniform(-_REACH, _REACH, size=(len(graph), dim)).astype(np.float32)
    else:

        def find() -> np.ndarray:
            return _spectral(graph, vectors, dim, random, metric)

        places = share(find, random) if share else find()
    low, high = places.min(axis=0), places.max(axis=0)
    first = matrix_beside(graph.tails, places.shape)
    for part, to in zip(pieces(places), pieces(first), strict=True):
        to[:] = 10.0 * (part - low) / (high - low)
    return first


def _apart(places: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Places [n, dim] with a little noise where some are equal: nothing would ever part those."""
    from sklearn.neighbors import KDTree

    if len(np.unique(places, axis=0)) == len(places):
        return places
    gap = float(KDTree(places).query(places, k=2)[0][:, 1].mean())
    return places + random.normal(scale=0.001 * gap, size=places.shape).astype(np.float32)


def _spectral(
    graph: FuzzyGraph, vectors: np.ndarray, dim: int, random: np.random.RandomState, metric: str
) -> np.ndarray:
    """The spectral start, [n, dim] float32, with a little noise."""
    find = _spectral_of_few if len(graph) <= FEW_ROWS else _spectral_of_many
    places = find(graph, vectors, dim, random, metric)
    expansion = _REACH / max(places.max(), -places.min())
    noisy = np.empty(places.shape, np.float32)
    for part, to in zip(pieces(places), pieces(noisy), strict=True):
        to[:] = part * expansion
        to += random.normal(scale=_NOISE, size=part.shape).astype(np.float32)
    return noisy


def _spectral_of_few(
    graph: FuzzyGraph, vectors: np.ndarray, dim: int, random: np.random.RandomState, metric: str
) -> np.ndarray:
    from umap.distances import named_distances
    from umap.spectral import spectral_layout

    return spectral_layout(vectors, graph.to_scipy().tocoo(), dim, random, metric=named_distances[metric])


def _spectral_of_many(
    graph: FuzzyGraph, vectors: np.ndarray, dim: int, random: np.random.RandomState, metric: str
) -> np.ndarray:
    """Eigenvectors of the graph; of each part of its own, around a place for the part, where it is not connected."""
    n_parts, part_of = graph.connected_parts()
    place_of = np.empty(len(graph), np.int32)  # in its part
    places = np.empty((len(graph), dim), np.float32)
    centers = _place_parts(vectors, n_parts, part_of, dim, random, metric) if n_parts > 1 else np.zeros((1, dim))
    for part, members in cluster_members(part_of, n_parts):
        place_of[members] = np.arange(len(members))
        gaps = np.linalg.norm(centers - centers[part], axis=1)
        reach = gaps[gaps > 0].min(initial=1.0) / 2
        if len(members) < 2 * dim or len(members) <= dim + 2:
            offsets = random.uniform(-reach, reach, size=(len(members), dim))
        else:
            offsets = _low_eigenvectors(graph if n_parts == 1 else graph.take(members, place_of), dim)
            offsets *= reach / max(offsets.max(), -offsets.min())
        offsets += centers[part].astype(offsets.dtype)  # in its place: sums would be as large again
        places[members] = offsets
    return places


def _low_eigenvectors(graph: FuzzyGraph, dim: int) -> np.ndarray:
    """The eigenvectors [n, dim] of the normalised Laplacian above the lowest, which is the sums alone."""
    operator = ScaledGraph(graph)
    if len(graph) <= _FEW_IN_PART:
        return np.linalg.eigh(operator.to_table())[1][:, -2 : -dim - 2 : -1]
    return highest_eigenvectors(operator.multiply, len(graph), dim + 1, beside=graph.tails)[:, 1:]


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
