"""Does the loop pay? Banking77 with 5 and 10 labels a class: labelled only, self-training, cluster pseudo-labels.

    python benchmarks/loop_banking77.py                       # every rule, three seeds, judged by a regression: minutes
    python benchmarks/loop_banking77.py --judge training      # the arms of the table, trained: hours on two cores
    python benchmarks/loop_banking77.py --judge training --classes 20 --seeds 0 --labels 10     # a reduced version

Labels are hidden, never rows: the rest of the training texts is the unlabelled part. Pseudo-labels come from the rules
of stage 6 (common/pseudo_labels.py) on k-means clusters and on a classifier of the frozen vectors. A judge learns from
the labelled rows with and without them and is scored on the official test part. Two controls tell noise from choice:
the same rows with their true labels, and as many random rows with theirs. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loop_parts.arms import TRAINED, gather_evidence
from benchmarks.loop_parts.corpus import ROOT, Corpus, draw_labelled, load_banking77
from benchmarks.loop_parts.judges import judge_by_regression, judge_by_training
from benchmarks.machine import describe_machine, load_average
from common.commit import write_json


def summarize(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of every number of every rule."""
    table = []
    for entries in zip(*runs, strict=True):
        row: dict[str, Any] = {"rule": entries[0]["rule"]}
        for key in entries[0]:
            values = [entry[key] for entry in entries if isinstance(entry[key], int | float)]
            if key != "rule" and values:
                row[key] = [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]
        table.append(row)
    return table


def print_table(title: str, table: list[dict[str, Any]]) -> None:
    """The table as Markdown."""
    keys = list(dict.fromkeys(key for row in table for key in row if key != "rule"))
    print(f"\n{title}\n\n| rule | {' | '.join(keys)} |\n| --- |{' --- |' * len(keys)}")
    for row in table:
        cells = [
            ""
            if key not in row
            else f"{row[key][0]:.3g}"
            if row[key][1] is None
            else "{:.3g} ± {:.2g}".format(*row[key])
            for key in keys
        ]
        print(f"| {row['rule']} | {' | '.join(cells)} |", flush=True)


def read_arguments() -> argparse.Namespace:
    """What is judged, how, and where it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", choices=("regression", "training"), default="regression")
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 10], help="visible labels a class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--classes", type=int, default=77, help="the first of the intents, by name")
    parser.add_argument("--clusters-per-class", type=float, default=3.0)
    parser.add_argument("--rules", default="", help="regression: only rules whose name has this text in it")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a trained arm, about")
    parser.add_argument("--arms", nargs="+", choices=TRAINED, default=list(TRAINED), help="training: which ones")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "loop_banking77")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/loop_banking77_JUDGE.json")
    return parser.parse_args()


def judge(
    train: Corpus, test: Corpus, options: argparse.Namespace, *, per_class: int, seed: int
) -> list[dict[str, Any]]:
    """What the chosen judge says of every rule or arm, for one draw of visible labels."""
    visible = draw_labelled(train.labels, per_class=per_class, seed=seed)
    n_clusters = round(options.clusters_per_class * len(train.names))
    evidence = gather_evidence(train, visible=visible, n_clusters=n_clusters, seed=seed)
    if options.judge == "regression":
        return judge_by_regression(train, test, evidence, seed=seed, rules=options.rules)
    folder = options.work_dir / f"labels{per_class}_seed{seed}_classes{options.classes}"
    limits = {"arms": options.arms, "n_steps": options.steps}
    return judge_by_training(train, test, evidence, seed=seed, work_dir=folder, **limits)


def main() -> None:
    """Run the judge over labels a class and seeds, and write the results after each."""
    options = read_arguments()
    train, test = load_banking77(n_classes=options.classes, work_dir=options.work_dir)
    out = options.out or ROOT / "benchmarks" / "results" / f"loop_banking77_{options.judge}.json"
    tables: dict[str, Any] = {}
    seeds_done: dict[str, int] = {}
    for per_class in options.labels:
        runs: list[list[dict[str, Any]]] = []
        for seed in options.seeds:
            runs.append(judge(train, test, options, per_class=per_class, seed=seed))
            tables[str(per_class)], seeds_done[str(per_class)] = summarize(runs), len(runs)
            settings = {name: str(value) for name, value in vars(options).items() if name not in ("work_dir", "out")}
            facts = {"machine": describe_machine(), "load_average": load_average(), "settings": settings}
            write_json(out, {**facts, "tables": tables, "seeds_done": seeds_done})
        print_table(f"{per_class} labels a class, seeds {options.seeds}", tables[str(per_class)])


if __name__ == "__main__":
    main()
