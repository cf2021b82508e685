"""Inputs for the benchmark of the text pipeline, written as the stage before would have committed them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measure import ROOT

if TYPE_CHECKING:
    import pyarrow as pa

    from benchmarks.measure import Work

ROWS_PER_SHARD = 50_000
N_LABELLED_CLUSTERS = 200


def write_texts(*, path: str, n_rows: int) -> Work:
    """Banking77's requests where CLUSTERING_DATA_DIR has them, else those of the demonstration."""

    def work() -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from demo.support_requests import generate_requests

        folder = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))
        banking = folder / "banking77_train.parquet"
        name = "Banking77" if banking.exists() else "demonstration requests"
        texts = pq.read_table(banking)["text"] if banking.exists() else generate_requests(n_rows)["text"]
        # The demonstration has a few empty and very long texts, which `encode` has no rule for.
        texts = pa.array([text for text in texts.to_pylist() if text and text.strip() and len(text) < 2000])[:n_rows]
        pq.write_table(pa.table({"text": texts}), path)
        return {"texts": name, "rows": len(texts)}

    return work


def write_vectors(*, folder: str, n_rows: int, dimension: int) -> Work:
    """Shards of stage 1: an id, a text and `cls` with a falling spectrum, as text encoders give."""
    spectrum = (np.arange(1, dimension + 1) ** -0.4).astype(np.float32)

    def tables() -> Iterator[pa.Table]:
        import pyarrow as pa

        from common.columns import vector_array

        rng = np.random.default_rng(0)
        rotation = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0].astype(np.float32)
        offset = rng.standard_normal(dimension, dtype=np.float32) * np.float32(0.3)
        for ids in _ranges(n_rows):
            vectors = (rng.standard_normal((len(ids), dimension), dtype=np.float32) * spectrum + offset) @ rotation
            yield pa.table({"id": ids, "text": [f"request {row}" for row in ids], "cls": vector_array(vectors)})

    return lambda: _commit(folder, tables(), stage="supervise")


def write_reduced(*, folder: str, vectors_path: str, n_rows: int, n_clusters: int) -> Work:
    """Shards of stage 2 with an id and `pca`, and the same vectors as one array for the peers."""
    from benchmarks.kmeans_variants import make_pca_like

    def work() -> dict[str, Any]:
        import pyarrow as pa

        from common.columns import vector_array

        vectors = make_pca_like(n_rows, n_components=n_clusters * 3 // 2).astype(np.float32)
        np.save(vectors_path, vectors)
        tables = (pa.table({"id": ids, "pca": vector_array(vectors[ids.start : ids.stop])}) for ids in _ranges(n_rows))
        return _commit(folder, tables, stage="normalize_and_pca")

    return work


def write_labelled(*, folder: str, centroids_path: str, n_rows: int) -> Work:
    """Shards of stage 4 without vectors: texts, a tenth of gold labels, noisy teacher labels, cluster ids."""

    def work() -> dict[str, Any]:
        import pyarrow.parquet as pq

        from common.centroids import centroid_table
        from demo.support_requests import generate_requests

        texts = generate_requests(2000)["text"].fill_null("no text").combine_chunks()
        rng = np.random.default_rng(0)
        share_right = rng.uniform(0.5, 1.0, N_LABELLED_CLUSTERS)
        tables = (_labelled_table(ids, texts, share_right, rng) for ids in _ranges(n_rows, rows_per_shard=250_000))
        made = _commit(folder, tables, stage="normalize_and_pca")
        k = N_LABELLED_CLUSTERS
        centers = rng.standard_normal((k, 8)).astype(np.float32)
        pq.write_table(centroid_table(centers, np.full(k, n_rows // k), np.ones(k)), centroids_path)
        return made

    return work


def _labelled_table(ids: range, texts: pa.Array, share_right: np.ndarray, rng: np.random.Generator) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    n_rows, n_intents = len(ids), 77
    names = pa.array([f"intent_{code:02d}" for code in range(n_intents)])
    cluster_ids = rng.integers(N_LABELLED_CLUSTERS, size=n_rows, dtype=np.int32)
    right = rng.random(n_rows) < share_right[cluster_ids]
    intents = np.where(right, cluster_ids % n_intents, rng.integers(n_intents, size=n_rows))
    clipped = pc.utf8_slice_codeunits(texts.take(rng.integers(len(texts), size=n_rows)), 0, 200)
    numbers = pa.array(ids).cast("string")
    return pa.table(
        {
            "text": pc.binary_join_element_wise(clipped, numbers, " "),  # all different, as texts are
            "label": names.take(pa.array(intents, mask=rng.random(n_rows) >= 0.1)),
            "teacher_label": names.take(pa.array(intents)),
            "cluster_id": cluster_ids,
            "cluster_distance": rng.random(n_rows, dtype=np.float32),
        }
    )


def _ranges(n_rows: int, *, rows_per_shard: int = ROWS_PER_SHARD) -> Iterator[range]:
    return (range(start, min(start + rows_per_shard, n_rows)) for start in range(0, n_rows, rows_per_shard))


def _commit(folder: str, tables: Iterator[pa.Table], *, stage: str) -> dict[str, Any]:
    """Write each table as a shard and commit the folder."""
    from cluster_supervise import Settings
    from common.commit import Identity
    from common.outputs import StageOutput
    from common.shards import shard_name

    n_rows, names = 0, []
    with StageOutput(folder, Identity(stage, {"made by": "benchmark"}, {"folder": folder})) as output:
        for index, table in enumerate(tables):
            task = output.task(shard_name(index), table.num_rows)
            task.write(table.schema, [table])
            names.append(task.name)
            n_rows += table.num_rows
        output.finish(names, Settings(input_parquet="benchmark", output_dir=folder), {"rows": n_rows})
    return {"rows": n_rows}
