"""YOLO labels: where the label of an image lies, which labels belong to no image, and the names of the classes.

The label of `…/img/a.jpg` is `…/lab/a.txt`: the LAST folder of the path that is called `img` is replaced, so that an
`img` further up does no harm. Where that file does not exist, the label is looked for beside the image.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import yaml

from common.config import UserError
from image_parts.settings import AnnotationSettings

CLASS_LIST_NAME = "classes.txt"
DATA_YAML_NAME = "data.yaml"
CARRIED_NAMES = (CLASS_LIST_NAME, DATA_YAML_NAME)
# Folders of the Ultralytics layout, which it finds labels by.
ULTRALYTICS_SUBDIRS = ("images", "labels")

LabelState = Literal["found", "empty", "missing", "unusable"]
_STATES: tuple[LabelState, ...] = get_args(LabelState)
_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Label:
    """The label file of one image."""

    name: str | None  # absolute path; None where there is none
    state: LabelState  # empty: an image without objects; unusable: a broken link, a folder, a pipe

    @property
    def path(self) -> Path | None:
        """Where it lies."""
        return None if self.name is None else Path(self.name)


@dataclass(frozen=True)
class LabelCounts:
    """What was found beside the images; the first four add up to the number of images."""

    found: int = 0
    empty: int = 0  # there, but without a box: an image of the background
    missing: int = 0
    unusable: int = 0
    orphan: int = 0  # label files that no image belongs to; they stay where they are
    shared: int = 0  # images whose label other images have too (a.jpg and a.png): each gets a copy, it stays
    linked: int = 0  # labels that are symbolic links: their content is copied, the links stay


@dataclass(frozen=True)
class FoundLabels:
    """The labels of many images, three bytes each; their names are made as they are asked for."""

    annotations: AnnotationSettings
    places: np.ndarray  # [n] int8: in which of the places where it may lie, -1 for none
    states: np.ndarray  # [n] int8, by _STATES
    is_shared: np.ndarray  # [n] bool: other images have it too
    folders: set[str]  # in which labels lie

    def label(self, row: int, image_path: Path) -> Label:
        """The label of the image in a row, whose path this is."""
        state, place = _STATES[self.states[row]], self.places[row]
        if place == _NOWHERE:
            return Label(None, state)
        return Label(list(_label_candidates(image_path, self.annotations))[place], state)

    def count(self, state: LabelState) -> int:
        """Images whose label is in a state."""
        return int((self.states == _STATES.index(state)).sum())

    @property
    def n_shared(self) -> int:
        """Images whose label other images have too, and which can be used."""
        return int((self.is_shared & (self.states != _STATES.index("unusable"))).sum())


def find_labels(image_paths: Iterable[Path], *, n_images: int, annotations: AnnotationSettings) -> FoundLabels:
    """Find the label of each image; an image without one is no error. With `annotations` off there are none."""
    places, states = np.full(n_images, _NOWHERE, np.int8), np.full(n_images, _STATES.index("missing"), np.int8)
    hashes, folders = np.zeros(n_images, "V16"), set()
    for row, image_path in enumerate(image_paths if annotations.enabled else ()):
        for place, candidate in enumerate(_label_candidates(image_path, annotations)):
            if os.path.lexists(candidate):
                places[row], states[row] = place, _STATES.index(_label_state(Path(candidate)))
                hashes[row] = _short_hash(candidate)
                folders.add(candidate.rpartition(os.sep)[0])
                break
    is_shared = np.zeros(n_images, bool)
    is_there = places != _NOWHERE
    _, of, counts = np.unique(hashes[is_there], return_inverse=True, return_counts=True)
    is_shared[is_there] = counts[of] > 1
    return FoundLabels(annotations, places, states, is_shared, folders)


def find_orphans(
    image_paths: Iterable[Path], *, image_folders: set[Path], label_folders: set[str], annotations: AnnotationSettings
) -> list[Path]:
    """List the label files that belong to none of the images, sorted.

    Searched are the label folders that mirror `image_folders`, with all below them, and folders in which labels lie
    beside their images, which `label_folders` are. Names are compared by hashes of 128 bits.
    """
    folders = set(label_folders)
    for image_folder in image_folders:
        candidates = map(Path, _label_candidates(image_folder / "any", annotations))
        folders |= {str(path.parent) for path in candidates if _is_below_label_folder(path, annotations)}
    roots = {_label_root(Path(folder), annotations) for folder in folders}
    owned = _hashes(name for path in image_paths for name in _label_candidates(path, annotations))
    owned.sort()
    orphans = {name for root in roots for name in _label_files(root, annotations) if not _contains(owned, name)}
    return [Path(name) for name in sorted(orphans)]


def find_carried(image_folders: set[Path], *, input_dir: Path, annotations: AnnotationSettings) -> dict[str, Path]:
    """Find `classes.txt` and `data.yaml` of the data set: in the label and image folders and those above them.

    Raises UserError where two of the same name list other classes: the numbers in the labels would mean different
    things.
    """
    found: dict[str, Path] = {}
    for folder in sorted(_data_set_folders(image_folders, input_dir, annotations)):
        for name in CARRIED_NAMES:
            path = folder / name
            if not path.is_file():
                continue
            if name in found and read_class_names({name: found[name]}) != read_class_names({name: path}):
                raise UserError(
                    f"{found[name]} and {path} list different classes, so that the numbers in their labels mean "
                    f"different things; sort the two data sets one after the other, or make the files equal"
                )
            found.setdefault(name, path)
    return found


def read_class_names(carried: dict[str, Path]) -> list[str]:
    """Read the class names by number, from `data.yaml` or else `classes.txt`; empty where there is neither."""
    if DATA_YAML_NAME in carried:
        path = carried[DATA_YAML_NAME]
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as problem:
            raise UserError(f"{path} is not valid YAML ({' '.join(str(problem).split())}); mend or remove it") from None
        names = values.get("names", []) if isinstance(values, dict) else []
        if names:
            return [str(names[key]) for key in sorted(names)] if isinstance(names, dict) else [str(x) for x in names]
    if CLASS_LIST_NAME in carried:
        lines = carried[CLASS_LIST_NAME].read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]
    return []


def write_data_yaml(class_names: Sequence[str]) -> bytes:
    """Return the `data.yaml` of the Ultralytics layout; all images train and validate, for want of a split."""
    values = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(class_names))}
    head = "# path: `.` is this folder for some versions of Ultralytics; others want its absolute path here.\n"
    return (head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)).encode()


def _label_candidates(image_path: Path, annotations: AnnotationSettings) -> Iterator[str]:
    """Where the label of an image may lie, the likeliest first."""
    name = image_path.stem + annotations.label_extension
    pairs: tuple[tuple[str, str], ...] = ((annotations.image_subdir, annotations.label_subdir),)
    if annotations.layout == "ultralytics":
        pairs = (*pairs, ULTRALYTICS_SUBDIRS)
    return (f"{folder}{os.sep}{name}" for folder in _label_folders(image_path.parent, pairs))


@lru_cache(maxsize=1024)
def _label_folders(image_folder: Path, pairs: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The folders of the labels of one image folder, by pairs of names (of images, of labels), and that folder."""
    found = (_replace_last(image_folder, images, labels) for images, labels in pairs)
    return (*(str(folder) for folder in found if folder is not None), str(image_folder))


def _replace_last(folder: Path, old: str, new: str) -> Path | None:
    """Replace the last part of a path that is called `old`; None where no part is."""
    parts = list(folder.parts)
    if old not in parts:
        return None
    last = len(parts) - 1 - parts[::-1].index(old)
    return Path(*parts[:last], new, *parts[last + 1 :])


def _label_state(path: Path) -> LabelState:
    try:
        state = path.stat()
    except OSError:  # a broken link, or a circle of links
        return "unusable"
    if not stat.S_ISREG(state.st_mode):
        return "unusable"
    is_empty = state.st_size == 0 or (state.st_size < 1024 and not path.read_bytes().strip())
    return "empty" if is_empty else "found"


def _is_below_label_folder(path: Path, annotations: AnnotationSettings) -> bool:
    return _label_root(path.parent, annotations) != path.parent or path.parent.name in _label_subdirs(annotations)


def _label_root(folder: Path, annotations: AnnotationSettings) -> Path:
    """The last folder of the path that is called like the label folder, or the folder itself."""
    names = _label_subdirs(annotations)
    for ancestor in (folder, *folder.parents):
        if ancestor.name in names:
            return ancestor
    return folder


def _label_subdirs(annotations: AnnotationSettings) -> tuple[str, ...]:
    preset = ULTRALYTICS_SUBDIRS[1:] if annotations.layout == "ultralytics" else ()
    return (annotations.label_subdir, *preset)


def _label_files(folder: Path, annotations: AnnotationSettings) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        for name in names:
            if Path(name).suffix == annotations.label_extension and name not in CARRIED_NAMES:
                yield f"{parent}{os.sep}{name}"


def _hashes(names: Iterable[str]) -> np.ndarray:
    """Hashes [n] V16 of names, which take a tenth of their memory."""
    packed = bytearray()
    for name in names:
        packed += _short_hash(name)
    return np.frombuffer(packed, "V16")


def _short_hash(name: str) -> bytes:
    return hashlib.blake2b(os.fsencode(name), digest_size=16).digest()


def _contains(hashes: np.ndarray, name: str) -> bool:
    """Whether sorted hashes hold that of a name."""
    wanted = np.frombuffer(_short_hash(name), "V16")
    place = int(np.searchsorted(hashes, wanted)[0])
    return place < len(hashes) and bool(hashes[place] == wanted[0])


def _data_set_folders(image_folders: set[Path], input_dir: Path, annotations: AnnotationSettings) -> set[Path]:
    """The folders of images and labels and all above them, up to the one that holds both."""
    folders = {input_dir}
    for image_folder in image_folders:
        for candidate in _label_candidates(image_folder / "any", annotations):
            folder = Path(candidate).parent
            if not folder.is_dir():
                continue
            top = os.path.commonpath([folder, image_folder, input_dir])
            folders |= {ancestor for ancestor in (folder, *folder.parents) if ancestor.is_relative_to(top)}
    return folders
