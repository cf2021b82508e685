"""What keeps single people out of the report: least sizes of clusters, and an audit of all that is said about them.

Masking comes first (masking.py), the minimums before anything is named, the audit before anything is shown. What is
dropped is counted by place; a cluster that is dropped leaves its conversations in no cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llm_parts.clio.parent_names import Questions
from llm_parts.clio.prompts import named_cards, tagged
from llm_parts.clio.schemas import PrivacyAuditAnswer
from llm_parts.clio.taxonomy import NOISE, ClusterName, Hierarchy, count_sizes

log = logging.getLogger(__name__)

STEP = "privacy_audit"

INSTRUCTIONS = """
You audit the names and summaries of clusters of dialogues before they are shown to anybody. Score how well what you are
shown protects the people in the dialogues:
5: nothing in it is about any one person or group of a few; 4: it is about a topic so narrow that a few people might be
guessed; 3: it holds details that together could point to somebody; 2: it points to a person or an organisation that is
not public; 1: it holds a name, a contact, an account or another identifier.
- reasoning: one sentence that does not repeat the details.
"""

WITHHELD = "Withheld by the privacy audit"


@dataclass(frozen=True)
class Kept:
    """Clusters that may be shown, renumbered without gaps."""

    labels: np.ndarray  # [n] int64, NOISE in no cluster that is kept
    clusters: np.ndarray  # [k] int64: the number that each kept cluster had before
    n_small: int  # clusters dropped because of too few conversations
    n_few_users: int  # … of too few users
    n_conversations: int  # conversations that were in them


def keep_large(
    labels: np.ndarray,
    users: Sequence[str | None] | None,
    *,
    n_clusters: int,
    min_size: int,
    min_users: int,
) -> Kept:
    """Drop clusters below the minimums; `users` [n] of None counts no users, a user of None is nobody.

    labels [n] int64 with NOISE for no cluster.
    """
    sizes = count_sizes(labels, n_clusters=n_clusters)
    small = sizes < min_size
    few = np.zeros(n_clusters, bool)
    if users is not None:
        few = ~small & (count_users(labels, users, n_clusters=n_clusters) < min_users)
    kept, n_lost = drop_clusters(labels, small | few)
    return Kept(kept, np.flatnonzero(~(small | few)), int(small.sum()), int(few.sum()), n_lost)


def why_nothing_is_shown(n_clusters: int, *, algorithm: str) -> str:
    """What to say of a run of which no cluster may be shown."""
    if n_clusters:
        return (
            f"all {n_clusters} base clusters are below clio.min_cluster_size or clio.min_unique_users, so there is "
            "nothing to show; lower clio.n_clusters, or give more dialogues"
        )
    reason = "no dialogue has a facet" if algorithm == "kmeans" else f"{algorithm} took all dialogues for noise"
    return f"there is no base cluster, and nothing to show: {reason}"


def count_users(labels: np.ndarray, users: Sequence[str | None], *, n_clusters: int) -> np.ndarray:
    """Different users of each cluster: [n_clusters] int64; conversations without a user count for none."""
    pairs = {(int(label), user) for label, user in zip(labels, users, strict=True) if label >= 0 and user}
    return np.bincount(np.array([label for label, _ in pairs], np.int64), minlength=n_clusters)


def drop_clusters(labels: np.ndarray, dropped: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels [n] without the clusters marked in dropped [k], renumbered; and how many rows lost theirs."""
    new_number = np.where(dropped, NOISE, np.cumsum(~dropped) - 1)
    kept = np.append(new_number, NOISE)[labels].astype(np.int64)  # a label of -1 takes the last
    return kept, int(((kept == NOISE) & (labels != NOISE)).sum())


def audit_names(names: Sequence[ClusterName], *, questions: Questions, step: str = STEP) -> np.ndarray:
    """Scores of names with their summaries, 1 to 5: [n] int64; 0 where the auditor gave no usable answer."""
    answers = questions.ask(
        [f"{tagged('names', named_cards([name]))}\n\nScore it." for name in names],
        instructions=INSTRUCTIONS,
        schema=PrivacyAuditAnswer,
        schema_name="privacy_audit",
        step=step,
    )
    return np.array([0 if answer is None else answer.score for answer in answers], np.int64)


def withhold_parents(
    hierarchy: Hierarchy, base_names: Sequence[ClusterName], *, threshold: int, questions: Questions
) -> tuple[Hierarchy, dict[str, int], list[int]]:
    """Replace names of parents that the auditor scores under `threshold`; what stands below them stays.

    Returns the hierarchy, how many were withheld on each level, and all scores. A parent that bears the very name and
    summary of a base cluster has passed the audit already, and is not asked about again.
    """
    if threshold <= 1:
        return hierarchy, {}, []
    passed = set(base_names)
    n_withheld: dict[str, int] = {}
    levels, all_scores = [], []
    for depth, level in enumerate(hierarchy.levels, start=1):
        rows = [row for row, name in enumerate(level.names) if name not in passed]
        scores = audit_names([level.names[row] for row in rows], questions=questions).tolist()
        bad = {row for row, score in zip(rows, scores, strict=True) if score < threshold}
        names = [ClusterName(f"{WITHHELD} ({row + 1})", "") if row in bad else n for row, n in enumerate(level.names)]
        n_withheld[f"names_of_{hierarchy.kind}_level_{depth}"] = len(bad)
        levels.append(replace(level, names=names))
        all_scores += scores
    return replace(hierarchy, levels=levels), n_withheld, all_scores


def begin_audit(*, masked: dict[str, int], kept: Kept) -> dict[str, Any]:
    """What was masked before any prompt, and what fell below the minimums."""
    return {
        "masked": dict(masked),
        "dropped": {
            "clusters_too_small": kept.n_small,
            "clusters_with_too_few_users": kept.n_few_users,
            "conversations_in_them": kept.n_conversations,
        },
        "audited": 0,
        "scores": dict.fromkeys(["1", "2", "3", "4", "5", "no_answer"], 0),
    }


def add_audit(audit: dict[str, Any], n_dropped: dict[str, int], scores: Sequence[int]) -> dict[str, Any]:
    """The same with what one more audit scored and dropped."""
    counts = dict(audit["scores"])
    for score in scores:
        counts[str(score) if score else "no_answer"] += 1
    dropped = {**audit["dropped"], **n_dropped}
    return {**audit, "dropped": dropped, "audited": audit["audited"] + len(scores), "scores": counts}
