"""All images below a folder, with their content hash and size; what did not change is not read again.

The index of a folder lies in the cache as `image_index_<hash>.json`. An entry is used again while the size and the time
of change of its file are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from common.commit import write_bytes
from common.config import UserError, canonical_json
from common.progress import Progress, Stopwatch
from image_parts.decode import UnreadableImage, measure_value_range, read_content, read_header
from image_parts.records import BadImage, ImageRecord, printable

log = logging.getLogger(__name__)

_INDEX_FORMAT = 1


@dataclass(frozen=True)
class ScannedImages:
    """The images of a folder in the order of their paths, and the files that are none."""

    records: list[ImageRecord]
    bad: list[BadImage]
    value_range: tuple[float, float] | None  # over all images of more than 8 bits together; None where there are none


@dataclass(frozen=True)
class _Entry:
    """What the index keeps of one file."""

    n_bytes: int
    modified_ns: int
    sha256: str
    width: int
    height: int
    low: float | None  # least and largest value, only of images of more than 8 bits
    high: float | None
    error: str | None  # why the header cannot be read


@dataclass(frozen=True)
class _Found:
    path: Path
    relative_path: str
    n_bytes: int
    modified_ns: int


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
    index_path = _index_path(input_dir, extensions, cache_dir) if cache_dir else None
    known = _read_index(index_path) if index_path else {}
    entries = {file.relative_path: entry for file in found if (entry := _still_valid(known, file))}
    changed = [file for file in found if file.relative_path not in entries]
    with (
        ThreadPoolExecutor(n_workers) as executor,
        Progress(len(changed), label="index", unit="files", enabled=progress) as bar,
    ):
        for file, entry in zip(changed, executor.map(_examine, changed), strict=True):
            entries[file.relative_path] = entry
            bar.update(1)
    if index_path and entries != known:
        _write_index(index_path, input_dir, entries)
    log.info(
        "scan: %d images, %d unchanged since the last index, %.1f s",
        len(found),
        len(found) - len(changed),
        watch.seconds,
    )
    return _scanned(found, entries, bad)


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


def _list_files(input_dir: Path, extensions: Sequence[str]) -> tuple[list[_Found], list[BadImage], Counter[str]]:
    wanted = {extension.lower() for extension in extensions}
    found: list[_Found] = []
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
        found.append(_Found(item, relative_path, state.st_size, state.st_mtime_ns))
    found.sort(key=lambda file: os.fsencode(file.relative_path))
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


def _examine(file: _Found) -> _Entry:
    """Hash one file and read its header; what is wrong with it is kept in `error`."""
    sha256, width, height, low, high, error = "", 0, 0, None, None, None
    try:
        content = read_content(file.path)
        sha256 = hashlib.sha256(content).hexdigest()
        header = read_header(content)
        width, height = header.width, header.height
        if header.is_deep:
            low, high = measure_value_range(content)
    except UnreadableImage as problem:
        error = str(problem)
    return _Entry(file.n_bytes, file.modified_ns, sha256, width, height, low, high, error)


def _still_valid(known: dict[str, _Entry], file: _Found) -> _Entry | None:
    entry = known.get(file.relative_path)
    if entry and (entry.n_bytes, entry.modified_ns) == (file.n_bytes, file.modified_ns) and entry.sha256:
        return entry
    return None


def _scanned(found: list[_Found], entries: dict[str, _Entry], bad: list[BadImage]) -> ScannedImages:
    records = []
    lows, highs = [], []
    for file in found:
        entry = entries[file.relative_path]
        if entry.error is not None:
            bad.append(BadImage(file.path, file.relative_path, entry.error))
            continue
        if entry.low is not None and entry.high is not None:
            lows.append(entry.low)
            highs.append(entry.high)
        records.append(
            ImageRecord(
                path=file.path,
                relative_path=file.relative_path,
                sha256=entry.sha256,
                width=entry.width,
                height=entry.height,
                n_bytes=file.n_bytes,
                modified_ns=file.modified_ns,
                is_deep=entry.low is not None,
            )
        )
    return ScannedImages(records, bad, (min(lows), max(highs)) if lows else None)


def _index_path(input_dir: Path, extensions: Sequence[str], cache_dir: Path) -> Path:
    what = canonical_json({"input_dir": printable(str(input_dir)), "extensions": sorted(extensions)})
    return cache_dir / f"image_index_{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def _read_index(path: Path) -> dict[str, _Entry]:
    """The entries of an index; empty where there is none or where it is of another format."""
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != _INDEX_FORMAT:
            return {}
        return {name: _Entry(**entry) for name, entry in values["images"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        log.warning("image index %s is damaged and is made anew", path)
        return {}


def _write_index(path: Path, input_dir: Path, entries: dict[str, _Entry]) -> None:
    images = {name: asdict(entry) for name, entry in sorted(entries.items())}
    values = {"format": _INDEX_FORMAT, "input_dir": str(input_dir), "images": images}
    # Names that are not UTF-8 survive as JSON escapes, so this must stay ASCII.
    write_bytes(path, json.dumps(values, ensure_ascii=True).encode())


def _no_images(input_dir: Path, extensions: Sequence[str], others: Counter[str], bad: list[BadImage]) -> str:
    what = f"input_dir {input_dir} holds no file with one of the extensions {', '.join(extensions)}"
    if others:
        shown = ", ".join(f"{name or 'no extension'} ({count})" for name, count in others.most_common(5))
        return f"{what}; there are {shown}: add what is an image to image_extensions"
    if bad:
        return f"{what}, and {len(bad)} that cannot be read: {bad[0].relative_path}: {bad[0].reason}"
    return f"{what}; it is empty: give another folder"
