"""Where every image and its label will go: names, folders and kinds of action, found out before any file is touched.

    plan = plan_files(clustered, input_dir=…, output_dir=…, mode="move", annotations=settings.annotations)

Labels are read and states of files; nothing is written.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.config import UserError
from image_parts import yolo
from image_parts.actions import Action, ActionDraft, Kind, Mode, Role
from image_parts.moves import SourceChanged, hash_file
from image_parts.naming import StemGiver, Wanted
from image_parts.plan import Plan
from image_parts.records import ClusteredImages, ImageRecord, cluster_name, relative_paths, take_records
from image_parts.settings import AnnotationSettings


def plan_files(
    clustered: ClusteredImages,
    *,
    input_dir: Path,
    output_dir: Path,
    mode: Mode,
    annotations: AnnotationSettings,
    other_images: Sequence[Path] = (),
) -> Plan:
    """Plan where each image and its label go; reads labels and states of files, touches nothing.

    `other_images` are images of the input that are in no cluster because they cannot be read: their labels are no
    orphans. Raises UserError where class lists contradict each other or output and input lie in each other.
    """
    input_dir, output_dir = input_dir.absolute(), output_dir.absolute()
    _refuse_nested(input_dir, output_dir)
    rows, left_out = _readable_rows(clustered.records)
    records = take_records(clustered.records, rows)
    labels = yolo.find_labels(_ImagePaths(records), n_images=len(rows), annotations=annotations)
    folders = {input_dir / folder for folder in {path.rpartition("/")[0] for path in relative_paths(clustered.records)}}
    n_orphans = 0
    if annotations.enabled:
        paths, all_folders = (
            _ImagePaths(clustered.records, other_images),
            folders | {path.parent for path in other_images},
        )
        n_orphans = len(
            yolo.find_orphans(paths, image_folders=all_folders, label_folders=labels.folders, annotations=annotations)
        )
    planner = _Planner(input_dir, output_dir, mode, annotations)
    numbers = np.full(len(clustered.records), -1, np.int64)
    numbers[rows] = planner.add_images(records, clustered.labels[rows], labels)
    counts = yolo.LabelCounts()
    if annotations.enabled:
        carried = yolo.find_carried(folders, input_dir=input_dir, annotations=annotations)
        planner.add_class_lists(carried)
        counts = planner.count_labels(labels, n_orphans=n_orphans)
    return Plan(
        mode=mode,
        input_dir=os.fspath(input_dir),
        output_dir=os.fspath(output_dir),
        actions=planner.draft.finish(),
        labels=counts,
        n_renamed=planner.n_renamed,
        n_linked_images=planner.n_linked_images,
        left_out=tuple(left_out),
        image_actions=numbers,
    )


@dataclass(frozen=True)
class _ImagePaths:
    """The paths of images, made as they are asked for, as often as that is."""

    records: Sequence[ImageRecord]
    others: Sequence[Path] = ()

    def __iter__(self) -> Iterator[Path]:
        return itertools.chain((record.path for record in self.records), self.others)


class _Planner:
    """Collects actions and gives out names."""

    def __init__(self, input_dir: Path, output_dir: Path, mode: Mode, annotations: AnnotationSettings) -> None:
        self.draft = ActionDraft(output_dir)
        self.n_renamed = self.n_linked_images = self.n_linked_labels = 0
        self._input_dir = input_dir
        self._real = lru_cache(maxsize=1024)(os.path.realpath)  # for the life of one plan
        self._mode = mode
        self._annotations = annotations
        self._max_bytes = _longest_name(output_dir)
        self._n_groups = 0

    def add_images(self, records: Sequence[ImageRecord], clusters: np.ndarray, labels: yolo.FoundLabels) -> np.ndarray:
        """Plan all images with their labels, cluster by cluster; `clusters` [n] is that of each image.

        Returns the numbers of the actions of the images, [n] int64.
        """
        numbers = np.empty(len(records), np.int64)
        for cluster, members in _members_by_name(records, clusters):
            stems = StemGiver(max_bytes=self._max_bytes)
            for row in members.tolist():
                numbers[row] = len(self.draft)
                self._add_pair(records[row], labels, row, cluster=cluster, stems=stems)
        return numbers

    def add_class_lists(self, carried: dict[str, Path]) -> None:
        """Carry classes.txt and data.yaml; the Ultralytics layout gets a data.yaml of its own with the same names."""
        written = self._annotations.layout == "ultralytics"
        for name, path in sorted(carried.items()):
            if not (written and name == yolo.DATA_YAML_NAME):
                self._add_file("copy", "classes", path, target=name)
        if written:
            content = yolo.write_data_yaml(yolo.read_class_names(carried))
            sha256 = hashlib.sha256(content).hexdigest()
            self._add("write", "classes", "", yolo.DATA_YAML_NAME, sha256, len(content), 0, content.decode())
        self._n_groups += 1

    def count_labels(self, labels: yolo.FoundLabels, *, n_orphans: int) -> yolo.LabelCounts:
        """Count labels by what became of them."""
        return yolo.LabelCounts(
            found=labels.count("found"),
            empty=labels.count("empty"),
            missing=labels.count("missing"),
            unusable=labels.count("unusable"),
            orphan=n_orphans,
            shared=labels.n_shared,
            linked=self.n_linked_labels,
        )

    def _add_pair(
        self, record: ImageRecord, labels: yolo.FoundLabels, row: int, *, cluster: str, stems: StemGiver
    ) -> None:
        image_folder, label_folder = self._folders(cluster)
        suffixes = (record.path.suffix, self._annotations.label_extension)
        stem = stems.give(Wanted(record.relative_path, record.path.stem, suffixes))
        self.n_renamed += stem != record.path.stem
        is_linked = self._leads_elsewhere(record.path, root=self._input_dir)
        self.n_linked_images += is_linked
        kind, target = self._kind_of(stays=is_linked), f"{image_folder}/{stem}{suffixes[0]}"
        self._add(kind, "image", os.fspath(record.path), target, record.sha256, record.n_bytes, record.modified_ns)
        label = labels.label(row, record.path)
        path = label.path
        if path is not None and label.state != "unusable":
            root = Path(os.path.commonpath([path.parent, record.path.parent]))
            is_linked = is_linked or self._leads_elsewhere(path, root=root)
            self.n_linked_labels += is_linked
            kind = self._kind_of(stays=is_linked or bool(labels.is_shared[row]))
            self._add_file(kind, "label", path, target=f"{label_folder}/{stem}{path.suffix}")
        self._n_groups += 1

    def _folders(self, cluster: str) -> tuple[str, str]:
        if self._annotations.layout == "ultralytics":
            images, labels = yolo.ULTRALYTICS_SUBDIRS
            return f"{images}/{cluster}", f"{labels}/{cluster}"
        return f"{cluster}/{self._annotations.image_subdir}", f"{cluster}/{self._annotations.label_subdir}"

    def _leads_elsewhere(self, path: Path, *, root: Path) -> bool:
        """Whether a path is a symbolic link, or below `root` passes one that leaves it."""
        return path.is_symlink() or not Path(self._real(path.parent)).is_relative_to(self._real(root))

    def _kind_of(self, *, stays: bool) -> Kind:
        """What a link leads to is copied as content, and so is a label that several images need: the source stays."""
        return "copy" if stays and self._mode != "symlink" else self._mode

    def _add_file(self, kind: Kind, role: Role, path: Path, *, target: str) -> None:
        state = path.stat()
        self._add(kind, role, os.fspath(path), target, hash_file(path), state.st_size, state.st_mtime_ns)

    def _add(
        self, kind: Kind, role: Role, source: str, target: str, sha256: str, n_bytes: int, ns: int, content: str = ""
    ) -> None:
        number = len(self.draft)
        self.draft.add(Action(number, self._n_groups, kind, role, source, target, sha256, n_bytes, ns, content))


def _members_by_name(records: Sequence[ImageRecord], clusters: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Names of clusters in the order of the alphabet, and the rows of their images in that of the paths."""
    by_path = _order_by_path(records)
    for cluster in sorted(np.unique(clusters).tolist(), key=cluster_name):
        yield cluster_name(cluster), by_path[clusters[by_path] == cluster]


def _order_by_path(records: Sequence[ImageRecord]) -> np.ndarray:
    """Rows in the order of the bytes of their paths; a scan has them so."""
    if all(one <= other for one, other in itertools.pairwise(map(os.fsencode, relative_paths(records)))):
        return np.arange(len(records))
    return np.array(sorted(range(len(records)), key=lambda row: os.fsencode(records[row].relative_path)), np.int64)


def _readable_rows(records: Sequence[ImageRecord]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Rows whose file still is what was scanned, and (path, reason) of the others."""
    is_readable = np.ones(len(records), bool)
    left_out: list[tuple[str, str]] = []
    for row, record in enumerate(records):
        reason = _what_changed(record)
        if reason:
            left_out.append((os.fspath(record.path), reason))
            is_readable[row] = False
    return np.flatnonzero(is_readable), left_out


def _what_changed(record: ImageRecord) -> str:
    try:
        state = record.path.stat()
        if not stat.S_ISREG(state.st_mode):
            return "is not a regular file"
        if (state.st_size, state.st_mtime_ns) == (record.n_bytes, record.modified_ns):
            return ""
        return "" if hash_file(record.path) == record.sha256 else "changed since it was scanned"
    except (FileNotFoundError, NotADirectoryError):
        return "is gone since it was scanned"
    except SourceChanged as problem:
        return str(problem)


def _longest_name(output_dir: Path) -> int:
    """Bytes that the file system of the output folder, or of its nearest existing parent, allows in a name."""
    folder = output_dir
    while not folder.exists():
        folder = folder.parent
    return os.pathconf(folder, "PC_NAME_MAX")


def _refuse_nested(input_dir: Path, output_dir: Path) -> None:
    source, target = Path(os.path.realpath(input_dir)), Path(os.path.realpath(output_dir))
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(
            f"output_dir {output_dir} and input_dir {input_dir} lie in each other, so that a second run would sort its "
            f"own results; choose an output_dir beside the input"
        )
