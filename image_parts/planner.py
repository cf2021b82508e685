"""Where every image and its label will go: names, folders and kinds of action, found out before any file is touched.

    plan = plan_files(clustered, input_dir=…, output_dir=…, mode="move", annotations=settings.annotations)

Labels are read and states of files; nothing is written.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from common.config import UserError
from image_parts import yolo
from image_parts.moves import SourceChanged, hash_file
from image_parts.naming import Wanted, assign_stems
from image_parts.plan import Action, Kind, Mode, Plan, Role
from image_parts.records import ClusteredImages, ImageRecord, cluster_name, take_records
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
    found = [
        yolo.find_label(record.path, annotations=annotations) if annotations.enabled else yolo.Label(None, "missing")
        for record in records
    ]
    n_orphans = 0
    if annotations.enabled:  # before the plan is made, which takes as much memory again
        paths = _ImagePaths(clustered.records, other_images)
        n_orphans = len(yolo.find_orphans(paths, found, annotations=annotations))
    planner = _Planner(input_dir, output_dir, mode, annotations, _shared_labels(found))
    planner.add_images(records, clustered.labels[rows], found)
    counts = yolo.LabelCounts()
    if annotations.enabled:
        carried = yolo.find_carried(_ImagePaths(clustered.records), input_dir=input_dir, annotations=annotations)
        planner.add_class_lists(carried)
        counts = planner.count_labels(found, n_orphans=n_orphans)
    return Plan(
        mode=mode,
        input_dir=os.fspath(input_dir),
        output_dir=os.fspath(output_dir),
        actions=planner.actions,
        labels=counts,
        n_renamed=planner.n_renamed,
        n_linked_images=planner.n_linked_images,
        left_out=tuple(left_out),
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

    def __init__(
        self,
        input_dir: Path,
        output_dir: Path,
        mode: Mode,
        annotations: AnnotationSettings,
        shared: set[str],
    ) -> None:
        self.actions: list[Action] = []
        self.n_renamed = self.n_linked_images = self.n_linked_labels = 0
        self._input_dir = input_dir
        self._real = cache(os.path.realpath)  # for the life of one plan
        self._mode = mode
        self._annotations = annotations
        self._shared = shared  # labels that several images have
        self._max_bytes = _longest_name(output_dir)
        self._n_groups = 0

    def add_images(self, records: Sequence[ImageRecord], clusters: np.ndarray, labels: list[yolo.Label]) -> None:
        """Plan all images with their labels, cluster by cluster; `clusters` [n] is that of each image."""
        members: defaultdict[str, list[int]] = defaultdict(list)
        for row in sorted(range(len(records)), key=lambda row: os.fsencode(records[row].relative_path)):
            members[cluster_name(int(clusters[row]))].append(row)
        for name in sorted(members):
            wanted = [_wanted(records[row], self._annotations) for row in members[name]]
            stems = assign_stems(wanted, max_bytes=self._max_bytes)
            for row, entry, stem in zip(members[name], wanted, stems, strict=True):
                self.n_renamed += stem != entry.stem
                self._add_pair(records[row], labels[row], cluster=name, stem=stem)

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

    def count_labels(self, labels: list[yolo.Label], *, n_orphans: int) -> yolo.LabelCounts:
        """Count labels by what became of them."""
        states = Counter(label.state for label in labels)
        return yolo.LabelCounts(
            found=states["found"],
            empty=states["empty"],
            missing=states["missing"],
            unusable=states["unusable"],
            orphan=n_orphans,
            shared=sum(label.name in self._shared for label in labels if label.state != "unusable"),
            linked=self.n_linked_labels,
        )

    def _add_pair(self, record: ImageRecord, label: yolo.Label, *, cluster: str, stem: str) -> None:
        image_folder, label_folder = self._folders(cluster)
        target = f"{image_folder}/{stem}{record.path.suffix}"
        is_linked = self._leads_elsewhere(record.path, root=self._input_dir)
        self.n_linked_images += is_linked
        kind = self._kind_of(stays=is_linked)
        self._add(kind, "image", os.fspath(record.path), target, record.sha256, record.n_bytes, record.modified_ns)
        path = label.path
        if path is not None and label.state != "unusable":
            root = Path(os.path.commonpath([path.parent, record.path.parent]))
            is_linked = is_linked or self._leads_elsewhere(path, root=root)
            self.n_linked_labels += is_linked
            kind = self._kind_of(stays=is_linked or label.name in self._shared)
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
        number = len(self.actions)
        self.actions.append(Action(number, self._n_groups, kind, role, source, target, sha256, n_bytes, ns, content))


def _shared_labels(labels: list[yolo.Label]) -> set[str]:
    """The labels that more than one image has."""
    counts = Counter(label.name for label in labels if label.name is not None)
    return {name for name, count in counts.items() if count > 1}


def _readable_rows(records: Sequence[ImageRecord]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Rows whose file still is what was scanned, and (path, reason) of the others."""
    rows: list[int] = []
    left_out: list[tuple[str, str]] = []
    for row, record in enumerate(records):
        reason = _what_changed(record)
        if reason:
            left_out.append((os.fspath(record.path), reason))
        else:
            rows.append(row)
    return np.array(rows, np.int64), left_out


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


def _wanted(record: ImageRecord, annotations: AnnotationSettings) -> Wanted:
    suffixes = (record.path.suffix, annotations.label_extension)
    return Wanted(record.relative_path, record.path.stem, suffixes)


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
