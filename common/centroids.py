"""The centroids of a clustering on the disk: `centroids.parquet`, which prediction and purity read."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.columns import number_array, read_ids, read_vectors, replace_columns, vector_array
from common.commit import fingerprint_files, write_bytes
from common.config import UserError
from common.shard_writer import write_shard
from common.shards import Shard, Stamp, read_stamp

if TYPE_CHECKING:
    import pyarrow as pa

WRITTEN_BY = "cluster_train_clusters.py"


@dataclass(frozen=True)
class Centroids:
    """Centroids in the order of their ids, and what they were made from."""

    path: Path
    ids: np.ndarray  # [k] int64
    centers: np.ndarray  # [k, d] float32
    spherical: bool  # made for rows of unit length
    fingerprint: str
    table: pa.Table  # every column of the file


def centroid_table(centers: np.ndarray, sizes: np.ndarray, inertia: np.ndarray) -> pa.Table:
    """The columns of `centroids.parquet`: centers [k, d], sizes [k], inertia [k] (sums of squared distances)."""
    import pyarrow as pa

    return pa.table(
        {
            "centroid_id": number_array(np.arange(len(centers), dtype=np.int32)),
            "center": vector_array(centers),
            "size": number_array(np.asarray(sizes, np.int64)),
            "inertia": number_array(np.asarray(inertia, np.float64)),
        }
    )


def load_centroids(path: str | Path) -> Centroids:
    """Read centroids of ours or of another program; raises UserError where the file is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"centroids {path} do not exist; run {WRITTEN_BY} first, or check the config")
    stamp = read_stamp(path)
    table = next(Shard(path, 0).iter_tables(n_rows=2**31 - 1), None)
    if table is None or table.num_rows == 0:
        raise UserError(f"centroids {path} are empty; run {WRITTEN_BY} again with --overwrite")
    missing = [name for name in ("centroid_id", "center") if name not in table.schema.names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r} (has: {', '.join(table.schema.names)}); run {WRITTEN_BY}")
    centers = read_vectors(table["center"], where=f"{path}, column 'center'")
    if not centers.valid.all():
        raise UserError(f"centroids {path} hold null, NaN or Inf centers; run {WRITTEN_BY} again with --overwrite")
    ids = read_ids(table["centroid_id"], where=f"{path}, column 'centroid_id'")
    if ids.min() < 0:
        raise UserError(
            f"centroids {path} hold a null or negative centroid_id; run {WRITTEN_BY} again with --overwrite"
        )
    if len(np.unique(ids)) != len(ids):
        raise UserError(f"centroids {path} hold a centroid_id twice; run {WRITTEN_BY} again with --overwrite")
    keys = stamp.identity.get("keys", {}) if stamp else {}
    return Centroids(
        path=path,
        ids=ids,
        centers=centers.vectors,
        spherical=keys.get("algorithm") == "spherical",
        fingerprint=stamp.fingerprint if stamp else fingerprint_files([path]),
        table=table,
    )


def add_centroid_columns(centroids: Centroids, columns: dict[str, pa.Array], layer: dict[str, Any]) -> None:
    """Rewrite the centroids with more columns, atomically; `layer` says in the footer what they were made from."""
    stamp = read_stamp(centroids.path) or Stamp({}, centroids.fingerprint, len(centroids.ids))
    table = replace_columns(centroids.table, columns)
    layers = {**stamp.layers, layer["stage"]: layer}
    write_shard(centroids.path, table.schema, [table], Stamp(stamp.identity, stamp.fingerprint, stamp.n_rows, layers))


def write_joblib(path: Path, centers: np.ndarray) -> None:
    """Write a fitted scikit-learn KMeans for users of their own code; this suite never loads it."""
    import joblib

    from common.kmeans import as_estimator

    buffer = io.BytesIO()
    joblib.dump(as_estimator(centers), buffer)
    write_bytes(path, buffer.getvalue())
