"""What passes between the parts: one record for each image, and the clustered whole."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

# The label of images that are in no cluster, as HDBSCAN writes it.
NOISE = -1
NOISE_NAME = "noise"


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

    records: list[ImageRecord]
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
