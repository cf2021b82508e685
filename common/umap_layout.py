"""UMAP from a graph of neighbours, on the CPU, in little more memory than the embedding takes.

    graph = fuzzy_graph(indices, distances)
    embedding = lay_out(graph, vectors, n_components=10, min_dist=0.1, metric="cosine", random_state=0)

Up to 10,000 rows the graph and the start are equal to those of umap-learn, bit for bit; the steps from there are those
of `common.umap_steps`. What its estimator holds beside the graph is not made: copies of it, and, to find where rows
start, as many vectors of all rows as the root of their number. From some 10,000 rows on those are more than all that
the layout takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from common.mapped import return_freed_memory
from common.spectral_start import FEW_ROWS, Share, first_places
from common.umap_graph import FuzzyGraph

# As many epochs as umap-learn takes for few rows and for more.
_EPOCHS_OF_FEW, _EPOCHS_OF_MANY = 500, 200


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


def lay_out(
    graph: FuzzyGraph,
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
    """Embed the rows of a `fuzzy_graph`, which is used up: [n, n_components] float32, NaN for rows without an edge.

    `vectors` [n, d], `metric`, `start` and `share` are those of `first_places`. With `random_state` None all cores take
    part, and the result differs from run to run.
    """
    from sklearn.utils import check_random_state
    from umap.umap_ import find_ab_params

    from common.umap_steps import count_samples, run_epochs

    is_alone = graph.is_alone
    if is_alone.all():
        return np.full((len(graph), n_components), np.nan, np.float32)
    n_epochs = n_epochs or _usual_epochs(graph)
    graph = drop_unsampled(graph, n_epochs)
    random = check_random_state(random_state)
    places = first_places(graph, vectors, n_components, random, metric=metric, start=start, share=share)
    if len(graph) > FEW_ROWS:
        return_freed_memory()  # of what was needed for the start, which is as much as comes now
    embedding = run_epochs(
        places,
        graph.indptr,
        graph.tails,
        count_samples(graph.strengths, n_epochs),
        curve=find_ab_params(1.0, min_dist),
        seeds=draw_seeds(random),
        n_epochs=n_epochs,
        on_all_cores=random_state is None,
    )
    embedding[is_alone] = np.nan
    return embedding


def drop_unsampled(graph: FuzzyGraph, n_epochs: int) -> FuzzyGraph:
    """The graph without the edges that would not be sampled once; takes the place of the one that is given."""
    n_counted = n_epochs if n_epochs > 10 else _usual_epochs(graph)
    return graph.drop_weak_edges(float(graph.strongest() / n_counted))


def draw_seeds(random: np.random.RandomState) -> np.ndarray:
    """The seeds of the rows' generators, [3] int64, as umap-learn draws them."""
    limits = np.iinfo(np.int32)
    return random.randint(limits.min + 1, limits.max - 1, 3).astype(np.int64)


def _usual_epochs(graph: FuzzyGraph) -> int:
    return _EPOCHS_OF_FEW if len(graph) <= FEW_ROWS else _EPOCHS_OF_MANY
