"""What each arm learns from: pseudo-labels by the rules of stage 6, of what clusters and a classifier say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loop_parts.corpus import Corpus, unit
from common.agreement import wilson_lower_bound
from common.pseudo_labels import ClusterLabels, MostConfident, Rows, Rules, decide

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
    "routed by agreement",
    "routed by share",
    "second round, self-training, surest 75%",
    "second round, agreement",
)
SECOND_ROUND = "second round, "
# Whose model is the teacher of a second round.
FIRST_ROUND = "self-training, surest 75%"


# --- Evidence ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What clusters and classifier say of each training row."""

    visible: np.ndarray  # [n] bool
    rows: Rows
    clusters: ClusterLabels
    lower_bound: ClusterLabels  # the same with the Wilson lower bound in place of the purity


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


# --- Pseudo-labels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pseudo:
    """Pseudo-labels of some unlabelled rows."""

    rows: np.ndarray  # [m] int64
    labels: np.ndarray  # [m] int64
    in_head: np.ndarray  # [m] bool: classifier_mask; metric_mask is 1 for all


def choose(evidence: Evidence, arm: str) -> Pseudo:
    """The pseudo-labels of an arm: none, routed by masks, or by one of `RULES`."""
    if arm.startswith("labelled only"):
        return Pseudo(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))
    routes = {"routed by agreement": routed_by_agreement, "routed by share": routed_by_share}
    return routes[arm](evidence) if arm in routes else by_rules(evidence, **RULES[arm.removesuffix(", CE")])


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


def routed_by_agreement(evidence: Evidence) -> Pseudo:
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


def routed_by_share(evidence: Evidence) -> Pseudo:
    """Self-training by the surest half of each class in both losses, by the next quarter in the metric loss alone."""
    sure = by_rules(evidence, source="classifier", share_of_class=0.5)
    wide = by_rules(evidence, source="classifier", share_of_class=0.75)
    return Pseudo(wide.rows, wide.labels, np.isin(wide.rows, sure.rows))
