"""Tasks for worker processes, which import them by name: ones that die, hang, or raise."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from common.config import UserError


def write_name(item: str, *, folder: Path) -> str:
    """Commit the item to the disk, counting how often, and return it in capitals."""
    with (folder / item).open("a") as file:
        file.write("x")
    return item.upper()


def die_once(item: str, *, folder: Path) -> str:
    """Like write_name; but the first worker that gets "c" is killed."""
    marker = folder / ".died"
    if item == "c" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write_name(item, folder=folder)


def die_always(item: str, *, folder: Path) -> str:
    """Like write_name; but "c" kills every worker, after the others are through."""
    if item == "c":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return write_name(item, folder=folder)


def write_pid_and_stay(item: str, *, folder: Path) -> None:
    """Write the number of this process to a file of the item's name, and then compute for a minute."""
    (folder / f".{item}").write_text(str(os.getpid()))
    (folder / f".{item}").rename(folder / item)
    time.sleep(60)


def own_pid(_item: str) -> int:
    """The number of the process that computes, which the others have time to do too."""
    time.sleep(0.05)
    return os.getpid()


def own_gpu(_item: str) -> tuple[int, str]:
    """The number of the process that computes, and the GPUs that it sees."""
    time.sleep(0.05)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def refuse(item: str, *, folder: Path) -> str:
    """Like write_name; but "c" is a mistake of the user."""
    if item == "c":
        raise UserError(f"item {item} is no good; give another")
    return write_name(item, folder=folder)


def fail(item: str) -> str:
    """A bug."""
    raise ZeroDivisionError(f"in {item}")
