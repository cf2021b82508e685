"""What passes between the parts: one record for each image, and the clustered whole."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from image_parts.on_demand import OnDemand

# The label of images that are in no cluster, as HDBSCAN writes it.
NOISE = -1
NOISE_NAME = "noise"

# Where the images of a part of the rows were sorted to: paths below output_dir, None for those left out.
Targets = Callable[[slice], "list[str | None]"]


@dataclass(frozen=True)
class ImageRecord:
    """One readable image of the input folder."""

    path: Path  # absolute; a name that is not UTF-8 holds surrogates, as Python reads it from the file system
    relative_path: str  # below input_dir, with "/" between the parts
    sha256: str  # of the bytes of the file
    width: int  # pixels, after the EXIF rotation
    height: int
    n_bytes: int
    modified_ns: int  # time of change, nanoseconds since 1970
    is_deep: bool = False  # more than 8 bits a channel: shown with the value range of the data set

    @property
    def shown_path(self) -> str:
        """The relative path as valid UTF-8 for tables and pages; foreign bytes appear as `\\xff`."""
        return printable(self.relative_path)


@dataclass(frozen=True, eq=False)
class PackedNames(OnDemand[bytes]):
    """Many names, one after the other: eight bytes each beside their own, where an object takes fifty."""

    content: bytes
    ends: np.ndarray  # [n + 1] int64: where they end in `content`, behind a first 0

    @classmethod
    def of(cls, names: Iterable[bytes]) -> PackedNames:
        """Pack names as they come."""
        content, ends = bytearray(), array("q", [0])
        for name in names:
            content += name
            ends.append(len(content))
        return cls(bytes(content), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def _make(self, number: int) -> bytes:
        return self.content[self.ends[number] : self.ends[number + 1]]

    def take(self, rows: np.ndarray) -> PackedNames:
        """Some of the names, in the order of `rows` [m] integers."""
        return PackedNames.of(self[row] for row in rows)


@dataclass(frozen=True, eq=False)
class ImageTable(OnDemand[ImageRecord]):
    """Records of many images in columns: a hundred bytes each, where an object takes ten times that.

    A record is made when it is asked for. Images lie below one folder, `root`.
    """

    root: Path
    names: PackedNames  # [n] relative paths as the file system has them
    hashes: np.ndarray  # [n, 32] uint8, sha256 of the bytes of the files
    pixels: np.ndarray  # [n, 2] int32, width and height after the EXIF rotation
    n_bytes: np.ndarray  # [n] int64
    modified_ns: np.ndarray  # [n] int64
    is_deep: np.ndarray  # [n] bool

    def __len__(self) -> int:
        return len(self.hashes)

    def _make(self, number: int) -> ImageRecord:
        relative_path = self.relative_path(number)
        return ImageRecord(
            path=self.root / relative_path,
            relative_path=relative_path,
            sha256=self.hashes[number].tobytes().hex(),
            width=int(self.pixels[number, 0]),
            height=int(self.pixels[number, 1]),
            n_bytes=int(self.n_bytes[number]),
            modified_ns=int(self.modified_ns[number]),
            is_deep=bool(self.is_deep[number]),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTable) and len(self) == len(other) and all(map(ImageRecord.__eq__, self, other))

    def relative_path(self, row: int) -> str:
        """The path of one image below `root`."""
        return os.fsdecode(self.names[row])

    def take(self, rows: np.ndarray) -> ImageTable:
        """Some of the images, in the order of `rows` [m] integers; all of them are no copy."""
        if len(rows) == len(self) and (np.diff(rows, prepend=-1) == 1).all():
            return self
        columns = (self.hashes, self.pixels, self.n_bytes, self.modified_ns, self.is_deep)
        return ImageTable(self.root, self.names.take(rows), *(column[rows] for column in columns))


def take_records(records: Sequence[ImageRecord], rows: np.ndarray) -> Sequence[ImageRecord]:
    """Some records, in the order of `rows` [m] integers."""
    return records.take(rows) if isinstance(records, ImageTable) else [records[row] for row in rows]


def relative_paths(records: Sequence[ImageRecord]) -> Iterator[str]:
    """The paths of all images below their folder; of a table, without making records."""
    if isinstance(records, ImageTable):
        return map(records.relative_path, range(len(records)))
    return (record.relative_path for record in records)


@dataclass(frozen=True)
class BadImage:
    """One file of the input folder that is no readable image, and why."""

    path: Path
    relative_path: str
    reason: str


@dataclass(frozen=True)
class ClusteredImages:
    """All readable images with their clusters; every array has one row for each record, in the order of `records`.

    Labels are 0 … n_clusters - 1 by falling size, NOISE (-1) for images that are in no cluster.
    """

    records: Sequence[ImageRecord]
    labels: np.ndarray  # [n] int64, the cluster after noise handling
    raw_labels: np.ndarray  # [n] int64, as HDBSCAN gave it, in the same numbering
    probabilities: np.ndarray  # [n] float32, membership strength of HDBSCAN; 0 for noise
    distances: np.ndarray  # [n] float32, euclidean, to the centroid of the cluster in the reduced space; NaN for noise
    coordinates: np.ndarray  # [n, 3] float32, x y z for pictures
    value_range: tuple[float, float] | None = None  # of all images of more than 8 bits, for `read_image`

    @cached_property
    def n_clusters(self) -> int:
        """How many clusters there are, noise not counted."""
        return int(self.labels.max(initial=NOISE)) + 1

    @cached_property
    def n_noise(self) -> int:
        """How many images are in no cluster."""
        return int((self.labels == NOISE).sum())

    @cached_property
    def cluster_sizes(self) -> np.ndarray:
        """Images in each cluster, by its number: [n_clusters] int64, noise not counted."""
        return np.bincount(self.labels[self.labels >= 0], minlength=self.n_clusters)

    @cached_property
    def cluster_names(self) -> list[str]:
        """Folder names by cluster number: cluster_000, cluster_001, …"""
        return [cluster_name(number) for number in range(self.n_clusters)]

    def members(self, label: int) -> np.ndarray:
        """Rows of one cluster, or of NOISE: [m] int64, ascending."""
        return np.flatnonzero(self.labels == label)


def cluster_name(label: int) -> str:
    """The folder name of a label: cluster_007, or noise."""
    return NOISE_NAME if label == NOISE else f"cluster_{label:03d}"


def printable(text: str) -> str:
    """Text with the bytes of a file name that are not UTF-8 written as `\\xff`, so that every format can hold it."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def number_or_none(value: float) -> float | None:
    """NaN, which JSON does not know, as None."""
    return None if math.isnan(value) else float(value)
