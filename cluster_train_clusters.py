"""Stages 3 and 4: k-means over shards larger than memory, then the nearest centroid of every row.

run_mode: train     reads train.input_dir (shards with `pca`), writes train.centroids_out and train.model_out
run_mode: predict   reads both, adds `cluster_id` and `cluster_distance` to the shards, in place and one by one

    python cluster_train_clusters.py --config clustering.example.yaml
    python cluster_train_clusters.py --config clustering.example.yaml train.run_mode=predict
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from common import cli
from common.centroids import Centroids, centroid_table, load_centroids, write_joblib
from common.cluster_report import ClusterNumber, choose_best, score_clusters, write_cluster_report
from common.columns import read_vectors, replace_columns
from common.commit import Identity, make_folder, remove_stale_temporaries
from common.config import StageSettings, UserError
from common.engine import map_items
from common.layers import LayerOutput, LayerTask
from common.outputs import FileOutput, ShardTask, StageOutput
from common.shard_kmeans import lloyd_over_shards
from common.shards import Shard, ShardSet, open_shards, shard_name
from common.stage import write_missing_shards
from common.vector_stream import VectorStream, open_stream

if TYPE_CHECKING:
    import pyarrow as pa

    from common.backend import Backend
    from common.kmeans import KMeansResult

log = logging.getLogger(__name__)

WRITTEN_BY = "cluster_normalize_and_pca.py"


class Settings(StageSettings):
    """Section `train`."""

    run_mode: Literal["train", "predict"] = Field("train", description="find centroids, or give rows the nearest one")
    input_dir: str = Field(min_length=1, description="shards of stage 2, or any folder of parquet files with vectors")
    output_dir: str | None = Field(None, description="predict: folder for ids only; null adds the columns in place")
    centroids_out: str = Field(min_length=1, description="parquet file for the centroids")
    model_out: str | None = Field(None, description="joblib file for scikit-learn users; never read by this suite")
    report_out: str | None = Field(
        None, description="HTML report; null: beside centroids_out, for a list of n_clusters"
    )
    pca_column: str = Field("pca", description="column with the vectors")
    centroid_column: str = Field("cluster_id", description="column that predict writes")
    distance_column: str = Field("cluster_distance", description="column that predict writes: distance to the centroid")
    label_column: str = Field(
        "label", description="labels for the report over a list of n_clusters, where there are any"
    )
    n_clusters: int | list[int] = Field(100, description="number of clusters; a list trains each and reports all")
    select_by: Literal["silhouette", "purity", "nmi", "inertia"] = Field(
        "silhouette", description="how the best of a list becomes centroids_out; inertia takes the bend of its curve"
    )
    algorithm: Literal["minibatch", "lloyd", "spherical"] = Field(
        "minibatch", description="spherical clusters by cosine"
    )
    batch_size: int = Field(8192, ge=1, description="rows of a mini-batch; changes the centroids")
    max_iter: int = Field(5, ge=0, description="passes over the data at most")
    polish_iter: int = Field(2, ge=0, description="full passes after the mini-batches")
    tol: float = Field(1e-3, ge=0, description="training stops when a pass lowers inertia by less than this share")
    init_size: int = Field(0, ge=0, description="sampled rows for the start; 0: 32 a cluster for minibatch, else 128")
    sample_limit: int = Field(0, ge=0, description="train on at most so many rows, drawn evenly; 0: all")
    random_state: int = Field(0, ge=0, description="seed")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="products of training; labels are float32"
    )
    gpu: bool = Field(False, description="train on a GPU: cuML where installed, else our own passes by torch")
    num_workers: int = Field(0, ge=0, description="threads; 0: one a core")
    memory_limit_gb: float = Field(2.0, ge=0, description="vectors are kept in memory up to this, else read each pass")
    silhouette_sample: int = Field(5000, ge=100, description="rows for the silhouette of the report")

    @field_validator("n_clusters")
    @classmethod
    def _positive(cls, value: int | list[int]) -> int | list[int]:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
            raise ValueError("must be a positive number, or a list of different ones")
        return value

    @property
    def cluster_numbers(self) -> list[int]:
        """The numbers of clusters to train, at least one."""
        return self.n_clusters if isinstance(self.n_clusters, list) else [self.n_clusters]

    @property
    def model_path(self) -> Path:
        """Where the joblib model goes."""
        return Path(self.model_out) if self.model_out else Path(self.centroids_out).with_name("kmeans.joblib")

    @property
    def report_path(self) -> Path:
        """Where the report over a list of cluster numbers goes."""
        return Path(self.report_out) if self.report_out else Path(self.centroids_out).with_name("clusters_report.html")


def run(settings: Settings, *, overwrite: bool = False) -> Path:
    """Train centroids, or predict with them; returns the centroids file, or the folder with the ids."""
    shards = _open_input(settings)
    if settings.run_mode == "train":
        return train(shards, settings, overwrite=overwrite)
    return predict(shards, settings, overwrite=overwrite)


def check(settings: Settings) -> dict[str, Any]:
    """Validate input and columns; returns the plan."""
    shards = _open_input(settings)
    plan = {"stage": settings.run_mode, "rows": shards.n_rows, "shards": len(shards.shards)}
    if settings.run_mode == "predict":
        centroids = load_centroids(settings.centroids_out)
        return plan | {"clusters": len(centroids.ids), "output": settings.output_dir or settings.input_dir}
    _refuse_too_many(settings, shards.n_rows)
    return plan | {"n_clusters": settings.cluster_numbers, "output": settings.centroids_out}


def _open_input(settings: Settings) -> ShardSet:
    shards = open_shards(settings.input_dir, written_by=WRITTEN_BY)
    shards.require_columns(settings.pca_column, written_by={settings.pca_column: WRITTEN_BY})
    return shards


def _refuse_too_many(settings: Settings, n_rows: int) -> None:
    too_many = [number for number in settings.cluster_numbers if number > n_rows]
    if too_many:
        raise UserError(
            f"train.n_clusters={too_many[0]} is more than the {n_rows} rows with a vector in {settings.input_dir}; "
            f"lower n_clusters"
        )


# --- Train -----------------------------------------------------------------------------------------------------------


def train(shards: ShardSet, settings: Settings, *, overwrite: bool) -> Path:
    """Train one clustering for each number of clusters and write the best as `centroids_out`."""
    watch = cli.Stopwatch()
    identity = train_identity(settings, shards, settings.n_clusters)
    with FileOutput(settings.centroids_out, identity, overwrite=overwrite) as output:
        if output.is_complete and _has_report(settings):
            if not settings.model_path.exists():
                write_joblib(settings.model_path, load_centroids(output.path).centers)
            log.info("nothing to do: %s is complete", output.path)
            return output.path
        _clear_derived(settings)
        stream = open_stream(shards, settings.pca_column, memory_limit_gb=settings.memory_limit_gb)
        _refuse_too_many(settings, stream.n_valid)
        if settings.sample_limit:
            stream = stream.sample(settings.sample_limit, seed=settings.random_state)
        tried = [
            _train_number(number, stream, shards, settings, overwrite=overwrite) for number in settings.cluster_numbers
        ]
        best = tried[0]
        if len(tried) > 1:
            best = choose_best(tried, select_by=settings.select_by)
            write_cluster_report(tried, best, settings.report_path)
            log.info("report over %d numbers of clusters: %s", len(tried), settings.report_path)
        if not output.is_complete:
            output.write(best.table)
        write_joblib(settings.model_path, best.centers)
    log.info(
        "rows in %s, trained on %s, without a vector %s; %d clusters, inertia %.6g; %.1f s",
        f"{shards.n_rows:,}",
        f"{stream.n_rows:,}",
        f"{shards.n_rows - stream.n_valid:,}",
        best.n_clusters,
        best.inertia,
        watch.seconds,
    )
    return output.path


def _has_report(settings: Settings) -> bool:
    return len(settings.cluster_numbers) == 1 or settings.report_path.exists()


def _clear_derived(settings: Settings) -> None:
    """Take away what an earlier run derived from its centroids: a killed run must not leave it beside new ones."""
    for path in (settings.model_path, settings.report_path):
        remove_stale_temporaries(make_folder(path.parent))
    settings.model_path.unlink(missing_ok=True)
    settings.report_path.unlink(missing_ok=True)


def train_identity(settings: Settings, shards: ShardSet, n_clusters: int | list[int]) -> Identity:
    """What the centroids depend on."""
    names = ("pca_column", "algorithm", "batch_size", "max_iter", "polish_iter", "tol", "init_size", "sample_limit")
    keys = {name: getattr(settings, name) for name in (*names, "random_state", "gpu")}
    keys |= {"n_clusters": n_clusters, "precision": _precision(settings)}
    if isinstance(n_clusters, list):
        keys |= {"select_by": settings.select_by}
    return Identity("train", keys, {"input_dir": shards.fingerprint})


def _precision(settings: Settings) -> str:
    if settings.precision != "auto":
        return settings.precision
    from common.kmeans import best_precision

    return best_precision("cuda" if settings.gpu else "cpu")


def _train_number(
    n_clusters: int, stream: VectorStream, shards: ShardSet, settings: Settings, *, overwrite: bool
) -> ClusterNumber:
    """Train one number of clusters; of a list, each has a file of its own, so that a kill costs one number."""
    if len(settings.cluster_numbers) == 1:
        result = fit(stream, shards, settings, n_clusters)
        return ClusterNumber(n_clusters, centroid_table(result.centroids, result.sizes, result.cluster_inertia))
    path = Path(settings.centroids_out).with_suffix(f".k{n_clusters}.parquet")
    with FileOutput(path, train_identity(settings, shards, n_clusters), overwrite=overwrite) as output:
        if not output.is_complete:
            result = fit(stream, shards, settings, n_clusters)
            output.write(centroid_table(result.centroids, result.sizes, result.cluster_inertia))
    number = ClusterNumber(n_clusters, load_centroids(path).table)
    scores = score_clusters(
        number,
        shards,
        vector_column=settings.pca_column,
        label_column=settings.label_column,
        silhouette_sample=settings.silhouette_sample,
        spherical=settings.algorithm == "spherical",
        seed=settings.random_state,
    )
    log.info("k=%d: %s", n_clusters, ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    return ClusterNumber(n_clusters, number.table, scores)


def fit(stream: VectorStream, shards: ShardSet, settings: Settings, n_clusters: int) -> KMeansResult:
    """Train by the algorithm and on the device that the settings name."""
    from common import kmeans

    backend = _training_backend(settings)
    polish = partial(
        lloyd_over_shards,
        stream=stream,
        shards=shards,
        engine=settings.engine,
        column=settings.pca_column,
        tol=settings.tol,
        map_settings=_map_settings(settings, backend),
    )
    report = log.info if settings.progress else log.debug
    common_arguments: dict[str, Any] = {
        "n_clusters": n_clusters,
        "random_state": settings.random_state,
        "report": report,
    }
    if backend is not None and backend.uses_cuml and settings.algorithm != "spherical":
        return kmeans.train_cuml(
            stream.in_memory(), max_iter=max(settings.max_iter, 1), tol=settings.tol, **common_arguments
        )
    if settings.algorithm == "minibatch" and backend is None:
        trained = kmeans.train_minibatch(
            stream,
            batch_size=settings.batch_size,
            max_epochs=settings.max_iter,
            init_size=settings.init_size,
            tol=settings.tol,
            n_threads=settings.num_workers or None,
            **common_arguments,
        )
        return polish(trained.centroids, max_passes=settings.polish_iter)
    rng = np.random.default_rng(settings.random_state)
    n_sampled = settings.init_size or max(4 * kmeans.FIRST_ROWS, 128 * n_clusters)
    sample = kmeans.sample_rows(stream, n_rows=max(n_sampled, n_clusters), rng=rng)
    spherical = settings.algorithm == "spherical"
    sample = kmeans.unit_rows(sample) if spherical else sample
    start = kmeans.warm_start(sample, n_clusters=n_clusters, rng=rng, report=report, **_map_settings(settings, backend))
    return polish(start, max_passes=settings.max_iter)


def _map_settings(settings: Settings, backend: Backend | None) -> dict[str, Any]:
    return {
        "precision": _precision(settings),
        "spherical": settings.algorithm == "spherical",
        "device": "cuda" if backend is not None else "cpu",
        "n_threads": settings.num_workers or None,
    }


def _training_backend(settings: Settings) -> Backend | None:
    """The GPU backend to train on, or None for the CPU."""
    if not settings.gpu:
        return None
    from common.backend import choose_backend

    backend = choose_backend("cuda")
    if settings.algorithm == "minibatch" and backend.name != "cpu":
        log.warning("there is no mini-batch k-means for the GPU: full passes are made instead")
    return None if backend.name == "cpu" else backend


# --- Predict ---------------------------------------------------------------------------------------------------------


def predict(shards: ShardSet, settings: Settings, *, overwrite: bool) -> Path:
    """Give every row the id of its nearest centroid, in place or, ids only, into `output_dir`."""
    watch = cli.Stopwatch()
    centroids = load_centroids(settings.centroids_out)
    _refuse_other_dimension(shards, centroids, settings)
    identity = predict_identity(settings, shards, centroids)
    if settings.output_dir:
        folder = _predict_into_folder(shards, centroids, settings, identity, overwrite=overwrite)
    else:
        folder = _predict_in_place(shards, centroids, settings, identity, overwrite=overwrite)
    log.info(
        "rows in and out %s; %.0f rows/s, %.1f s", f"{shards.n_rows:,}", shards.n_rows / watch.seconds, watch.seconds
    )
    return folder


def predict_identity(settings: Settings, shards: ShardSet, centroids: Centroids) -> Identity:
    """What the ids depend on."""
    keys = {name: getattr(settings, name) for name in ("pca_column", "centroid_column", "distance_column")}
    return Identity("predict", keys, {"input_dir": shards.fingerprint, "centroids_out": centroids.fingerprint})


def _refuse_other_dimension(shards: ShardSet, centroids: Centroids, settings: Settings) -> None:
    first = next(shards.shards[0].iter_tables([settings.pca_column], n_rows=1024))
    where = f"{shards.shards[0].path}, column {settings.pca_column!r}"
    length = read_vectors(first[settings.pca_column], where=where).vectors.shape[1]
    if length not in (0, centroids.centers.shape[1]):
        raise UserError(
            f"centroids {centroids.path} have dimension {centroids.centers.shape[1]}, but {where} holds vectors of "
            f"length {length}; train on these shards first"
        )


def _predict_in_place(
    shards: ShardSet, centroids: Centroids, settings: Settings, identity: Identity, *, overwrite: bool
) -> Path:
    with LayerOutput(shards, identity, overwrite=overwrite) as layer:
        if layer.is_complete:
            log.info("nothing to do: %s already has %s", shards.folder, settings.centroid_column)
            return shards.folder
        layer.begin()
        todo = [layer.task(shard) for shard in shards.shards if not layer.is_done(shard)]
        with cli.Progress(shards.n_rows, label="predict", enabled=settings.progress) as progress:
            map_items(
                partial(add_ids, centroids=centroids, settings=settings),
                todo,
                settings.engine,
                is_done=lambda task: task.is_done(),
                on_result=lambda task, _: progress.update(task.shard.n_rows),
            )
        layer.finish({"rows": shards.n_rows, "clusters": len(centroids.ids)})
    return shards.folder


def _predict_into_folder(
    shards: ShardSet, centroids: Centroids, settings: Settings, identity: Identity, *, overwrite: bool
) -> Path:
    with StageOutput(settings.output_dir or "", identity, overwrite=overwrite, source=shards.folder) as output:
        if output.is_complete:
            log.info("nothing to do: %s is complete", output.folder)
            return output.folder
        tasks = [
            IdsTask(shard, output.task(shard_name(index), shard.n_rows)) for index, shard in enumerate(shards.shards)
        ]
        write = partial(write_ids, centroids=centroids, settings=settings)
        write_missing_shards(write, tasks, output, settings, label="predict")
        totals = {"rows": shards.n_rows, "clusters": len(centroids.ids)}
        output.finish([task.shard.name for task in tasks], settings, totals)
    return output.folder


class IdsTask:
    """One input shard and the shard of ids that it becomes."""

    def __init__(self, source: Shard, shard: ShardTask) -> None:
        self.source = source
        self.shard = shard


def add_ids(task: LayerTask, *, centroids: Centroids, settings: Settings) -> int:
    """Rewrite one shard with the id of the nearest centroid of each row."""
    return task.write(partial(_with_ids, centroids=centroids, settings=settings, where=str(task.shard.path)))


def write_ids(task: IdsTask, *, centroids: Centroids, settings: Settings) -> dict[str, Any]:
    """Write the ids of one shard, and nothing else, to a shard of its own."""
    with_ids = partial(_with_ids, centroids=centroids, settings=settings, where=str(task.source.path))
    columns = [settings.centroid_column, settings.distance_column]
    tables = (with_ids(table).select(columns) for table in task.source.iter_tables([settings.pca_column]))
    empty = task.source.schema.empty_table().select([settings.pca_column])
    return task.shard.write(with_ids(empty).select(columns).schema, tables)


def _with_ids(table: pa.Table, *, centroids: Centroids, settings: Settings, where: str) -> pa.Table:
    import pyarrow as pa

    from common.kmeans import assign, unit_rows

    column = read_vectors(
        table[settings.pca_column],
        where=f"{where}, column {settings.pca_column!r}",
        dimension=centroids.centers.shape[1],
    )
    vectors = unit_rows(column.vectors) if centroids.spherical else column.vectors
    nearest, squared_distances = assign(vectors, centroids.centers)
    mask = ~column.valid
    return replace_columns(
        table,
        {
            settings.centroid_column: pa.array(centroids.ids[nearest], pa.int32(), mask=mask),
            settings.distance_column: pa.array(np.sqrt(squared_distances), pa.float32(), mask=mask),
        },
    )


if __name__ == "__main__":
    from cluster_train_clusters import (
        Settings,
        check,
        run,
    )  # by name, so that worker processes can import the functions

    sys.exit(cli.main(Settings, run, doc=__doc__, section="train", check=check))
