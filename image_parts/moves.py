"""The file operations of the file stage: none of them overwrites, and no source goes before its copy is proven.

A file gets its final name in one step (rename without overwrite), so a target that exists is whole. A copy is written
under a temporary name, flushed, read back and compared by sha256 before it gets that name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import UserError

_BLOCK_BYTES = 2**20
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
# A file system, kernel or C library without renameat2, or without this flag of it.
_NO_RENAMEAT2 = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
_LIBC_ARGUMENTS: dict[str, list[Any]] = {
    "renameat2": [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint],
    "syncfs": [ctypes.c_int],
}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class SourceChanged(Exception):
    """A source is not the file any more that was planned; the message says how."""


def hash_file(path: str | Path, *, from_disk: bool = False) -> str:
    """Return the sha256 of the bytes of a regular file. Raises SourceChanged for a device, a pipe or a folder.

    With `from_disk` the copy of the file in memory is dropped first, so that what is read is what the disk holds.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without NONBLOCK a pipe waits for ever
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SourceChanged("is not a regular file")
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename_exclusive(source: str | Path, target: str | Path) -> None:
    """Rename on one file system. Raises FileExistsError where the target exists, OSError EXDEV across file systems."""
    renameat2 = _load_from_libc("renameat2")
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_RENAMEAT2:
            raise OSError(code, os.strerror(code), os.fspath(source), None, os.fspath(target))
    _link_and_unlink(source, target)


def copy_verified(source: str | Path, target: str | Path, *, part_path: str | Path) -> None:
    """Copy one file so that the target appears whole or not at all: the three steps below, one after the other."""
    sha256 = write_part(source, part_path)
    try:
        flush_files([part_path])
        publish_part(part_path, target, sha256=sha256)
    except BaseException:
        remove_part(part_path)
        raise


def write_part(source: str | Path | bytes, part_path: str | Path) -> str:
    """Write a copy of a file, with its mode, times and where permitted owner, or plain content, under a temporary name.

    Returns the sha256 of what was read. Nothing is flushed: `flush_files` does that for many at once.
    """
    remove_part(part_path)
    digest = hashlib.sha256()
    try:
        with _create(part_path) as writer:
            if isinstance(source, bytes):
                digest.update(source)
                writer.write(source)
                return digest.hexdigest()
            with Path(source).open("rb") as reader:
                while block := reader.read(_BLOCK_BYTES):
                    digest.update(block)
                    writer.write(block)
                _copy_attributes(os.fstat(reader.fileno()), source, part_path)
    except BaseException:
        remove_part(part_path)
        raise
    return digest.hexdigest()


def flush_files(paths: Sequence[str | Path]) -> None:
    """Wait until files of one file system are on the disk; many together take about the time of one."""
    syncfs = _load_from_libc("syncfs") if len(paths) > 1 else None
    for path in paths[:1] if syncfs is not None else paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if syncfs is None:
                os.fsync(descriptor)
            elif syncfs(descriptor) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
        finally:
            os.close(descriptor)


def publish_part(part_path: str | Path, target: str | Path, *, sha256: str) -> None:
    """Read a flushed temporary file back from the disk and give it its name.

    Raises UserError where the disk gives back other bytes, FileExistsError where the target exists.
    """
    if hash_file(part_path, from_disk=True) != sha256:
        raise UserError(f"{target}: the disk gives back other bytes than were written; check it before going on")
    rename_exclusive(part_path, target)


def is_same_file(first: str | Path, second: str | Path) -> bool:
    """Whether two names are one file on the disk; links are not followed."""
    one, other = os.lstat(first), os.lstat(second)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def remove_part(part_path: str | Path) -> None:
    """Remove what an earlier run left under a temporary name."""
    Path(part_path).unlink(missing_ok=True)


def _create(path: str | Path) -> Any:
    """Open a new file for unbuffered writing, never one that exists and never through a link."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0)


def _copy_attributes(state: os.stat_result, source: str | Path, target: str | Path) -> None:
    with contextlib.suppress(PermissionError):  # only the administrator may give a file to another owner
        os.chown(target, state.st_uid, state.st_gid)
    shutil.copystat(source, target)
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))


def _link_and_unlink(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as problem:
        if problem.errno in _NO_HARD_LINKS:
            raise UserError(
                f"the file system of {target} can neither rename without overwriting nor link; choose an output_dir "
                f"on another one"
            ) from None
        raise
    if is_same_file(source, target):  # else somebody replaced the source meanwhile: theirs stays
        Path(source).unlink()


@functools.cache
def _load_from_libc(name: str) -> Any:
    """A function of the C library that Python does not offer; None where the library has it not."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = _LIBC_ARGUMENTS[name]
        function.restype = ctypes.c_int
    return function
