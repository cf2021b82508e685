"""llm_cluster.py from the command line: files in and out, runs that go on, budgets, kills, and what is refused."""

from __future__ import annotations

import gzip
import json
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from browser import browser, open_page  # noqa: F401
from llm_brain import TruthBrain
from llm_requests import labels_by_text, requests_frame
from llm_runs import start_run
from llm_servers import LlmServer, fault, rates

import llm_cluster
from common.commit import OutputLock

ROOT = Path(__file__).resolve().parents[1]
SECRET = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@pytest.fixture
def frame() -> pd.DataFrame:
    return requests_frame(48)


@pytest.fixture
def server(frame):
    with LlmServer(TruthBrain(labels_by_text(frame))) as started:
        yield started


class Job:
    """A config file, its input and its output under one folder."""

    def __init__(self, folder: Path, server: LlmServer | None, frame: pd.DataFrame, **keys) -> None:
        self.folder = folder
        self.output = folder / "out"
        frame.to_csv(folder / "requests.csv", index=False)
        url = server.url("openai") if server else "http://127.0.0.1:9/v1"
        llm = {"provider": "openai", "model": "test-model", "url": url, "retry_wait_s": 0.01, "concurrency": 4}
        own = {"input": str(folder / "requests.csv"), "output_dir": str(self.output), "label_column": "label"}
        own |= {"embedder": "words", "batch_size": 24, "qa_sample": 3}
        self.sections = {"llm": llm | keys.pop("llm", {}), "llm_cluster": own | keys}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(self.sections, allow_unicode=True))

    def run(self, *arguments: str) -> int:
        return llm_cluster.main(["--config", str(self.config), *arguments])

    def results(self, batch_id: str = "batch-001") -> pd.DataFrame:
        return pd.read_parquet(self.output / "results" / f"{batch_id}.parquet")

    def report(self, batch_id: str = "batch-001") -> dict:
        return json.loads((self.output / "reports" / f"{batch_id}.json").read_text())

    def names(self) -> list[str]:
        """The clusters of the registry by id and name, without the times of day."""
        clusters = json.loads((self.output / "clusters.json").read_text())["clusters"]
        return [(c["cluster_id"], c["name"], c["count"], c["aliases"]) for c in clusters]


# --- a batch ---------------------------------------------------------------------------------------------------------


def test_a_batch_leaves_all_its_files(tmp_path, server, frame, capsys):
    job = Job(tmp_path, server, frame)
    assert job.run() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["coverage"] == 100.0 and printed["clusters"] == 12 and printed["calls"] == len(server.calls)
    results = job.results()
    assert list(results.columns) == [
        *("request_id", "cluster_id", "name", "confidence", "rationale", "decision", "batch", "batch_number"),
    ]
    assert list(results["request_id"]) == list(frame["request_id"])
    assert set(results["batch"]) == {"batch-001"} and list(results["batch_number"].unique()) == [1, 2]
    as_csv = pd.read_csv(job.output / "results" / "batch-001.csv")
    assert list(as_csv["cluster_id"]) == list(results["cluster_id"])
    assert (job.output / "batches" / "batch-001.parquet").exists()
    report = job.report()
    assert report["coverage"] == 100.0
    assert report["scores"]["ours"]["ari"] == 1.0
    assert report["scores"]["kmeans_same_k"]["n_clusters"] == 12  # the $0 baseline stands beside ours
    assert report["quality"]["cohesion"] == 5.0 and report["quality"]["separation"] == 1.0
    assert report["quality"]["names_true"] == 1.0 and report["quality"]["names_distinct"]
    assert report["failures"]["attempts"] == {} and report["failures"]["quarantined"] == 0
    assert sum(step["calls"] for step in report["steps"].values()) == len(server.calls)
    assert "<script>alert" not in (job.output / "reports" / "batch-001.html").read_text()


def test_prompts_are_logged_without_keys_and_can_be_switched_off(tmp_path, server, frame):
    server.require_key = False
    job = Job(tmp_path, server, frame)
    assert job.run() == 0
    lines = [json.loads(line) for line in (job.output / "prompts" / "batch-001.jsonl").read_text().splitlines()]
    assert len(lines) >= server.n_calls()
    assert {"step", "messages", "latency_s"} <= lines[-1].keys()
    for path in job.output.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert job.run("llm_cluster.batch_id=b2", "llm_cluster.log_prompts=false") == 0
    assert not (job.output / "prompts" / "b2.jsonl").exists()


def test_the_same_again_does_nothing_and_another_key_is_refused(tmp_path, server, frame, capsys):
    job = Job(tmp_path, server, frame)
    assert job.run() == 0
    first = capsys.readouterr().out
    n_calls = len(server.calls)
    assert job.run() == 0
    assert capsys.readouterr().out == first
    assert job.run("llm.concurrency=2", "llm.max_calls=9999") == 0  # changes no result
    assert len(server.calls) == n_calls
    assert job.run("llm_cluster.shortlist=5") == 1
    assert "shortlist: 12 -> 5" in capsys.readouterr().err
    assert job.run("llm_cluster.shortlist=5", "--overwrite") == 0
    assert {count for _, _, count, _ in job.names()} == {4}  # counted once


def test_the_next_batch_goes_on_with_the_registry(tmp_path, server, frame):
    job = Job(tmp_path, server, frame)
    assert job.run("--limit", "24", "--batch-id", "monday") == 0
    ids = [row[0] for row in job.names()]
    assert job.run("--batch-id", "tuesday") == 0
    assert [row[0] for row in job.names()] == ids
    assert job.report("tuesday")["n_new_clusters"] == 0
    assert {row[2] for row in job.names()} == {2 + 4}
    assert job.run("--limit", "24", "--batch-id", "monday") == 0  # done, whatever came after


def test_a_registry_elsewhere_is_shared_and_copied(tmp_path, server, frame):
    job = Job(tmp_path, server, frame, registry_path=str(tmp_path / "shared" / "registry.json"))
    assert job.run() == 0
    assert (tmp_path / "shared" / "registry.json").read_bytes() == (job.output / "clusters.json").read_bytes()


# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv.zip", "csv.gz", "jsonl", "parquet"])
def test_any_kind_of_table(tmp_path, server, frame, kind):
    small = frame.head(12).drop(columns="request_id").rename(columns={"text": "message"})
    path = tmp_path / f"data.{kind}"
    if kind == "csv.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.csv", small.to_csv(index=False))
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(small.to_csv(index=False).encode()))
    elif kind == "jsonl":
        small.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        small.to_parquet(path)
    job = Job(tmp_path, server, frame)
    assert job.run("--input", str(path), "--text-column", "message", "--batch-id", "b") == 0
    assert list(job.results("b")["request_id"][:2]) == ["req-b-0", "req-b-1"]
    assert job.report("b")["coverage"] == 100.0


def test_context_columns_go_along(tmp_path, server, frame):
    job = Job(tmp_path, server, frame.assign(channel="телефон"), context_columns=["channel"])
    assert job.run("--limit", "12") == 0
    judged = [call.prompt for call in server.work() if call.schema_name == "judge"]
    assert all('"context":{"channel":"телефон"}' in prompt for prompt in judged)


def test_odd_rows_stay_and_are_counted(tmp_path, server, frame):
    frame.loc[0, "text"] = ""
    frame.loc[1, "text"] = "long " * 20_000
    frame.loc[3, "request_id"] = frame.loc[2, "request_id"]
    job = Job(tmp_path, server, frame)
    assert job.run() == 0
    counted = job.report()["requests"]
    assert (counted["total"], counted["empty"], counted["cut"], counted["duplicate_request_ids"]) == (48, 1, 1, 1)
    assert list(job.results()["request_id"]) == list(frame["request_id"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["llm_cluster.text_column=body"],
            1,
            r"requests.csv has no column 'body' \(has: request_id, text, label\); set llm_cluster.text_column",
        ),
        (["--input", "nowhere.csv"], 1, "nowhere.csv does not exist"),
        (["llm_cluster.shortlst=5"], 2, "did you mean 'shortlist'"),
        (["llm_cluster.shortlist=0"], 2, "should be a number from 1 on, or all"),
        (["llm.provider=olama"], 1, "did you mean 'ollama'"),
        (["llm_cluster.mode=clip"], 2, "llm_cluster.mode"),
        (["llm_cluster.input=null"], 2, "llm_cluster.input: required"),
        (["--batch-id", "../escape"], 2, "batch_id"),
    ],
)
def test_mistakes_are_named(tmp_path, server, frame, capsys, arguments, code, message):
    assert Job(tmp_path, server, frame).run(*arguments) == code
    assert re.search(message, capsys.readouterr().err)


# --- providers that refuse -------------------------------------------------------------------------------------------


def test_no_server_wrong_model_and_wrong_key_end_the_run_with_advice(tmp_path, server, frame, capsys):
    assert Job(tmp_path, None, frame, llm={"max_attempts": 2, "timeout_s": 2}).run() == 1
    assert "127.0.0.1:9" in capsys.readouterr().err
    server.models = {"another"}
    assert Job(tmp_path, server, frame).run() == 1
    assert "test-model" in capsys.readouterr().err
    server.models, server.require_key = None, True
    assert Job(tmp_path, server, frame).run() == 1
    said = capsys.readouterr().err
    assert "OPENAI_API_KEY" in said and SECRET not in said
    assert server.n_calls() == 0


def test_too_many_failures_exit_1_and_can_be_mended(tmp_path, server, frame, capsys):
    server.faults = lambda call, n: fault("prose") if call.schema_name == "judge" and '"R0005"' in call.prompt else None
    job = Job(tmp_path, server, frame, max_failure_rate=0.01)
    assert job.run() == 1
    assert "1 of 48 requests (2.1%) are quarantined" in capsys.readouterr().err
    assert job.results()["decision"].value_counts().to_dict() == {"assign": 47, "quarantined": 1}
    failures = job.report()["failures"]
    assert failures["quarantined"] == 1 and failures["attempts"] == {"invalid_json": 2}
    assert failures["quarantined_requests"][0]["request_id"] == "R0005"
    server.faults = None
    n_calls = len(server.calls)
    assert job.run("llm.retry_quarantined=true") == 0
    assert len(server.calls) - n_calls < 25  # the one request, and the checks that see it
    assert job.report()["coverage"] == 100.0
    assert {row[2] for row in job.names()} == {4}


# --- budgets, plans and kills ----------------------------------------------------------------------------------------


def test_a_dry_run_asks_nothing_writes_nothing_and_is_about_right(tmp_path, server, frame, capsys):
    job = Job(tmp_path, server, frame, llm={"prices": {"default": {"input": 1.0, "output": 2.0}}})
    assert job.run("--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert server.calls == [] and not job.output.exists()
    assert plan["cost"] == pytest.approx((plan["tokens_in"] + 2 * plan["tokens_out"]) / 1e6)
    assert set(plan["calls"]) >= {"proposer", "judge", "merge", "cohesion", "name_check"}
    assert job.run() == 0
    spent = job.report()["cost"]
    assert 0.6 < plan["total_calls"] / spent["calls"] < 1.6
    assert 0.5 < plan["tokens_in"] / spent["tokens_in"] < 2


def test_a_budget_stops_and_a_higher_one_goes_on(tmp_path, server, frame, capsys):
    other = tmp_path / "unlimited"
    other.mkdir()
    assert Job(other, server, frame).run() == 0
    n_all = len(server.calls)
    server.calls.clear()
    capsys.readouterr()
    job = Job(tmp_path, server, frame)
    for limit in (20, 25):  # the second run pays for what the first one did not
        assert job.run(f"llm.max_calls={limit}") == 1
        said = capsys.readouterr().err
        assert f"llm.max_calls={limit} is used up" in said and re.search(r"of 48 requests are done, \d+ are left", said)
        assert not (job.output / "clusters.json").exists()
    assert job.run() == 0
    assert len(server.calls) == n_all
    pd.testing.assert_frame_equal(job.results(), Job(other, server, frame).results())


N_KILLS = 20


def test_killed_at_random_moments_nothing_is_paid_twice(tmp_path, frame):
    """Twenty kills from the first call to the last; afterwards the result is that of a run nobody disturbed."""
    dice = random.Random(5)
    drawn = rates(malformed=0.05, rate_limited=0.03)

    def faults(call, n_seen):
        # What is malformed must not depend on how often a killed run had sent the prompt; a 429 changes nothing.
        first, now = drawn(call, 0), drawn(call, n_seen)
        return first if first and first.kind == "malformed" else now if now and now.kind != "malformed" else None

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    with LlmServer(TruthBrain(labels_by_text(frame), wrong=0.05), faults=faults) as calm:
        whole = Job(tmp_path / "whole", calm, frame)
        assert whole.run() == 0
        n_needed = len(calm.calls)
    with LlmServer(TruthBrain(labels_by_text(frame), wrong=0.05), faults=faults, delay_s=0.01) as server:
        job = Job(tmp_path / "killed", server, frame)
        n_killed = 0
        for n_calls in sorted(dice.sample(range(1, n_needed), N_KILLS)):
            process, receiver = start_run(["--config", str(job.config)])
            while len(server.calls) < n_calls and not receiver.poll(0.002):
                pass
            time.sleep(dice.uniform(0, 0.02))
            process.kill()
            process.join()
            n_killed += process.exitcode == -signal.SIGKILL
        assert n_killed >= N_KILLS - 2  # the last of them may come after the end
        process, receiver = start_run(["--config", str(job.config)])
        assert receiver.recv() == 0
        process.join()
        answered = Counter(call.prompt for call in server.calls if call.answered)
        n_sent = len(server.calls)
    pd.testing.assert_frame_equal(job.results(), whole.results())
    assert job.names() == whole.names()
    # What was in flight at a kill (4 calls at most) may be asked again; what had arrived is never.
    assert n_sent <= n_needed + N_KILLS * 4
    assert sum(n - 1 for n in answered.values()) <= N_KILLS * 4


# --- the registry on the disk ----------------------------------------------------------------------------------------


def test_a_registry_cut_in_half_is_replaced_by_the_one_before_loudly(tmp_path, server, frame, capsys):
    job = Job(tmp_path, server, frame)
    assert job.run("--limit", "24", "--batch-id", "a") == 0
    assert job.run("--batch-id", "b") == 0
    path = job.output / "clusters.json"
    path.write_bytes(path.read_bytes()[:500])
    capsys.readouterr()
    assert job.run("--batch-id", "c") == 0
    assert "DAMAGED" in capsys.readouterr().err
    assert "DAMAGED" in job.report("c")["warnings"][0]
    assert {row[2] for row in job.names()} == {2 + 4}  # of a and c


def test_a_registry_of_another_version_is_refused(tmp_path, server, frame, capsys):
    job = Job(tmp_path, server, frame)
    job.output.mkdir()
    (job.output / "clusters.json").write_text('{"format": 99, "clusters": []}')
    assert job.run() == 1
    assert "has format 99" in capsys.readouterr().err
    assert server.n_calls() == 0


def test_two_runs_on_one_registry_or_output_exclude_each_other(tmp_path, server, frame, capsys):
    job = Job(tmp_path, server, frame, registry_path=str(tmp_path / "registry.json"))
    with OutputLock(tmp_path / "registry.json"):
        assert job.run() == 75
    with OutputLock(job.output):
        assert job.run() == 75
    assert "is being written by pid" in capsys.readouterr().err
    assert job.run() == 0


def test_a_batch_whose_registry_moved_on_is_not_resumed(tmp_path, server, frame, capsys):
    job = Job(tmp_path, server, frame)
    assert job.run("--batch-id", "a", "llm.max_calls=20") == 1
    assert job.run("--batch-id", "b") == 0
    assert job.run("--batch-id", "a") == 1
    assert "was changed since batch a began" in capsys.readouterr().err
    assert job.run("--batch-id", "a", "--overwrite") == 0
    assert {row[2] for row in job.names()} == {8}


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_without_a_config_takes_the_environment(tmp_path, server, frame, monkeypatch, capsys):
    frame.to_csv("data.csv", index=False)
    (tmp_path / ".env").write_text(f'OPENAI_API_URL="{server.url("openai")}"\nMAX_CLUSTERS_PER_BATCH=5\n')
    monkeypatch.setenv("DEFAULT_LLM_PROVIDER", "openai")
    arguments = ["--input", "data.csv", "--text-column", "text", "--limit", "24", "llm_cluster.embedder=words"]
    assert llm_cluster.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["coverage"] == 100.0
    assert (tmp_path / "runs" / "llm_cluster" / "clusters.json").exists()
    proposer = next(call for call in server.work() if call.schema_name == "proposer")
    assert "5 at most" in proposer.prompt


def test_importing_and_help_load_nothing_heavy():
    code = "import sys, llm_cluster; print({'torch', 'pandas', 'sklearn', 'openai', 'scipy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    done = subprocess.run([sys.executable, "llm_cluster.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--dry-run" in done.stdout and "--text-column" in done.stdout


def test_the_extractive_provider_needs_no_server(tmp_path, frame):
    job = Job(tmp_path, None, frame, llm={"provider": "extractive", "model": None, "url": None})
    assert job.run("--limit", "24", "llm_cluster.qa_sample=1") == 0
    report = job.report()
    assert report["coverage"] > 80
    assert report["failures"]["quarantined"] == 0
    assert (job.output / "reports" / "batch-001.html").stat().st_size > 10_000


def test_markup_in_requests_and_names_does_nothing_in_the_report(tmp_path, browser):  # noqa: F811
    hostile = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"
    frame = requests_frame(24)
    frame["text"] = frame["text"] + hostile

    class Marked(TruthBrain):
        def proposer(self, requests, clusters, prompt):
            answer = super().proposer(requests, clusters, prompt)
            return {**answer, "clusters": [{**c, "name": c["name"] + hostile} for c in answer["clusters"]]}

    with LlmServer(Marked(labels_by_text(frame))) as server:
        job = Job(tmp_path, server, frame)
        assert job.run() == 0
    page = open_page(browser, job.output / "reports" / "batch-001.html")
    assert page.errors == [] and page.requests == []
    assert browser.title == "Request clusters: batch-001"
    assert "card arrival" in browser.find_element("tag name", "main").text
