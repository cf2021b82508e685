"""Did the second round help? Scores of two rounds of the text pipeline on labels that neither has seen.

Reads the shards of stage 4 of both rounds. The demonstration dataset carries the true intent of every row, which no
stage uses; accuracy and macro-F1 are taken on the rows whose gold label was hidden from the pipeline.

    python demo/compare_rounds.py --before runs/demo/pca --after runs/demo/round2/pca
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from common.columns import label_strings
from common.config import UserError
from common.quality import Contingency
from common.shards import open_shards


def score_round(folder: str, *, truth_column: str) -> dict[str, float]:
    """Accuracy and macro-F1 of predictions on hidden labels, purity and NMI of clusters on all rows."""
    shards = open_shards(folder, written_by="make run")
    shards.require_columns("label", "prediction", "cluster_id", truth_column)
    clusters = Contingency()
    truths: list[str] = []
    predictions: list[str] = []
    for table in shards.iter_tables(["label", "prediction", "cluster_id", truth_column]):
        truth, gold, predicted = (label_strings(table[name]) for name in (truth_column, "label", "prediction"))
        clusters.update(table["cluster_id"], truth)
        hidden = [
            i for i, name in enumerate(gold) if name is None and truth[i] is not None and predicted[i] is not None
        ]
        truths += [str(truth[i]) for i in hidden]
        predictions += [str(predicted[i]) for i in hidden]
    agreement = clusters.agreement()
    right = np.array(truths) == np.array(predictions)
    return {
        "accuracy": float(right.mean()) if len(right) else float("nan"),
        "macro-F1": macro_f1(truths, predictions),
        "purity": agreement.purity,
        "NMI": agreement.nmi,
    }


def macro_f1(truths: list[str], predictions: list[str]) -> float:
    """Mean F1 over the true classes."""
    scores = []
    for name in set(truths):
        hits = sum(t == name == p for t, p in zip(truths, predictions, strict=True))
        scores.append(2 * hits / (truths.count(name) + predictions.count(name)))
    return float(np.mean(scores)) if scores else float("nan")


def main() -> int:
    """Print one line a score, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--truth-column", default="true_intent")
    arguments = parser.parse_args()
    try:
        before, after = (
            score_round(folder, truth_column=arguments.truth_column) for folder in (arguments.before, arguments.after)
        )
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    notes = {
        "accuracy": "on hidden labels",
        "macro-F1": "on hidden labels",
        "purity": "of clusters",
        "NMI": "of clusters",
    }
    print(f"{'':10}  before   after")
    for name, note in notes.items():
        print(f"{name:10}  {before[name]:6.3f}  {after[name]:6.3f}   {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
