"""Stage 6: a dataset for the trainer, with gold labels, pseudo-labels of pure clusters, and two masks.

Reads   update_dataset.shards_dir (shards with `cluster_id` and `probs`) and update_dataset.centroids_path (with purity)
Writes  update_dataset.output_path: text, label, metric_mask, classifier_mask, label_source, label_reason, other columns

    python cluster_update_dataset.py --config clustering.example.yaml
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from common import cli
from common.centroids import PREDICTED_BY, Centroids, load_centroids, refuse_other_predictions
from common.columns import has_text, is_vector, label_strings, read_vectors
from common.commit import Identity
from common.config import StageSettings, UserError
from common.engine import map_items
from common.holdout import estimate_accuracy
from common.outputs import FileOutput, ShardTask, StageOutput
from common.pseudo_labels import (
    REASONS,
    SOURCE_NAMES,
    ClusterLabels,
    Decisions,
    MostConfident,
    Rows,
    Rules,
    class_limits,
    decide,
)
from common.shards import Shard, ShardSet, open_shards, read_stamp, shard_name
from common.stage import write_missing_shards

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

# What stages 1 and 2 call their vectors; they stay where they are.
_VECTOR_COLUMNS = ("cls", "pca")

# At most 18 digits: any such number fits in 64 bits.
_WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")


class Settings(StageSettings):
    """Section `update_dataset`."""

    shards_dir: str = Field(min_length=1, description="shards of stage 4, or any folder with cluster ids")
    centroids_path: str = Field(min_length=1, description="centroids with the purity of stage 5")
    output_path: str = Field(min_length=1, description="a file (….parquet) or a folder for shards")
    text_column: str = Field("text", description="column with the texts; becomes `text`")
    label_column: str = Field("label", description="column with the gold labels; becomes `label`")
    cluster_id_column: str = Field("cluster_id", description="column with the cluster ids")
    probs_column: str = Field("probs", description="column with the class probabilities; absent is fine")
    prediction_column: str = Field("prediction", description="column with the classifier's label; absent is fine")
    pseudo_label_from: Literal["cluster", "classifier"] = Field(
        "cluster", description="cluster: its majority label; classifier: the prediction (self-training)"
    )
    metric_purity_threshold: float = Field(0.8, ge=0, le=1, description="least purity of a cluster for metric_mask")
    metric_max_prob_threshold: float = Field(0.0, ge=0, le=1, description="least top probability for metric_mask")
    classification_purity_threshold: float = Field(0.9, ge=0, le=1, description="least purity for classifier_mask")
    classification_max_prob_threshold: float = Field(0.0, ge=0, le=1, description="least top probability for that mask")
    use_purity_lower_bound: bool = Field(
        False, description="compare Wilson's lower bound of purity, safer in small ones"
    )
    min_labeled_per_cluster: int = Field(1, ge=0, description="labelled rows that a cluster needs to pass its label on")
    require_agreement: bool = Field(False, description="only where the cluster's label is also the classifier's")
    max_per_class: int | None = Field(None, ge=1, description="rows of each class that take part at most")
    downsample: bool = Field(False, description="take part: the most confident rows, as many as the smallest class has")
    keep_unused: bool = Field(True, description="keep rows whose masks are both 0; false drops and counts them")
    holdout_fraction: float = Field(0.0, ge=0, lt=1, description="share of gold labels hidden to measure pseudo-labels")
    random_state: int = Field(0, ge=0, description="seed of the holdout")

    @property
    def rules(self) -> Rules:
        """The thresholds as the rules take them."""
        return Rules(
            metric_purity=self.metric_purity_threshold,
            metric_max_prob=self.metric_max_prob_threshold,
            classification_purity=self.classification_purity_threshold,
            classification_max_prob=self.classification_max_prob_threshold,
            min_labeled=self.min_labeled_per_cluster,
            require_agreement=self.require_agreement,
            source=self.pseudo_label_from,
        )


@dataclass(frozen=True)
class DatasetSource:
    """One input shard, and which of its rows may take part."""

    shard: Shard
    balanced: np.ndarray | None  # [n] bool; None: all rows


@dataclass(frozen=True)
class DatasetTask:
    """The input shards that become one output shard."""

    sources: tuple[DatasetSource, ...]
    shard: ShardTask


def run(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Decide label and masks for every row and write the dataset; returns the counts."""
    watch = cli.Stopwatch()
    shards, centroids = _open_inputs(settings)
    identity = make_identity(settings, shards, centroids)
    output = _open_output(settings, identity, overwrite=overwrite, source=shards.folder)
    with output:
        if settings.holdout_fraction:
            log_holdout(shards, centroids, settings)
        if output.is_complete and output.success is not None:
            log.info("nothing to do: %s is complete", settings.output_path)
            return _result(output, settings)
        names = collect_label_names(shards, centroids, settings)
        clusters = cluster_labels(centroids, names, settings)
        balanced = balance(shards, clusters, names, settings)
        tasks = plan_shards(shards, output, clusters, names, settings, balanced)
        write = partial(write_dataset_shard, clusters=clusters, names=names, settings=settings)
        write_missing_shards(write, tasks, output, settings, label="dataset")
        totals = count_dataset([Shard(task.shard.path, task.shard.n_rows) for task in tasks])
        totals["dropped"] = shards.n_rows - totals["rows"]
        output.finish([task.shard.name for task in tasks], settings, totals)
        log_totals(shards.n_rows, totals, watch.seconds)
        return _result(output, settings)


def check(settings: Settings) -> dict[str, Any]:
    """Validate inputs and columns; returns the plan."""
    shards, _ = _open_inputs(settings)
    return {
        "stage": "update_dataset",
        "rows": shards.n_rows,
        "shards": len(shards.shards),
        "rules": vars(settings.rules),
        "output_path": settings.output_path,
    }


def make_identity(settings: Settings, shards: ShardSet, centroids: Centroids) -> Identity:
    """What the dataset depends on."""
    paths, measuring = {"shards_dir", "centroids_path", "output_path"}, {"holdout_fraction", "random_state"}
    keys = settings.model_dump(exclude={*paths, *measuring, "progress", "log_level", "engine"})
    stamp, predicted = read_stamp(centroids.path), shards.layer("predict")
    purity = stamp.layers.get("purity_counter", {}) if stamp else {}
    inputs = {
        "shards_dir": shards.fingerprint,
        "cluster ids": str(predicted["fingerprint"]) if predicted else "as they are",
        "centroids_path": centroids.fingerprint,
        "purity": Identity("purity", purity, {}).fingerprint if purity else "as it is",
    }
    return Identity("update_dataset", keys, inputs)


# --- Input and output ------------------------------------------------------------------------------------------------


def _open_inputs(settings: Settings) -> tuple[ShardSet, Centroids]:
    shards = open_shards(settings.shards_dir, written_by=PREDICTED_BY)
    writers = {settings.cluster_id_column: PREDICTED_BY, settings.text_column: "cluster_supervise.py"}
    shards.require_columns(settings.text_column, settings.cluster_id_column, written_by=writers)
    centroids = load_centroids(settings.centroids_path)
    missing = [name for name in ("purity", "majority_label", "n_labeled") if name not in centroids.table.schema.names]
    if missing:
        raise UserError(f"{centroids.path} has no column {missing[0]!r}; run cluster_purity_counter.py first")
    refuse_other_predictions(shards, centroids)
    return shards, centroids


def _open_output(settings: Settings, identity: Identity, *, overwrite: bool, source: Path) -> StageOutput | FileOutput:
    if Path(settings.output_path).suffix == ".parquet":
        return FileOutput(settings.output_path, identity, overwrite=overwrite)
    return StageOutput(settings.output_path, identity, overwrite=overwrite, source=source)


def _result(output: StageOutput | FileOutput, settings: Settings) -> dict[str, Any]:
    totals = (output.success or {}).get("totals", {})
    return {"dataset": settings.output_path} | {name: value for name, value in totals.items() if name != "reasons"}


def collect_label_names(shards: ShardSet, centroids: Centroids, settings: Settings) -> list[str]:
    """All labels there are, sorted: gold, predicted, and of clusters; a label's place in it is its code."""
    names = {label for label in centroids.table["majority_label"].to_pylist() if label is not None}
    columns = [c for c in (settings.label_column, settings.prediction_column) if c in shards.schema.names]
    for found in map_items(partial(unique_labels, columns=columns), shards.shards, settings.engine):
        names |= found
    return sorted(names)


def unique_labels(shard: Shard, *, columns: list[str]) -> set[str]:
    """The labels that occur in some columns of one shard."""
    found: set[str] = set()
    for table in shard.iter_tables(columns) if columns else ():
        for column in columns:
            found |= {label for label in label_strings(table[column].unique()) if label is not None}
    return found


def cluster_labels(centroids: Centroids, names: list[str], settings: Settings) -> ClusterLabels:
    """What the centroids file says of its clusters."""
    code_of = {name: code for code, name in enumerate(names)}
    column = "purity_lower_bound" if settings.use_purity_lower_bound else "purity"
    order = np.argsort(centroids.ids)
    majority = [code_of.get(label, -1) for label in centroids.table["majority_label"].to_pylist()]
    return ClusterLabels(
        ids=centroids.ids[order],
        majority=np.array(majority, np.int64)[order],
        purity=centroids.table[column].fill_null(0.0).to_numpy()[order],
        n_labeled=centroids.table["n_labeled"].to_numpy()[order],
    )


# --- Deciding --------------------------------------------------------------------------------------------------------


def columns_to_read(schema: pa.Schema, settings: Settings) -> list[str]:
    """All columns but the vectors of earlier stages; a list of numbers of the user's own is carried along."""

    def is_of_earlier_stage(field: pa.Field) -> bool:
        is_ours = is_vector(field.type) and not field.type.value_field.nullable  # as `vector_array` makes them
        return field.name in _VECTOR_COLUMNS or is_ours

    return [field.name for field in schema if field.name == settings.probs_column or not is_of_earlier_stage(field)]


def decided_chunks(
    shard: Shard, clusters: ClusterLabels, names: list[str], settings: Settings
) -> Iterator[tuple[pa.Table, Decisions]]:
    """The rows of one shard, chunk by chunk, each with its decisions; vectors are left on the disk."""
    columns = columns_to_read(shard.schema, settings)
    for table in shard.iter_tables(columns):
        yield table, decide(read_rows(table, names, settings), clusters, settings.rules)


def read_rows(table: pa.Table, names: list[str], settings: Settings) -> Rows:
    """What the rules need to know of some rows."""
    import pyarrow as pa

    n_rows = table.num_rows
    code_of = {name: code for code, name in enumerate(names)}

    def codes(column: str) -> np.ndarray:
        if column not in table.schema.names:
            return np.full(n_rows, -1)
        encoded = pa.concat_arrays(table[column].chunks or [pa.array([], table[column].type)]).dictionary_encode()
        of_value = [code_of.get(label, -1) if label is not None else -1 for label in label_strings(encoded.dictionary)]
        indices = encoded.indices.fill_null(len(of_value)).to_numpy()
        return np.array([*of_value, -1], np.int64)[indices]

    return Rows(
        gold=codes(settings.label_column),
        cluster_ids=table[settings.cluster_id_column].cast("int64").fill_null(-1).to_numpy(),
        max_prob=_max_prob(table, settings),
        predicted=codes(settings.prediction_column),
        usable=has_text(table[settings.text_column]),
    )


def _max_prob(table: pa.Table, settings: Settings) -> np.ndarray:
    if settings.probs_column not in table.schema.names:
        return np.full(table.num_rows, np.nan)
    column = read_vectors(table[settings.probs_column], where=f"column {settings.probs_column!r}")
    if column.vectors.shape[1] == 0:
        return np.full(table.num_rows, np.nan)
    return np.where(column.valid, column.vectors.max(axis=1), np.nan)


def balance(shards: ShardSet, clusters: ClusterLabels, names: list[str], settings: Settings) -> np.ndarray | None:
    """The rows that may take part, by number, where classes are capped; None where all may."""
    if not settings.downsample and settings.max_per_class is None:
        return None
    counts = np.zeros(len(names), np.int64)
    for shard in shards.shards:
        for _, decisions in decided_chunks(shard, clusters, names, settings):
            counts += np.bincount(decisions.labels[decisions.used], minlength=len(names))
    limits = class_limits(counts, downsample=settings.downsample, max_per_class=settings.max_per_class)
    kept, first_row = MostConfident(limits), 0
    for shard in shards.shards:
        for table, decisions in decided_chunks(shard, clusters, names, settings):
            kept.add(first_row, decisions.labels, decisions.confidence, decisions.used)
            first_row += table.num_rows
    return kept.rows()


# --- Writing ---------------------------------------------------------------------------------------------------------


def plan_shards(
    shards: ShardSet,
    output: StageOutput | FileOutput,
    clusters: ClusterLabels,
    names: list[str],
    settings: Settings,
    balanced: np.ndarray | None,
) -> list[DatasetTask]:
    """One task for each input shard, or a single one for a dataset in one file."""
    sources, first_row = [], 0
    for shard in shards.shards:
        keep = None if balanced is None else np.isin(np.arange(first_row, first_row + shard.n_rows), balanced)
        sources.append(DatasetSource(shard, keep))
        first_row += shard.n_rows
    groups = [[source] for source in sources] if isinstance(output, StageOutput) else [sources]
    tasks = []
    for index, group in enumerate(groups):
        n_rows = sum(source.shard.n_rows for source in group)
        if not settings.keep_unused:
            n_rows = sum(_n_used(source, clusters, names, settings) for source in group)
        tasks.append(DatasetTask(tuple(group), output.task(shard_name(index), n_rows)))
    return tasks


def _n_used(source: DatasetSource, clusters: ClusterLabels, names: list[str], settings: Settings) -> int:
    return sum(int(masks.used.sum()) for _, masks in _balanced_chunks(source, clusters, names, settings))


def _balanced_chunks(
    source: DatasetSource, clusters: ClusterLabels, names: list[str], settings: Settings
) -> Iterator[tuple[pa.Table, Decisions]]:
    first_row = 0
    for table, decisions in decided_chunks(source.shard, clusters, names, settings):
        if source.balanced is not None:
            decisions = decisions.without(~source.balanced[first_row : first_row + table.num_rows])
        first_row += table.num_rows
        yield table, decisions


def write_dataset_shard(
    task: DatasetTask, *, clusters: ClusterLabels, names: list[str], settings: Settings
) -> dict[str, Any]:
    """Write one shard of the dataset; returns what `_SUCCESS` says of it."""
    as_dataset = partial(dataset_table, names=names, settings=settings)
    columns = columns_to_read(task.sources[0].shard.schema, settings)
    empty = task.sources[0].shard.schema.empty_table().select(columns)
    schema = as_dataset(empty, decide(read_rows(empty, names, settings), clusters, settings.rules)).schema

    def tables() -> Iterator[pa.Table]:
        for source in task.sources:
            for table, decisions in _balanced_chunks(source, clusters, names, settings):
                dataset = as_dataset(table, decisions)
                yield dataset if settings.keep_unused else dataset.filter(_arrow_mask(decisions.used))

    return task.shard.write(schema, tables())


def _arrow_mask(mask: np.ndarray) -> pa.Array:
    import pyarrow as pa

    return pa.array(mask)


def dataset_table(table: pa.Table, decisions: Decisions, *, names: list[str], settings: Settings) -> pa.Table:
    """The columns of the dataset: the six of this stage first, then every column carried along."""
    import pyarrow as pa

    own = {
        "text": table[settings.text_column],
        "label": _label_column(table, decisions, names, settings),
        "metric_mask": pa.array(decisions.metric_mask.astype(np.int8)),
        "classifier_mask": pa.array(decisions.classifier_mask.astype(np.int8)),
        "label_source": pa.array(SOURCE_NAMES, pa.string()).take(pa.array(decisions.source)),
        "label_reason": pa.array(REASONS, pa.string()).take(pa.array(decisions.reasons)),
        "label_confidence": pa.array(np.minimum(decisions.confidence, 1.0), pa.float32()),
    }
    dropped = {settings.text_column, settings.label_column, settings.probs_column, *own}
    carried = {name: table[name] for name in table.schema.names if name not in dropped}
    return pa.table(own | carried)


def _label_column(table: pa.Table, decisions: Decisions, names: list[str], settings: Settings) -> pa.Array:
    """Labels in the type of the gold ones, where every label there is can be written in it, else as text."""
    import pyarrow as pa

    codes = pa.array(decisions.labels, mask=decisions.labels < 0)
    has_gold = settings.label_column in table.schema.names
    gold_type = table.schema.field(settings.label_column).type if has_gold else pa.string()
    if not pa.types.is_integer(gold_type) or not all(_WHOLE_NUMBER.fullmatch(name) for name in names):
        return pa.array(names, pa.string()).take(codes)
    numbers = pa.array([int(name) for name in names], pa.int64())
    try:
        return numbers.cast(gold_type).take(codes)
    except pa.ArrowInvalid:  # a label of a cluster or of the classifier is too long for the type of the gold ones
        return numbers.take(codes)


# --- Counting --------------------------------------------------------------------------------------------------------


def count_dataset(shards: list[Shard]) -> dict[str, Any]:
    """Rows by source, mask and reason."""
    import pyarrow.compute as pc

    totals: dict[str, Any] = {
        "rows": 0,
        "gold": 0,
        "cluster": 0,
        "classifier": 0,
        "metric_mask": 0,
        "classifier_mask": 0,
    }
    reasons: dict[str, int] = {}
    for shard in shards:
        for table in shard.iter_tables(["label_source", "label_reason", "metric_mask", "classifier_mask"]):
            totals["rows"] += table.num_rows
            for mask in ("metric_mask", "classifier_mask"):
                totals[mask] += int(pc.sum(table[mask]).as_py() or 0)
            for count in pc.value_counts(table["label_source"]).to_pylist():
                totals[count["values"]] = totals.get(count["values"], 0) + count["counts"]
            for count in pc.value_counts(table["label_reason"]).to_pylist():
                reasons[count["values"]] = reasons.get(count["values"], 0) + count["counts"]
    totals.pop(None, None)  # type: ignore[call-overload]
    return totals | {"reasons": dict(sorted(reasons.items()))}


def log_totals(n_rows: int, totals: dict[str, Any], seconds: float) -> None:
    """Say what became of the rows."""
    log.info("why: %s", ", ".join(f"{reason} {count:,}" for reason, count in totals["reasons"].items()))
    log.info(
        "rows in %s, rows out %s, dropped %s; labels: gold %s, cluster %s, classifier %s; metric_mask %s, "
        "classifier_mask %s; %.0f rows/s, %.1f s",
        *(f"{n:,}" for n in (n_rows, totals["rows"], totals["dropped"], totals["gold"], totals["cluster"])),
        *(f"{n:,}" for n in (totals["classifier"], totals["metric_mask"], totals["classifier_mask"])),
        n_rows / seconds,
        seconds,
    )


def log_holdout(shards: ShardSet, centroids: Centroids, settings: Settings) -> None:
    """Hide some gold labels, label their rows by the rules, and say how often the hidden label comes back."""
    names = collect_label_names(shards, centroids, settings)
    lines = estimate_accuracy(
        shards,
        cluster_labels(centroids, names, settings),
        names,
        rules=settings.rules,
        read_rows=partial(read_rows, names=names, settings=settings),
        fraction=settings.holdout_fraction,
        seed=settings.random_state,
        recount=_purity_is_of_gold(centroids, settings),
        use_lower_bound=settings.use_purity_lower_bound,
        columns=[
            settings.text_column,
            settings.label_column,
            settings.cluster_id_column,
            settings.prediction_column,
            settings.probs_column,
        ],
    )
    for line in lines:
        log.info("%s", line)


def _purity_is_of_gold(centroids: Centroids, settings: Settings) -> bool:
    stamp = read_stamp(centroids.path)
    counted = stamp.layers.get("purity_counter", {}).get("keys", {}) if stamp else {}
    return counted.get("teacher_label_column", settings.label_column) == settings.label_column


if __name__ == "__main__":
    from cluster_update_dataset import (
        Settings,
        check,
        run,
    )  # by name, so that worker processes can import the functions

    sys.exit(cli.main(Settings, run, doc=__doc__, section="update_dataset", check=check))
