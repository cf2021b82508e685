"""Extractive answers to the schemas of part one: proposer, judge, merge, cohesion and name_check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_parts.extractive.evidence import Evidence, text_of
from llm_parts.extractive.similarity import vectors_of
from llm_parts.extractive.words import clip, keywords, name_from, sentences_of

# Similarities chosen on invented requests in two languages and on the queries of a bank: higher ones leave more
# requests alone, lower ones put more intents together.
ASSIGN_SIMILARITY = 0.55  # least similarity of a request to the cluster that takes it
GROUP_SIMILARITY = 0.55  # least mean similarity within a proposed cluster
SAME_SIMILARITY = 0.75  # two clusters are one from here on
_SMALLEST_GROUP = 2  # requests that a proposed cluster must have
COHESION_STEPS = (0.15, 0.25, 0.35, 0.50)  # mean similarity of members at which the score rises

_N_EXAMPLES = 5
_BETWEEN_EXAMPLES = " / "
_NUMBERS = re.compile(r"\S*\d{3,}\S*|\S+@\S+")  # account numbers, phones and addresses have no place in a summary


def propose(evidence: Evidence) -> dict[str, Any]:
    """Answer `proposer`: groups of requests that no known cluster is near to, the largest first."""
    requests = [card for card in evidence.cards("requests") if text_of(card)]
    texts = [text_of(card) for card in requests]
    covered = _best_similarity(texts, evidence.cards("clusters")) >= ASSIGN_SIMILARITY
    free = [row for row in range(len(texts)) if not covered[row]]
    groups = [[free[place] for place in group] for group in _groups([texts[row] for row in free])]
    groups = [group for group in groups if len(group) >= _SMALLEST_GROUP]
    clusters = [_describe([texts[row] for row in group], texts) for group in groups]
    for cluster, group in zip(clusters, groups, strict=True):
        cluster["request_ids"] = [str(requests[row].get("request_id")) for row in group]
    reasoning = f"{len(texts) - len(free)} of {len(texts)} requests are near to a known cluster"
    return {"reasoning": reasoning, "clusters": clusters[: evidence.number(default=len(clusters))]}


def judge(evidence: Evidence) -> dict[str, Any]:
    """Answer `judge`: the nearest cluster, or new_cluster where none is near, or skip where there is no word."""
    clusters = evidence.cards("clusters")
    requests = evidence.cards("requests")
    similarity = _similarities([text_of(card) or " " for card in requests], clusters)  # [n, c]
    decisions = []
    for card, row in zip(requests, similarity, strict=True):
        decision: dict[str, Any] = {"request_id": str(card.get("request_id")), "cluster_id": None}
        best = int(row.argmax()) if len(row) else -1
        nearest = float(row[best]) if len(row) else 0.0
        if not any(letter.isalnum() for letter in text_of(card)):
            decision |= {"decision": "skip", "confidence": 1.0, "rationale": "there are no words in it"}
        elif nearest >= ASSIGN_SIMILARITY:
            decision |= {"decision": "assign", "cluster_id": str(clusters[best]["cluster_id"])}
            decision |= {"confidence": _share(nearest), "rationale": f"similarity {nearest:.2f} to the cluster"}
        else:
            decision |= {"decision": "new_cluster", "confidence": _share(1 - nearest)}
            decision |= {"rationale": f"the nearest cluster has similarity {nearest:.2f}"}
        decisions.append(decision)
    return {"decisions": decisions}


def merge(evidence: Evidence) -> dict[str, Any]:
    """Answer `merge`: same where the two clusters are nearly one text."""
    cards = evidence.cards("clusters")
    if len(cards) < 2:
        return {"reasoning": "there are no two clusters to compare", "decision": "different"}
    first, second = (_prototypes(card) for card in cards[:2])
    similarity = _group_similarity(first, second)
    decision = "same" if similarity >= SAME_SIMILARITY else "different"
    return {"reasoning": f"their similarity is {similarity:.2f}", "decision": decision}


def cohesion(evidence: Evidence) -> dict[str, Any]:
    """Answer `cohesion`: the mean similarity of the members to each other, in five steps."""
    texts = evidence.texts("requests", "members")
    if len(texts) < 2:
        return {"reasoning": "a single request is of one intent", "score": 5}
    vectors = vectors_of(texts)
    n = len(texts)
    mean = float(((vectors @ vectors.T).sum() - n) / (n * (n - 1)))
    score = 1 + sum(mean >= step for step in COHESION_STEPS)
    return {"reasoning": f"the mean similarity of the members is {mean:.2f}", "score": score}


def name_check(evidence: Evidence) -> dict[str, Any]:
    """Answer `name_check`: the cluster that is nearest to the request; null where there is none."""
    clusters = evidence.cards("clusters")
    texts = evidence.texts("requests", "members", "request")
    if not clusters or not texts:
        return {"cluster_id": None}
    similarity = _similarities(texts, clusters).mean(axis=0)
    return {"cluster_id": str(clusters[int(similarity.argmax())]["cluster_id"])}


def _groups(texts: Sequence[str]) -> list[list[int]]:
    """Rows in groups whose mean similarity is at least GROUP_SIMILARITY, the largest group first."""
    if len(texts) < 2:
        return [[row] for row in range(len(texts))]
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    vectors = vectors_of(texts).astype(np.float64)
    distance = np.clip(1 - vectors @ vectors.T, 0, 2)  # [n, n]
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average")
    numbers = fcluster(tree, 1 - GROUP_SIMILARITY, criterion="distance")
    groups: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        groups.setdefault(int(number), []).append(row)
    return sorted(groups.values(), key=lambda group: (-len(group), group))


def _describe(texts: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """Name, summary and criteria of a group: keywords, its most central requests, keywords again."""
    vectors = vectors_of(texts)
    central = np.argsort(-(vectors @ vectors.mean(axis=0)), kind="stable")
    examples = dict.fromkeys(clip(_without_numbers(texts[row]), 110) for row in central)
    background = [text for text in others if text not in set(texts)]
    shared = keywords(texts, others=background, n_words=8)
    return {
        "name": name_from(texts, others=background),
        "summary": _BETWEEN_EXAMPLES.join(list(examples)[:_N_EXAMPLES]),
        "criteria": f"Requests about: {', '.join(shared)}" if shared else "",
    }


def _without_numbers(text: str) -> str:
    return _NUMBERS.sub("…", " ".join(sentences_of(text)[:2]))


def _prototypes(card: dict[str, Any]) -> list[str]:
    """The texts that stand for a cluster: the examples of its summary, or all that is said of it."""
    summary = str(card.get("summary") or "")
    examples = [part.strip() for part in summary.split(_BETWEEN_EXAMPLES) if part.strip()]
    given = [text_of(example) for example in card.get("examples") or () if text_of(example)]
    return examples + given or [f"{card.get('name') or ''} {card.get('criteria') or ''}".strip() or " "]


def _similarities(texts: Sequence[str], clusters: Sequence[dict[str, Any]]) -> np.ndarray:
    """How near texts are to clusters [n, c]: half the best example, half the mean of all."""
    if not clusters:
        return np.zeros((len(texts), 0), np.float32)
    vectors = vectors_of(texts)
    columns = [_nearness(vectors, vectors_of(_prototypes(card))) for card in clusters]
    # Rounded, so that the last digits of a float, which depend on what else was embedded beside, decide nothing.
    return np.round(np.stack(columns, axis=1), 3)


def _nearness(vectors: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    # The mean of the similarities, not the similarity to the mean: that one draws everything to the widest cluster.
    similarity = vectors @ prototypes.T  # [n, p]
    return 0.5 * similarity.max(axis=1) + 0.5 * similarity.mean(axis=1)


def _group_similarity(first: Sequence[str], second: Sequence[str]) -> float:
    means = [vectors_of(texts).mean(axis=0) for texts in (first, second)]
    norms = [max(float(np.linalg.norm(mean)), 1e-12) for mean in means]
    return float(means[0] @ means[1] / (norms[0] * norms[1]))


def _best_similarity(texts: Sequence[str], clusters: Sequence[dict[str, Any]]) -> np.ndarray:
    similarity = _similarities(texts, clusters)
    return similarity.max(axis=1) if similarity.shape[1] else np.full(len(texts), -1.0)


def _share(value: float) -> float:
    return round(min(max(value, 0.0), 1.0), 3)
