"""Mode clio as a whole: files, figures, runs that go on after a kill, budgets, odd input, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml
from clio_brain import BrainProvider, ClioBrain, topic_of
from clio_dialogues import REPLIES, TOPICS, generate, write_jsonl
from llm_runs import start_run
from llm_servers import LlmServer

import llm_cluster
from common.config import ConfigError, UserError
from llm_parts.clio.pipeline import check_clio, run_clio
from llm_parts.clio.settings import ClioSettings
from llm_parts.settings import LlmSettings

N_ROWS, N_TOPICS = 96, 4
# Small, and without a model to load: words are enough where a brain words the facets.
SMALL = {
    "embedding": {"sentence_model": "words"},
    "clustering": {"n_init": 1, "stability_runs": 1},
    "label_column": "topic",
    "n_clusters": 12,
    "levels": 1,
    "n_top": N_TOPICS,
    "min_cluster_size": 2,
    "min_unique_users": 1,
    "judge_sample": 3,
}
RESULT_FILES = (
    "taxonomy.json", "clusters.parquet", "facets.parquet", "hierarchy_comparison.csv", "map.png",
    "embedding_atlas.parquet", "report.html", "audit.json", "_SUCCESS",
)  # fmt: skip


class Job:
    """A run in a folder of its own, answered by a brain."""

    def __init__(self, folder, rows, *, brain=None, llm=None, **keys):
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "out"
        source = write_jsonl(folder / "dialogues.jsonl", rows)
        self.settings = ClioSettings(**{**SMALL, "input": str(source), "output_dir": str(self.output), **keys})
        self.llm = LlmSettings(**{"provider": "ollama", "concurrency": 2, **(llm or {})})
        self.provider = BrainProvider(brain or ClioBrain())

    def run(self, *, overwrite=False, **keys):
        settings = ClioSettings(**{**self.settings.model_dump(), **keys})
        return run_clio(settings, self.llm, overwrite=overwrite, progress=False, provider=self.provider)

    def clusters(self):
        return pq.read_table(self.output / "clusters.parquet").to_pylist()

    def facets(self):
        return pq.read_table(self.output / "facets.parquet").to_pylist()

    def audit(self):
        return json.loads((self.output / "audit.json").read_text())

    def report(self):
        return (self.output / "report.html").read_text()

    def files(self):
        return {name: (self.output / name).read_bytes() for name in RESULT_FILES if name != "_SUCCESS"}


@pytest.fixture(scope="module")
def rows():
    return generate(N_ROWS, n_topics=N_TOPICS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows):
    """A finished run, its result and the plan that was made before it."""
    job = Job(tmp_path_factory.mktemp("clio"), rows)
    job.plan = check_clio(job.settings, job.llm)
    assert not job.output.exists() and job.provider.prompts == []
    job.result = job.run()
    return job


# --- a run -----------------------------------------------------------------------------------------------------------


def test_all_files_are_there_and_say_the_same(finished, rows):
    assert all((finished.output / name).is_file() for name in RESULT_FILES)
    table = finished.clusters()
    assert [row["conversation_id"] for row in table] == [row["conversation_id"] for row in rows]
    in_clusters = [row for row in table if row["cluster_id"] >= 0]
    tree = json.loads((finished.output / "taxonomy.json").read_text())
    assert set(tree) == {"llm", "linkage"}
    for kind, root in tree.items():
        assert root["size"] == len(in_clusters) == finished.result["in_clusters"]
        sizes = {node["name"]: node["size"] for node in root["children"]}
        assert sizes == Counter(row[f"{kind}_level_1"] for row in in_clusters)
    names = {row["name"] for row in tree["llm"]["children"]}
    assert len(names) == finished.result["top_clusters"]["llm"]
    assert finished.facets()[0]["language"] == rows[0]["language"]
    assert "The two hierarchies compared" in finished.report()


def test_dialogues_of_both_languages_come_under_their_topic(finished, rows):
    right = Counter()
    for row, placed in zip(rows, finished.clusters(), strict=True):
        name = placed["llm_level_1"]
        right[row["language"]] += name is not None and topic_of({"name": name}) == row["topic"]
    assert all(n >= 0.9 * N_ROWS / 2 for n in right.values()), right


def test_a_brain_that_does_not_read_reconstructs_nothing(tmp_path, rows):
    """The negative control of the figure above."""
    job = Job(tmp_path, rows[:48], brain=ClioBrain(wrong=1.0), n_clusters=8)
    job.run()
    right = [
        placed["llm_level_1"] is not None and topic_of({"name": placed["llm_level_1"]}) == row["topic"]
        for row, placed in zip(rows[:48], job.clusters(), strict=True)
    ]
    assert sum(right) / len(right) < 2 / len(TOPICS) + 0.1


def test_the_estimate_is_within_a_tenth(finished):
    assert finished.plan["calls"]["facets"] == N_ROWS
    asked = finished.provider.brain.n_calls.total()
    assert finished.result["calls"] == asked
    assert abs(finished.plan["total_calls"] - asked) <= 0.1 * asked
    calls = json.loads((finished.output / "calls.json").read_text())
    assert calls["estimated"]["calls"] == finished.plan["calls"]
    assert sum(step["calls"] for step in calls["this_run"]["steps"].values()) == asked


def test_the_estimate_knows_the_price_of_every_model(finished):
    prices = {"a": {"input": 1.0, "output": 0.0}, "b": {"input": 3.0, "output": 0.0}}
    llm = LlmSettings(provider="openai", model="a", prices=prices)
    settings = ClioSettings(**{**finished.settings.model_dump(), "judges": [{}, {"model": "b"}]})
    steps = {step["step"]: step for step in check_clio(settings, llm)["steps"]}
    assert steps["facets"]["cost"] == pytest.approx(steps["facets"]["tokens_in"] / 1e6)
    assert steps["judge_names"]["cost"] == pytest.approx(2 * steps["judge_names"]["tokens_in"] / 1e6)
    unpriced = check_clio(settings, LlmSettings(provider="openai", model="c"))
    assert unpriced["cost"] is None and unpriced["total_calls"] > 96


def test_a_finished_run_is_left_alone_and_another_configuration_refused(finished):
    before = len(finished.provider.prompts)
    assert finished.run()["base_clusters"] == finished.result["base_clusters"]
    with pytest.raises(UserError, match=r"another configuration \(clio.n_top: 4 -> 5\)"):
        finished.run(n_top=5)
    assert len(finished.provider.prompts) == before


# --- kills, budgets, failures ----------------------------------------------------------------------------------------


def test_stopped_by_budgets_a_run_goes_on_and_leaves_the_same_files(finished, rows, tmp_path):
    job = Job(tmp_path, rows)
    n_all = finished.provider.brain.n_calls.total()
    for limit in (40, 100):
        job.llm = job.llm.model_copy(update={"max_calls": limit})
        with pytest.raises(UserError, match=rf"llm.max_calls={limit} is used up.*Left to do: .*judge_"):
            job.run()
        assert not (job.output / "_SUCCESS").exists()
    job.llm = job.llm.model_copy(update={"max_calls": None})
    job.run()
    assert job.provider.brain.n_calls.total() == n_all
    different = [name for name, content in job.files().items() if content != finished.files()[name]]
    assert different == []


def test_killed_with_calls_in_flight_no_others_are_asked_twice(finished, rows, tmp_path):
    """Over HTTP and two at a time; test_clio_kill.py kills in every step."""
    brain = ClioBrain()
    with LlmServer(brain, delay_s=0.005) as server:
        job = Job(tmp_path, rows)
        llm = {"provider": "ollama", "url": server.url("ollama"), "model": "m", "concurrency": 2}
        clio = job.settings.model_dump(mode="json")
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump({"llm": llm, "llm_cluster": {"mode": "clio"}, "clio": clio}))
        arguments = ["--config", str(config), "llm_cluster.progress=false"]
        process, receiver = start_run(arguments)
        while server.n_calls() < 60 and not receiver.poll(0.002):
            pass
        process.kill()
        process.join()
        assert llm_cluster.main(arguments) == 0
        answered = Counter(call.prompt for call in server.calls if call.answered and call.schema_name != "preflight")
        again = [prompt for prompt, n in answered.items() if n > 1]
        assert len(again) <= llm["concurrency"]  # those in flight may have been answered after the kill
    assert job.files()["clusters.parquet"] == finished.files()["clusters.parquet"]
    assert job.files()["taxonomy.json"] == finished.files()["taxonomy.json"]


def test_a_full_disk_ends_cleanly_and_the_run_goes_on(rows, tmp_path, monkeypatch):
    job = Job(tmp_path, rows[:24], n_clusters=4)
    real = os.fsync
    for n_writes in (3, 14):
        left = iter(range(n_writes))

        def fsync(descriptor, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr("os.fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            job.run()
        assert not (job.output / "_SUCCESS").exists()
    monkeypatch.setattr("os.fsync", real)
    job.run()
    assert job.provider.brain.n_calls["facets"] == 24
    assert all((job.output / name).is_file() for name in RESULT_FILES)
    assert [path.name for path in job.output.rglob("*.tmp")] == []


def test_too_many_refusals_end_with_an_error_and_mended_go_on(rows, tmp_path):
    class Refuser(ClioBrain):
        refuses = True

        def facets(self, tags, prompt, draw):
            refused = self.refuses and int(tags["dialogue"][-1]["content"][-2]) < 3
            return {"facets": []} if refused else super().facets(tags, prompt, draw)

    brain = Refuser()
    job = Job(tmp_path, rows[:40], brain=brain, n_clusters=8)
    with pytest.raises(UserError, match=r"of 40 dialogues \(.*\) are quarantined, more than clio.max_failure_rate"):
        job.run()
    errors = [row["error"] for row in job.facets()]
    assert all(error is None or error.startswith("schema: ") for error in errors)
    lost = [placed["cluster_id"] for placed, error in zip(job.clusters(), errors, strict=True) if error]
    assert lost and set(lost) == {-1} and not (job.output / "_SUCCESS").exists()
    brain.refuses = False
    job.llm = job.llm.model_copy(update={"retry_quarantined": True})
    n_before = brain.n_calls["facets"]
    assert job.run()["quarantined"] == 0
    assert brain.n_calls["facets"] - n_before == len(lost)
    assert {row["error"] for row in job.facets()} == {None}


# --- privacy ---------------------------------------------------------------------------------------------------------


def test_nothing_personal_is_sent_or_shown(rows, tmp_path):
    secrets = (
        "anna.k@example.com",
        "4111 1111 1111 1111",
        "DE89 3704 0044 0532 0130 00",
        "+49 30 1234567",
        "Annabella",
    )
    said = {"role": "user", "content": " ; ".join([*secrets, "<script>document.title='ran'</script></dialogue> ZEBRA"])}
    told = [{**row, "messages": [*row["messages"], said]} for row in rows[:40]]
    job = Job(tmp_path, told, mask_names=["annabella"], show_conversations=True, n_clusters=8)
    job.run()
    sent, shown = "\n".join(job.provider.prompts), job.report()
    for secret in secrets:
        assert secret not in sent and secret not in shown
    assert "[mail] ; [card] ; [iban] ; [phone] ; [name]" in sent
    assert job.audit()["masked"] == {"card": 40, "iban": 40, "mail": 40, "name": 40, "phone": 40}
    assert all(row["user_id"] not in sent for row in told)
    assert "ZEBRA" in shown and "<script>document.title" not in shown


def test_small_clusters_and_what_the_auditor_objects_to_are_dropped_and_counted(rows, tmp_path):
    class Auditor(ClioBrain):
        def privacy_audit(self, tags, prompt, draw):
            return {"score": 1 if "Tax" in prompt else 5}

    told = [{**row, "user_id": "same"} if row["topic"] == "Travel planning" else row for row in rows]
    job = Job(tmp_path, told, brain=Auditor(), n_clusters=24, min_cluster_size=3, min_unique_users=2)
    job.run()
    dropped = job.audit()["dropped"]
    assert dropped["clusters_too_small"] >= 1 and dropped["clusters_with_too_few_users"] >= 1
    assert dropped["base_clusters"] >= 1 and job.audit()["scores"]["1"] == dropped["base_clusters"]
    shown = (job.output / "taxonomy.json").read_text()
    assert "Tax" not in shown and "Travel" not in shown and "Cooking" in shown
    lost = sum(placed["cluster_id"] < 0 for placed in job.clusters())
    assert lost == dropped["conversations_in_them"] + dropped["conversations_in_base_clusters"]


def test_dialogues_are_not_shown_by_default(finished, rows):
    assert finished.facets()[0]["request"] in (finished.output / "report.html").read_text()
    assert all(reply not in finished.report() for reply in (*REPLIES["English"], *REPLIES["Russian"]))


# --- odd input -------------------------------------------------------------------------------------------------------


def silent(rows):
    return [{**row, "messages": []} for row in rows[:5]]


def one_language_short_and_strange(rows):
    """Russian alone; a third with one message, a third of unknown roles."""
    russian = [row["messages"] for row in rows if row["language"] == "Russian"][:24]
    strange = [[{**message, "role": "wizard"} for message in messages] for messages in russian[8:16]]
    return [{"messages": one} for one in [*(messages[:1] for messages in russian[:8]), *strange, *russian[16:]]]


def all_equal(rows):
    return [{**row, "messages": rows[0]["messages"]} for row in rows[:24]]


@pytest.mark.parametrize(
    ("change", "keys", "expected"),
    [
        (silent, {}, {"in_clusters": 0, "base_clusters": 0, "calls": 0}),
        (one_language_short_and_strange, {"n_clusters": 4, "label_column": None}, {"base_clusters": 4}),
        (all_equal, {}, {"in_clusters": 24, "base_clusters": 1}),
        (lambda rows: rows[:3], {"n_clusters": "auto", "min_cluster_size": 5}, {"in_clusters": 0, "base_clusters": 0}),
        (lambda rows: rows[:3], {"n_clusters": "auto", "min_cluster_size": 1}, {"in_clusters": 3, "quarantined": 0}),
        (lambda rows: rows[:1], {"min_cluster_size": 1}, {"in_clusters": 1, "base_clusters": 1}),
        (lambda rows: rows[:10], {"n_clusters": 50, "min_cluster_size": 1}, {"in_clusters": 10}),
        (lambda rows: rows[:40], {"levels": 10, "n_top": 2}, {"quarantined": 0}),
    ],
)  # fmt: skip
def test_odd_input_makes_a_whole_report(rows, tmp_path, change, keys, expected):
    given = change(rows)
    job = Job(tmp_path, given, **keys)
    result = job.run()
    assert {name: result[name] for name in expected} == expected
    assert all((job.output / name).is_file() for name in RESULT_FILES)
    assert len(job.clusters()) == len(given) == result["conversations"]
    assert ("nothing to show" in job.report()) == (result["base_clusters"] == 0)


def test_a_level_under_one_name_is_cut_otherwise_and_told(rows, tmp_path):
    class Lumper(ClioBrain):
        def hierarchy_propose(self, tags, prompt, draw):
            return {"names": ["Everything"]}

    job = Job(tmp_path, rows[:48], brain=Lumper())
    assert job.run()["top_clusters"]["llm"] > 1
    assert "cut by embeddings instead" in job.report()


def test_several_models_temperatures_and_ways_side_by_side(rows, tmp_path):
    job = Job(
        tmp_path,
        rows[:40],
        n_clusters=6,
        judges=[{}, {"temperature": 0.7}],
        extractors=[{"facet_prompt": "detailed"}],
        sampling_sweep={"temperatures": [0.5], "top_ps": [0.9]},
        compare_naming=["summarize", "centroid"],
        facets=[{"name": "request", "question": "?"}, {"name": "task", "question": "?", "weight": 0.5}],
    )
    plan = check_clio(job.settings, job.llm)
    result = job.run()
    assert abs(plan["total_calls"] - result["calls"]) <= 0.2 * result["calls"]  # few clusters, many ways
    for title in ("Extraction by several models", "Temperature and top_p", "Judges: how far they agree"):
        assert title in job.report(), title


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_with_no_model_at_all(rows, tmp_path, capsys):
    source = write_jsonl(tmp_path / "d.jsonl", rows[:12])
    config = tmp_path / "config.yaml"
    clio = {**SMALL, "output_dir": str(tmp_path / "out"), "n_clusters": 3, "judge_sample": 1, "n_truth_checks": 1}
    config.write_text(
        yaml.safe_dump({"llm": {"provider": "extractive"}, "llm_cluster": {"mode": "clio"}, "clio": clio})
    )
    arguments = ["--config", str(config), "--input", str(source), "llm_cluster.progress=false"]
    assert llm_cluster.main([*arguments, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["calls"]["facets"] == 12 and not (tmp_path / "out").exists()
    assert llm_cluster.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["conversations"] == 12 and result["base_clusters"] >= 1
    assert llm_cluster.main([*arguments, "clio.n_top=3"]) == 1
    assert "clio.n_top: 4 -> 3" in capsys.readouterr().err
    assert llm_cluster.main([*arguments, "clio.sweep.choose_by=nmi", "clio.label_column=null"]) in (0, 1)


def test_what_a_later_step_would_refuse_is_refused_at_once(rows, tmp_path):
    job = Job(tmp_path, rows[:12])
    with pytest.raises((ConfigError, UserError), match="clio.sweep"):
        job.run(sweep={"grid": {"dbscan_eps": [0.1]}})
    assert job.provider.prompts == []


def test_what_is_refused_leaves_the_folder_as_it_was(finished, rows, tmp_path):
    before = finished.files()
    with pytest.raises((ConfigError, UserError), match="clio.sweep"):
        finished.run(overwrite=True, sweep={"grid": {"dbscan_eps": [0.1]}})
    assert finished.files() == before and (finished.output / "_SUCCESS").exists()
    job = Job(tmp_path, rows[:12], n_clusters=3)
    with pytest.raises(UserError, match=r"dialogues.jsonl has no column 'intent' \(has: conversation_id"):
        job.run(label_column="intent")
    assert job.run()["conversations"] == 12  # not taken for another configuration


def test_a_judge_without_a_key_ends_the_run_before_anything_is_asked(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    job = Job(tmp_path, rows[:12], judges=[{}, {"provider": "openai"}])
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        job.run()
    assert job.provider.prompts == []
