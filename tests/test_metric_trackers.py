"""What the trackers call in their libraries, on stand-ins with the signatures of mlflow 3.18 and neptune 1.14.

Neither library is installed for the tests: each brings some hundred megabytes. Both adapters were tried on the real
ones.
"""

import sys
import types

import pytest

from metric_parts.curves import draw_curves
from metric_parts.settings import MLflowSettings, NeptuneSettings
from metric_parts.trackers import MLflowTracker, NeptuneTracker, Trackers

METRICS = {"train/loss": 1.5, "val/recall@5": 0.25, "bank/intra_cosine": float("nan")}


class MLflow(types.ModuleType):
    """The functions that the adapter calls; like the real ones, they refuse names with an @ and unknown runs."""

    def __init__(self):
        super().__init__("mlflow")
        self.store = None
        self.runs = {}
        self.open = None

    def set_tracking_uri(self, uri):
        self.store = uri

    def set_experiment(self, experiment_name):
        self.experiment = experiment_name

    def start_run(self, run_id=None):
        assert self.open is None, "a run is open already"
        assert run_id is None or run_id in self.runs, "no such run"
        self.open = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.open, {"params": {}, "metrics": []})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.open))

    def log_params(self, params):
        assert not set(params) & set(self.runs[self.open]["params"]), "a parameter cannot be changed"
        assert all(len(value) <= 6000 for value in params.values())
        self.runs[self.open]["params"].update(params)

    def log_metrics(self, metrics, step=None):
        assert not [name for name in metrics if set(name) - set("abcdefghijklmnopqrstuvwxyz_/0123456789")]
        self.runs[self.open]["metrics"].append((step, metrics))

    def end_run(self):
        self.open = None


class Neptune(types.ModuleType):
    def __init__(self):
        super().__init__("neptune")
        self.values = {}

    def init_run(self, *, project, api_token, mode, name, tags, source_files, **capture):
        import os

        assert mode in ("offline", "debug") and not any(capture.values())
        self.options = {"project": project, "name": name, "tags": tags, "folder": os.environ["NEPTUNE_DATA_DIRECTORY"]}
        return self

    def __setitem__(self, name, value):
        self.values[name] = value

    def __getitem__(self, name):
        series = self.values.setdefault(name, [])
        return types.SimpleNamespace(append=lambda value, step: series.append((step, value)))

    def stop(self):
        self.is_stopped = True


def test_mlflow_keeps_one_run_over_a_kill_in_a_local_store(tmp_path, monkeypatch):
    mlflow = MLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for step in (0, 7):  # begun, and gone on with by another process
        trackers = Trackers({"mlflow": MLflowTracker(MLflowSettings(enabled=True, experiment="mine"), tmp_path)})
        trackers.start({"training.seed": 42, "long": "x" * 9000}, step=step)
        trackers.log(METRICS, step=step + 1)
        trackers.finish()
    assert mlflow.store == f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}" and mlflow.experiment == "mine"
    finite = {"train/loss": 1.5, "val/recall_at_5": 0.25}
    assert [run["metrics"] for run in mlflow.runs.values()] == [[(1, finite), (8, finite)]]
    assert mlflow.runs["run0"]["params"]["training.seed"] == "42" and mlflow.open is None


@pytest.mark.parametrize("mode", ["offline", "debug"])
def test_neptune_writes_beside_the_checkpoints_and_not_into_the_current_folder(tmp_path, monkeypatch, mode):
    neptune = Neptune()
    monkeypatch.setitem(sys.modules, "neptune", neptune)
    monkeypatch.setenv("NEPTUNE_DATA_DIRECTORY", "")  # so that it is taken back after the test
    monkeypatch.delenv("NEPTUNE_DATA_DIRECTORY")
    settings = NeptuneSettings(enabled=True, mode=mode, name="first", tags=["a"])
    trackers = Trackers({"neptune": NeptuneTracker(settings, tmp_path)})
    trackers.start({"training.seed": 42}, step=0)
    trackers.log(METRICS, step=3)
    trackers.finish()
    assert neptune.options["folder"] == str(tmp_path / "neptune") and neptune.options["tags"] == ["a"]
    assert neptune.values == {"config": {"training.seed": "42"}, "train/loss": [(3, 1.5)], "val/recall@5": [(3, 0.25)]}
    assert neptune.is_stopped


def test_a_tracker_whose_library_changed_is_dropped_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    mlflow, neptune = MLflow(), Neptune()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "neptune", neptune)
    monkeypatch.setenv("NEPTUNE_DATA_DIRECTORY", str(tmp_path))
    mlflow.log_metrics = lambda metrics: None  # no step any more
    trackers = Trackers(
        {
            "mlflow": MLflowTracker(MLflowSettings(enabled=True), tmp_path),
            "neptune": NeptuneTracker(NeptuneSettings(enabled=True), tmp_path),
        }
    )
    trackers.start({}, step=0)
    for step in (1, 2):
        trackers.log(METRICS, step=step)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1 and "tracker mlflow is switched off" in warnings[0] and "TypeError" in warnings[0]
    assert neptune.values["train/loss"] == [(1, 1.5), (2, 1.5)]


def test_the_picture_of_retrieval_shows_whatever_k_was_asked_for(tmp_path):
    lines = [{"step": step, "val/recall@3": 0.5, "val/recall@40": None} for step in (1, 2)]
    assert [path.name for path in draw_curves(lines, frozen={}, folder=tmp_path)] == ["retrieval.png"]
