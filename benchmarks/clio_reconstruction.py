"""How many dialogues Clio brings under the right topic, by language, with a scripted model that reads the topic.

    python benchmarks/clio_reconstruction.py --rows 2000 --out benchmarks/results/clio_reconstruction.json

2,000 invented dialogues over twenty topics, half in English and half in Russian (tests/clio_dialogues.py). The model
(tests/clio_brain.py) never sees a label: it words what a dialogue wants, names clusters by their members and sorts
names by their meaning. So the table says what the machinery loses of what a model reads, not how well a model reads.
The control is a model that reads every dialogue as one of a random topic. Calls are counted against the estimate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

import pyarrow.parquet as pq
from clio_brain import BrainProvider, ClioBrain, topic_of
from clio_dialogues import LANGUAGES, TOPICS, generate, write_jsonl
from machine import describe_machine, load_average, machine_lines

from llm_parts.clio.pipeline import check_clio, run_clio
from llm_parts.clio.settings import ClioSettings
from llm_parts.settings import LlmSettings

REACH, REACH_OF_A_LANGUAGE, REACH_OF_THE_ESTIMATE = 0.94, 0.92, 0.10
LLM = LlmSettings(provider="ollama")  # a name only: the brain answers in its place

Row = dict[str, Any]


def reconstruct(rows: list[Row], *, wrong: float) -> Row:
    """One run; the shares of dialogues whose top cluster bears the name of their topic, and the calls."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "dialogues.jsonl", rows)
        output = Path(folder) / "out"
        settings = ClioSettings(input=str(source), output_dir=str(output), label_column="topic", n_top=len(TOPICS))
        plan = check_clio(settings, LLM)
        result = run_clio(settings, LLM, progress=False, provider=BrainProvider(ClioBrain(wrong=wrong)))
        placed = pq.read_table(output / "clusters.parquet").to_pylist()
        steps = json.loads((output / "calls.json").read_text())["this_run"]["steps"]
    return {
        "model": "reads the topic" if wrong == 0 else "reads a random topic",
        **{kind: _shares(rows, placed, kind) for kind in ("llm", "linkage")},
        "base_clusters": result["base_clusters"],
        "levels": {kind: _level_sizes(placed, kind) for kind in ("llm", "linkage")},
        "estimated_calls": plan["total_calls"],
        "calls": result["calls"],
        "calls_by_step": {step: [n, steps[step]["calls"]] for step, n in plan["calls"].items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _shares(rows: list[Row], placed: list[Row], kind: str) -> dict[str, float]:
    """The share under the right top, of all and of each language; dialogues in no cluster are wrong."""
    right: Counter[str] = Counter()
    all_: Counter[str] = Counter()
    for row, place in zip(rows, placed, strict=True):
        name = place[f"{kind}_level_1"]
        is_right = name is not None and topic_of({"name": name}) == row["topic"]
        for group in ("all", row["language"]):
            right[group] += is_right
            all_[group] += 1
    return {group: round(right[group] / all_[group], 4) for group in ("all", *LANGUAGES)}


def _level_sizes(placed: list[Row], kind: str) -> list[int]:
    """Clusters of each level of a hierarchy, the top first."""
    columns = [name for name in placed[0] if name.startswith(f"{kind}_level_")]
    return [len({row[name] for row in placed} - {None}) for name in columns]


def to_markdown(results: list[Row], machine: list[str]) -> str:
    """The table, and what it was measured on."""
    lines = [
        "# Clio: reconstruction of topics\n",
        *machine,
        "",
        "| model | hierarchy | levels | all | English | Russian | calls | estimated | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        for kind in ("llm", "linkage"):
            levels = " > ".join(map(str, [*row["levels"][kind], row["base_clusters"]]))
            shares = " | ".join(f"{row[kind][group]:.1%}" for group in ("all", *LANGUAGES))
            lines.append(
                f"| {row['model']} | {kind} | {levels} | {shares} | {row['calls']} | {row['estimated_calls']} | "
                f"{row['seconds']} |"
            )
    ours = results[0]["llm"]
    off = abs(results[0]["estimated_calls"] / results[0]["calls"] - 1)
    lines += [
        "",
        "The shares are of dialogues whose cluster of the top level bears the name of their topic; levels go from the",
        "top to the base clusters.",
        "",
        f"Reach: all {ours['all']:.1%} (wanted {REACH:.0%}), the lower language "
        f"{min(ours[language] for language in LANGUAGES):.1%} (wanted {REACH_OF_A_LANGUAGE:.0%}), estimate off by "
        f"{off:.1%} (wanted {REACH_OF_THE_ESTIMATE:.0%} at most).",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code, 1 where a reach is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write, and the same as .md beside it")
    options = parser.parse_args(arguments)
    rows = generate(options.rows, seed=options.seed)
    load = load_average()
    results = [reconstruct(rows, wrong=wrong) for wrong in (0.0, 1.0)]
    text = to_markdown(results, [*machine_lines(describe_machine()), f"load at the start: {load}"])
    print(text)
    if options.out:
        options.out.write_text(json.dumps({"machine": describe_machine(), "load": load, "results": results}, indent=1))
        options.out.with_suffix(".md").write_text(text)
    ours = results[0]["llm"]
    is_reached = ours["all"] >= REACH and min(ours[language] for language in LANGUAGES) >= REACH_OF_A_LANGUAGE
    is_near = abs(results[0]["estimated_calls"] / results[0]["calls"] - 1) <= REACH_OF_THE_ESTIMATE
    return 0 if is_reached and is_near else 1


if __name__ == "__main__":
    sys.exit(main())
