"""Who gets which label, and for which of the two losses: the rules of stage 6, row by row in numpy.

A row with a gold label keeps it. A row without one gets the majority label of its cluster, or the classifier's
prediction, only if the cluster is pure enough and the classifier sure enough; the thresholds are apart for the metric
loss and for the classification loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Source = Literal["cluster", "classifier"]

# Codes of `label_source`; NONE is a row without a label.
NONE, GOLD, CLUSTER, CLASSIFIER = 0, 1, 2, 3
SOURCE_NAMES = (None, "gold", "cluster", "classifier")

# Above every confidence of a pseudo-label, which is at most 1.
GOLD_CONFIDENCE = 2.0


@dataclass(frozen=True)
class Rules:
    """The thresholds of stage 6; see its settings for their meaning."""

    metric_purity: float
    metric_max_prob: float
    classification_purity: float
    classification_max_prob: float
    min_labeled: int
    require_agreement: bool
    source: Source
    agreement_in_metric: bool = False

    @property
    def go_by_clusters(self) -> bool:
        """Whether a row's cluster has a say."""
        return self.source == "cluster" or self.require_agreement


@dataclass(frozen=True)
class ClusterLabels:
    """What the clusters have to say, by cluster number 0 to k - 1."""

    ids: np.ndarray  # [k] int64, rising
    majority: np.ndarray  # [k] int64, code of the majority label; -1: none
    purity: np.ndarray  # [k] float64, or its lower bound; 0 where there are no labels
    n_labeled: np.ndarray  # [k] int64

    def positions(self, cluster_ids: np.ndarray) -> np.ndarray:
        """The number of each row's cluster, -1 for rows without one."""
        places = np.minimum(np.searchsorted(self.ids, cluster_ids), len(self.ids) - 1)
        return np.where(self.ids[places] == cluster_ids, places, -1)


@dataclass(frozen=True)
class Rows:
    """What stage 6 knows of some rows; label codes are of one common list of names, -1 is none."""

    gold: np.ndarray  # [n] int64 label code
    cluster_ids: np.ndarray  # [n] int64, -1: none
    max_prob: np.ndarray  # [n] float64, NaN: no probabilities
    predicted: np.ndarray  # [n] int64 label code
    usable: np.ndarray  # [n] bool: has a text


@dataclass(frozen=True)
class ClassCuts:
    """The least confidence at which a pseudo-label of each class takes part in each loss.

    Both end with one entry more than there are classes, for rows without a candidate.
    """

    metric: np.ndarray  # [c + 1] float64
    classification: np.ndarray  # [c + 1] float64


@dataclass(frozen=True)
class Decisions:
    """A label and two masks for each row, and why."""

    labels: np.ndarray  # [n] int64 label code, -1: none
    source: np.ndarray  # [n] int8, codes above
    metric_mask: np.ndarray  # [n] bool
    classifier_mask: np.ndarray  # [n] bool
    confidence: np.ndarray  # [n] float64: GOLD_CONFIDENCE, or purity times probability
    reasons: np.ndarray  # [n] int8, index into REASONS

    @property
    def used(self) -> np.ndarray:
        """[n] bool: the row takes part in at least one loss."""
        return self.metric_mask | self.classifier_mask

    def without(self, left_out: np.ndarray) -> Decisions:
        """The same with the rows `left_out` [n] bool in no loss; gold labels stay, pseudo-labels go."""
        pseudo = left_out & self.used & (self.source != GOLD)
        return Decisions(
            labels=np.where(pseudo, -1, self.labels),
            source=np.where(pseudo, NONE, self.source).astype(np.int8),
            metric_mask=self.metric_mask & ~left_out,
            classifier_mask=self.classifier_mask & ~left_out,
            confidence=self.confidence,
            reasons=np.where(left_out & self.used, BALANCED_OUT, self.reasons).astype(np.int8),
        )


@dataclass(frozen=True)
class _Candidates:
    """The label that each row might get, and what speaks for it."""

    place: np.ndarray  # [n] int64 number of the row's cluster, -1: none
    majority: np.ndarray  # [n] int64 label code of that cluster, -1: none
    purity: np.ndarray  # [n] float64 of that cluster
    labels: np.ndarray  # [n] int64 label code, -1: none
    agreed: np.ndarray  # [n] bool: cluster and classifier say the same
    allowed: np.ndarray  # [n] bool: may have it, whatever the thresholds
    confidence: np.ndarray  # [n] float64: purity, where clusters count, times probability, where there is one


REASONS = (
    "gold label",
    "pure cluster and sure classifier",
    "no text",
    "no cluster",
    "cluster has too few labels",
    "cluster is not pure enough",
    "classifier is not sure enough",
    "cluster and classifier disagree",
    "no prediction",
    "left out to balance the classes",
    "not among the surest of its class",
    "sure classifier",
    "cluster and classifier agree",
)
_GOLD, _LABELLED, _NO_TEXT, _NO_CLUSTER, _FEW_LABELS, _IMPURE, _UNSURE, _DISAGREE, _NO_PREDICTION = range(9)
BALANCED_OUT, _LESS_SURE, _PREDICTED, _AGREED = 9, 10, 11, 12


def decide(rows: Rows, clusters: ClusterLabels, rules: Rules, *, cuts: ClassCuts | None = None) -> Decisions:
    """Apply the rules to some rows; of what passes them, `cuts` leave the surest of each class."""
    candidates = _candidates(rows, clusters, rules)
    metric = _passes(rows, candidates, rules, rules.metric_purity, rules.metric_max_prob)
    classification = _passes(rows, candidates, rules, rules.classification_purity, rules.classification_max_prob)
    passed = metric | classification
    let_in = np.zeros_like(metric)  # by agreement alone
    if cuts is not None:
        classification &= candidates.confidence >= cuts.classification[candidates.labels]
        is_sure = candidates.confidence >= cuts.metric[candidates.labels]
        let_in = metric & ~is_sure & candidates.agreed & rules.agreement_in_metric
        metric = (metric & is_sure) | let_in
    labelled = metric | classification
    has_gold = rows.gold >= 0
    pseudo_source = CLUSTER if rules.source == "cluster" else CLASSIFIER
    return Decisions(
        labels=np.where(has_gold, rows.gold, np.where(labelled, candidates.labels, -1)),
        source=np.where(has_gold, GOLD, np.where(labelled, pseudo_source, NONE)).astype(np.int8),
        metric_mask=(rows.usable & has_gold) | metric,
        classifier_mask=(rows.usable & has_gold) | classification,
        confidence=np.where(rows.usable & has_gold, GOLD_CONFIDENCE, candidates.confidence),
        reasons=_reasons(
            rows, clusters, rules, candidates, passed=passed, labelled=labelled, let_in=let_in & ~classification
        ),
    )


def _candidates(rows: Rows, clusters: ClusterLabels, rules: Rules) -> _Candidates:
    place = clusters.positions(rows.cluster_ids)
    in_cluster = place >= 0
    majority = np.where(in_cluster, clusters.majority[place], -1)
    purity = np.where(in_cluster, clusters.purity[place], 0.0)
    has_votes = in_cluster & (np.where(in_cluster, clusters.n_labeled[place], 0) >= rules.min_labeled)
    labels = majority if rules.source == "cluster" else rows.predicted
    agree = (majority == rows.predicted) & (majority >= 0)
    allowed = rows.usable & (rows.gold < 0) & (labels >= 0)
    if rules.source == "cluster":
        allowed &= has_votes
    if rules.require_agreement:
        allowed &= agree
    sureness = np.where(np.isnan(rows.max_prob), 1.0, rows.max_prob)
    confidence = (purity if rules.go_by_clusters else 1.0) * sureness
    return _Candidates(place, majority, purity, labels, agree & has_votes, allowed, confidence)


def _passes(rows: Rows, candidates: _Candidates, rules: Rules, least_purity: float, least_prob: float) -> np.ndarray:
    """[n] bool: may have its label, and meets two thresholds."""
    # Without probabilities only a threshold of zero is met.
    is_sure = np.nan_to_num(rows.max_prob, nan=0.0) >= least_prob
    is_pure = candidates.purity >= least_purity if rules.go_by_clusters else True
    return candidates.allowed & is_pure & is_sure


def _reasons(
    rows: Rows,
    clusters: ClusterLabels,
    rules: Rules,
    candidates: _Candidates,
    *,
    passed: np.ndarray,
    labelled: np.ndarray,
    let_in: np.ndarray,
) -> np.ndarray:
    """The first reason that applies, in the order in which a person would ask."""
    place, majority = candidates.place, candidates.majority
    least_purity = min(rules.metric_purity, rules.classification_purity)
    n_labeled = np.where(place >= 0, clusters.n_labeled[place], 0)
    too_few = (n_labeled < max(rules.min_labeled if rules.source == "cluster" else 0, 1)) | (majority < 0)
    questions = [
        (~rows.usable, _NO_TEXT),
        (rows.gold >= 0, _GOLD),
        (let_in, _AGREED),
        (labelled, _LABELLED if rules.go_by_clusters else _PREDICTED),
        (passed, _LESS_SURE),
        (rules.go_by_clusters & (place < 0), _NO_CLUSTER),
        (rules.go_by_clusters & too_few, _FEW_LABELS),
        (rules.go_by_clusters & (candidates.purity < least_purity), _IMPURE),
        ((rules.source == "classifier") & (rows.predicted < 0), _NO_PREDICTION),
        (rules.require_agreement & (majority != rows.predicted), _DISAGREE),
    ]
    conditions = [np.broadcast_to(condition, place.shape) for condition, _ in questions]
    return np.select(conditions, [code for _, code in questions], default=_UNSURE).astype(np.int8)


# --- Balance ---------------------------------------------------------------------------------------------------------


class MostConfident:
    """The `limit` most confident rows of each class over a stream, in memory that grows with what is kept alone.

    Of equally confident rows the earlier stay.
    """

    def __init__(self, limits: np.ndarray) -> None:
        self._limits = limits  # [c] int64 rows to keep of each class
        self._kept = [(np.zeros(0), np.zeros(0, np.int64)) for _ in limits]  # (confidence, row number) of each class

    def add(self, first_row: int, labels: np.ndarray, confidence: np.ndarray, used: np.ndarray) -> None:
        """Offer rows `first_row`, …; only those `used` count."""
        for label in np.unique(labels[used]):
            rows = np.flatnonzero(used & (labels == label))
            kept_confidence, kept_rows = self._kept[label]
            all_confidence = np.concatenate([kept_confidence, confidence[rows]])
            all_rows = np.concatenate([kept_rows, rows + first_row])
            order = np.lexsort((all_rows, -all_confidence))[: self._limits[label]]
            self._kept[label] = (all_confidence[order], all_rows[order])

    def rows(self) -> np.ndarray:
        """The numbers of all kept rows, rising."""
        return np.sort(np.concatenate([rows for _, rows in self._kept])) if self._kept else np.zeros(0, np.int64)


def class_limits(counts: np.ndarray, *, downsample: bool, max_per_class: int | None) -> np.ndarray:
    """How many rows of each class may take part; `counts` [c] are the rows that would."""
    limits = counts.copy()
    if downsample and (counts > 0).any():
        limits = np.minimum(limits, counts[counts > 0].min())
    if max_per_class is not None:
        limits = np.minimum(limits, max_per_class)
    return limits
