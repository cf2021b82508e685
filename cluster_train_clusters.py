"""Stages 3 and 4: k-means over shards larger than memory, then the nearest centroid of every row.

run_mode: train     reads train.input_dir (shards with `pca`), writes train.centroids_out and train.model_out
run_mode: predict   reads both, adds `cluster_id` and `cluster_distance` to the shards, in place and one by one

    python cluster_train_clusters.py --config clustering.example.yaml
    python cluster_train_clusters.py --config clustering.example.yaml train.run_mode=predict
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from common import cli
from common.centroids import Centroids, centroid_table, load_centroids, write_joblib
from common.cluster_ids import Predictor, predict_in_place, predict_into_folder
from common.cluster_report import ClusterNumber, choose_best, score_clusters, write_cluster_report
from common.commit import Identity, make_folder, remove_stale_temporaries
from common.config import StageSettings, UserError
from common.outputs import FileOutput
from common.shard_kmeans import lloyd_over_shards
from common.shards import ShardSet, open_shards
from common.vector_stream import VectorStream, open_stream

if TYPE_CHECKING:
    import pyarrow as pa

    from common.backend import Backend
    from common.kmeans import KMeansResult, Report

log = logging.getLogger(__name__)

WRITTEN_BY = "cluster_normalize_and_pca.py"


class Settings(StageSettings):
    """Section `train`."""

    run_mode: Literal["train", "predict"] = Field("train", description="find centroids, or give rows the nearest one")
    input_dir: str = Field(min_length=1, description="shards of stage 2, or any folder of parquet files with vectors")
    output_dir: str | None = Field(None, description="predict: folder for ids only; null adds the columns in place")
    centroids_out: str = Field(min_length=1, description="parquet file for the centroids")
    # By their endings, a model and a report never take the place of shards or centroids.
    model_out: str | None = Field(
        None, pattern=r"\.(joblib|pkl)$", description="joblib file for scikit-learn users; never read by this suite"
    )
    report_out: str | None = Field(
        None, pattern=r"\.html$", description="HTML report; null: beside centroids_out, for a list of n_clusters"
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

    @model_validator(mode="after")
    def _model_beside_centroids(self) -> Settings:
        if self.model_path == Path(self.centroids_out):
            raise ValueError(f"centroids_out and the model are one file, {self.model_path}; name them differently")
        return self

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
        n_clusters = len(_open_predictor(shards, settings).centroids.ids)
        return plan | {"clusters": n_clusters, "output": settings.output_dir or settings.input_dir}
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
        stream = open_stream(shards, settings.pca_column, memory_limit_gb=settings.memory_limit_gb)
        n_valid = stream.n_rows
        _refuse_too_many(settings, n_valid)
        _clear_derived(settings)
        if settings.sample_limit:
            stream = stream.sample(settings.sample_limit, seed=settings.random_state)
        best = _train_best(stream, shards, settings, overwrite=overwrite)
        if not output.is_complete:
            output.write(best.table)
        write_joblib(settings.model_path, best.centers)
    log.info(
        "rows in %s, trained on %s, without a vector %s; %d clusters, inertia %.6g; %.1f s",
        f"{shards.n_rows:,}",
        f"{stream.n_rows:,}",
        f"{shards.n_rows - n_valid:,}",
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

    return best_precision("cpu" if _training_backend(settings.gpu, settings.algorithm) is None else "cuda")


def _train_best(stream: VectorStream, shards: ShardSet, settings: Settings, *, overwrite: bool) -> ClusterNumber:
    """The one number of clusters, or the best of a list, which goes into a report."""
    if len(settings.cluster_numbers) == 1:
        n_clusters = settings.cluster_numbers[0]
        return ClusterNumber(n_clusters, fit_table(stream, shards, settings, n_clusters))
    tried = [_train_one(number, stream, shards, settings, overwrite=overwrite) for number in settings.cluster_numbers]
    best = choose_best(tried, select_by=settings.select_by)
    write_cluster_report(tried, best, settings.report_path)
    log.info("%d clusters taken; report over %d numbers: %s", best.n_clusters, len(tried), settings.report_path)
    return best


def _train_one(
    n_clusters: int, stream: VectorStream, shards: ShardSet, settings: Settings, *, overwrite: bool
) -> ClusterNumber:
    """Train and score one number of a list; each has a file of its own, so that a kill costs one number."""
    path = Path(settings.centroids_out).with_suffix(f".k{n_clusters}.parquet")
    with FileOutput(path, train_identity(settings, shards, n_clusters), overwrite=overwrite) as output:
        if not output.is_complete:
            output.write(fit_table(stream, shards, settings, n_clusters))
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


# --- One training ----------------------------------------------------------------------------------------------------


def fit_table(stream: VectorStream, shards: ShardSet, settings: Settings, n_clusters: int) -> pa.Table:
    """Train, as the columns of `centroids.parquet`."""
    result = fit(stream, shards, settings, n_clusters)
    return centroid_table(result.centroids, result.sizes, result.cluster_inertia)


def fit(stream: VectorStream, shards: ShardSet, settings: Settings, n_clusters: int) -> KMeansResult:
    """Train by the algorithm and on the device that the settings name."""
    from common import kmeans

    backend = _training_backend(settings.gpu, settings.algorithm)
    report = log.info if settings.progress else log.debug
    if backend is not None and backend.uses_cuml and settings.algorithm != "spherical":
        return kmeans.train_cuml(
            stream.in_memory(),
            n_clusters=n_clusters,
            max_iter=max(settings.max_iter, 1),
            tol=settings.tol,
            random_state=settings.random_state,
            report=report,
        )
    by_batches = settings.algorithm == "minibatch" and backend is None
    find_start = _minibatch_centroids if by_batches else _sample_centroids
    map_settings = _map_settings(settings, backend)
    return lloyd_over_shards(
        find_start(stream, settings, n_clusters, map_settings=map_settings, report=report),
        stream=stream,
        shards=shards,
        engine=settings.engine,
        column=settings.pca_column,
        max_passes=settings.polish_iter if by_batches else settings.max_iter,
        tol=settings.tol,
        map_settings=map_settings,
    )


def _minibatch_centroids(
    stream: VectorStream, settings: Settings, n_clusters: int, *, map_settings: dict[str, Any], report: Report
) -> np.ndarray:
    """Centroids [k, d] after at most `max_iter` passes of mini-batches."""
    from common import kmeans

    return kmeans.train_minibatch(
        stream,
        n_clusters=n_clusters,
        batch_size=settings.batch_size,
        max_epochs=settings.max_iter,
        init_size=settings.init_size,
        tol=settings.tol,
        random_state=settings.random_state,
        n_threads=map_settings["n_threads"],
        report=report,
    ).centroids


def _sample_centroids(
    stream: VectorStream, settings: Settings, n_clusters: int, *, map_settings: dict[str, Any], report: Report
) -> np.ndarray:
    """Centroids [k, d] of a sample, from which full passes start warm."""
    from common import kmeans

    rng = np.random.default_rng(settings.random_state)
    n_sampled = settings.init_size or max(4 * kmeans.FIRST_ROWS, 128 * n_clusters)
    sample = kmeans.sample_rows(stream, n_rows=max(n_sampled, n_clusters), rng=rng)
    sample = kmeans.unit_rows(sample) if map_settings["spherical"] else sample
    return kmeans.warm_start(sample, n_clusters=n_clusters, rng=rng, report=report, **map_settings)


def _map_settings(settings: Settings, backend: Backend | None) -> dict[str, Any]:
    """What `partial_sums` is called with in every pass."""
    return {
        "precision": _precision(settings),
        "spherical": settings.algorithm == "spherical",
        "device": "cuda" if backend is not None else "cpu",
        "n_threads": settings.num_workers or None,
    }


@cache
def _training_backend(gpu: bool, algorithm: str) -> Backend | None:
    """The GPU backend to train on, or None for the CPU; looked for, and told, once."""
    if not gpu:
        return None
    from common.backend import choose_backend

    backend = choose_backend("cuda")
    if algorithm == "minibatch" and backend.name != "cpu":
        log.warning("there is no mini-batch k-means for the GPU: full passes are made instead")
    return None if backend.name == "cpu" else backend


# --- Predict ---------------------------------------------------------------------------------------------------------


def predict(shards: ShardSet, settings: Settings, *, overwrite: bool) -> Path:
    """Give every row the id of its nearest centroid, in place or, ids only, into `output_dir`."""
    watch = cli.Stopwatch()
    predictor = _open_predictor(shards, settings)
    identity = predict_identity(settings, shards, predictor.centroids)
    if settings.output_dir:
        totals = predict_into_folder(settings.output_dir, shards, predictor, identity, settings, overwrite=overwrite)
    else:
        totals = predict_in_place(shards, predictor, identity, settings, overwrite=overwrite)
    if totals is not None:
        log.info(
            "rows in and out %s, without a vector and so without a cluster %s; %.0f rows/s, %.1f s",
            f"{totals['rows']:,}",
            f"{totals['without_vector']:,}",
            totals["rows"] / watch.seconds,
            watch.seconds,
        )
    return Path(settings.output_dir or settings.input_dir)


def _open_predictor(shards: ShardSet, settings: Settings) -> Predictor:
    centroids = load_centroids(settings.centroids_out)
    predictor = Predictor(centroids, settings.pca_column, settings.centroid_column, settings.distance_column)
    predictor.refuse_other_dimension(shards)
    return predictor


def predict_identity(settings: Settings, shards: ShardSet, centroids: Centroids) -> Identity:
    """What the ids depend on."""
    keys = {name: getattr(settings, name) for name in ("pca_column", "centroid_column", "distance_column")}
    return Identity("predict", keys, {"input_dir": shards.fingerprint, "centroids_out": centroids.fingerprint})


if __name__ == "__main__":
    from cluster_train_clusters import Settings, check, run  # by name, so that worker processes can import them

    sys.exit(cli.main(Settings, run, doc=__doc__, section="train", check=check))
