"""Clusterings of one set of vectors under many settings, each stage computed once and shared by all that need it.

    stages = Stages(sample, StageStore(folder), backend=backend)
    stages.cluster(settings)        # equal, bit for bit, to image_parts.pipeline.cluster_features with these settings

PCA once at the largest size, of which smaller ones are the first columns; one neighbour graph for all n_neighbors up to
its width; one UMAP embedding for each of its keys, and one spectral start for those that differ in min_dist alone; one
HDBSCAN tree for each embedding and min_samples, cut for every size, epsilon and method. What took time lies on disk, so
that no process and no later run computes it again.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.backend import Backend
from common.commit import atomic_file, make_folder, save_array
from common.config import canonical_json
from common.density import LinkageTree, SpectralStart, single_linkage_tree
from common.neighbors import Neighbors
from image_parts.pipeline import (
    ClusterAssignment,
    check_enough_images,
    embed,
    find_clusters,
    graph_width,
    has_graph,
    is_pca_nested,
    number_by_size,
    project_pca,
    umap_graph,
)
from image_parts.purity import feature_neighbors
from image_parts.settings import ImageSettings, PuritySettings, ReductionSettings

log = logging.getLogger(__name__)

Value = TypeVar("Value")

# Arrays held in memory beside those on disk; the oldest go first.
_MAX_HELD_BYTES = 1 << 29


@dataclass(frozen=True, eq=False)
class Sample:
    """The distinct vectors that candidates cluster, all of them or a part."""

    vectors: np.ndarray  # [u, d] float32
    rows: np.ndarray  # [n] int64: for each image its row in `vectors`

    @cached_property
    def fingerprint(self) -> str:
        """Another one for every other content."""
        digest = hashlib.sha256(repr(self.vectors.shape).encode())
        digest.update(np.ascontiguousarray(self.vectors).data)
        digest.update(np.ascontiguousarray(self.rows).data)
        return digest.hexdigest()

    def take(self, fraction: float, *, seed: int) -> Sample:
        """A random part of the distinct vectors, with the images that have them."""
        n_kept = round(fraction * len(self.vectors))
        kept = np.sort(np.random.default_rng(seed).permutation(len(self.vectors))[:n_kept])
        new_rows = np.full(len(self.vectors), -1, np.int64)
        new_rows[kept] = np.arange(n_kept)
        rows = new_rows[self.rows]
        return Sample(np.ascontiguousarray(self.vectors[kept]), rows[rows >= 0])


class Held:
    """The results used last, up to a number of bytes."""

    def __init__(self, max_bytes: int = _MAX_HELD_BYTES) -> None:
        self._values: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._max_bytes, self._n_bytes = max_bytes, 0

    def get(self, name: str, make: Callable[[], Value], size_of: Callable[[Value], int]) -> Value:
        """The value of this name, made if it is not held."""
        if name in self._values:
            self._values.move_to_end(name)
            value: Value = self._values[name][0]
            return value
        value = make()
        self._values[name] = (value, size_of(value))
        self._n_bytes += self._values[name][1]
        while self._n_bytes > self._max_bytes and len(self._values) > 1:
            self._n_bytes -= self._values.popitem(last=False)[1][1]
        return value


class StageStore:
    """Arrays on disk by name, each made once; one that is damaged is made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self._held = Held()

    def get(self, name: str, make: Callable[[], np.ndarray], *, n_rows: int) -> np.ndarray:
        """The array of this name with `n_rows` rows, made and written if it is not there."""
        return self._held.get(name, lambda: self._read_or_make(name, make, n_rows), lambda array: array.nbytes)

    def _read_or_make(self, name: str, make: Callable[[], np.ndarray], n_rows: int) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if path.exists():
            try:
                array: np.ndarray = np.load(path)
                if len(array) == n_rows:
                    return array
                problem: object = f"it has {len(array)} rows, not {n_rows}"
            except (ValueError, EOFError) as damage:
                problem = damage
            log.warning("%s is damaged and is computed again: %s", path, problem)
        array = make()
        with atomic_file(path) as file:
            save_array(file, array)
        return array


class Stages:
    """The staged way from vectors to clusters for one sample."""

    def __init__(self, sample: Sample, store: StageStore, *, backend: Backend, max_components: int) -> None:
        self.sample, self.backend = sample, backend
        self._store = store
        self._max_components = min(max_components, *sample.vectors.shape)
        self._held = Held()

    def cluster(self, settings: ImageSettings) -> ClusterAssignment:
        """Cluster under these settings; clusters are numbered by falling size, as image_cluster.py numbers them.

        Raises UserError where there are too few images for the settings.
        """
        check_enough_images(len(self.sample.vectors), settings)
        embedding = self.embedding(settings.reduction)
        tree = None if self.backend.uses_cuml else self._tree(settings.reduction, settings.clustering.min_samples)
        found = find_clusters(embedding, settings.clustering, backend=self.backend, tree=tree)
        return number_by_size(found, self.sample.rows)

    def embedding(self, settings: ReductionSettings) -> np.ndarray:
        """The UMAP embedding [u, e] float32 of one key."""

        def make() -> np.ndarray:
            graph = self._graph(settings)
            pca, start = self._pca(settings.pca_components), self._start(settings)
            return embed(pca, settings, backend=self.backend, graph=graph, start=start)

        name = f"umap-{embedding_key(settings, self.sample.vectors.shape)}"
        return self._store.get(name, make, n_rows=len(self.sample.vectors))

    def _start(self, settings: ReductionSettings) -> SpectralStart:
        """Where the embeddings begin that differ in min_dist alone; in memory, as it is found in half a second."""
        others = embedding_key(settings.model_copy(update={"umap_min_dist": 0.0}), self.sample.vectors.shape)
        n_bytes = 4 * len(self.sample.vectors) * settings.umap_components
        return self._held.get(f"start-{others}", SpectralStart, lambda start: n_bytes)

    def feature_neighbors(self, settings: PuritySettings) -> Neighbors:
        """The neighbours in feature space that the cross ratio looks at."""
        k = min(settings.k_neighbors, len(self.sample.vectors) - 1)
        return self._neighbors(f"features-{k}", lambda: feature_neighbors(self.sample.vectors, settings))

    def _pca(self, n_components: int) -> np.ndarray:
        n_components = min(n_components, *self.sample.vectors.shape)
        nested = is_pca_nested(self.sample.vectors.shape, backend=self.backend)
        n_fitted = max(n_components, self._max_components) if nested else n_components

        def make() -> np.ndarray:
            return project_pca(self.sample.vectors, n_components=n_fitted, backend=self.backend)

        fitted = self._store.get(f"pca-{n_fitted}", make, n_rows=len(self.sample.vectors))
        return np.ascontiguousarray(fitted[:, :n_components])

    def _graph(self, settings: ReductionSettings) -> Neighbors | None:
        n_rows = len(self.sample.vectors)
        if not has_graph(n_rows, settings, backend=self.backend):
            return None
        pca = self._pca(settings.pca_components)
        width = graph_width(settings.umap_n_neighbors, n_rows=n_rows)
        name = f"graph-{pca.shape[1]}-{settings.umap_metric}-{width}"
        return self._neighbors(name, lambda: umap_graph(pca, settings, backend=self.backend))

    def _neighbors(self, name: str, make: Callable[[], Neighbors]) -> Neighbors:
        """A graph on disk as one array: indices are exact in float64."""

        def packed() -> np.ndarray:
            found = make()
            return np.hstack([found.indices.astype(np.float64), found.distances.astype(np.float64)])

        both = self._store.get(name, packed, n_rows=len(self.sample.vectors))
        k = both.shape[1] // 2
        return Neighbors(both[:, :k].astype(np.int32), both[:, k:].astype(np.float32))

    def _tree(self, settings: ReductionSettings, min_samples: int) -> LinkageTree:
        n_rows = len(self.sample.vectors)
        name = f"tree-{embedding_key(settings, self.sample.vectors.shape)}-{min(min_samples, n_rows - 1)}"

        def build() -> np.ndarray:
            return single_linkage_tree(self.embedding(settings), min_samples=min_samples).merges

        def load() -> LinkageTree:
            return LinkageTree(self._store.get(name, build, n_rows=n_rows - 1), n_rows)

        # A tree holds its condensed trees, several times its own size.
        return self._held.get(name, load, lambda tree: 8 * tree.merges.nbytes)


def embedding_key(settings: ReductionSettings, shape: tuple[int, ...]) -> str:
    """The same for settings with the same embedding of vectors of this shape [u, d]."""
    return hashlib.sha256(canonical_json(_effective_reduction(settings, shape)).encode()).hexdigest()[:24]


def candidate_key(settings: ImageSettings, shape: tuple[int, ...]) -> str:
    """The same for settings that give vectors of this shape [u, d] equal clusters: what is capped counts as capped."""
    clustering = settings.clustering.model_dump(mode="json")
    clustering["min_samples"] = min(settings.clustering.min_samples, shape[0] - 1)
    values = {
        "model": settings.model.model_dump(mode="json", exclude={"batch_size", "device", "num_workers"}),
        "preprocessing": settings.preprocessing.model_dump(mode="json"),
        "reduction": _effective_reduction(settings.reduction, shape),
        "clustering": clustering,
    }
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def _effective_reduction(settings: ReductionSettings, shape: tuple[int, ...]) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    values["pca_components"] = min(settings.pca_components, *shape)
    values["umap_n_neighbors"] = min(settings.umap_n_neighbors, shape[0] - 1)
    return values
