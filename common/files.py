"""Write a whole small file so that a reader finds the old one or the new one, never a part."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(path: str | Path, payload: bytes) -> Path:
    """Write payload to path by way of a temporary file in the same directory, and return path.

    Parent directories are made. The bytes and the rename are on the disk when this returns. OSError (a full disk, no
    permission) passes through, with the temporary file removed and the old file untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary_path.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary_path, path)
    except BaseException:
        temporary_path.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # without it the rename may be lost when the power goes
    finally:
        os.close(directory)
    return path
