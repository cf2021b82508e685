"""A folder for what numba compiles, where it would find none itself and stop with a traceback.

numba keeps compiled code beside its source, or else in the cache folder of the user. A night job on a checkout that
only others may write to, with an empty HOME, has neither.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

# Libraries that numba compiles parts of, beside this one.
_LIBRARIES = ("umap", "pynndescent")


def ensure_cache_folder() -> None:
    """Set NUMBA_CACHE_DIR, for this process and those that it starts, where numba could keep nothing without it.

    To be called before numba is imported. The folder is private: what lies there is run.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or all(map(_can_write, _code_folders())) or _can_write(_user_folder()):
        return
    try:
        folder = _private_folder(Path(tempfile.gettempdir()))
    except OSError as problem:
        log.warning("numba has no folder for what it compiles (%s); set NUMBA_CACHE_DIR to one", problem.strerror)
        return
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    log.info("neither the code nor HOME can be written to: what numba compiles is kept in %s", folder)


def _code_folders() -> Iterator[Path]:
    yield Path(__file__).parent / "__pycache__"
    for name in _LIBRARIES:
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield Path(folder) / "__pycache__"


def _user_folder() -> Path:
    """Where numba looks on Linux."""
    # Not Path.expanduser, which raises an error for a user that the system does not know, as in a container.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "numba"  # noqa: PTH111


def _can_write(folder: Path) -> bool:
    """Try it, as numba does: modes do not tell of read-only file systems and of what root may do."""
    if folder.parts[0] == "~":  # nobody knows this user's HOME, and a folder of that name is not meant
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private_folder(parent: Path) -> Path:
    """The folder of this user below `parent`, kept between runs; a new one where somebody else has taken its name."""
    folder = parent / f"numba-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
            return Path(tempfile.mkdtemp(prefix="numba-cache-", dir=parent))
    return folder
