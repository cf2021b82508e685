"""Files that are whole or not there: atomic writes, locks, and the identity of a result.

A file is written beside its target under a temporary name, flushed to the disk, renamed over the target, and the rename
is flushed too. A reader sees the old file or the new one, never a half. What a result was made from is its `Identity`;
two identities never share an output.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from common.config import UserError, canonical_json

if TYPE_CHECKING:
    import numpy as np

# Raised when a stage's numbers change for the same settings, so that old and new shards are never mixed.
FORMAT_VERSION = 1

# Above this many bytes an input is identified by names, sizes and times instead of by its content.
_MAX_HASHED_BYTES = 2 * 2**30

_TEMPORARY_NAME = re.compile(r"^\.(?P<target>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{32}\.tmp$")


class LockHeld(UserError):
    """Another run is writing to the same output."""

    exit_code = 75


# --- Atomic files ----------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on a clean exit it becomes `path`, on an exception `path` stays as it was.

    Raises OSError where the disk refuses (full, read-only), UserError where `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"output {target} is a folder; give the path of a file")
    make_folder(target.parent)
    host = socket.gethostname().replace(".", "-") or "host"
    temporary = target.with_name(f".{target.name}.{host}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as problem:
        temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError) and problem.errno is not None:
            problem.filename = str(target)  # a write that fails does not say where
        raise
    sync_folder(target.parent)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: str | Path, values: Any) -> None:
    """Write `values` to `path` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def save_array(file: IO[bytes], array: np.ndarray) -> None:
    """Write an array as .npy to an open file; raises OSError where the disk refuses."""
    import numpy as np

    # Not to the file itself: numpy's shortcut to files on disk raises an OSError that does not say why.
    np.save(SimpleNamespace(write=file.write), array)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents and return it; raises UserError where a file stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"output folder {folder} cannot be made: a file of that name is in the way") from None
    return folder


def remove_stale_temporaries(folder: Path) -> int:
    """Delete the temporary files that dead processes of this host left in `folder`; returns how many."""
    host = socket.gethostname().replace(".", "-") or "host"
    n_removed = 0
    for path in folder.iterdir():
        match = _TEMPORARY_NAME.match(path.name)
        if match and match["host"] == host and not _is_alive(int(match["pid"])):
            path.unlink(missing_ok=True)
            n_removed += 1
    return n_removed


def is_temporary(name: str) -> bool:
    """Whether a file name is one of our unfinished files."""
    return bool(_TEMPORARY_NAME.match(name))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- Locks -----------------------------------------------------------------------------------------------------------


class OutputLock:
    """Exclusive hold on one output, from the first check to the last byte; the kernel frees it when the process dies.

        with OutputLock("runs/demo/pca"):
            ...

    An output that does not exist yet is a file where its name has a suffix, unless `is_file` says what it will be.
    Raises LockHeld (exit 75) with the holder's pid, host and start where another run has it.
    """

    def __init__(self, output: str | Path, *, is_file: bool | None = None) -> None:
        self.output = Path(output)
        self._is_file = is_file

    def __enter__(self) -> OutputLock:
        is_file = self._is_file if self._is_file is not None else bool(self.output.is_file() or self.output.suffix)
        if is_file:
            make_folder(self.output.parent)
            lock_path = self.output.with_name(f".{self.output.name}.lock")
        else:
            make_folder(self.output)
            lock_path = self.output / ".lock"
        self._file = lock_path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise LockHeld(f"output {self.output} is being written by {holder}; wait for it or end it") from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


class HeldOutput(ABC):
    """An output under its lock; a subclass says in `_claim` what it looks at, and refuses, once it holds it."""

    def __init__(self, output: str | Path, *, is_file: bool) -> None:
        self._lock = OutputLock(output, is_file=is_file)

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            self._claim()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, value, traceback)

    @abstractmethod
    def _claim(self) -> None:
        """Look at what is there; an exception gives the lock back."""


# --- Identity --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What a result was made from: the stage, the keys that change its numbers, and its inputs."""

    stage: str
    keys: dict[str, Any]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that changes the numbers."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, from which an equal identity can be made."""
        return {"format": FORMAT_VERSION, "stage": self.stage, "keys": self.keys, "inputs": self.inputs}


def describe_changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Say which keys and inputs differ between two identities: `n_clusters: 10 -> 12; input centroids changed`."""
    if before.get("stage") != after.get("stage"):
        return f"it was written by {before.get('stage')!r}, not by {after.get('stage')!r}"
    if before.get("format") != after.get("format"):
        return f"it has format {before.get('format')}, this version writes format {after.get('format')}"
    changes = []
    old_keys, new_keys = before.get("keys", {}), after.get("keys", {})
    for name in sorted(old_keys.keys() | new_keys.keys()):
        if (name in old_keys, old_keys.get(name)) != (name in new_keys, new_keys.get(name)):
            changes.append(f"{name}: {_brief(old_keys, name)} -> {_brief(new_keys, name)}")
    old_inputs, new_inputs = before.get("inputs", {}), after.get("inputs", {})
    for name in sorted(old_inputs.keys() | new_inputs.keys()):
        if old_inputs.get(name) != new_inputs.get(name):
            changes.append(f"{name} itself changed since")
    return "; ".join(changes) or "nothing that is known"


def fingerprint_files(paths: Sequence[Path]) -> str:
    """Identify input files: by content up to 2 GiB together, beyond that by name, size and time of change."""
    digest = hashlib.sha256()
    by_content = sum(path.stat().st_size for path in paths) <= _MAX_HASHED_BYTES
    for path in paths:
        state = path.stat()
        digest.update(f"{path.name}\0{state.st_size}\0".encode())
        if by_content:
            _hash_into(digest, _read_blocks(path))
        else:
            digest.update(str(state.st_mtime_ns).encode())
    return digest.hexdigest()


def _read_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(2**22):
            yield block


def _hash_into(digest: Any, blocks: Iterable[bytes]) -> None:
    for block in blocks:
        digest.update(block)


def _brief(keys: dict[str, Any], name: str) -> str:
    if name not in keys:
        return "plays no part"
    text = json.dumps(keys[name], ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"
