"""Stage 6: a dataset for the trainer, with gold labels, pseudo-labels of pure clusters, and two masks.

Reads   update_dataset.shards_dir (shards with `cluster_id` and `probs`) and update_dataset.centroids_path (with purity)
Writes  update_dataset.output_path: text, label, metric_mask, classifier_mask, label_source, label_reason, other columns

    python cluster_update_dataset.py --config clustering.example.yaml
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from common import cli
from common.centroids import Centroids
from common.class_cuts import find_class_cuts
from common.clustered_shards import clustered_inputs, open_clustered_shards, refuse_nested_labels
from common.columns import no_rows, number_array
from common.commit import Identity
from common.config import StageSettings, UserError
from common.dataset_table import columns_to_read, count_dataset, dataset_table
from common.holdout import estimate_accuracy
from common.labeler import Labeler, RowColumns, make_labeler
from common.outputs import FileOutput, StageOutput
from common.pseudo_labels import Decisions, MostConfident, Rules, class_limits
from common.shard_writer import ShardTask
from common.shards import Shard, ShardSet, read_stamp, shard_name
from common.stage import write_missing_shards

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


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
    metric_class_share: float = Field(
        1.0, ge=0, le=1, description="of each class's pseudo-labels, the surest share that gets metric_mask"
    )
    classification_class_share: float = Field(1.0, ge=0, le=1, description="the same for classifier_mask")
    agreement_gets_metric_mask: bool = Field(
        False, description="metric_mask beyond its share too, where the cluster's label is also the classifier's"
    )
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

    @model_validator(mode="after")
    def _agreement_needs_a_share(self) -> Settings:
        if self.agreement_gets_metric_mask and self.metric_class_share == 1:
            raise ValueError("agreement_gets_metric_mask adds to metric_class_share, which is 1: set that below 1")
        return self

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
            agreement_in_metric=self.agreement_gets_metric_mask,
        )

    @property
    def columns(self) -> RowColumns:
        """What the columns are called that the rules read."""
        return RowColumns(
            text=self.text_column,
            label=self.label_column,
            cluster_id=self.cluster_id_column,
            probs=self.probs_column,
            prediction=self.prediction_column,
        )


@dataclass(frozen=True)
class DatasetSource:
    """One input shard, and which of its rows may take part."""

    shard: Shard
    balanced: np.ndarray | None  # [n] bool; None: all rows

    def decided_chunks(self, columns: Sequence[str], labeler: Labeler) -> Iterator[tuple[pa.Table, Decisions]]:
        """Some columns of the shard, chunk by chunk, each with its decisions."""
        first_row = 0
        for table in self.shard.iter_tables(columns):
            decisions = labeler.decide(table, where=str(self.shard.path))
            if self.balanced is not None:
                decisions = decisions.without(~self.balanced[first_row : first_row + table.num_rows])
            first_row += table.num_rows
            yield table, decisions

    def count_used(self, labeler: Labeler) -> int:
        """Rows that take part."""
        chunks = self.decided_chunks(labeler.columns.present(self.shard.schema), labeler)
        return sum(int(decisions.used.sum()) for _, decisions in chunks)


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
    with _open_output(settings, identity, overwrite=overwrite, source=shards.folder) as output:
        is_done = output.is_complete and output.success is not None
        if is_done and not settings.holdout_fraction:
            return _nothing_to_do(output, settings)
        labeler = prepare_labeler(shards, centroids, settings)
        if settings.holdout_fraction:
            log_holdout(shards, centroids, labeler, settings)
        if is_done:
            return _nothing_to_do(output, settings)
        tasks = plan_shards(shards, output, labeler, settings)
        write = partial(write_dataset_shard, labeler=labeler, keep_unused=settings.keep_unused)
        write_missing_shards(write, tasks, output, settings, label="dataset")
        totals = count_dataset(Shard(task.shard.path, task.shard.n_rows) for task in tasks)
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
    purity = _purity_layer(centroids)
    counted = Identity("purity", purity, {}).fingerprint if purity else "as it is"
    return Identity("update_dataset", keys, clustered_inputs(shards, centroids) | {"purity": counted})


def _purity_layer(centroids: Centroids) -> dict[str, Any]:
    """What stage 5 says of the purity in the centroids file; empty where another program counted it."""
    stamp = read_stamp(centroids.path)
    return stamp.layers.get("purity_counter", {}) if stamp else {}


# --- Input and output ------------------------------------------------------------------------------------------------


def _open_inputs(settings: Settings) -> tuple[ShardSet, Centroids]:
    shards, centroids = open_clustered_shards(
        settings.shards_dir,
        settings.centroids_path,
        cluster_column=settings.cluster_id_column,
        columns={settings.text_column: "cluster_supervise.py"},
    )
    refuse_nested_labels(shards, settings.label_column, settings.prediction_column)
    missing = [name for name in ("purity", "majority_label", "n_labeled") if name not in centroids.table.schema.names]
    if missing:
        raise UserError(f"{centroids.path} has no column {missing[0]!r}; run cluster_purity_counter.py first")
    return shards, centroids


def _open_output(settings: Settings, identity: Identity, *, overwrite: bool, source: Path) -> StageOutput | FileOutput:
    if Path(settings.output_path).suffix == ".parquet":
        return FileOutput(settings.output_path, identity, overwrite=overwrite)
    return StageOutput(settings.output_path, identity, overwrite=overwrite, source=source)


def _nothing_to_do(output: StageOutput | FileOutput, settings: Settings) -> dict[str, Any]:
    log.info("nothing to do: %s is complete", settings.output_path)
    return _result(output, settings)


def _result(output: StageOutput | FileOutput, settings: Settings) -> dict[str, Any]:
    totals = (output.success or {}).get("totals", {})
    return {"dataset": settings.output_path} | {name: value for name, value in totals.items() if name != "reasons"}


def prepare_labeler(shards: ShardSet, centroids: Centroids, settings: Settings) -> Labeler:
    """The rules, and where only the surest of each class count, how sure these are."""
    labeler = make_labeler(
        shards,
        centroids,
        columns=settings.columns,
        rules=settings.rules,
        use_lower_bound=settings.use_purity_lower_bound,
        settings=settings,
    )
    if settings.metric_class_share == settings.classification_class_share == 1:
        return labeler
    cuts = find_class_cuts(
        shards,
        labeler,
        settings,
        metric_share=settings.metric_class_share,
        classification_share=settings.classification_class_share,
    )
    return replace(labeler, cuts=cuts)


# --- Planning --------------------------------------------------------------------------------------------------------


def plan_shards(
    shards: ShardSet, output: StageOutput | FileOutput, labeler: Labeler, settings: Settings
) -> list[DatasetTask]:
    """One task for each input shard, or a single one for a dataset in one file."""
    sources = _balanced_sources(shards, balance(shards, labeler, settings))
    groups = [[source] for source in sources] if isinstance(output, StageOutput) else [sources]
    tasks = []
    for index, group in enumerate(groups):
        n_rows = sum(source.shard.n_rows if settings.keep_unused else source.count_used(labeler) for source in group)
        tasks.append(DatasetTask(tuple(group), output.task(shard_name(index), n_rows)))
    return tasks


def balance(shards: ShardSet, labeler: Labeler, settings: Settings) -> np.ndarray | None:
    """The rows that may take part, by number, where classes are capped; None where all may."""
    if not settings.downsample and settings.max_per_class is None:
        return None
    counts = np.zeros(len(labeler.names), np.int64)
    for shard in shards.shards:
        for decisions in labeler.decisions(shard):
            counts += np.bincount(decisions.labels[decisions.used], minlength=len(counts))
    limits = class_limits(counts, downsample=settings.downsample, max_per_class=settings.max_per_class)
    kept, first_row = MostConfident(limits), 0
    for shard in shards.shards:
        for decisions in labeler.decisions(shard):
            kept.add(first_row, decisions.labels, decisions.confidence, decisions.used)
            first_row += len(decisions.labels)
    return kept.rows()


def _balanced_sources(shards: ShardSet, rows: np.ndarray | None) -> list[DatasetSource]:
    """The shards as sources; `rows` are the numbers, over all shards, of those that may take part."""
    if rows is None:
        return [DatasetSource(shard, None) for shard in shards.shards]
    chosen = np.zeros(shards.n_rows, bool)
    chosen[rows] = True
    ends = np.cumsum([shard.n_rows for shard in shards.shards])
    parts = np.split(chosen, ends[:-1])
    return [DatasetSource(shard, part) for shard, part in zip(shards.shards, parts, strict=True)]


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_dataset_shard(task: DatasetTask, *, labeler: Labeler, keep_unused: bool) -> dict[str, Any]:
    """Write one shard of the dataset; returns what `_SUCCESS` says of it."""
    schema = task.sources[0].shard.schema
    columns = columns_to_read(schema, labeler.columns)
    empty = no_rows(schema).select(columns)

    def tables() -> Iterator[pa.Table]:
        for source in task.sources:
            for table, decisions in source.decided_chunks(columns, labeler):
                dataset = dataset_table(table, decisions, labeler)
                yield dataset if keep_unused else dataset.filter(number_array(decisions.used))

    return task.shard.write(dataset_table(empty, labeler.decide(empty), labeler).schema, tables())


# --- What the log says -----------------------------------------------------------------------------------------------


def log_totals(n_rows: int, totals: dict[str, Any], seconds: float) -> None:
    """Say what became of the rows."""
    log.info("rows by reason: %s", ", ".join(f"{reason} {count:,}" for reason, count in totals["reasons"].items()))
    log.info(
        "rows in %s, rows out %s, dropped %s; labels: gold %s, cluster %s, classifier %s; metric_mask %s, "
        "classifier_mask %s; %.0f rows/s, %.1f s",
        *(f"{n:,}" for n in (n_rows, totals["rows"], totals["dropped"], totals["gold"], totals["cluster"])),
        *(f"{n:,}" for n in (totals["classifier"], totals["metric_mask"], totals["classifier_mask"])),
        n_rows / seconds,
        seconds,
    )


def log_holdout(shards: ShardSet, centroids: Centroids, labeler: Labeler, settings: Settings) -> None:
    """Hide some gold labels, label their rows by the rules, and say how often the hidden label comes back."""
    lines = estimate_accuracy(
        shards,
        labeler,
        fraction=settings.holdout_fraction,
        seed=settings.random_state,
        recount=_purity_is_of_gold(centroids, settings),
        use_lower_bound=settings.use_purity_lower_bound,
    )
    for line in lines:
        log.info("%s", line)


def _purity_is_of_gold(centroids: Centroids, settings: Settings) -> bool:
    counted = _purity_layer(centroids).get("keys", {})
    return bool(counted.get("teacher_label_column", settings.label_column) == settings.label_column)


if __name__ == "__main__":
    from cluster_update_dataset import Settings, check, run  # by name, so that worker processes can import them

    sys.exit(cli.main(Settings, run, doc=__doc__, section="update_dataset", check=check))
