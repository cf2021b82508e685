"""The tables of a run that belong to no step of their own: what was read, asked and found, by language too."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_parts.clio.conversations import ConversationTable
from llm_parts.clio.facets import FacetTable
from llm_parts.clio.measures import sampled_scores

Row = dict[str, Any]

_SCORES = {
    "davies_bouldin": "Davies-Bouldin (lower is better)",
    "calinski_harabasz": "Calinski-Harabasz",
    "nmi": "NMI with the labels",
    "ari": "ARI with the labels",
    "acc": "accuracy with the labels",
    "purity": "purity by the labels",
}


def conversation_rows(table: ConversationTable, facets: FacetTable) -> list[Row]:
    """How many dialogues there are, and how many of them were odd in which way."""
    counts = {**table.counts(), "quarantined": facets.n_quarantined}
    failures = Counter(error.partition(":")[0] for error in facets.errors if error is not None and error != "empty")
    counts |= {f"quarantined: {kind}": n for kind, n in sorted(failures.items())}
    return [{"dialogues": name.replace("_", " "), "count": n} for name, n in counts.items()]


def facet_rows(facets: FacetTable, *, least: int) -> list[Row]:
    """For each facet how many dialogues have an answer and how many answers did not fit the type.

    The most common answer is told where `least` dialogues gave it: one that few gave may point to them.
    """
    rows = []
    for name, values in facets.columns.items():
        given = [value for value in values if value is not None]
        rows.append(
            {
                "facet": name,
                "answers": len(given),
                "different": len(set(given)),
                "did_not_fit": facets.unfit[name],
                "most_common": _most_common(given, least=max(2, least)),
            }
        )
    return rows


def score_table(scores: Mapping[str, Any]) -> list[Row]:
    """One row for each score, under the name that people know it by, and whether it is that of a sample."""
    words = {name: _SCORES.get(name, name.replace("_", " ")) for name in scores}
    words |= {name: f"{words[name]}, of a sample" for name in sampled_scores(scores)}
    return [{"score": words[name], "value": value} for name, value in scores.items()]


def calls_rows(plan: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """For each step the calls that were estimated and the questions that were asked, those from the cache included.

    The same for a run that went through at once and for one that was killed and started again.
    """
    estimated = plan["calls"]
    rows = []
    for step in [*steps, *(step for step in estimated if step not in steps)]:
        if step == "preflight":
            continue
        counts = steps.get(step)
        rows.append(
            {
                "step": step,
                "estimated_calls": estimated.get(step, 0),
                "questions": counts["answered"] + counts["cached"] if counts else 0,
                "cost": _cost(counts),
            }
        )
    return rows


def by_language_rows(
    table: ConversationTable, base_labels: np.ndarray, top: np.ndarray, true_labels: Sequence[str | None] | None
) -> list[Row]:
    """For each language of the input the share of dialogues in a cluster and, with labels, under the right top.

    The label of a top cluster is that of most of its conversations. `top` [k] is the top cluster of each base cluster.
    """
    languages = [conversation.language for conversation in table.conversations]
    if not any(languages):
        return []
    tops = np.where(base_labels >= 0, top[base_labels] if len(top) else -1, -1)
    label_of = _majorities(tops, true_labels) if true_labels is not None else {}
    groups: dict[str, list[int]] = defaultdict(list)
    for place, language in enumerate(languages):
        groups[language or "unknown"].append(place)
    rows = []
    for language, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        row: Row = {"language": language, "dialogues": len(members)}
        row["in_a_cluster"] = round(float(np.mean(tops[members] >= 0)), 4)
        if true_labels is not None:
            right = [tops[one] >= 0 and label_of.get(int(tops[one])) == true_labels[one] for one in members]
            row["under_the_right_top"] = round(float(np.mean(right)), 4)
        rows.append(row)
    return rows


def without_empty(tables: Sequence[tuple[str, list[Row]]]) -> list[tuple[str, list[Row]]]:
    """The tables that have rows."""
    return [(title, rows) for title, rows in tables if rows]


def _majorities(tops: np.ndarray, true_labels: Sequence[str | None]) -> dict[int, str]:
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for top, label in zip(tops.tolist(), true_labels, strict=True):
        if top >= 0 and label is not None:
            counts[top][label] += 1
    return {top: min(found, key=lambda label: (-found[label], label)) for top, found in counts.items()}


def _most_common(values: Sequence[Any], *, least: int) -> str:
    if not values:
        return ""
    value, n = min(Counter(values).items(), key=lambda item: (-item[1], str(item[0])))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text[:60]} ({n})" if n >= least else ""


def _cost(counts: Mapping[str, Any] | None) -> float | None:
    if counts is None:
        return 0.0
    parts = (counts["cost"], counts["cached_cost"])
    return None if None in parts else round(sum(parts), 6)
