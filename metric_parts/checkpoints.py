"""Checkpoints that are whole or not there: Hugging Face folders with what resuming needs beside the weights.

A folder is written under another name, flushed, and renamed; its `state.json`, written last, lists the other files with
their digests, so that a folder that was cut short afterwards is found out too. `best` is a link to the best of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.commit import sync_folder, write_bytes, write_json
from common.config import UserError
from metric_parts.bank import Bank
from metric_parts.model import JointModel
from metric_parts.model_folder import save_model
from metric_parts.steps import Stepper

log = logging.getLogger(__name__)

STATE = "state.json"
BEST = "best"

_STEP_FOLDER = re.compile(r"^step-(\d{8})$")
_BEST_FOLDER = re.compile(r"^best-(\d{8})$")
_UNFINISHED = ".unfinished-"
_OWN_FILES = (
    "step-[0-9]*",
    "best-[0-9]*",
    BEST,
    "metrics.jsonl",
    "summary.json",
    "confusion.csv",
    "curves",
    "tensorboard",
    "mlflow",
    "mlflow_run_id",
    "neptune",
)


@dataclass
class RunState:
    """Where a run stands; with the weights and the optimizer, all that going on needs."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    window: int = 0  # windows of this epoch that are done
    batches: int = 0  # batches done, over all epochs
    rows: int = 0
    best_value: float | None = None
    best_step: int | None = None
    metrics_bytes: int = 0  # length of metrics.jsonl
    running: dict[str, float] = field(default_factory=dict)  # sums of metrics since they were last logged
    n_running: int = 0
    frozen: dict[str, dict[str, float]] = field(default_factory=dict)  # scores of the frozen encoder
    best_scores: dict[str, float] = field(default_factory=dict)
    best_confusion: list[list[int]] = field(default_factory=list)
    own_head_agreement: float | None = None  # share of texts to which the architecture's own head gives the same class

    def advance(self, *, n_batches: int, n_rows: int, n_windows: int) -> bool:
        """Count a step of this epoch of `n_windows`; returns whether it was its last."""
        self.step += 1
        self.window += 1
        self.batches += n_batches
        self.rows += n_rows
        ends_epoch = self.window == n_windows
        if ends_epoch:
            self.epoch, self.window = self.epoch + 1, 0
        return ends_epoch

    def add(self, metrics: dict[str, float]) -> None:
        """Add the metrics of a step to those that are logged next."""
        for name, value in metrics.items():
            self.running[name] = self.running.get(name, 0.0) + value
        self.n_running += 1

    def take_means(self) -> dict[str, float]:
        """The means of what was added since the last time."""
        means = {name: total / self.n_running for name, total in self.running.items()}
        self.running, self.n_running = {}, 0
        return means


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: RunState
    identity: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in `checkpoints_dir`."""

    def __init__(self, folder: Path, *, identity: dict[str, Any], keep_last_n: int) -> None:
        self.folder = folder
        self.identity = identity
        self.keep_last_n = keep_last_n

    def save(self, state: RunState, *, model: JointModel, stepper: Stepper, bank: Bank) -> Path:
        """Write the checkpoint of this step, then delete the oldest ones; raises UserError where the disk refuses."""
        path = self.folder / f"step-{state.step:08d}"
        with _new_folder(path) as unfinished:
            save_model(model, unfinished)
            _save_tensors(unfinished / "optimizer.pt", stepper.state_dict())
            _save_tensors(unfinished / "bank.pt", _as_tensors(bank.state_dict()))
            self._seal(unfinished, state)
        for old in self._folders(_STEP_FOLDER)[: -self.keep_last_n]:
            shutil.rmtree(old)
        return path

    def save_best(self, state: RunState, *, model: JointModel) -> Path:
        """Write the model alone and let `best` point to it; the link is swapped in one rename."""
        path = self.folder / f"best-{state.step:08d}"
        with _new_folder(path) as unfinished:
            save_model(model, unfinished)
            self._seal(unfinished, state)
        link = self.folder / BEST
        fresh = self.folder / f".{BEST}.{uuid.uuid4().hex}"
        fresh.symlink_to(path.name, target_is_directory=True)
        fresh.replace(link)
        sync_folder(self.folder)
        for old in self._folders(_BEST_FOLDER):
            if old != path:
                shutil.rmtree(old)
        return link

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None; damaged ones are passed over with a warning."""
        for path in reversed(self._folders(_STEP_FOLDER)):
            try:
                return read_checkpoint(path)
            except UserError as problem:
                log.warning("%s; the one before it is tried", problem)
        return None

    def leftover(self) -> dict[str, Any] | None:
        """The identity of a run that left a best model and no checkpoint to resume from; None where there is none."""
        return read_checkpoint(self.folder / BEST).identity if (self.folder / BEST).exists() else None

    def has_checkpoints(self) -> bool:
        """Whether there is any checkpoint, whole or not."""
        return bool(self._folders(_STEP_FOLDER))

    def clear(self) -> None:
        """Delete what a run writes into the folder, and nothing else that may lie there."""
        for pattern in _OWN_FILES:
            for path in self.folder.glob(pattern):
                if path.is_symlink() or path.is_file():
                    path.unlink()
                else:
                    shutil.rmtree(path)

    def remove_unfinished(self) -> None:
        """Delete what a killed run left half written."""
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path)
        for path in self.folder.glob(f".{BEST}.*"):
            path.unlink()

    def _seal(self, folder: Path, state: RunState) -> None:
        files = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for name in files:
            _flush(folder / name)
        write_json(folder / STATE, {"state": asdict(state), "identity": self.identity, "files": files})

    def _folders(self, pattern: re.Pattern[str]) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if pattern.match(path.name) and path.is_dir())


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself; raises UserError where it is not whole."""
    try:
        saved = json.loads((path / STATE).read_text(encoding="utf-8"))
        state, identity, files = RunState(**saved["state"]), saved["identity"], saved["files"]
    except FileNotFoundError:
        raise UserError(
            f"{path} is no checkpoint: it has no {STATE}; give a folder step-… of checkpoints_dir"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint {path} is damaged: its {STATE} cannot be read; resume from another one") from None
    for name, expected in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or _digest(file) != expected["sha256"]:
            raise UserError(f"checkpoint {path} is damaged: {name} is not what was written; resume from another one")
    return Checkpoint(path, state, identity)


def restore(checkpoint: Checkpoint, *, stepper: Stepper, bank: Bank) -> None:
    """Load optimizer, schedule and bank; the weights come by loading the folder as a model."""
    try:
        stepper.load_state_dict(torch.load(checkpoint.path / "optimizer.pt", weights_only=True, map_location="cpu"))
        state = torch.load(checkpoint.path / "bank.pt", weights_only=True)
    except FileNotFoundError as problem:
        raise UserError(f"{checkpoint.path} cannot be resumed from: it has no {Path(problem.filename).name}") from None
    bank.load_state_dict({name: values.numpy() for name, values in state.items()})


# --- Files -----------------------------------------------------------------------------------------------------------


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` on a clean exit and vanishes on an exception."""
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}-{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for folder in (unfinished, *(child for child in unfinished.rglob("*") if child.is_dir())):
            sync_folder(folder)
        if path.exists():  # of a run that was killed after it, or damaged: this run came back to the same step
            shutil.rmtree(path)
        unfinished.replace(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _save_tensors(path: Path, values: dict[str, Any]) -> None:
    # Through memory, so that a full disk is an OSError with its number, not torch's own exception.
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_bytes(path, buffer.getvalue())


def _as_tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _sha256).hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


_sha256: Callable[[], Any] = hashlib.sha256
