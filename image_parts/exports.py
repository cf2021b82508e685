"""The clusters as files that other tools open: Embedding Atlas, FiftyOne and the TensorBoard projector."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.commit import atomic_file, write_bytes
from common.mapped import release, return_freed_memory
from common.neighbors import Neighbors
from common.progress import Stopwatch
from image_parts.features import Features
from image_parts.records import ClusteredImages, ImageRecord, Targets, cluster_name, printable
from image_parts.scan import n_workers_of
from image_parts.settings import ImageSettings
from image_parts.sprites import each_thumbnail, square_sprite

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

EXPORT_DIR = "exports"
ATLAS_NAME = "embedding_atlas.parquet"
FIFTYONE_NAME = "fiftyone.csv"
PROJECTOR_DIR = "projector"

# Beyond this many images the atlas comes without thumbnails: it would take minutes and hundreds of megabytes.
_MAX_ATLAS_THUMBNAILS = 20_000
# Images whose lines are made at a time.
_CHUNK = 1024
# The projector loads no sprite with a longer side, and is slow with more points.
_MAX_SPRITE_SIDE = 8192
_MAX_PROJECTOR_POINTS = 10_000


def write_exports(
    clustered: ClusteredImages,
    *,
    features: Features,
    pca: np.ndarray,
    neighbors: Neighbors | None,
    settings: ImageSettings,
    output_dir: Path,
) -> None:
    """Write the exports that the settings ask for; `pca` [u, p] and `neighbors` [u, k] are of distinct images."""
    watch = Stopwatch()
    folder = output_dir / EXPORT_DIR
    if settings.exports.embedding_atlas:
        write_embedding_atlas(
            clustered, rows=features.rows, pca=pca, neighbors=neighbors, settings=settings, path=folder / ATLAS_NAME
        )
    if settings.exports.fiftyone:
        write_fiftyone(clustered, path=folder / FIFTYONE_NAME)
    if settings.exports.tensorboard:
        write_projector(clustered, rows=features.rows, pca=pca, settings=settings, folder=folder / PROJECTOR_DIR)
    return_freed_memory()
    if any(settings.exports.model_dump().values()):
        log.info("exports: %s, %.1f s", folder, watch.seconds)


def write_embedding_atlas(
    clustered: ClusteredImages,
    *,
    rows: np.ndarray,
    pca: np.ndarray,
    neighbors: Neighbors | None,
    settings: ImageSettings,
    path: Path,
) -> None:
    """Write one parquet that `embedding-atlas FILE --x x --y y --vector vector --image image` shows."""
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None
    _, first_image = np.unique(rows, return_index=True)  # [u], as distinct images are numbered 0 … u - 1
    with atomic_file(path) as file:
        for start in range(0, len(clustered.records), _CHUNK):
            part = slice(start, start + _CHUNK)
            table = _atlas_table(clustered, part, rows, first_image, pca, neighbors, settings)
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            release(pca)  # these rows lie anywhere in it
        if writer is not None:
            writer.close()


def write_fiftyone(
    clustered: ClusteredImages, *, path: Path, targets: Targets | None = None, target_dir: Path | None = None
) -> None:
    """Write a CSV for `fo.types.CSVDataset`: absolute `filepath` and what is known of each image.

    `targets` is for images that were sorted: where those of a part of the rows lie now below `target_dir`.
    """
    with atomic_file(path) as file:
        file.write(b"filepath,cluster,raw_label,probability,x,y,z,sha256\r\n")
        for start in range(0, len(clustered.records), _CHUNK):
            part = slice(start, start + _CHUNK)
            paths = [record.path for record in clustered.records[part]]
            if targets and target_dir:
                now = zip(targets(part), paths, strict=True)
                paths = [path if target is None else target_dir / target for target, path in now]
            file.write(_fiftyone_lines(clustered, part, paths).encode())


def _fiftyone_lines(clustered: ClusteredImages, part: slice, paths: Sequence[Path]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for row, (record, here) in enumerate(zip(clustered.records[part], paths, strict=True), part.start):
        place = [f"{value:.6g}" for value in clustered.coordinates[row]]
        name, raw = cluster_name(int(clustered.labels[row])), int(clustered.raw_labels[row])
        writer.writerow([printable(str(here)), name, raw, f"{clustered.probabilities[row]:.6g}", *place, record.sha256])
    return text.getvalue()


def write_projector(
    clustered: ClusteredImages, *, rows: np.ndarray, pca: np.ndarray, settings: ImageSettings, folder: Path
) -> None:
    """Write vectors.tsv, metadata.tsv, sprite.png and projector_config.pbtxt for `tensorboard --logdir FOLDER`.

    `pca` is [u, p], `rows` [n] the row of each image in it. Beyond what the projector can show, an even sample of the
    images is taken.
    """
    import cv2

    size = settings.visualization.thumbnail_size
    n_points = min(len(clustered.records), _MAX_PROJECTOR_POINTS, (_MAX_SPRITE_SIDE // size) ** 2)
    chosen = np.linspace(0, len(clustered.records) - 1, n_points).astype(np.int64)
    lines = io.StringIO()
    np.savetxt(lines, pca[rows[chosen]], fmt="%.5g", delimiter="\t")
    release(pca)
    write_bytes(folder / "vectors.tsv", lines.getvalue().encode())
    write_bytes(folder / "metadata.tsv", _projector_metadata(clustered, chosen).encode())
    thumbnails = _thumbnails([clustered.records[row] for row in chosen], clustered, settings)
    sprite = square_sprite(thumbnails, count=len(chosen), size=size)
    for line in sprite:  # it may have 200 MB, and OpenCV would copy all of it
        line[:] = line[:, ::-1]
    done, png = cv2.imencode(".png", sprite)
    if not done:
        raise RuntimeError("OpenCV could not encode the sprite")
    write_bytes(folder / "sprite.png", png.tobytes())
    write_bytes(folder / "projector_config.pbtxt", _projector_config(len(chosen), pca.shape[1], size).encode())


def _atlas_table(
    clustered: ClusteredImages,
    part: slice,
    rows: np.ndarray,
    first_image: np.ndarray,
    pca: np.ndarray,
    neighbors: Neighbors | None,
    settings: ImageSettings,
) -> pa.Table:
    import pyarrow as pa

    records = clustered.records[part]
    columns: dict[str, Any] = {
        "x": pa.array(clustered.coordinates[part, 0], pa.float32()),
        "y": pa.array(clustered.coordinates[part, 1], pa.float32()),
        "z": pa.array(clustered.coordinates[part, 2], pa.float32()),
        "cluster": pa.array([cluster_name(int(label)) for label in clustered.labels[part]], pa.string()),
        "probability": pa.array(clustered.probabilities[part], pa.float32()),
        "file": pa.array([record.shown_path for record in records], pa.string()),
        "width": pa.array([record.width for record in records], pa.int32()),
        "height": pa.array([record.height for record in records], pa.int32()),
        "vector": pa.array(list(pca[rows[part]]), pa.list_(pa.float32())),
    }
    if neighbors is not None:
        columns["neighbors"] = _neighbor_column(rows[part], first_image, neighbors)
    if len(clustered.records) <= _MAX_ATLAS_THUMBNAILS:
        jpegs = _encode_jpegs(_thumbnails(records, clustered, settings))
        columns["image"] = pa.array(
            [{"bytes": jpeg, "path": record.shown_path} for jpeg, record in zip(jpegs, records, strict=True)],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        )
    return pa.table(columns)


def _neighbor_column(distinct: np.ndarray, first_image: np.ndarray, neighbors: Neighbors) -> pa.Array:
    """Neighbours of some images, by their distinct rows, as row numbers of this table.

    Of several equal images the first, `first_image` [u], stands for all.
    """
    import pyarrow as pa

    values = [
        {"ids": first_image[ids].tolist(), "distances": distances.tolist()}
        for ids, distances in zip(neighbors.indices[distinct], neighbors.distances[distinct], strict=True)
    ]
    return pa.array(values, pa.struct({"ids": pa.list_(pa.int64()), "distances": pa.list_(pa.float64())}))


def _thumbnails(
    records: Sequence[ImageRecord], clustered: ClusteredImages, settings: ImageSettings
) -> Iterator[np.ndarray]:
    return each_thumbnail(
        records,
        size=settings.visualization.thumbnail_size,
        value_range=clustered.value_range,
        n_workers=n_workers_of(settings.model.num_workers),
    )


def _encode_jpegs(thumbnails: Iterable[np.ndarray]) -> Iterator[bytes]:
    import cv2

    for thumbnail in thumbnails:
        done, encoded = cv2.imencode(".jpg", cv2.cvtColor(thumbnail, cv2.COLOR_RGB2BGR))
        if not done:
            raise RuntimeError("OpenCV could not encode a thumbnail")
        yield encoded.tobytes()


def _projector_metadata(clustered: ClusteredImages, chosen: np.ndarray) -> str:
    """A header is wanted only where there is more than one column. Tabs and line ends in names would shift rows."""
    lines = ["file\tcluster\tprobability"]
    for row in chosen:
        name = " ".join(clustered.records[row].shown_path.split())
        lines.append(f"{name}\t{cluster_name(int(clustered.labels[row]))}\t{clustered.probabilities[row]:.4g}")
    return "\n".join(lines) + "\n"


def _projector_config(n_points: int, dimension: int, size: int) -> str:
    return (
        "embeddings {\n"
        f'  tensor_name: "images: {n_points} x {dimension}"\n'
        '  tensor_path: "vectors.tsv"\n'
        '  metadata_path: "metadata.tsv"\n'
        "  sprite {\n"
        '    image_path: "sprite.png"\n'
        f"    single_image_dim: {size}\n"
        f"    single_image_dim: {size}\n"
        "  }\n"
        "}\n"
    )
