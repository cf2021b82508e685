"""How far the estimate of Clio's calls is from the calls of small runs, where a cluster more or less weighs most.

    python benchmarks/clio_estimate.py --rows 60 100 130 200

Each number of dialogues is run twice: invented dialogues with the scripted model of the tests, and those of the
demonstration with the provider that asks no model. By the default settings the top level has 10 clusters, about as many
as there are base clusters here, so that the hierarchies are made in one run and left out in the next.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from clio_brain import BrainProvider, ClioBrain
from clio_dialogues import generate, write_jsonl
from machine import describe_machine, machine_lines

from demo.dialogues import generate_dialogues
from llm_parts.clio.pipeline import check_clio, run_clio
from llm_parts.clio.settings import ClioSettings
from llm_parts.settings import LlmSettings

REACH = 0.10


def measure(rows: list[dict[str, Any]], *, is_extractive: bool) -> dict[str, Any]:
    """One run: base clusters and calls, guessed before it and counted after it."""
    llm = LlmSettings(provider="extractive" if is_extractive else "ollama")
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "dialogues.jsonl", rows)
        settings = ClioSettings(input=str(source), output_dir=str(Path(folder) / "out"))
        plan = check_clio(settings, llm)
        provider = None if is_extractive else BrainProvider(ClioBrain())
        result = run_clio(settings, llm, progress=False, provider=provider)
    return {
        "model": "none (extractive)" if is_extractive else "scripted",
        "dialogues": len(rows),
        "base_clusters": (plan["guessed_base_clusters"], result["base_clusters"]),
        "calls": (plan["total_calls"], result["calls"]),
        "off": plan["total_calls"] / result["calls"] - 1,
    }


def main() -> int:
    """Measure and print; returns the exit code, 1 where an estimate is off by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[60, 100, 130, 200])
    options = parser.parse_args()
    print("\n".join(machine_lines(describe_machine())), "", sep="\n")
    print("| model | dialogues | base clusters, guessed and found | calls, estimated and made | off |")
    print("| --- | --- | --- | --- | --- |")
    worst = 0.0
    for n_rows in options.rows:
        for is_extractive in (False, True):
            rows = generate_dialogues(n_rows, seed=7) if is_extractive else generate(n_rows)
            row = measure(rows, is_extractive=is_extractive)
            (guessed, found), (estimated, made) = row["base_clusters"], row["calls"]
            print(
                f"| {row['model']} | {n_rows} | {guessed}, {found} | {estimated}, {made} | {row['off']:+.1%} |",
                flush=True,
            )
            worst = max(worst, abs(row["off"]))
    return int(worst > REACH)


if __name__ == "__main__":
    sys.exit(main())
