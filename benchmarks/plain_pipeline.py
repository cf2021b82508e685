"""The peers: the stages as one writes them first, with sentence-transformers, scikit-learn and pandas in one process.

Each function sets up and returns the work that is timed, as `measure` wants it. The peers are given every advantage
that costs no thought: whole columns, threads where the library has them, arrays in memory where the comparison says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.measure import Work


def encode(*, texts_path: str, model: str, vectors_path: str) -> Work:
    """Stage 1: sentence-transformers' `encode` with its defaults, float32."""
    import pandas as pd
    from sentence_transformers import SentenceTransformer

    from common.model_files import resolve_model

    def work() -> dict[str, Any]:
        texts = pd.read_parquet(texts_path)["text"].tolist()
        encoder = SentenceTransformer(resolve_model(model), device="cpu")
        np.save(vectors_path, encoder.encode(texts))
        return {"rows": len(texts)}

    return work


def reduce_vectors(*, input_dir: str, output_dir: str, components_path: str, n_components: int) -> Work:
    """Stage 2: pandas shards to lists, IncrementalPCA, pandas shards."""
    import pandas as pd
    from sklearn.decomposition import IncrementalPCA
    from sklearn.preprocessing import normalize

    def frames() -> Iterator[tuple[str, pd.DataFrame, np.ndarray]]:
        for path in sorted(Path(input_dir).glob("*.parquet")):
            frame = pd.read_parquet(path)
            yield path.name, frame, normalize(np.array(frame["cls"].tolist(), dtype=np.float32))

    def work() -> dict[str, Any]:
        pca = IncrementalPCA(n_components=n_components)
        for _, _, vectors in frames():
            pca.partial_fit(vectors)
        Path(output_dir).mkdir(exist_ok=True)
        n_rows = 0
        for name, frame, vectors in frames():
            frame["pca"] = pca.transform(vectors).tolist()
            frame.to_parquet(Path(output_dir) / name)
            n_rows += len(frame)
        np.save(components_path, pca.components_)
        return {"rows": n_rows}

    return work


def train(*, vectors_path: str, centroids_path: str, n_clusters: int, kind: str) -> Work:
    """Stage 3: scikit-learn's `KMeans` or `MiniBatchKMeans` with their defaults, on an array in memory."""
    from sklearn import cluster

    vectors = np.load(vectors_path)
    estimator = getattr(cluster, kind)(n_clusters, random_state=0)

    def work() -> dict[str, Any]:
        np.save(centroids_path, estimator.fit(vectors).cluster_centers_)
        return {"passes": int(estimator.n_iter_)}

    return work


def predict(*, vectors_path: str, centroids_path: str) -> Work:
    """Stage 4: `KMeans.predict` on an array in memory; nothing is read or written while the clock runs."""
    from common.kmeans import as_estimator

    vectors = np.load(vectors_path)
    estimator = as_estimator(np.load(centroids_path))

    def work() -> dict[str, Any]:
        return {"rows": len(estimator.predict(vectors))}

    return work


def count_purity(*, shards_dir: str) -> Work:
    """Stage 5: pandas reads cluster ids and labels, and groups."""
    import pandas as pd

    def work() -> dict[str, Any]:
        frame = pd.read_parquet(shards_dir, columns=["cluster_id", "teacher_label"]).dropna()
        counts = frame.groupby(["cluster_id", "teacher_label"]).size()
        purity = counts.groupby(level=0).max() / counts.groupby(level=0).sum()
        return {
            "purity": float(counts.groupby(level=0).max().sum() / counts.sum()),
            "least_purity": float(purity.min()),
            "clusters": len(purity),
        }

    return work


def update_dataset(*, shards_dir: str, centroids_path: str, output_path: str, purity: dict[str, float]) -> Work:
    """Stage 6: pandas reads texts, labels and ids, joins the clusters, makes masks, and writes the dataset."""
    import pandas as pd

    def work() -> dict[str, Any]:
        frame = pd.read_parquet(shards_dir)
        clusters = pd.read_parquet(centroids_path, columns=["centroid_id", "purity", "majority_label", "n_labeled"])
        joined = frame[["cluster_id"]].join(clusters.set_index("centroid_id"), on="cluster_id")
        gold = frame["label"].notna()
        labelled = ~gold & joined["majority_label"].notna() & (joined["n_labeled"] >= 1)
        for mask in ("metric", "classifier"):
            passed = labelled & (joined["purity"] >= purity[mask])
            frame[f"{mask}_mask"] = (gold | passed).astype("int8")
        pseudo = ~gold & ((frame["metric_mask"] == 1) | (frame["classifier_mask"] == 1))
        frame["label"] = frame["label"].where(~pseudo, joined["majority_label"])
        frame["label_source"] = np.where(gold, "gold", np.where(pseudo, "cluster", None))
        frame.to_parquet(output_path)
        masks = {name: int(frame[name].sum()) for name in ("metric_mask", "classifier_mask")}
        return {"rows": len(frame)} | masks

    return work
