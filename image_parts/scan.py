"""All images below a folder, with their content hash and size; what did not change is not read again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError
from common.progress import Progress, Stopwatch
from image_parts.decode import UnreadableImage, measure_value_range, read_content, read_header
from image_parts.file_index import Examined, FileColumns, FileState, index_path, read_index, write_index
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
    found, bad, other_extensions = _list_files(input_dir, extensions)
    if not found:
        raise UserError(_no_images(input_dir, extensions, other_extensions, bad))
    files = FileColumns.of(found)
    del found  # a tuple for each file
    kept_at = index_path(input_dir, extensions, cache_dir) if cache_dir else None
    known = read_index(kept_at) if kept_at else None
    n_known = files.recall(known) if known else 0
    changed = np.flatnonzero(~files.is_read)
    _examine_all(input_dir, files, changed, n_workers=n_workers, progress=progress)
    if kept_at and (known is None or len(changed) or len(known.names) != n_known):
        write_index(kept_at, files)
    log.info("scan: %d images, %d unchanged since the last index, %.1f s", len(files.names), n_known, watch.seconds)
    return _scanned(input_dir, files, bad)


def list_images(input_dir: Path, *, extensions: Sequence[str]) -> tuple[int, int]:
    """Count the files below `input_dir` that look like images, and their bytes, without reading them.

    Raises UserError where there are none.
    """
    found, bad, other_extensions = _list_files(input_dir, extensions)
    if not found:
        raise UserError(_no_images(input_dir, extensions, other_extensions, bad))
    return len(found), sum(file.n_bytes for file in found)


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


def _list_files(input_dir: Path, extensions: Sequence[str]) -> tuple[list[FileState], list[BadImage], Counter[str]]:
    wanted = {extension.lower() for extension in extensions}
    found: list[FileState] = []
    bad: list[BadImage] = []
    others: Counter[str] = Counter()
    for item in _walk(input_dir, input_dir, set()):
        if isinstance(item, BadImage):
            bad.append(item)
            continue
        relative_path = item.relative_to(input_dir).as_posix()
        if item.suffix.lower() not in wanted:
            others[item.suffix.lower()] += 1
            continue
        try:
            state = item.stat()
        except OSError as problem:
            why = "a link to nothing" if item.is_symlink() else f"cannot be read: {os.strerror(problem.errno or 0)}"
            bad.append(BadImage(item, relative_path, why))
            continue
        found.append(FileState(os.fsencode(relative_path), state.st_size, state.st_mtime_ns))
    found.sort()
    return found, bad, others


def _walk(folder: Path, top: Path, seen: set[tuple[int, int]]) -> Iterator[Path | BadImage]:
    """Files below a folder; a folder that cannot be listed is a BadImage, one seen before is passed over."""
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            state = current.stat()
            if (state.st_dev, state.st_ino) in seen:
                log.warning("%s leads to a folder that was scanned already and is passed over", printable(str(current)))
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(current) as entries:
                listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as problem:
            reason = f"the folder cannot be read: {os.strerror(problem.errno or 0)}"
            if current == top:
                raise UserError(f"input_dir {top}: {reason}; check its owner and mode") from None
            yield BadImage(current, current.relative_to(top).as_posix(), reason)
            continue
        pending += [Path(entry.path) for entry in reversed(listed) if entry.is_dir()]
        yield from (
            Path(entry.path) for entry in listed if entry.is_file() or (entry.is_symlink() and not entry.is_dir())
        )


def _examine_all(input_dir: Path, files: FileColumns, rows: np.ndarray, *, n_workers: int, progress: bool) -> None:
    """Read the files in `rows` and keep what they say."""

    def examine(start: int) -> list[Examined]:
        return [_examine(input_dir / os.fsdecode(files.names[row])) for row in rows[start : start + _TASK_FILES]]

    starts = range(0, len(rows), _TASK_FILES)
    with (
        ThreadPoolExecutor(n_workers) as executor,
        Progress(len(rows), label="index", unit="files", enabled=progress) as bar,
    ):
        for start, seen in zip(starts, executor.map(examine, starts), strict=True):
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
    images = np.delete(np.arange(len(files.names)), sorted(files.errors))
    ranges = files.ranges[images[~np.isnan(files.ranges[images, 0])]]  # of images of more than 8 bits
    value_range = (float(ranges[:, 0].min()), float(ranges[:, 1].max())) if len(ranges) else None
    return ScannedImages(files.images(input_dir), bad, value_range)


def _no_images(input_dir: Path, extensions: Sequence[str], others: Counter[str], bad: list[BadImage]) -> str:
    what = f"input_dir {input_dir} holds no file with one of the extensions {', '.join(extensions)}"
    if others:
        shown = ", ".join(f"{name or 'no extension'} ({count})" for name, count in others.most_common(5))
        return f"{what}; there are {shown}: add what is an image to image_extensions"
    if bad:
        return f"{what}, and {len(bad)} that cannot be read: {bad[0].relative_path}: {bad[0].reason}"
    return f"{what}; it is empty: give another folder"
