"""The vectors that candidates cluster, on disk, where worker processes open them by the name of their folder.

samples = Samples(scanned, root, fraction=None, seed=42, backend=backend)
handle = samples.of(settings)           # features extracted once for each model and preprocessing
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np

from common.backend import Backend
from common.commit import atomic_file, make_folder, remove_stale_temporaries, save_array
from common.config import UserError, canonical_json
from image_parts.extractors import identify_model
from image_parts.features import Features, cache_key, extract_features
from image_parts.scan import ScannedImages
from image_parts.settings import ImageSettings
from image_parts.tuning.evaluate import Measures
from image_parts.tuning.stages import Sample, Stages, StageStore

log = logging.getLogger(__name__)

# What a stage on disk was computed with; another version, or other code of ours, may give other bits.
_PACKAGES = ("numpy", "scipy", "scikit-learn", "umap-learn", "hdbscan", "numba")
_ROOT = Path(__file__).resolve().parents[2]
_CODE = (
    "common/vectors.py", "common/neighbors.py", "common/best_scores.py", "common/cells.py", "common/grouping.py",
    "common/kmeans.py", "common/kmeans_init.py", "common/kmeans_steps.py", "common/umap_graph.py", "common/lanczos.py",
    "common/spectral_start.py", "common/umap_layout.py", "common/umap_steps.py", "common/kd_tree.py",
    "common/disjoint_sets.py",
    "common/single_linkage.py", "common/density.py", "image_parts/pipeline.py",
)  # fmt: skip

# UMAP and HDBSCAN make nothing of fewer.
_LEAST_ROWS = 4


@dataclass(frozen=True)
class SampleHandle:
    """A sample on disk, and all that is needed to open it anywhere."""

    folder: str
    shape: tuple[int, int]  # of its distinct vectors [u, d]
    n_images: int
    backend: Backend
    max_components: int  # the largest PCA that will be asked for


class Samples:
    """The samples of one phase, one for each way of making features."""

    def __init__(
        self,
        scanned: ScannedImages,
        root: Path,
        *,
        fraction: float | None,
        seed: int,
        backend: Backend,
        max_components: int,
    ) -> None:
        self._scanned, self._root = scanned, root
        self._fraction, self._seed = fraction, seed
        self._backend, self._max_components = backend, max_components
        self._handles: dict[str, SampleHandle] = {}

    def of(self, settings: ImageSettings) -> SampleHandle:
        """The sample that these settings cluster; features come from the cache, or are extracted and cached."""
        key = _features_key(settings)
        if key not in self._handles:
            features = extract_features(self._scanned, settings, progress=settings.progress)
            self._handles[key] = self._store(whole_sample(features))
        return self._handles[key]

    def _store(self, sample: Sample) -> SampleHandle:
        if self._fraction is not None:
            sample = sample.take(self._fraction, seed=self._seed)
        if len(sample.vectors) < _LEAST_ROWS:
            share = "" if self._fraction is None else f" in a share of {self._fraction:g}"
            raise UserError(
                f"there are only {len(sample.vectors)} distinct images{share}; {_LEAST_ROWS} are the least to cluster"
            )
        return store_sample(sample, self._root, backend=self._backend, max_components=self._max_components)


def store_sample(sample: Sample, root: Path, *, backend: Backend, max_components: int) -> SampleHandle:
    """Write a sample below `root`, in a folder of its own, unless it is there."""
    folder = make_folder(root / _stages_name(sample, backend))
    remove_stale_temporaries(folder)
    for name, array in (("vectors", sample.vectors), ("rows", sample.rows)):
        if not _is_whole(folder / f"{name}.npy", array):
            with atomic_file(folder / f"{name}.npy") as file:
                save_array(file, array)
    n_vectors, dimension = sample.vectors.shape
    return SampleHandle(str(folder), (n_vectors, dimension), len(sample.rows), backend, max_components)


def _is_whole(path: Path, array: np.ndarray) -> bool:
    """Whether a file is there and holds an array like this one; its content is what its folder is named by."""
    try:
        there = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return False
    except (ValueError, EOFError) as damage:
        log.warning("%s is damaged and is written again: %s", path, damage)
        return False
    return bool(there.shape == array.shape and there.dtype == array.dtype)


@lru_cache(maxsize=2)
def open_stages(handle: SampleHandle) -> tuple[Stages, Measures]:
    """The staged evaluator of a sample; a process keeps those it used last."""
    folder = Path(handle.folder)
    sample = Sample(np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "rows.npy"))
    store = StageStore(folder / "stages")
    stages = Stages(sample, store, backend=handle.backend, max_components=handle.max_components)
    return stages, Measures(stages)


def whole_sample(features: Features) -> Sample:
    """All distinct vectors of the images."""
    return Sample(features.vectors, features.rows)


def _features_key(settings: ImageSettings) -> str:
    key = cache_key(settings, identify_model(settings.model))
    return canonical_json({**key, "l2": settings.preprocessing.l2_normalize})


def _stages_name(sample: Sample, backend: Backend) -> str:
    """Other vectors, another backend, other libraries and other code never share a folder."""
    versions = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
    text = canonical_json([sample.fingerprint, backend.name, versions, fingerprint_code(_ROOT)])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@lru_cache
def fingerprint_code(root: Path) -> str:
    """The same as long as the modules below `root` that compute the stages are the same."""
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()
