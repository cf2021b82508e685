"""Where metrics go: always metrics.jsonl; TensorBoard, MLflow and neptune's offline files by key.

A tracker has three verbs: start, log, finish. One that fails warns once and is dropped; training goes on. The lines of
metrics.jsonl hold no times, so that a run that was resumed has the lines of one that was not.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.commit import make_folder
from common.config import UserError
from metric_parts.settings import MLflowSettings, NeptuneSettings, TensorBoardSettings, TrainerSettings

log = logging.getLogger(__name__)

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """Something that keeps metrics."""

    def start(self, config: dict[str, Any], *, step: int) -> None:
        """Begin, or go on from `step`, with the flat settings of the run."""

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Keep the metrics of a step."""

    def finish(self) -> None:
        """End, with everything written."""


class JsonLines:
    """`metrics.jsonl`: one line a call of `log`; what it cannot write ends the run, for it is the record."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def go_on(self, n_bytes: int) -> None:
        """Cut the file to the length that a checkpoint knows: what came after it will be written again."""
        make_folder(self.path.parent)
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < n_bytes:
            raise UserError(
                f"{self.path} is shorter than the checkpoint says; it was changed since, start with --overwrite"
            )
        with self.path.open("ab") as file:
            file.truncate(n_bytes)

    def log(self, metrics: Metrics, *, step: int) -> int:
        """Append a line and return the length of the file; NaN becomes null, as JSON has none."""
        values = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
        with self.path.open("ab") as file:
            file.write((json.dumps({"step": step, **values}) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


class TensorBoardTracker:
    """Event files for TensorBoard."""

    def __init__(self, settings: TensorBoardSettings, folder: Path) -> None:
        self._folder = settings.log_dir or str(folder / "tensorboard")

    def start(self, config: dict[str, Any], *, step: int) -> None:
        """Open the event file; events after `step`, of a run that was killed, are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=step + 1 if step else None)
        self._writer.add_text("config", "    " + json.dumps(config, indent=2).replace("\n", "\n    "))

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Add one scalar a metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the event file."""
        self._writer.close()


class MLflowTracker:
    """A run in a local store of MLflow."""

    def __init__(self, settings: MLflowSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = Path(settings.tracking_dir or folder / "mlflow").absolute()
        self._id_path = folder / "mlflow_run_id"

    def start(self, config: dict[str, Any], *, step: int) -> None:
        """Begin a run in the store, or go on with the one that was begun."""
        import mlflow

        make_folder(self._folder)
        mlflow.set_tracking_uri(f"sqlite:///{self._folder / 'mlflow.db'}")
        mlflow.set_experiment(self._settings.experiment)
        known = self._id_path.read_text() if step and self._id_path.exists() else None
        run = mlflow.start_run(run_id=known)
        self._id_path.write_text(run.info.run_id)
        if known is None:
            mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log the finite metrics, under names that MLflow allows."""
        import mlflow

        finite = {name.replace("@", "_at_"): value for name, value in metrics.items() if np.isfinite(value)}
        mlflow.log_metrics(finite, step=step)

    def finish(self) -> None:
        """End the run."""
        import mlflow

        mlflow.end_run()


class NeptuneTracker:
    """neptune's offline files: JSON lines that no service can take any more."""

    def __init__(self, settings: NeptuneSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder / "neptune"

    def start(self, config: dict[str, Any], *, step: int) -> None:
        """Begin an offline run; its files go where NEPTUNE_DATA_DIRECTORY says, else beside the checkpoints."""
        import neptune

        os.environ.setdefault("NEPTUNE_DATA_DIRECTORY", str(self._folder.absolute()))  # else it is the current folder
        self._run = neptune.init_run(
            project=self._settings.project,
            api_token=None,
            mode=self._settings.mode,
            name=self._settings.name,
            tags=self._settings.tags or None,
            source_files=[],
            capture_hardware_metrics=False,
            capture_stdout=False,
            capture_stderr=False,
        )
        self._run["config"] = {name: str(value) for name, value in config.items()}

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Append to one series a metric."""
        for name, value in metrics.items():
            if np.isfinite(value):
                self._run[name].append(value, step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.stop()


class Trackers:
    """All trackers but the record itself, each on its own: one that fails is dropped."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def start(self, config: dict[str, Any], *, step: int) -> None:
        """Start each tracker."""
        self._each(lambda tracker: tracker.start(config, step=step))

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log to each tracker."""
        self._each(lambda tracker: tracker.log(metrics, step=step))

    def finish(self) -> None:
        """Finish each tracker."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except ImportError as problem:
                self._drop(name, f"{problem}; to use it: pip install {name}")
            except Exception as problem:  # whatever a tracker's library does, training is worth more
                self._drop(name, f"{type(problem).__name__}: {problem}")

    def _drop(self, name: str, reason: str) -> None:
        del self._trackers[name]
        log.warning(
            "tracker %s is switched off, training goes on without it (%s)", name, " ".join(reason.split())[:300]
        )


class Record:
    """metrics.jsonl, and the trackers beside it."""

    def __init__(self, settings: TrainerSettings, *, folder: Path) -> None:
        self._lines = JsonLines(folder / "metrics.jsonl")
        self._trackers = make_trackers(settings, folder=folder)

    def start(self, config: dict[str, Any], *, step: int, n_bytes: int) -> None:
        """Begin, or go on from `step`, at which metrics.jsonl had `n_bytes`."""
        self._lines.go_on(n_bytes)
        self._trackers.start(config, step=step)

    def log(self, metrics: Metrics, *, step: int) -> int:
        """Keep the metrics of a step; returns the length of metrics.jsonl."""
        self._trackers.log(metrics, step=step)
        return self._lines.log(metrics, step=step)

    def finish(self) -> list[dict[str, Any]]:
        """End, and return all lines."""
        self._trackers.finish()
        return self._lines.read()


def make_trackers(settings: TrainerSettings, *, folder: Path) -> Trackers:
    """The trackers that the settings switch on; their libraries are imported when they start."""
    trackers: dict[str, Tracker] = {}
    if settings.tensorboard.enabled:
        trackers["tensorboard"] = TensorBoardTracker(settings.tensorboard, folder)
    if settings.mlflow.enabled:
        trackers["mlflow"] = MLflowTracker(settings.mlflow, folder)
    if settings.neptune.enabled:
        trackers["neptune"] = NeptuneTracker(settings.neptune, folder)
    return Trackers(trackers)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: `training.seed`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
