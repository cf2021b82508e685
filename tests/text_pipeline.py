"""The six text stages on tiny input, run as processes that can be killed: what the pipeline's tests share."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.tiny_encoder import save_tiny_encoder, training_rows

ROOT = Path(__file__).resolve().parent.parent
N_SHARDS = 3

# stage -> script, and what its command adds
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "supervise": ("cluster_supervise", ()),
    "pca": ("cluster_normalize_and_pca", ()),
    "train": ("cluster_train_clusters", ()),
    "predict": ("cluster_train_clusters", ("train.run_mode=predict",)),
    "purity": ("cluster_purity_counter", ()),
    "dataset": ("cluster_update_dataset", ()),
}
STAGE_NAMES = tuple(STAGES)


def stage_before(stage: str) -> str:
    """The state from which a stage starts: the one that the stage before it leaves."""
    index = STAGE_NAMES.index(stage)
    return STAGE_NAMES[index - 1] if index else "empty"


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    exit_code: int  # negative: the signal that killed it
    stdout: str
    stderr: str
    touches: list[tuple[str, str]]  # (kind, path under the work folder), in order
    pid: int

    @property
    def error(self) -> str:
        """The error line, without its `error: `; fails the test where there is none or a traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        return lines[0].removeprefix("error: ")


class TextPipeline:
    """A folder with input, model, config and outputs of the six stages, and a server that runs their commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.states = folder / "states"
        self.model = save_tiny_encoder(folder / "model", dropout=0.0)
        self.input = write_requests(folder / "input" / "requests.parquet")
        self.config = write_config(folder / "clustering.yaml", self.work, input_path=self.input, model=self.model)
        # Most stages need no torch, and a small process forks fast.
        self._large, self._small = _start_server(self.model), _start_server()
        for server in (self._large, self._small):
            assert server.stdout and server.stdout.readline() == "ready\n", "the server of stages did not start"

    def close(self) -> None:
        """End the servers."""
        for server in (self._large, self._small):
            assert server.stdin and server.stdout
            server.stdin.close()
            server.wait(timeout=60)
            server.stdout.close()

    # --- commands

    def run(self, stage: str, *arguments: str, fault: dict[str, Any] | None = None, **limits: Any) -> Outcome:
        """Run one stage's command as a process of its own and wait for its end."""
        return _outcome(self._ask(self._request(stage, arguments) | {"do": "run", "fault": fault, **limits}))

    def start(self, stage: str, *arguments: str) -> dict[str, Any]:
        """Start one stage's command and return at once; `finish` waits for it."""
        request = self._request(stage, arguments)
        return {"script": request["script"], **self._ask(request | {"do": "start"})}

    def finish(self, started: dict[str, Any]) -> Outcome:
        """Wait for a command that `start` started."""
        return _outcome(self._ask({"do": "wait", **started}))

    def run_all(self, stages: Sequence[str] = STAGE_NAMES, *arguments: str) -> dict[str, Outcome]:
        """Run stages one after the other; each must succeed."""
        outcomes = {}
        for stage in stages:
            outcomes[stage] = self.run(stage, *arguments)
            assert outcomes[stage].exit_code == 0, outcomes[stage].stderr
        return outcomes

    def _request(self, stage: str, arguments: Sequence[str]) -> dict[str, Any]:
        script, own = STAGES.get(stage, (stage, ()))
        argv = ["--config", str(self.config), *own, *arguments]
        return {"script": script, "argv": argv, "root": str(self.work)}

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        needs_torch = request["script"] in ("cluster_supervise", "cluster_train_clusters")
        server = self._large if needs_torch else self._small
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    # --- states of the work folder

    def save(self, name: str) -> None:
        """Keep the work folder as it is now."""
        shutil.copytree(self.work, self.states / name)

    def restore(self, name: str) -> None:
        """Make the work folder what it was when `name` was saved: "empty", or the name of the last stage that ran."""
        shutil.rmtree(self.work, ignore_errors=True)
        if name == "empty":
            self.work.mkdir()
        else:
            shutil.copytree(self.states / name, self.work)

    def state(self, name: str) -> dict[str, bytes]:
        """Every byte of a saved state."""
        return read_tree(self.states / name)

    def tree(self) -> dict[str, bytes]:
        """Every byte of the work folder."""
        return read_tree(self.work)


def read_tree(folder: Path) -> dict[str, bytes]:
    """The content of every file under a folder by relative path, except lock files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def times_of(folder: Path) -> dict[str, int]:
    """When every file under a folder was last changed, except lock files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def differing(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Names of the files that are missing, additional or not equal byte for byte."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def _start_server(*arguments: Path) -> subprocess.Popen[str]:
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "stage_server.py"), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **single, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _outcome(reply: dict[str, Any]) -> Outcome:
    touches = [tuple(json.loads(line)) for line in reply["trace"].splitlines()]
    return Outcome(reply["exit_code"], reply["stdout"], reply["stderr"], touches, reply["pid"])


# --- Input and config ------------------------------------------------------------------------------------------------


def requests_table(*, n_classes: int = 5, n_per_class: int = 18, seed: int = 0) -> pa.Table:
    """Requests whose words tell their class; some labels hidden, some texts unusable, and columns to carry along."""
    rows = training_rows(n_classes=n_classes, n_per_class=n_per_class)
    order = list(range(len(rows["text"])))
    random.Random(seed).shuffle(order)
    texts: list[Any] = [rows["text"][i] for i in order]
    labels: list[Any] = [rows["label"][i] for i in order]
    texts[3], texts[40], texts[71] = None, "  ", "pay \U0001f4b3 <script>alert(1)</script> \u202e money"
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(days=i) for i in order]
    return pa.table(
        {
            "request_id": pa.array(order, pa.int64()),
            "text": pa.array(texts, pa.string()),
            "label": pa.array([label if i % 5 < 2 else None for i, label in enumerate(labels)], pa.string()),
            "teacher_label": pa.array([label if i % 9 else None for i, label in enumerate(labels)], pa.string()),
            "created": pa.array(days, pa.date32()),
        }
    )


def write_requests(path: Path, table: pa.Table | None = None) -> Path:
    """Write the requests, or another table, as one parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(requests_table() if table is None else table, path)
    return path


def config_values(work: Path, *, input_path: Path | str, model: Path | str) -> dict[str, dict[str, Any]]:
    """Sections for all six stages, with outputs under `work`."""
    centroids = str(work / "centroids.parquet")
    return {
        "supervise": {
            "model_name_or_path": str(model),
            "input_parquet": str(input_path),
            "output_dir": str(work / "supervised"),
            "num_shards": N_SHARDS,
            "batch_size": 16,
            "device": "cpu",
            "progress": False,
        },
        "normalize_and_pca": {
            "input_dir": str(work / "supervised"),
            "output_dir": str(work / "pca"),
            "n_components": 8,
            "device": "cpu",
        },
        "train": {"input_dir": str(work / "pca"), "centroids_out": centroids, "n_clusters": 7, "num_workers": 1},
        "purity_counter": {"shards_dir": str(work / "pca"), "centroids_path": centroids},
        "update_dataset": {
            "shards_dir": str(work / "pca"),
            "centroids_path": centroids,
            "output_path": str(work / "dataset"),
            "metric_purity_threshold": 0.4,
            "classification_purity_threshold": 0.6,
        },
    }


def write_config(path: Path, work: Path, *, input_path: Path | str, model: Path | str, **changes: Any) -> Path:
    """Write the YAML of all six stages; `changes` are by section, e.g. train={"n_clusters": 3}."""
    values = config_values(work, input_path=input_path, model=model)
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
