"""How sure a pseudo-label has to be, to be among the surest of its class.

A share of each class keeps the classes in proportion, where one threshold for all takes the easy classes whole and
leaves nothing of the hard ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from common.config import StageSettings
from common.labeler import Labeler
from common.pseudo_labels import GOLD, ClassCuts, Decisions
from common.shards import Shard, ShardSet
from common.stage import map_shards


@dataclass(frozen=True)
class PseudoLabels:
    """The pseudo-labels of some rows, and in which losses they would take part; 14 bytes each."""

    labels: np.ndarray  # [m] int32 label code
    confidence: np.ndarray  # [m] float64
    metric_mask: np.ndarray  # [m] bool
    classifier_mask: np.ndarray  # [m] bool


def find_class_cuts(
    shards: ShardSet,
    labeler: Labeler,
    settings: StageSettings,
    *,
    metric_share: float,
    classification_share: float,
) -> ClassCuts:
    """The confidence that the surest share of each class has, for either loss; one pass over the shards."""
    read = partial(pseudo_labels_of, labeler=labeler)
    found = join_parts(map_shards(read, shards.shards, settings, label="confidence"))
    n_classes = len(labeler.names)
    return ClassCuts(
        metric=cuts_of(found, found.metric_mask, share=metric_share, n_classes=n_classes),
        classification=cuts_of(found, found.classifier_mask, share=classification_share, n_classes=n_classes),
    )


def pseudo_labels_of(shard: Shard, *, labeler: Labeler) -> PseudoLabels:
    """What the rules label in one shard, gold labels left out."""
    return join_parts([pick_pseudo_labels(decisions) for decisions in labeler.decisions(shard)])


def pick_pseudo_labels(decisions: Decisions) -> PseudoLabels:
    """The rows that take part by a label that is not a gold one."""
    rows = np.flatnonzero(decisions.used & (decisions.source != GOLD))
    return PseudoLabels(
        decisions.labels[rows].astype(np.int32),
        decisions.confidence[rows],
        decisions.metric_mask[rows],
        decisions.classifier_mask[rows],
    )


def join_parts(parts: list[PseudoLabels]) -> PseudoLabels:
    """All of them one after another; none gives none."""
    nothing = PseudoLabels(np.zeros(0, np.int32), np.zeros(0), np.zeros(0, bool), np.zeros(0, bool))
    fields = vars(nothing)
    return PseudoLabels(**{name: np.concatenate([vars(part)[name] for part in (nothing, *parts)]) for name in fields})


def cuts_of(found: PseudoLabels, mask: np.ndarray, *, share: float, n_classes: int) -> np.ndarray:
    """[c + 1] float64: the confidence of the last row of each class that is in; rows as sure as that one are in too."""
    cuts = np.full(n_classes + 1, -np.inf if share else np.inf)
    labels, confidence = found.labels[mask], found.confidence[mask]
    order = np.lexsort((-confidence, labels))  # class by class, the surest first
    counts = np.bincount(labels, minlength=n_classes)
    firsts = np.cumsum(counts) - counts
    present = np.flatnonzero(counts) if share else np.zeros(0, np.int64)
    n_in = np.ceil(np.round(share * counts[present], 9)).astype(np.int64)  # 0.07 * 100 is a little above 7
    last = firsts[present] + np.maximum(n_in, 1) - 1
    cuts[present] = confidence[order[last]]
    return cuts
