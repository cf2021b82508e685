"""Accuracy on Banking77 with all labels or a few of each class, beside the frozen encoder, in one report.

    python benchmarks/metric_banking77.py                        # all labels, four epochs: a quarter of an hour
    python benchmarks/metric_banking77.py --labels 10 --seeds 0 1 2
    python benchmarks/metric_banking77.py --labels 10 --seeds 0 --epochs 3 --precision bf16 --out bf16.json

Runs train_metric_classifier.py as it is, with the example's settings and the embedded model. The official test part is
scored once, with the checkpoint that did best on a twentieth of the training part (with few labels: the last one).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine, load_average  # noqa: E402
from common.commit import write_json  # noqa: E402

DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))
CONFIG = ROOT / "metric_classifier_training.example.yaml"
# Steps are what training takes: few rows want more epochs.
EPOCHS_OF_ALL, EPOCHS_OF_FEW = 4, 12


def write_rows(path: Path, *, per_class: int | None, seed: int) -> int:
    """The training part, or `per_class` rows of each class drawn by the seed, with both masks; returns the rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(DATA_DIR / "banking77_train.parquet")
    if per_class is not None:
        labels, rng = np.array(table["label"].to_pylist()), np.random.default_rng(seed)
        drawn = [rng.choice(np.flatnonzero(labels == name), per_class, replace=False) for name in np.unique(labels)]
        table = table.take(pa.array(np.sort(np.concatenate(drawn))))
    ones = pa.array(np.ones(table.num_rows, np.int8))
    pq.write_table(table.append_column("metric_mask", ones).append_column("classifier_mask", ones), path)
    return table.num_rows


def train(folder: Path, *, per_class: int | None, seed: int, epochs: int, precision: str) -> dict[str, Any]:
    """Train once; returns the line that the script prints, with the seed."""
    import train_metric_classifier
    from common.config import load_settings
    from metric_parts.settings import TrainerSettings

    n_rows = write_rows(folder / "train.parquet", per_class=per_class, seed=seed)
    overrides = [
        f"data.parquet_path={folder / 'train.parquet'}",
        f"data.test_parquet_path={DATA_DIR / 'banking77_test.parquet'}",
        f"data.val_ratio={0.05 if per_class is None else 0.0}",
        f"training.num_epochs={epochs}",
        f"training.seed={seed}",
        f"training.mixed_precision={precision}",
        f"checkpointing.checkpoints_dir={folder / 'out'}",
    ]
    settings = load_settings(CONFIG, TrainerSettings, overrides=overrides)
    result = train_metric_classifier.run(settings)
    kept = {name: value for name, value in result.items() if name != "best"}
    return {"seed": seed, "rows": n_rows, "epochs": epochs, "precision": precision, **kept}


def main() -> None:
    """Train for each seed and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", default="all", help="labels of each class, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--precision", default="auto", choices=["auto", "no", "bf16"])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    per_class = None if options.labels == "all" else int(options.labels)
    epochs = options.epochs or (EPOCHS_OF_ALL if per_class is None else EPOCHS_OF_FEW)
    runs = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            precision = options.precision
            runs.append(train(Path(folder), per_class=per_class, seed=seed, epochs=epochs, precision=precision))
        print(json.dumps(runs[-1]), flush=True)
    accuracies = [100 * run["test_acc"] for run in runs]
    print(f"{options.labels} labels a class: {np.mean(accuracies):.2f} +- {np.std(accuracies):.2f} % of the test part")
    out = options.out or ROOT / "benchmarks" / "results" / f"metric_banking77_{options.labels}.json"
    write_json(out, {"machine": describe_machine(), "load_average": load_average(), "runs": runs})


if __name__ == "__main__":
    main()
