"""What was learned of the files of a folder, in columns, and the index in the cache that keeps it between runs.

The index of a folder lies in the cache as `image_index_<hash>.parquet`. What it says of a file is used again while the
size and the time of change of the file are the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.commit import atomic_file
from common.config import canonical_json
from image_parts.records import ImageTable, pack_names, printable

log = logging.getLogger(__name__)


class FileState(NamedTuple):
    """One file as the folder lists it."""

    name: bytes  # relative path, as the file system has it
    n_bytes: int
    modified_ns: int


class Examined(NamedTuple):
    """What the content of one file says."""

    sha256: bytes  # b"" where it cannot be read
    width: int
    height: int
    value_range: tuple[float, float] | None  # only of images of more than 8 bits
    error: str | None  # why it is no image


@dataclass
class FileColumns:
    """The files of a folder in columns, in the order of their names."""

    names: list[bytes]
    n_bytes: np.ndarray  # [n] int64
    modified_ns: np.ndarray  # [n] int64
    hashes: np.ndarray  # [n, 32] uint8
    is_read: np.ndarray  # [n] bool: the content is known; where it is not, the hash is zeros
    pixels: np.ndarray  # [n, 2] int32
    ranges: np.ndarray  # [n, 2] float64, NaN but for images of more than 8 bits
    errors: dict[int, str] = field(default_factory=dict)  # by row

    @classmethod
    def of(cls, files: Sequence[FileState]) -> FileColumns:
        """Columns of files whose content is not known yet."""
        n = len(files)
        return cls(
            names=[file.name for file in files],
            n_bytes=np.fromiter((file.n_bytes for file in files), np.int64, n),
            modified_ns=np.fromiter((file.modified_ns for file in files), np.int64, n),
            hashes=np.zeros((n, 32), np.uint8),
            is_read=np.zeros(n, bool),
            pixels=np.zeros((n, 2), np.int32),
            ranges=np.full((n, 2), np.nan),
        )

    def put(self, row: int, examined: Examined) -> None:
        """Keep what was learned of one file."""
        self.is_read[row] = bool(examined.sha256)
        if examined.sha256:
            self.hashes[row] = np.frombuffer(examined.sha256, np.uint8)
        self.pixels[row] = examined.width, examined.height
        if examined.value_range:
            self.ranges[row] = examined.value_range
        if examined.error is not None:
            self.errors[row] = examined.error

    def recall(self, known: FileColumns) -> int:
        """Take over what an earlier index says of files that did not change since; returns how many those are."""
        places = {name: place for place, name in enumerate(known.names)}
        place_of = np.array([places.get(name, -1) for name in self.names], np.int64)
        rows = np.flatnonzero(place_of >= 0)
        place = place_of[rows]
        is_same = (self.n_bytes[rows] == known.n_bytes[place]) & (self.modified_ns[rows] == known.modified_ns[place])
        is_same &= known.is_read[place]
        rows, place = rows[is_same], place[is_same]
        for name in ("hashes", "is_read", "pixels", "ranges"):
            getattr(self, name)[rows] = getattr(known, name)[place]
        if known.errors:
            found = zip(rows.tolist(), place.tolist(), strict=True)
            self.errors |= {row: known.errors[old] for row, old in found if old in known.errors}
        return len(rows)

    def images(self, root: Path) -> ImageTable:
        """The files that are images."""
        rows = np.delete(np.arange(len(self.names)), sorted(self.errors))
        names, ends = pack_names(self.names[row] for row in rows)
        return ImageTable(
            root,
            names,
            ends,
            hashes=self.hashes[rows],
            pixels=self.pixels[rows],
            n_bytes=self.n_bytes[rows],
            modified_ns=self.modified_ns[rows],
            is_deep=~np.isnan(self.ranges[rows, 0]),
        )


def index_path(input_dir: Path, extensions: Sequence[str], cache_dir: Path) -> Path:
    """Where the index of a folder lies."""
    what = canonical_json({"input_dir": printable(str(input_dir)), "extensions": sorted(extensions)})
    return cache_dir / f"image_index_{hashlib.sha256(what.encode()).hexdigest()[:16]}.parquet"


def read_index(path: Path) -> FileColumns | None:
    """What an index holds; None where there is none or where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        n = len(table)
        errors = {row: text for row, text in enumerate(table["error"].to_pylist()) if text is not None}
        sha256 = table["sha256"].combine_chunks()
        return FileColumns(
            names=table["name"].to_pylist(),
            n_bytes=table["n_bytes"].to_numpy(),
            modified_ns=table["modified_ns"].to_numpy(),
            hashes=np.frombuffer(b"".join(sha256.fill_null(bytes(32)).to_pylist()), np.uint8).reshape(n, 32),
            is_read=np.asarray(sha256.is_valid()),
            pixels=np.stack([table[side].to_numpy() for side in ("width", "height")], axis=1),
            ranges=np.stack([table[end].to_numpy() for end in ("low", "high")], axis=1),
            errors=errors,
        )
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, pa.ArrowException):
        log.warning("image index %s is damaged and is made anew", path)
        return None


def write_index(path: Path, files: FileColumns) -> None:
    """Write the index of a folder, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_read, hashes = pa.array(files.is_read).buffers()[1], pa.py_buffer(files.hashes)
    errors = [files.errors.get(row) for row in range(len(files.names))]
    columns = {
        "name": pa.array(files.names, pa.binary()),
        "n_bytes": pa.array(files.n_bytes),
        "modified_ns": pa.array(files.modified_ns),
        "sha256": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(files.names), [is_read, hashes]),
        "width": pa.array(files.pixels[:, 0]),
        "height": pa.array(files.pixels[:, 1]),
        "low": pa.array(files.ranges[:, 0]),
        "high": pa.array(files.ranges[:, 1]),
        "error": pa.array(errors, pa.string()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd", write_page_checksum=True)
