"""How right pseudo-labels would be: hide some gold labels, let the rules label their rows, and compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from common.labeler import Labeler
from common.pseudo_labels import ClusterLabels, Rows, decide
from common.quality import Contingency
from common.shards import ShardSet

_PURITY_STEPS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class HiddenRows:
    """The rows whose gold label is hidden, and what it was."""

    rows: Rows
    truth: np.ndarray  # [m] int64 label code


def estimate_accuracy(
    shards: ShardSet, labeler: Labeler, *, fraction: float, seed: int, recount: bool, use_lower_bound: bool
) -> list[str]:
    """Lines that say accuracy and coverage of pseudo-labels on hidden gold labels, at the rules and at other purities.

    With `recount` the clusters' purity and majority are counted again without the hidden labels, which otherwise would
    have voted for themselves.
    """
    hidden, counts = _hide(shards, labeler, fraction=fraction, seed=seed)
    rules, clusters = labeler.rules, labeler.clusters
    if recount:
        clusters = _recounted(counts, labeler, use_lower_bound=use_lower_bound)
    n_hidden = len(hidden.truth)
    if n_hidden == 0:
        return ["holdout: no gold labels to hide"]
    lines = [f"holdout: {n_hidden:,} gold labels hidden; of their rows, how many the rules label, and how rightly:"]
    decided = decide(hidden.rows, clusters, rules, cuts=labeler.cuts)
    lines.append(f"  metric_mask: {_score(hidden, decided.labels, decided.metric_mask)}")
    lines.append(f"  classifier_mask: {_score(hidden, decided.labels, decided.classifier_mask)}")
    for purity in _PURITY_STEPS if rules.go_by_clusters else ():
        tried = decide(hidden.rows, clusters, replace(rules, metric_purity=purity), cuts=labeler.cuts)
        lines.append(f"  at purity {purity:.2f}: {_score(hidden, tried.labels, tried.metric_mask)}")
    return lines


def _hide(shards: ShardSet, labeler: Labeler, *, fraction: float, seed: int) -> tuple[HiddenRows, Contingency]:
    """The hidden rows, and the labels of all others by cluster."""
    rng = np.random.default_rng(seed)
    counts, parts = Contingency(), []
    for table in shards.iter_tables(labeler.columns.present(shards.schema)):
        rows = labeler.read_rows(table)
        chosen = (rows.gold >= 0) & rows.usable & (rng.random(len(rows.gold)) < fraction)
        known = np.where(chosen, -1, rows.gold)
        counts.update(rows.cluster_ids, [labeler.names[code] if code >= 0 else None for code in known.tolist()])
        parts.append((chosen, rows))
    fields = ("gold", "cluster_ids", "max_prob", "predicted", "usable")
    taken = {name: np.concatenate([getattr(rows, name)[chosen] for chosen, rows in parts]) for name in fields}
    truth = taken["gold"]
    return HiddenRows(Rows(**taken | {"gold": np.full_like(truth, -1)}), truth), counts


def _recounted(counts: Contingency, labeler: Labeler, *, use_lower_bound: bool) -> ClusterLabels:
    quality = counts.per_cluster(cluster_ids=labeler.clusters.ids)
    code_of = {name: code for code, name in enumerate(labeler.names)}
    purity = quality.purity_lower_bound if use_lower_bound else np.nan_to_num(quality.purity)
    majority = np.array([code_of.get(label or "", -1) for label in quality.majority_labels], np.int64)
    return ClusterLabels(labeler.clusters.ids, majority, purity, quality.n_labeled)


def _score(hidden: HiddenRows, labels: np.ndarray, taken: np.ndarray) -> str:
    """How often the hidden label comes back in the rows [m] that are taken, and how many these are."""
    n_taken = int(taken.sum())
    if n_taken == 0:
        return "accuracy –, coverage 0.0% (no row labelled)"
    accuracy = float((labels == hidden.truth)[taken].mean())
    return f"accuracy {100 * accuracy:.1f}%, coverage {100 * n_taken / len(taken):.1f}% ({n_taken:,} rows)"
