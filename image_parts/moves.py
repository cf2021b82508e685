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
from pathlib import Path
from typing import Any

from common.config import UserError

_BLOCK_BYTES = 2**20
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
# A file system, kernel or C library without renameat2, or without this flag of it.
_NO_RENAMEAT2 = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class SourceChanged(Exception):
    """A source is not the file any more that was planned; the message says how."""


def hash_file(path: str | Path) -> str:
    """Return the sha256 of the bytes of a regular file. Raises SourceChanged for a device, a pipe or a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without NONBLOCK a pipe waits for ever
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SourceChanged("is not a regular file")
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename_exclusive(source: str | Path, target: str | Path) -> None:
    """Rename on one file system. Raises FileExistsError where the target exists, OSError EXDEV across file systems."""
    renameat2 = _load_renameat2()
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_RENAMEAT2:
            raise OSError(code, os.strerror(code), os.fspath(source), None, os.fspath(target))
    _link_and_unlink(source, target)


def copy_verified(source: str | Path, target: str | Path, *, part_path: str | Path, sha256: str | None = None) -> None:
    """Copy content, mode, times and, where permitted, owner; the target appears whole or not at all.

    `part_path` is the temporary name, in the folder of the target. Raises SourceChanged where the source has not the
    sha256 that is given, FileExistsError where the target exists, UserError where the disk gives back other bytes.
    """
    written = _write_part(source, part_path)
    try:
        if sha256 is not None and written != sha256:
            raise SourceChanged("has other content than planned")
        if hash_file(part_path) != written:
            raise UserError(f"{target}: the disk gives back other bytes than were written; check it before going on")
        rename_exclusive(part_path, target)
    except BaseException:
        remove_part(part_path)
        raise


def write_exclusive(content: bytes, target: str | Path, *, part_path: str | Path) -> None:
    """Write a new file; it appears whole or not at all. Raises FileExistsError where the target exists."""
    remove_part(part_path)
    try:
        with _create(part_path) as file:
            file.write(content)
            os.fsync(file.fileno())
        rename_exclusive(part_path, target)
    except BaseException:
        remove_part(part_path)
        raise


def is_same_file(first: str | Path, second: str | Path) -> bool:
    """Whether two names are one file on the disk; links are not followed."""
    one, other = os.lstat(first), os.lstat(second)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def remove_part(part_path: str | Path) -> None:
    """Remove what an earlier run left under a temporary name."""
    Path(part_path).unlink(missing_ok=True)


def _write_part(source: str | Path, part_path: str | Path) -> str:
    """Copy into the temporary file and flush it; returns the sha256 of what was read."""
    remove_part(part_path)
    digest = hashlib.sha256()
    try:
        with Path(source).open("rb") as reader, _create(part_path) as writer:
            while block := reader.read(_BLOCK_BYTES):
                digest.update(block)
                writer.write(block)
            _copy_attributes(os.fstat(reader.fileno()), source, part_path)
            os.fsync(writer.fileno())
            if hasattr(os, "posix_fadvise"):  # so that the comparison reads the disk, not the memory
                os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except BaseException:
        remove_part(part_path)
        raise
    return digest.hexdigest()


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
def _load_renameat2() -> Any:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        function.restype = ctypes.c_int
    return function
