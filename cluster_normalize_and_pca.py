"""Stage 2: vectors of stage 1 to unit length, then exact PCA.

Reads   normalize_and_pca.input_dir: shards with `cls`
Writes  normalize_and_pca.output_dir: the same rows with `pca`; the fitted PCA as pca.safetensors and pca.json

    python cluster_normalize_and_pca.py --config clustering.example.yaml
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from common import cli
from common.columns import describe_errors, merge_errors, read_vectors, vector_array
from common.commit import Identity, fingerprint_files, make_folder, remove_stale_temporaries
from common.config import StageSettings, UserError
from common.extended_shard import Extension, write_extended_shard
from common.outputs import StageOutput
from common.pca_file import load_pca, save_pca
from common.shards import Shard, ShardSet, open_shards
from common.stage import ShardToShard, map_shards, one_to_one, write_missing_shards
from common.threads import map_ahead
from common.vectors import CovarianceSums, Pca, fit_pca, l2_normalize

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

WRITTEN_BY = "cluster_supervise.py"

# Rows whose mean is the shift of the covariance: enough to be near the mean of all.
SHIFT_ROWS = 4096


class Settings(StageSettings):
    """Section `normalize_and_pca`."""

    input_dir: str = Field(min_length=1, description="shards of stage 1, or any folder of parquet files with vectors")
    output_dir: str = Field(min_length=1, description="folder for the shards")
    vector_column: str = Field("cls", description="column with the vectors")
    n_components: int | float = Field(
        64, gt=0, description="number of components, or a fraction of variance such as 0.95"
    )
    l2_normalize: bool = Field(True, description="scale vectors to unit length before PCA")
    whiten: bool = Field(False, description="scale each component to unit variance")
    renormalize: bool = Field(False, description="scale the reduced vectors to unit length again")
    keep_cls: bool = Field(True, description="carry the vectors and probs along; false saves most of the disk")
    fit: bool = Field(True, description="false applies the PCA in pca_model_path to new rows")
    pca_model_path: str | None = Field(None, description="where the PCA lies; null: pca.safetensors in output_dir")
    batch_size: int = Field(2048, ge=1, description="rows in memory at once")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N, for the products of the fit")
    use_gpu_pca: bool = Field(True, description="false keeps the fit on the CPU whatever the device")
    overwrite: bool = Field(False, description="replace an output of another configuration, as --overwrite does")

    @field_validator("n_components")
    @classmethod
    def _whole_or_fraction(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("must be a whole number, or a fraction of variance between 0 and 1")
        return int(value) if value >= 1 else value

    @property
    def model_path(self) -> Path:
        """Where the PCA lies."""
        return Path(self.pca_model_path) if self.pca_model_path else Path(self.output_dir) / "pca.safetensors"


def run(settings: Settings, *, overwrite: bool = False) -> Path:
    """Fit PCA over all shards in one pass, then transform them one by one; returns the output folder."""
    watch = cli.Stopwatch()
    shards = open_shards(settings.input_dir, written_by=WRITTEN_BY)
    shards.require_columns(settings.vector_column, written_by={settings.vector_column: WRITTEN_BY})
    identity = make_identity(settings, shards)
    overwrite = overwrite or settings.overwrite
    with StageOutput(settings.output_dir, identity, overwrite=overwrite, source=shards.folder) as output:
        if output.is_complete:
            log.info("nothing to do: %s is complete", output.folder)
            return output.folder
        pca = find_pca(shards, settings, identity, may_reuse=not overwrite)
        tasks = one_to_one(shards, output)
        write = partial(transform_shard, pca=pca, settings=settings)
        write_missing_shards(write, tasks, output, settings, label="transform")
        totals = count_rows([Shard(task.shard.path, task.source.n_rows) for task in tasks])
        totals |= {"n_components": pca.n_components, "explained_variance": float(pca.explained_variance_ratio.sum())}
        output.finish([task.shard.name for task in tasks], settings, totals)
    log.info(
        "rows in %s, rows out %s, of them without a vector %s; %d components keep %.1f%% of the variance; "
        "%.0f rows/s, %.1f s",
        f"{shards.n_rows:,}",
        f"{totals['rows']:,}",
        describe_errors(totals["errors"]),
        pca.n_components,
        100 * totals["explained_variance"],
        shards.n_rows / watch.seconds,
        watch.seconds,
    )
    return output.folder


def check(settings: Settings) -> dict[str, Any]:
    """Validate input and columns; returns the plan."""
    shards = open_shards(settings.input_dir, written_by=WRITTEN_BY)
    shards.require_columns(settings.vector_column, written_by={settings.vector_column: WRITTEN_BY})
    return {
        "stage": "normalize_and_pca",
        "rows": shards.n_rows,
        "shards": len(shards.shards),
        "input_bytes": shards.n_bytes,
        "output_dir": settings.output_dir,
    }


def make_identity(settings: Settings, shards: ShardSet) -> Identity:
    """What the numbers of this stage depend on."""
    names = ("vector_column", "n_components", "l2_normalize", "whiten", "renormalize", "keep_cls", "fit")
    inputs = {"input_dir": shards.fingerprint}
    if not settings.fit:
        if not settings.model_path.is_file():
            raise UserError(f"PCA {settings.model_path} does not exist; fit one with normalize_and_pca.fit=true first")
        inputs["pca_model_path"] = fingerprint_files([settings.model_path])
    return Identity("normalize_and_pca", {name: getattr(settings, name) for name in names}, inputs)


# --- Fit -------------------------------------------------------------------------------------------------------------


def find_pca(shards: ShardSet, settings: Settings, identity: Identity, *, may_reuse: bool) -> Pca:
    """The PCA to apply: the saved one where it belongs to this configuration, else a new one, saved at once."""
    if not settings.fit:
        return load_pca(settings.model_path)
    if may_reuse and settings.model_path.is_file() and settings.model_path.with_suffix(".json").is_file():
        saved = load_pca(settings.model_path)
        if saved.fingerprint == identity.fingerprint:
            log.info("PCA of an earlier, unfinished run of this configuration is used again")
            return saved
    remove_stale_temporaries(make_folder(settings.model_path.parent))
    sums = gather_covariance(shards, settings)
    pca = fit_pca(sums, settings.n_components)
    save_pca(settings.model_path, pca, identity, n_rows=sums.n_rows)
    return pca


def gather_covariance(shards: ShardSet, settings: Settings) -> CovarianceSums:
    """Covariance sums of all usable rows, in one pass; shards are gathered apart and added in their order."""
    shift = _first_mean(shards, settings)
    device = _fit_device(settings)
    gather = partial(gather_shard, shift=shift, settings=settings, device=device)
    sums = CovarianceSums.empty(shift)
    for part in map_shards(gather, shards.shards, settings, label="fit"):
        sums.merge(part)
    if sums.n_rows == 0:
        raise UserError(
            f"no row of {settings.input_dir} has a usable vector in {settings.vector_column!r}; see its `error`"
        )
    return sums


def gather_shard(shard: Shard, *, shift: np.ndarray, settings: Settings, device: str) -> CovarianceSums:
    """Covariance sums of one shard."""

    def gather(table: pa.Table) -> CovarianceSums:
        sums = CovarianceSums.empty(shift)
        sums.add(_usable_vectors(table, shard, settings, dimension=len(shift)), device=device)
        return sums

    sums = CovarianceSums.empty(shift)
    for part in map_ahead(gather, shard.iter_tables([settings.vector_column], n_rows=settings.batch_size)):
        sums.merge(part)
    return sums


def _first_mean(shards: ShardSet, settings: Settings) -> np.ndarray:
    for shard in shards.shards:
        for table in shard.iter_tables([settings.vector_column], n_rows=SHIFT_ROWS):
            vectors = _usable_vectors(table, shard, settings, dimension=None)
            if len(vectors):
                return vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    raise UserError(
        f"no row of {settings.input_dir} has a usable vector in {settings.vector_column!r}; see its `error`"
    )


def _usable_vectors(table: pa.Table, shard: Shard, settings: Settings, *, dimension: int | None) -> np.ndarray:
    vectors, usable, _ = prepare_vectors(table, shard, settings, dimension=dimension)
    return vectors if usable.all() else vectors[usable]


def _fit_device(settings: Settings) -> str:
    from common.backend import choose_device

    if not settings.use_gpu_pca:
        return "cpu"
    device = choose_device(settings.device)
    return "cpu" if device == "mps" else device  # float64 is missing there


def prepare_vectors(
    table: pa.Table, shard: Shard, settings: Settings, *, dimension: int | None
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Vectors ready for PCA [n, d], which of them are usable [n], and for the others, by row, why not."""
    column = read_vectors(
        table[settings.vector_column], where=f"{shard.path}, column {settings.vector_column!r}", dimension=dimension
    )
    name = settings.vector_column
    reasons = {int(row): f"{name} is null" for row in np.flatnonzero(column.absent)}
    reasons |= {int(row): f"{name} has NaN or Inf" for row in np.flatnonzero(~column.valid & ~column.absent)}
    if not settings.l2_normalize:
        return column.vectors, column.valid, reasons
    vectors, nonzero = l2_normalize(column.vectors)
    reasons |= {
        int(row): f"{name} is a zero vector, which has no direction" for row in np.flatnonzero(column.valid & ~nonzero)
    }
    return vectors, column.valid & nonzero, reasons


# --- Transform -------------------------------------------------------------------------------------------------------


def transform_shard(task: ShardToShard, *, pca: Pca, settings: Settings) -> None:
    """Write one output shard: the columns of the input as they are, with `pca` and `error`."""
    names = task.source.schema.names
    dropped = () if settings.keep_cls else (settings.vector_column, "probs")
    extension = Extension(
        task.source,
        columns=[name for name in names if name not in dropped],
        reads=[settings.vector_column, *({"error"} & set(names))],
        compute=partial(transform, source=task.source, pca=pca, settings=settings),
        batch_size=settings.batch_size,
    )
    write_extended_shard(task.shard.path, extension, task.shard.stamp)


def transform(table: pa.Table, *, source: Shard, pca: Pca, settings: Settings) -> pa.Table:
    """The columns `pca` and `error` of some rows of a shard."""
    import pyarrow as pa

    vectors, usable, reasons = prepare_vectors(table, source, settings, dimension=len(pca.mean))
    reduced = pca.transform(vectors, whiten=settings.whiten)  # [n, c]
    if settings.renormalize:
        reduced, _ = l2_normalize(reduced)
    reduced[~usable] = 0
    errors = merge_errors(table["error"] if "error" in table.schema.names else None, reasons, table.num_rows)
    return pa.table({"pca": vector_array(reduced, valid=usable), "error": errors})


def count_rows(shards: list[Shard]) -> dict[str, Any]:
    """Rows, rows with a reduced vector, and reasons for those without."""
    reasons: Counter[str] = Counter()
    n_rows = 0
    for shard in shards:
        for table in shard.iter_tables(["error"]):
            n_rows += table.num_rows
            reasons.update(reason for reason in table["error"].drop_null().to_pylist())
    return {"rows": n_rows, "with_vector": n_rows - reasons.total(), "errors": dict(sorted(reasons.items()))}


if __name__ == "__main__":
    from cluster_normalize_and_pca import Settings, check, run  # by name, so that worker processes can import them

    sys.exit(cli.main(Settings, run, doc=__doc__, section="normalize_and_pca", check=check))
