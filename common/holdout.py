"""How right pseudo-labels would be: hide some gold labels, let the rules label their rows, and compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from common.labeler import Labeler
from common.pseudo_labels import ClassCuts, ClusterLabels, Rows, Rules, decide
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
    cuts = labeler.cuts
    metric_cuts, classification_cuts = (cuts.metric, cuts.classification) if cuts else (None, None)
    for mask, purity, prob, cut in (
        ("metric_mask", rules.metric_purity, rules.metric_max_prob, metric_cuts),
        ("classifier_mask", rules.classification_purity, rules.classification_max_prob, classification_cuts),
    ):
        lines.append(f"  {mask}: {_score(hidden, clusters, rules, purity, prob, cut)}")
    for purity in _PURITY_STEPS if rules.go_by_clusters else ():
        score = _score(hidden, clusters, rules, purity, rules.metric_max_prob, metric_cuts)
        lines.append(f"  at purity {purity:.2f}: {score}")
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


def _score(
    hidden: HiddenRows, clusters: ClusterLabels, rules: Rules, purity: float, prob: float, cut: np.ndarray | None
) -> str:
    tried = replace(
        rules, metric_purity=purity, metric_max_prob=prob, classification_purity=purity, classification_max_prob=prob
    )
    cuts = None if cut is None else ClassCuts(cut, cut)
    decisions = decide(hidden.rows, clusters, tried, cuts=cuts)
    labelled = decisions.labels >= 0
    n_labelled = int(labelled.sum())
    if n_labelled == 0:
        return "accuracy –, coverage 0.0% (no row labelled)"
    accuracy = float((decisions.labels == hidden.truth)[labelled].mean())
    return f"accuracy {100 * accuracy:.1f}%, coverage {100 * n_labelled / len(labelled):.1f}% ({n_labelled:,} rows)"
