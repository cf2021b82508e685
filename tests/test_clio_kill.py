"""A run of mode clio is killed in each of its steps and started again: the same end, and nothing is asked twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from clio_dialogues import generate, write_jsonl
from clio_runs import answers_in

from tests.tuning_runs import TuningServer

CLIO = {
    "embedding": {"sentence_model": "words"},
    "clustering": {"n_init": 1, "stability_runs": 1},
    "n_clusters": 4,
    "levels": 1,
    "n_top": 2,
    "min_cluster_size": 2,
    "min_unique_users": 1,
    "judge_sample": 2,
}
STEPS = {
    *("facets", "cluster_name", "name_check", "privacy_audit"),
    *("hierarchy_propose", "hierarchy_dedupe", "hierarchy_assign", "hierarchy_rename", "linkage_rename"),
    *("judge_facets", "judge_names", "judge_placements", "judge_hierarchies"),
}
# Files about to get their names when the run is killed: what each step keeps, and of the result first, last and seal.
FILES = {
    *("vectors.safetensors", "clusters.safetensors", "map.safetensors"),
    *("audit.json", "report.html", "_SUCCESS"),
}


class Job:
    """One input with its output, run by a server that survives what it runs."""

    def __init__(self, folder: Path, server: TuningServer) -> None:
        folder.mkdir()
        self.folder, self.output, self._server = folder, folder / "out", server
        source = write_jsonl(folder / "dialogues.jsonl", generate(20, n_topics=4))
        values = {"clio": {**CLIO, "input": str(source), "output_dir": str(self.output)}}
        (folder / "config.yaml").write_text(yaml.safe_dump(values))

    def run(self, point: dict[str, Any]) -> dict[str, Any]:
        """One run that dies at a point; see clio_runs.py."""
        (self.folder / "die_at.json").write_text(json.dumps(point))
        return self._server.run(self.folder / "config.yaml", self.folder, script="tests.clio_runs")

    def answers(self) -> list[str]:
        return answers_in(self.folder / "answers.log")

    def files(self) -> dict[str, bytes]:
        """The result, without what tells of single runs."""
        own = {"calls.json", "prompts.jsonl", "_SUCCESS", "cache.sqlite"}
        paths = [path for path in self.output.iterdir() if path.is_file() and not path.name.startswith(".")]
        return {path.name: path.read_bytes() for path in paths if path.name not in own}


@pytest.fixture(scope="module")
def server() -> Iterator[TuningServer]:
    server = TuningServer()
    yield server
    server.close()


def points_of(touches: list[tuple[str, str]], steps: list[str]) -> Iterator[dict[str, Any]]:
    """In the order of a run: the middle answer of each step whenever it comes, and the files at which to kill."""
    middles, n_before = set(), 0
    for n_answers in [len(list(same)) for _, same in groupby(steps)]:
        middles.add(n_before + n_answers // 2)
        n_before += n_answers
    n_answers = 0
    for kind, path in touches:
        if kind == "open" and path == "answers.log":
            if n_answers in middles:
                yield {"answers": n_answers}
            n_answers += 1
        elif kind == "rename" and Path(path).name in FILES:
            yield {"file": Path(path).name}


def test_killed_in_every_step_nothing_is_asked_twice_and_the_end_is_the_same(server, tmp_path):
    whole = Job(tmp_path / "whole", server)
    reply = whole.run({})
    assert reply["exit_code"] == 0, reply["stderr"]
    steps = [json.loads(line)["step"] for line in (whole.output / "prompts.jsonl").read_text().splitlines()]
    points = list(points_of(reply["touches"], steps))
    assert set(steps) == STEPS and {point["file"] for point in points if "file" in point} == FILES
    assert len(points) == len(list(groupby(steps))) + len(FILES) >= len(STEPS) + 1 + len(FILES)  # audited twice
    job = Job(tmp_path / "killed", server)
    for point in points:
        killed = job.run(point)
        assert killed["exit_code"] == -signal.SIGKILL, (point, killed["stderr"])
    assert job.run({})["exit_code"] == 0
    assert len(set(job.answers())) == len(job.answers()) and sorted(job.answers()) == sorted(whole.answers())
    different = [name for name, content in whole.files().items() if job.files().get(name) != content]
    assert different == [] and job.files().keys() == whole.files().keys()
