"""Runs stages as real processes, fast, and can make any of them die or fail at any touch of the disk.

A server process imports everything once. For each request (one JSON line on stdin) it forks a child, which runs the
script's own `cli.main` with the arguments given and exits with its code; the reply (one JSON line on stdout) holds the
exit code, both outputs and the touches of the disk under `root`, in order: opens for writing, writes, fsyncs, renames,
removals. With `fault` = {"at": n, "how": …} the child does not survive touch number n: "kill" is SIGKILL (a write is
torn in half first), "full" makes that touch and every write after it raise ENOSPC.

    python tests/stage_server.py [MODEL_FOLDER]     (tests start it; see tests/text_pipeline.py)
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS: dict[str, str | None] = {
    "cluster_supervise": "supervise",
    "cluster_normalize_and_pca": "normalize_and_pca",
    "cluster_train_clusters": "train",
    "cluster_purity_counter": "purity_counter",
    "cluster_update_dataset": "update_dataset",
    "tests.bad_writers": "bad_writer",
    "iterative_tuning": None,
    "tests.tuning_runs": None,
    "tests.clio_runs": "clio",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# --- Touches of the disk, and what happens at one of them ------------------------------------------------------------


class Faults:
    """Counts the touches under one folder and strikes at the one asked for."""

    def __init__(self, root: str, fault: dict[str, Any] | None, trace_path: str) -> None:
        self.root = os.path.realpath(root)
        self.at = fault["at"] if fault else -1
        self.how = fault["how"] if fault else ""
        self.n = 0
        self._counting = threading.Lock()
        self.trace = os.open(trace_path, os.O_WRONLY | os.O_CREAT)
        self.disk_is_full = False

    def install(self) -> None:
        """Watch every way in which Python code changes a file."""
        self._open, self._fsync, self._fdatasync = io.open, os.fsync, os.fdatasync
        sys.addaudithook(self._on_event)
        io.open = builtins.open = self._watched_open
        os.fsync, os.fdatasync = self._watched_fsync, self._watched_fdatasync

    def concerns(self, path: Any) -> bool:
        """Whether a path lies under the watched folder."""
        if isinstance(path, (str, bytes, os.PathLike)):
            return os.path.abspath(os.fsdecode(path)).startswith(self.root + os.sep)
        return False

    def touch(self, kind: str, path: Any, half: Any = None) -> None:
        """One touch; `half` writes half of what was to be written."""
        with self._counting:  # a shard is written by two threads
            number, self.n = self.n, self.n + 1
        line = json.dumps([kind, os.path.relpath(os.path.abspath(os.fsdecode(path)), self.root)]) + "\n"
        os.write(self.trace, line.encode())
        if self.disk_is_full and kind == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number != self.at:
            return
        if self.how == "kill":
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.disk_is_full = True
        if kind in ("write", "fsync"):
            if half:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if self.concerns(path) and isinstance(flags, int) and flags & _WRITING:
                self.touch("open", path)
        elif event == "os.rename":
            if self.concerns(arguments[1]):
                self.touch("rename", arguments[1])
        elif event in ("os.remove", "os.rmdir"):
            path, folder_descriptor = arguments
            if folder_descriptor >= 0:  # shutil.rmtree names files within an open folder
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder_descriptor}"), os.fsdecode(path))
            if self.concerns(path):
                self.touch("remove", path)

    def _watched_open(self, file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if mode in ("wb", "xb", "ab", "r+b") and self.concerns(file):
            return _WatchedFile(io.FileIO(file, mode.replace("b", "")), self)
        return self._open(file, mode, *arguments, **keywords)

    def _watched_fsync(self, descriptor: int) -> None:
        self._touch_descriptor(descriptor)
        self._fsync(descriptor)

    def _watched_fdatasync(self, descriptor: int) -> None:
        self._touch_descriptor(descriptor)
        self._fdatasync(descriptor)

    def _touch_descriptor(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self.concerns(path):
            self.touch("fsync", path)


class _WatchedFile(io.BufferedWriter):
    def __init__(self, raw: io.FileIO, faults: Faults) -> None:
        super().__init__(raw)
        self._faults = faults

    def write(self, content: Any) -> int:
        content = bytes(content)
        self._faults.touch("write", self.raw.name, half=lambda: self._write_half(content))
        return super().write(content)

    def _write_half(self, content: bytes) -> None:
        self.flush()
        os.write(self.fileno(), content[: len(content) // 2])


# --- One child for each request --------------------------------------------------------------------------------------


def run_child(request: dict[str, Any], folder: str) -> NoReturn:
    """Be the command: its arguments, its outputs, its exit code."""
    code = 70
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", write_through=True)
        if request.get("max_file_bytes"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], resource.RLIM_INFINITY))
        trace = "/dev/null" if request.get("max_file_bytes") else f"{folder}/trace"
        Faults(request["root"], request.get("fault"), trace).install()
        code = call_main(request["script"], request["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            with open(f"{folder}/modules", "w") as file:
                file.write("\n".join(sys.modules))
        os._exit(code)


def call_main(script: str, argv: list[str]) -> int:
    """What the last lines of each script do."""
    from common import cli

    module = importlib.import_module(script)
    return cli.main(
        module.Settings,
        module.run,
        doc=module.__doc__,
        section=SCRIPTS[script],
        check=module.check,
        add_arguments=getattr(module, "add_arguments", None),
        known_sections=(*cli.CLUSTERING_SECTIONS, "bad_writer"),
        argv=argv,
    )


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and tell what happened; "start" only forks, "wait" only waits."""
    if request["do"] == "wait":
        return collect(request["pid"], request["folder"])
    folder = tempfile.mkdtemp(prefix="stage-")
    gc.freeze()  # what the parent holds is not the child's garbage; looking through it would copy it
    pid = os.fork()
    if pid == 0:
        run_child(request, folder)
    return {"pid": pid, "folder": folder} if request["do"] == "start" else collect(pid, folder)


def collect(pid: int, folder: str) -> dict[str, Any]:
    """Wait for one child and read what it left."""
    _, status = os.waitpid(pid, 0)
    reply: dict[str, Any] = {"exit_code": os.waitstatus_to_exitcode(status), "pid": pid}
    for name in ("stdout", "stderr", "trace"):
        path = Path(folder, name)
        reply[name] = path.read_text(encoding="utf-8") if path.exists() else ""
        path.unlink(missing_ok=True)
    import_like_child(Path(folder, "modules"))
    Path(folder).rmdir()
    return reply


def import_like_child(listed: Path) -> None:
    """Import what a child had to import, so that the next one need not."""
    if listed.exists():
        for name in set(listed.read_text().split("\n")) - set(sys.modules):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        listed.unlink()


def warm_up(model: str | None) -> None:
    """Import what the stages import and load the model, if there is one, once for all children."""
    for module in (*SCRIPTS, "pyarrow.parquet"):
        importlib.import_module(module)
    if model is None:
        return
    import torch

    from common.encoder import load_encoder

    torch.set_num_threads(1)  # a thread pool does not survive a fork
    for head in ("auto", "none"):
        load_encoder(
            model, device="cpu", dtype="float32", pooling="auto", head=head, revision=None, max_length=None
        ).encode(["warm"])


def main() -> None:
    """Serve until stdin closes."""
    sys.path.insert(0, str(ROOT))
    warm_up(sys.argv[1] if len(sys.argv) > 1 else None)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
