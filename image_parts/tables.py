"""The result on disk: clusters.parquet and clusters.csv, bad_images.csv, the purity report, and run.json at the end.

`run.json` is written last and names what the result was made from, so a run that finds it again has nothing to do.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.commit import (
    Identity,
    atomic_file,
    describe_changes,
    fingerprint_files,
    make_folder,
    save_array,
    sync_folder,
    write_bytes,
    write_json,
)
from common.config import UserError
from common.outputs import library_versions
from image_parts.extractors import ModelIdentity
from image_parts.features import cache_key
from image_parts.purity import PurityReport
from image_parts.records import (
    BadImage,
    ClusteredImages,
    ImageRecord,
    Targets,
    cluster_name,
    printable,
    take_records,
)
from image_parts.scan import ScannedImages
from image_parts.settings import ImageSettings

if TYPE_CHECKING:
    import pyarrow as pa

CLUSTERS_PARQUET = "clusters.parquet"
CLUSTERS_CSV = "clusters.csv"
BAD_IMAGES_CSV = "bad_images.csv"
PURITY_REPORT = "metrics/purity_report_latest.json"
COSINE_MATRIX = "metrics/centroid_cosine_matrix.npy"
RUN_JSON = "run.json"

# Images whose rows are made at a time.
_CHUNK_ROWS = 8192


def identify_run(scanned: ScannedImages, settings: ImageSettings, identity: ModelIdentity) -> Identity:
    """What a result depends on: the images, the model and every key that changes a number or a picture."""
    names = ("reduction", "clustering", "purity", "visualization", "exports", "acceleration")
    sections = {name: getattr(settings, name).model_dump(mode="json") for name in names}
    flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    del flat["purity.fail_on_fail"]  # changes the exit code alone
    features = cache_key(settings, identity)
    flat |= {f"preprocessing.{key}": value for key, value in features.pop("preprocessing").items()}
    flat |= {f"model.{key}": value for key, value in features.items()}
    flat["preprocessing.l2_normalize"] = settings.preprocessing.l2_normalize
    flat["annotations.image_subdir"] = settings.annotations.image_subdir  # which folder names a true label
    inputs = {"images": _fingerprint(scanned)}
    if settings.purity.truth and Path(settings.purity.truth).is_file():
        inputs["truth"] = fingerprint_files([Path(settings.purity.truth)])
    return Identity("image_cluster", flat, inputs)


def find_finished(output_dir: Path, identity: Identity, *, overwrite: bool) -> dict[str, Any] | None:
    """The content of run.json if it is of this very run, None if there is none or it may be replaced.

    Raises UserError, naming what changed, if another configuration made the result and `overwrite` is off.
    """
    path = output_dir / RUN_JSON
    try:
        values = json.loads(path.read_bytes())
        before = values["identity"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it, and the result is made anew") from None
    if before == identity.to_dict():
        return dict(values)
    if overwrite:
        return None
    changes = describe_changes(before, identity.to_dict())
    raise UserError(f"{output_dir} holds another result ({changes}); give --overwrite or another output_dir")


def begin_results(output_dir: Path) -> None:
    """Take run.json away: from here on, until it is written again, nobody takes the folder for a finished result."""
    make_folder(output_dir)
    (output_dir / RUN_JSON).unlink(missing_ok=True)
    sync_folder(output_dir)


def write_tables(
    clustered: ClusteredImages,
    *,
    output_dir: Path,
    truth: Sequence[str | None] | None = None,
    targets: Targets | None = None,
) -> None:
    """Write clusters.parquet and clusters.csv: one row for each image, some thousand at a time.

    `truth` adds the column `label`, `targets` the column `target`.
    """
    import pyarrow.parquet as pq
    from pyarrow import csv as arrow_csv

    starts = range(0, max(len(clustered.records), 1), _CHUNK_ROWS)
    tables = (_clusters_part(clustered, slice(start, start + _CHUNK_ROWS), truth, targets) for start in starts)
    first = next(tables)
    with (
        atomic_file(output_dir / CLUSTERS_PARQUET) as parquet_file,
        atomic_file(output_dir / CLUSTERS_CSV) as csv_file,
        pq.ParquetWriter(parquet_file, first.schema, compression="zstd", write_page_checksum=True) as parquet,
        arrow_csv.CSVWriter(csv_file, first.schema) as text,
    ):
        for table in itertools.chain([first], tables):
            parquet.write_table(table)
            text.write_table(table)


def _clusters_part(
    clustered: ClusteredImages, part: slice, truth: Sequence[str | None] | None, targets: Targets | None
) -> pa.Table:
    """Some of the images: where they are, what they are, their clusters and their places in space."""
    import pyarrow as pa

    records = clustered.records[part]
    table = pa.table(
        {
            "path": _texts([printable(str(record.path)) for record in records]),
            "relative_path": _texts([record.shown_path for record in records]),
            "sha256": _texts([record.sha256 for record in records]),
            "width": pa.array([record.width for record in records], pa.int32()),
            "height": pa.array([record.height for record in records], pa.int32()),
            "n_bytes": pa.array([record.n_bytes for record in records], pa.int64()),
            "cluster_id": pa.array(clustered.labels[part], pa.int32()),
            "cluster": _texts([cluster_name(int(label)) for label in clustered.labels[part]]),
            "raw_label": pa.array(clustered.raw_labels[part], pa.int32()),
            "probability": pa.array(clustered.probabilities[part], pa.float32()),
            "distance": pa.array(clustered.distances[part], pa.float32(), from_pandas=True),  # NaN becomes null
            "x": pa.array(clustered.coordinates[part, 0], pa.float32()),
            "y": pa.array(clustered.coordinates[part, 1], pa.float32()),
            "z": pa.array(clustered.coordinates[part, 2], pa.float32()),
        }
    )
    if truth is not None:
        table = table.append_column("label", _texts(truth[part]))
    if targets is not None:
        names = [None if name is None else printable(name) for name in targets(part)]
        table = table.append_column("target", _texts(names))
    return table


def read_tables(output_dir: Path, scanned: ScannedImages) -> tuple[ClusteredImages, list[ImageRecord]] | None:
    """The clusters of a finished run for the images of a scan, and the images that it could not decode.

    None where the table does not hold these images: then the result is made anew.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["cluster_id", "raw_label", "probability", "distance", "x", "y", "z"]
    try:
        rows = _listed_rows(output_dir / CLUSTERS_PARQUET, scanned.records)
        table = pq.read_table(output_dir / CLUSTERS_PARQUET, columns=names)
        columns = {name: table[name].to_numpy() for name in names}
    except (OSError, KeyError, pa.ArrowException):
        return None
    if rows is None:
        return None
    is_undecoded = np.ones(len(scanned.records), bool)
    is_undecoded[rows] = False
    clustered = ClusteredImages(
        records=take_records(scanned.records, rows),
        labels=columns["cluster_id"].astype(np.int64),
        raw_labels=columns["raw_label"].astype(np.int64),
        probabilities=columns["probability"],
        distances=columns["distance"].astype(np.float32),
        coordinates=np.stack([columns[axis] for axis in "xyz"], axis=1),
        value_range=scanned.value_range,
    )
    return clustered, [scanned.records[row] for row in np.flatnonzero(is_undecoded).tolist()]


def _listed_rows(path: Path, records: Sequence[ImageRecord]) -> np.ndarray | None:
    """Rows of the images that a table lists, [m] int64; None unless it lists them in the order of the records."""
    import pyarrow.parquet as pq

    rows, unseen = array("q"), enumerate(records)
    with pq.ParquetFile(path) as table:
        for part in table.iter_batches(_CHUNK_ROWS, columns=["relative_path", "sha256"]):
            for shown_path, sha256 in zip(*(column.to_pylist() for column in part.columns), strict=True):
                found = next(((row, record) for row, record in unseen if record.shown_path == shown_path), None)
                if found is None or found[1].sha256 != sha256:
                    return None
                rows.append(found[0])
    return np.frombuffer(rows, np.int64)


def write_bad_images(bad: Sequence[BadImage], *, output_dir: Path) -> None:
    """Write bad_images.csv: path and reason of every file that is no readable image; a header alone means none."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "reason"])
    writer.writerows((printable(image.relative_path), image.reason) for image in bad)
    write_bytes(output_dir / BAD_IMAGES_CSV, text.getvalue().encode())


def write_purity(report: PurityReport, truth: dict[str, Any] | None, *, output_dir: Path) -> None:
    """Write the purity report as JSON, and the matrix of centroid cosines beside it."""
    with atomic_file(output_dir / COSINE_MATRIX) as file:
        save_array(file, report.centroid_cosine_matrix)
    write_json(output_dir / PURITY_REPORT, {**report.to_dict(), "truth": truth, "versions": library_versions()})


def write_run(identity: Identity, summary: Mapping[str, Any], *, output_dir: Path, settings: ImageSettings) -> None:
    """Write run.json, the last file of a run."""
    values = {
        "identity": identity.to_dict(),
        "summary": dict(summary),
        "settings": settings.model_dump(mode="json"),
        "versions": library_versions(),
    }
    write_json(output_dir / RUN_JSON, values)


def _fingerprint(scanned: ScannedImages) -> str:
    digest = hashlib.sha256(repr(scanned.value_range).encode())
    for record in scanned.records:
        digest.update(f"{record.shown_path}\0{record.sha256}\n".encode())
    return digest.hexdigest()


def _texts(values: Sequence[str | None]) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, pa.string())
