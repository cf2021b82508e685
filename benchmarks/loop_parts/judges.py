"""What pseudo-labels are worth: to a regression on the frozen vectors, and to a model that is trained on them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loop_parts.arms import (
    FIRST_ROUND,
    RULES,
    SECOND_ROUND,
    Evidence,
    Pseudo,
    by_rules,
    choose,
    fit,
    gather_second_evidence,
)
from benchmarks.loop_parts.corpus import MODEL, Corpus, encode, unit
from common.quality import Contingency

# --- Judge: a regression on the frozen vectors -----------------------------------------------------------------------


def judge_by_regression(
    train: Corpus, test: Corpus, evidence: Evidence, *, seed: int, rules: str = ""
) -> list[dict[str, Any]]:
    """Gain in test accuracy by each rule, with its coverage, its precision and the two controls, in points."""
    visible = np.flatnonzero(evidence.visible)
    hidden = np.flatnonzero(~evidence.visible)

    def accuracy(rows: np.ndarray, labels: np.ndarray) -> float:
        together = np.concatenate([visible, rows])
        judge = fit(train.vectors[together], np.concatenate([train.labels[visible], labels]))
        return 100 * float(np.mean(judge.predict(test.vectors) == test.labels))

    nothing = np.zeros(0, np.int64)
    base = accuracy(nothing, nothing)
    results: list[dict[str, Any]] = [{"rule": "labelled only", "accuracy": base}]
    rng = np.random.default_rng(seed)
    for name, rule in RULES.items():
        if rules not in name:
            continue
        pseudo = by_rules(evidence, **rule)
        random = rng.choice(hidden, len(pseudo.rows), replace=False)
        results.append(
            {
                "rule": name,
                "coverage": len(pseudo.rows) / len(hidden),
                "precision": float(np.mean(pseudo.labels == train.labels[pseudo.rows])) if len(pseudo.rows) else None,
                "gain": accuracy(pseudo.rows, pseudo.labels) - base,
                "gain_true_labels": accuracy(pseudo.rows, train.labels[pseudo.rows]) - base,
                "gain_random_rows": accuracy(random, train.labels[random]) - base,
            }
        )
    return results


# --- Judge: the trainer ----------------------------------------------------------------------------------------------


def judge_by_training(
    train: Corpus,
    test: Corpus,
    evidence: Evidence,
    *,
    arms: list[str],
    seed: int,
    work_dir: Path,
    n_steps: int,
) -> list[dict[str, Any]]:
    """Train each of `arms` for about equally many steps; accuracy, macro-F1, and clusters of the re-embedded texts."""
    hidden = ~evidence.visible
    frozen = cluster_scores(train.vectors[hidden], train.labels[hidden], n_clusters=len(train.names), seed=seed)
    results: list[dict[str, Any]] = [{"rule": "frozen encoder", **frozen}]
    for name in arms:
        started = time.monotonic()
        pseudo = choose_in_round(train, evidence, name, work_dir=work_dir, seed=seed)
        precision = float(np.mean(pseudo.labels == train.labels[pseudo.rows])) if len(pseudo.rows) else None
        folder = arm_folder(work_dir, name)
        scores = train_arm(
            train, test, evidence.visible, pseudo, folder, seed=seed, n_steps=n_steps, supcon=not name.endswith("CE")
        )
        vectors = unit(encode(str(folder / "best"), [train.texts[row] for row in np.flatnonzero(hidden)]))
        clusters = cluster_scores(vectors, train.labels[hidden], n_clusters=len(train.names), seed=seed)
        results.append({"rule": name, "pseudo": len(pseudo.rows), "precision": precision, **scores, **clusters})
        print(json.dumps({**results[-1], "seconds": round(time.monotonic() - started)}), flush=True)
    return results


def choose_in_round(train: Corpus, evidence: Evidence, arm: str, *, work_dir: Path, seed: int) -> Pseudo:
    """The pseudo-labels of an arm; in a second round those of the model that the first has left in its folder."""
    if not arm.startswith(SECOND_ROUND):
        return choose(evidence, arm)
    model_dir, n_clusters = arm_folder(work_dir, FIRST_ROUND) / "best", len(evidence.clusters.ids)
    second = gather_second_evidence(train, model_dir, visible=evidence.visible, n_clusters=n_clusters, seed=seed)
    return choose(second, arm.removeprefix(SECOND_ROUND))


def arm_folder(work_dir: Path, arm: str) -> Path:
    """Where an arm is trained."""
    return work_dir / arm.replace(" ", "_").replace("%", "").replace(",", "").replace(">=", "from")


def train_arm(
    train: Corpus,
    test: Corpus,
    visible: np.ndarray,
    pseudo: Pseudo,
    folder: Path,
    *,
    seed: int,
    n_steps: int,
    supcon: bool,
) -> dict[str, float]:
    """Write the arm's rows as stage 6 would, train on them, and return the test scores."""
    import train_metric_classifier
    from common.config import settings_from_values
    from metric_parts.settings import TrainerSettings

    rows = np.concatenate([np.flatnonzero(visible), pseudo.rows])
    labels = np.concatenate([train.labels[visible], pseudo.labels])
    in_head = np.concatenate([np.ones(int(visible.sum()), bool), pseudo.in_head])
    write_dataset(folder / "train.parquet", [train.texts[row] for row in rows], labels, train.names, in_head=in_head)
    write_dataset(folder / "test.parquet", test.texts, test.labels, test.names)
    batch_size = 64
    values = {
        "model_name": MODEL,
        "progress": False,
        "curves": False,
        "data": {
            "parquet_path": str(folder / "train.parquet"),
            "test_parquet_path": str(folder / "test.parquet"),
            "val_ratio": 0.0,  # the last model is taken: with 5 labels a class there are none to spare
        },
        "training": {
            "batch_size": batch_size,
            "num_epochs": max(1, round(n_steps * batch_size / len(rows))),
            "max_seq_length": 64,
            "seed": seed,
            "metric_loss_weight": 1.0 if supcon else 0.0,
        },
        "optimizer": {"learning_rate": 1e-4, "head_learning_rate": 1e-3},
        "checkpointing": {"checkpoints_dir": str(folder), "save_every_n_bathces": 10_000, "keep_last_n": 1},
        "metric_validation": {"baseline_max_rows": 0},
    }
    settings = settings_from_values(TrainerSettings, values, source="benchmark")
    result = train_metric_classifier.run(settings)
    return {"accuracy": 100 * result["test_acc"], "macro_f1": 100 * result["test_f1"], "steps": result["step"]}


def write_dataset(
    path: Path, texts: list[str], labels: np.ndarray, names: list[str], *, in_head: np.ndarray | None = None
) -> None:
    """One parquet file with the columns that the trainer reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    in_head = np.ones(len(texts), bool) if in_head is None else in_head
    path.parent.mkdir(parents=True, exist_ok=True)
    masks = {"metric_mask": np.ones(len(texts), np.int8), "classifier_mask": in_head.astype(np.int8)}
    pq.write_table(pa.table({"text": texts, "label": [names[code] for code in labels], **masks}), path)


def cluster_scores(vectors: np.ndarray, labels: np.ndarray, *, n_clusters: int, seed: int) -> dict[str, float]:
    """Purity and NMI of k-means against the true labels."""
    from sklearn.cluster import KMeans

    table = Contingency()
    table.update(KMeans(n_clusters, n_init=3, random_state=seed).fit_predict(vectors), labels.astype(str))
    agreement = table.agreement()
    return {"purity": agreement.purity, "nmi": agreement.nmi}
