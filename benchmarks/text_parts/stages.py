"""Our side of the benchmark, and the checks that both sides computed the same."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.measure import Work


def run_stage(*, script: str, libraries: list[str], settings: dict[str, Any]) -> Work:
    """One stage as its command runs it, from settings to committed output; imports and an empty folder are set-up."""
    module = import_module(script)
    for library in libraries:
        import_module(library)
    stage_settings = module.Settings(**{"progress": False, **settings})
    for output in ("output_dir", "output_path"):  # what an earlier run left, such as a fitted PCA, would be used again
        shutil.rmtree(settings.get(output) or "", ignore_errors=True)

    def work() -> dict[str, Any]:
        result = module.run(stage_settings, overwrite=True)
        return result if isinstance(result, dict) else {"output": str(result)}

    return work


# --- Are they the same? ----------------------------------------------------------------------------------------------


def compare_vectors(*, peer_path: str, folder: str) -> Work:
    """Cosines between the vectors of `encode` and those of stage 1, row by row."""
    from common.columns import read_vectors
    from common.shards import open_shards

    def work() -> dict[str, Any]:
        shards = open_shards(folder, written_by="stage 1")
        parts = [read_vectors(table["cls"], where=folder).vectors for table in shards.iter_tables(["cls"])]
        ours, theirs = np.concatenate(parts).astype(np.float64), np.load(peer_path).astype(np.float64)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines = np.einsum("ij,ij->i", ours, theirs) / lengths
        return {"least_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}

    return work


def compare_components(*, input_dir: str, n_components: int, found: dict[str, str]) -> Work:
    """Largest difference of components, by name of side, from exact PCA in float64 on all rows at once."""
    from sklearn.decomposition import PCA

    from common.columns import read_vectors
    from common.shards import open_shards

    def work() -> dict[str, Any]:
        shards = open_shards(input_dir, written_by="stage 1")
        parts = [read_vectors(table["cls"], where=input_dir).vectors for table in shards.iter_tables(["cls"])]
        vectors = np.concatenate(parts).astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        exact = PCA(n_components, svd_solver="covariance_eigh").fit(vectors).components_
        return {name: float(_difference(_load_components(path), exact)) for name, path in found.items()}

    return work


def _load_components(path: str) -> np.ndarray:
    if Path(path).suffix == ".npy":
        return np.load(path)
    from common.pca_file import load_pca

    return load_pca(Path(path)).components


def _difference(components: np.ndarray, exact: np.ndarray) -> float:
    signs = np.sign(np.einsum("ij,ij->i", components.astype(np.float64), exact))
    return np.abs(components * signs[:, None] - exact).max()


def compare_inertia(*, vectors_path: str, found: dict[str, str]) -> Work:
    """Inertia of the centroids of each side, in float64 by scikit-learn."""
    from sklearn.metrics import pairwise_distances_argmin_min

    def work() -> dict[str, Any]:
        vectors = np.load(vectors_path)
        return {name: _inertia(vectors, _load_centroids(path)) for name, path in found.items()}

    def _inertia(vectors: np.ndarray, centroids: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(vectors), 50_000):
            rows = vectors[start : start + 50_000].astype(np.float64)
            nearest, _ = pairwise_distances_argmin_min(rows, centroids)
            total += float(np.square(rows - centroids[nearest]).sum())
        return total

    return work


def compare_labels(*, vectors_path: str, centroids_path: str, folder: str) -> Work:
    """The share of rows whose id is that of scikit-learn's `KMeans.predict`, and that share of all rows."""
    from common.kmeans import as_estimator
    from common.shards import open_shards

    def work() -> dict[str, Any]:
        shards = open_shards(folder, written_by="stage 4")
        tables = shards.iter_tables(["cluster_id"])
        ours = np.concatenate([table["cluster_id"].to_numpy() for table in tables])
        theirs = as_estimator(_load_centroids(centroids_path)).predict(np.load(vectors_path))
        return {"equal_share": float((ours == theirs).mean()), "rows": len(ours)}

    return work


def save_centroids(*, centroids_path: str, array_path: str) -> Work:
    """The centers of `centroids.parquet` as an array, for the peer."""

    def work() -> dict[str, Any]:
        centers = _load_centroids(centroids_path)
        np.save(array_path, centers)
        return {"clusters": len(centers)}

    return work


def _load_centroids(path: str) -> np.ndarray:
    if Path(path).suffix == ".npy":
        return np.load(path).astype(np.float64)
    from common.centroids import load_centroids

    return load_centroids(path).centers.astype(np.float64)
