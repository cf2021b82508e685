"""What was learned of the files of a folder, in columns, and the index in the cache that keeps it between runs.

The index of a folder lies in the cache as `image_index_<hash>.parquet`. What it says of a file is used again while the
size and the time of change of the file are the same. It is read and written some thousand files at a time.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.commit import atomic_file
from common.config import canonical_json
from image_parts.records import ImageTable, PackedNames, printable

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

# Files whose lines are read or written at a time.
_CHUNK_FILES = 8192


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

    names: PackedNames  # [n]
    n_bytes: np.ndarray  # [n] int64
    modified_ns: np.ndarray  # [n] int64
    hashes: np.ndarray  # [n, 32] uint8
    is_read: np.ndarray  # [n] bool: the content is known; where it is not, the hash is zeros
    pixels: np.ndarray  # [n, 2] int32
    ranges: np.ndarray  # [n, 2] float64, NaN but for images of more than 8 bits
    errors: dict[int, str] = field(default_factory=dict)  # by row

    @classmethod
    def of(cls, files: Iterable[FileState]) -> FileColumns:
        """Columns of files, in the order of their names, whose content is not known yet."""
        n_bytes, modified_ns = array("q"), array("q")

        def names() -> Iterator[bytes]:
            for file in files:
                n_bytes.append(file.n_bytes)
                modified_ns.append(file.modified_ns)
                yield file.name

        packed = PackedNames.of(names())
        n = len(packed)
        return cls(
            names=packed,
            n_bytes=np.frombuffer(n_bytes, np.int64),
            modified_ns=np.frombuffer(modified_ns, np.int64),
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

    def recall(self, known: pa.RecordBatch) -> int:
        """Take over what lines of an index say of files that did not change since; returns how many those are."""
        columns = {name: known.column(name) for name in known.schema.names}
        rows, lines = self._rows_of(columns["name"].to_pylist())
        is_same = np.asarray(columns["sha256"].is_valid())[lines]
        for name in ("n_bytes", "modified_ns"):
            is_same &= getattr(self, name)[rows] == columns[name].to_numpy()[lines]
        rows, lines = rows[is_same], lines[is_same]
        hashes = b"".join(columns["sha256"].fill_null(bytes(32)).to_pylist())
        self.hashes[rows] = np.frombuffer(hashes, np.uint8).reshape(-1, 32)[lines]
        self.is_read[rows] = True
        self.pixels[rows] = np.stack([columns[side].to_numpy() for side in ("width", "height")], axis=1)[lines]
        self.ranges[rows] = np.stack([columns[end].to_numpy() for end in ("low", "high")], axis=1)[lines]
        texts = columns["error"].to_pylist()
        found = zip(rows.tolist(), lines.tolist(), strict=True)
        self.errors |= {row: texts[line] for row, line in found if texts[line] is not None}
        return len(rows)

    def _rows_of(self, names: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The rows of some files, and their places in `names`, sorted too; those that are gone are left out."""
        rows, lines = array("q"), array("q")
        row = bisect.bisect_left(self.names, names[0])
        for line, name in enumerate(names):
            while row < len(self.names) and self.names[row] < name:
                row += 1
            if row < len(self.names) and self.names[row] == name:
                rows.append(row)
                lines.append(line)
        return np.frombuffer(rows, np.int64), np.frombuffer(lines, np.int64)

    def images(self, root: Path) -> ImageTable:
        """The files that are images."""
        table = ImageTable(
            root,
            self.names,
            hashes=self.hashes,
            pixels=self.pixels,
            n_bytes=self.n_bytes,
            modified_ns=self.modified_ns,
            is_deep=~np.isnan(self.ranges[:, 0]),
        )
        return table.take(np.delete(np.arange(len(self.names)), sorted(self.errors))) if self.errors else table


def index_path(input_dir: Path, extensions: Iterable[str], cache_dir: Path) -> Path:
    """Where the index of a folder lies."""
    what = canonical_json({"input_dir": printable(str(input_dir)), "extensions": sorted(extensions)})
    return cache_dir / f"image_index_{hashlib.sha256(what.encode()).hexdigest()[:16]}.parquet"


def recall_index(path: Path, files: FileColumns) -> tuple[int, bool]:
    """Take over what an index says of `files`; how many did not change, and whether it says that of them alone.

    A damaged index, which is told, gives what could be read of it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    n_same = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as index:
            for batch in index.iter_batches(batch_size=_CHUNK_FILES):
                n_same += files.recall(batch)
            return n_same, n_same == index.metadata.num_rows
    except FileNotFoundError:
        return 0, False
    except (OSError, KeyError, ValueError, pa.ArrowException):
        log.warning("image index %s is damaged and is made anew", path)
        return n_same, False


def write_index(path: Path, files: FileColumns) -> None:
    """Write the index of a folder, whole or not at all."""
    import pyarrow.parquet as pq

    starts = range(0, len(files.names), _CHUNK_FILES)
    tables = (_index_table(files, start, min(start + _CHUNK_FILES, len(files.names))) for start in starts)
    first = next(tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(path) as file,
        pq.ParquetWriter(file, first.schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def _index_table(files: FileColumns, start: int, end: int) -> pa.Table:
    """What is known of the files in rows `start` to `end`."""
    import pyarrow as pa

    part = slice(start, end)
    is_read, hashes = pa.array(files.is_read[part]).buffers()[1], pa.py_buffer(files.hashes[part])
    return pa.table(
        {
            "name": pa.array([files.names[row] for row in range(start, end)], pa.binary()),
            "n_bytes": pa.array(files.n_bytes[part]),
            "modified_ns": pa.array(files.modified_ns[part]),
            "sha256": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), end - start, [is_read, hashes]),
            "width": pa.array(files.pixels[part, 0]),
            "height": pa.array(files.pixels[part, 1]),
            "low": pa.array(files.ranges[part, 0]),
            "high": pa.array(files.ranges[part, 1]),
            "error": pa.array([files.errors.get(row) for row in range(start, end)], pa.string()),
        }
    )
