"""All images below a folder, with their content hash and size; what did not change is not read again."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError
from common.mapped import return_freed_memory
from common.progress import Progress, Stopwatch
from image_parts.decode import UnreadableImage, measure_value_range, read_content, read_header
from image_parts.file_index import Examined, FileColumns, FileState, index_path, recall_index, write_index
from image_parts.preparation import map_ahead
from image_parts.records import BadImage, ImageRecord, printable

log = logging.getLogger(__name__)

# Files in one task of a thread: a task takes more memory than what is learned of a file.
_TASK_FILES = 16


@dataclass(frozen=True)
class ScannedImages:
    """The images of a folder in the order of their paths, and the files that are none."""

    records: Sequence[ImageRecord]
    bad: list[BadImage]
    value_range: tuple[float, float] | None  # over all images of more than 8 bits together; None where there are none


def scan_images(
    input_dir: Path, *, extensions: Sequence[str], cache_dir: Path | None, n_workers: int, progress: bool = False
) -> ScannedImages:
    """Find and index all images below `input_dir`, links followed, loops survived, each real folder once.

    Raises UserError where the folder is missing or holds no file with one of the `extensions`.
    """
    watch = Stopwatch()
    listing = _Listing(input_dir, extensions)
    files = FileColumns.of(listing.files())
    if not len(files.names):
        raise UserError(listing.why_empty())
    kept_at = index_path(input_dir, extensions, cache_dir) if cache_dir else None
    n_known, is_exact = recall_index(kept_at, files) if kept_at else (0, False)
    changed = np.flatnonzero(~files.is_read)
    _examine_all(input_dir, files, changed, n_workers=n_workers, progress=progress)
    if kept_at and (len(changed) or not is_exact):
        write_index(kept_at, files)
    return_freed_memory()
    scanned = _scanned(input_dir, files, listing.bad)
    log.info("scan: %d images, %d files or folders unreadable, %d unchanged since the last index, %.1f s",
             len(scanned.records), len(scanned.bad), n_known, watch.seconds)  # fmt: skip
    return scanned


def list_images(input_dir: Path, *, extensions: Sequence[str]) -> tuple[int, int]:
    """Count the files below `input_dir` that look like images, and their bytes, without reading them.

    Raises UserError where there are none.
    """
    listing = _Listing(input_dir, extensions)
    n_files = n_bytes = 0
    for file in listing.files():
        n_files, n_bytes = n_files + 1, n_bytes + file.n_bytes
    if not n_files:
        raise UserError(listing.why_empty())
    return n_files, n_bytes


def check_folders(input_dir: str, output_dir: str) -> tuple[Path, Path]:
    """Resolve both folders; raises UserError where one is missing, equal to the other or inside it."""
    for name, value in (("input_dir", input_dir), ("output_dir", output_dir)):
        if not value:
            raise UserError(f"{name} is empty; set it in config.yaml or give {name}=FOLDER")
    source, target = Path(input_dir).expanduser().resolve(), Path(output_dir).expanduser().resolve()
    if not source.is_dir():
        what = "is a file, not a folder" if source.exists() else "does not exist"
        raise UserError(f"input_dir {source} {what}; give the folder of the images")
    if source == target:
        raise UserError(f"input_dir and output_dir are the same folder {source}; choose another output_dir")
    if source in target.parents:
        raise UserError(f"output_dir {target} is inside input_dir {source}; its results would be scanned as input")
    if target in source.parents:
        raise UserError(f"input_dir {source} is inside output_dir {target}; choose an output_dir beside it")
    return source, target


def n_workers_of(requested: int) -> int:
    """The number of workers; -1 is one for each core that this process may use."""
    return requested if requested > 0 else max(1, len(os.sched_getaffinity(0)))


class _Listing:
    """Finds the files below a folder that look like images, and keeps what else it sees on the way."""

    def __init__(self, top: Path, extensions: Sequence[str]) -> None:
        self.bad: list[BadImage] = []
        self._top, self._extensions = top, list(extensions)
        self._wanted = {extension.lower() for extension in extensions}
        self._others: Counter[str] = Counter()  # files of other extensions
        self._seen: set[tuple[int, int]] = set()  # folders

    def files(self) -> Iterator[FileState]:
        """The files in the order of the bytes of their paths, without a list of all of them."""
        pending = [iter(self._entries(b""))]
        while pending:
            name = next(pending[-1], None)
            if name is None:
                pending.pop()
            elif name.endswith(b"/"):
                pending.append(iter(self._entries(name)))
            elif (extension := Path(os.fsdecode(name)).suffix.lower()) not in self._wanted:
                self._others[extension] += 1
            elif (state := self._look_at(name)) is not None:
                yield state

    def why_empty(self) -> str:
        """What to say where there is no such file."""
        what = f"input_dir {self._top} holds no file with one of the extensions {', '.join(self._extensions)}"
        if self._others:
            shown = ", ".join(f"{name or 'no extension'} ({count})" for name, count in self._others.most_common(5))
            return f"{what}; there are {shown}: add what is an image to image_extensions"
        if self.bad:
            return f"{what}, and {len(self.bad)} that cannot be read: {self.bad[0].relative_path}: {self.bad[0].reason}"
        return f"{what}; it is empty: give another folder"

    def _entries(self, folder: bytes) -> list[bytes]:
        """Paths of what lies in a folder, sorted: folders end in "/", which is where all below them belongs.

        A folder that cannot be listed is a bad image, one that was seen before is passed over.
        """
        path = self._top / os.fsdecode(folder)
        try:
            state = path.stat()
            if (state.st_dev, state.st_ino) in self._seen:
                log.warning("%s leads to a folder that was scanned already and is passed over", printable(str(path)))
                return []
            self._seen.add((state.st_dev, state.st_ino))
            with os.scandir(path) as entries:
                return sorted(folder + _name_of(entry) for entry in entries)
        except OSError as problem:
            reason = f"the folder cannot be read: {os.strerror(problem.errno or 0)}"
            if path == self._top:
                raise UserError(f"input_dir {path}: {reason}; check its owner and mode") from None
            self.bad.append(BadImage(path, os.fsdecode(folder[:-1]), reason))
            return []

    def _look_at(self, name: bytes) -> FileState | None:
        path = self._top / os.fsdecode(name)
        try:
            state = path.stat()
        except OSError as problem:
            why = "a link to nothing" if path.is_symlink() else f"cannot be read: {os.strerror(problem.errno or 0)}"
            self.bad.append(BadImage(path, os.fsdecode(name), why))
            return None
        if not stat.S_ISREG(state.st_mode):  # reading a pipe would wait for ever
            self.bad.append(BadImage(path, os.fsdecode(name), f"{_kind_of(state.st_mode)}, not a file"))
            return None
        return FileState(name, state.st_size, state.st_mtime_ns)


def _name_of(entry: os.DirEntry[str]) -> bytes:
    """The name of what lies in a folder, that of a folder with "/" behind it."""
    name = os.fsencode(entry.name)
    try:
        return name + b"/" if entry.is_dir() else name
    except OSError:  # a link that leads in a circle
        return name


def _kind_of(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _examine_all(input_dir: Path, files: FileColumns, rows: np.ndarray, *, n_workers: int, progress: bool) -> None:
    """Read the files in `rows` and keep what they say."""

    def examine(start: int) -> list[Examined]:
        return [_examine(input_dir / os.fsdecode(files.names[row])) for row in rows[start : start + _TASK_FILES]]

    starts = range(0, len(rows), _TASK_FILES)
    with (
        ThreadPoolExecutor(n_workers) as executor,
        Progress(len(rows), label="index", unit="files", enabled=progress) as bar,
    ):
        for start, seen in zip(starts, map_ahead(examine, starts, executor, n_ahead=4 * n_workers), strict=True):
            for row, examined in zip(rows[start : start + _TASK_FILES], seen, strict=True):
                files.put(int(row), examined)
            bar.update(len(seen))


def _examine(path: Path) -> Examined:
    """Hash one file and read its header; what is wrong with it is kept in `error`."""
    sha256, width, height, value_range, error = b"", 0, 0, None, None
    try:
        content = read_content(path)
        sha256 = hashlib.sha256(content).digest()
        header = read_header(content)
        width, height = header.width, header.height
        if header.is_deep:
            value_range = measure_value_range(content)
    except UnreadableImage as problem:
        error = str(problem)
    return Examined(sha256, width, height, value_range, error)


def _scanned(input_dir: Path, files: FileColumns, bad: list[BadImage]) -> ScannedImages:
    for row, reason in sorted(files.errors.items()):
        relative_path = os.fsdecode(files.names[row])
        bad.append(BadImage(input_dir / relative_path, relative_path, reason))
    is_deep = ~np.isnan(files.ranges[:, 0])  # of more than 8 bits
    is_deep[list(files.errors)] = False
    ranges = files.ranges[is_deep]
    value_range = (float(ranges[:, 0].min()), float(ranges[:, 1].max())) if len(ranges) else None
    return ScannedImages(files.images(input_dir), bad, value_range)
