"""Extractive answers to the schemas of part two: facets, names, hierarchy, judges and the privacy audit.

A facet is a sentence of the customer, a name is made of keywords, a parent is the nearest one, and personal data is
what looks like it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_parts.extractive.evidence import Evidence, text_of
from llm_parts.extractive.similarity import vectors_of
from llm_parts.extractive.words import clip, name_from, sentences_of, stem, words_of
from llm_parts.schemas import Message

DEFAULT_FACETS = ("request", "task", "language", "concern")

_FACET_CHARS = 300  # of a facet that says nothing of its length
_TWIN_SIMILARITY = 0.85  # names from here on are one
_TIE = 0.02  # difference of similarity that decides nothing
_SCORE_STEPS = (0.1, 0.2, 0.35, 0.5)  # similarity of a summary to its evidence at which a score rises

_CONTACT = re.compile(r"[\w.+-]+@[\w-]+\.\w+|(?:\+|\b)\d[\d\s().-]{7,}\d|\b[A-Z]{2}\d{2}[A-Z0-9 ]{10,}")
_MASKED = re.compile(r"\[(?:mail|phone|card|iban|name)\]")
_NUMBER = re.compile(r"\b\d{5,}\b")
_NAME = re.compile(r"\b(?:[Mm]y name is|Mr\.?|Mrs\.?|Ms\.?|[Мм]еня зовут)\s+[A-ZА-ЯЁ]\w+")
_SCRIPTS = (
    (re.compile(r"[а-яё]", re.IGNORECASE), "Russian"),
    (re.compile(r"[\u0370-\u03ff]"), "Greek"),
    (re.compile(r"[\u0590-\u05ff]"), "Hebrew"),
    (re.compile(r"[\u0600-\u06ff]"), "Arabic"),
    (re.compile(r"[\u10a0-\u10ff]"), "Georgian"),
    (re.compile(r"[\u3040-\u30ff]"), "Japanese"),
    (re.compile(r"[\uac00-\ud7af]"), "Korean"),
    (re.compile(r"[\u4e00-\u9fff]"), "Chinese"),
    (re.compile(r"[a-z]", re.IGNORECASE), "English"),
)


# --- Facets ----------------------------------------------------------------------------------------------------------


def facets(evidence: Evidence) -> dict[str, Any]:
    """Answer `facets`: for a text the customer's most telling sentences, for a choice the nearest, for a number 1.

    `<facets>` describes what is asked: [{name, type: text|number|choice, choices}]; the default four without it.
    """
    turns = evidence.items("dialogue", "conversation", "messages")
    said = _customer_text(turns)
    asked = evidence.cards("facets") or [{"name": name} for name in DEFAULT_FACETS]
    return {"facets": [{"name": str(facet.get("name")), "value": _facet(facet, said)} for facet in asked]}


def _facet(facet: dict[str, Any], said: str) -> str:
    name, kind = str(facet.get("name") or "").lower(), facet.get("type") or "text"
    choices = [str(choice) for choice in facet.get("choices") or facet.get("values") or ()]
    if choices:
        return choices[int((vectors_of(choices) @ vectors_of([said or " "])[0]).argmax())]
    if kind == "number" or name == "concern":
        return str(facet.get("min") or facet.get("minimum") or 1)
    if name == "language":
        return language_of(said)
    n_chars = int(facet.get("max_length") or facet.get("length") or _FACET_CHARS)
    return _in_sentences(said, n_sentences=1 if name == "task" else 2, n_chars=n_chars)


def telling_sentences(turns: Sequence[dict[str, str]]) -> str:
    """What a facet of text holds for a dialogue of [{role, content}]: the customer's two most telling sentences."""
    return _in_sentences(_customer_text(turns), n_sentences=2, n_chars=_FACET_CHARS)


def _in_sentences(said: str, *, n_sentences: int, n_chars: int) -> str:
    return clip(_without_contacts(" ".join(_central_sentences(said, n_sentences=n_sentences))), n_chars)


def language_of(text: str) -> str:
    """The language that the script of most letters points to; Latin script counts as English."""
    counts = [(len(pattern.findall(text)), name) for pattern, name in _SCRIPTS]
    n_letters, name = max(counts, key=lambda pair: pair[0])
    return name if n_letters else "unknown"


def _customer_text(turns: Sequence[Any]) -> str:
    if len(turns) == 1 and isinstance(turns[0], dict) and isinstance(turns[0].get("messages"), list):
        turns = turns[0]["messages"]
    theirs = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") in ("user", "customer", "client")]
    return text_of(list(theirs or turns))


def _central_sentences(text: str, *, n_sentences: int) -> list[str]:
    """The sentences nearest to the whole of a text, in their order."""
    sentences = [sentence for sentence in sentences_of(text)[:20] if words_of(sentence)]
    # What holds masked data tells how to reach somebody, not what they want.
    sentences = [sentence for sentence in sentences if not _MASKED.search(sentence)] or sentences
    if len(sentences) <= n_sentences:
        return sentences or [clip(text, 200)]
    nearness = vectors_of(sentences) @ vectors_of([text])[0]
    best = np.argsort(-nearness, kind="stable")[:n_sentences]
    return [sentences[row] for row in sorted(best)]


# --- Names and hierarchy ---------------------------------------------------------------------------------------------


def cluster_name(evidence: Evidence) -> dict[str, Any]:
    """Answer `cluster_name`: keywords that the members share and the outsiders lack, and the most central members."""
    members = evidence.texts("members", "children", "names")
    return _named(members, evidence.texts("outsiders"))


def hierarchy_rename(evidence: Evidence) -> dict[str, Any]:
    """Answer `hierarchy_rename`: a name for all children, and the names of the first of them, the largest."""
    named = _named(evidence.texts("children", "members", "names"), evidence.texts("outsiders", "parents"))
    children = [str(card["name"]) for card in evidence.cards("children") if card.get("name")]
    if children:
        # Words of ours would be counted among those of the children, one level up.
        more = f"; and {len(children) - 3} more" if len(children) > 3 else ""
        named["summary"] = f"{'; '.join(children[:3])}{more}."
    return named


def hierarchy_propose(evidence: Evidence) -> dict[str, Any]:
    """Answer `hierarchy_propose`: names for as many groups of the clusters as the prompt asks for."""
    texts = evidence.texts("children", "names", "clusters", "members")
    n_names = min(max(1, evidence.number(default=-(-len(texts) // 3))), max(1, len(texts)))
    names = [name_from(group, others=texts, n_words=3) for group in _split(texts, n_names)]
    return {"reasoning": f"{len(texts)} clusters in {n_names} groups by similarity", "names": _distinct(names)}


def hierarchy_dedupe(evidence: Evidence) -> dict[str, Any]:
    """Answer `hierarchy_dedupe`: the names without those that say the same as an earlier one."""
    names = evidence.texts("names")
    if not names:
        return {"names": []}
    similarity = vectors_of(names) @ vectors_of(names).T
    kept: list[int] = []
    for row in range(len(names)):
        if all(similarity[row, other] < _TWIN_SIMILARITY for other in kept):
            kept.append(row)
    return {"names": [names[row] for row in kept]}


def hierarchy_assign(evidence: Evidence) -> dict[str, Any]:
    """Answer `hierarchy_assign`: the parent that is nearest to the child."""
    parents = evidence.items("parents", "names")
    child = " ".join(evidence.texts("children", "child", "cluster", "members")) or " "
    if not parents:
        return {"reasoning": "there is no parent to choose", "parent": ""}
    nearness = vectors_of([text_of(parent) or " " for parent in parents]) @ vectors_of([child])[0]
    best = parents[int(nearness.argmax())]
    name = best.get("name") or text_of(best) if isinstance(best, dict) else text_of(best)
    return {"reasoning": f"its similarity is {nearness.max():.2f}", "parent": str(name)}


def _named(members: Sequence[str], outsiders: Sequence[str]) -> dict[str, Any]:
    if not members:
        return {"reasoning": "there are no members", "summary": "No members.", "name": "Empty"}
    vectors = vectors_of(members)
    central = np.argsort(-(vectors @ vectors.mean(axis=0)), kind="stable")
    examples = list(dict.fromkeys(clip(_without_contacts(members[row]), 150) for row in central))[:2]
    return {
        "reasoning": f"keywords of {len(members)} members against {len(outsiders)} outsiders",
        "summary": " ".join(examples),
        "name": name_from(members, others=outsiders),
    }


def _split(texts: Sequence[str], n_groups: int) -> list[list[str]]:
    if len(texts) < 2 or n_groups < 2:
        return [list(texts)] if texts else []
    from scipy.cluster.hierarchy import fcluster, linkage

    numbers = fcluster(linkage(vectors_of(texts).astype(np.float64), method="ward"), n_groups, criterion="maxclust")
    return [[texts[int(row)] for row in np.flatnonzero(numbers == number)] for number in np.unique(numbers)]


def _distinct(names: Sequence[str]) -> list[str]:
    return list({frozenset(map(stem, words_of(name))) or name: name for name in reversed(names)}.values())[::-1]


# --- Judges ----------------------------------------------------------------------------------------------------------


def judge_pair(evidence: Evidence) -> dict[str, Any]:
    """Answer `judge_pair`: which of two texts is nearer to the evidence.

    The two are `<names>` or `<parents>` with an option a and b each, or stand in `<a>` and `<b>`.
    """
    cards = evidence.cards("names", "parents")
    options = {str(card.get("option")): text_of(card) for card in cards}
    first, second = (options.get(key) or " ".join(evidence.texts(key)) for key in ("a", "b"))
    shown = _shown(evidence)
    if not shown or not (first and second):
        return {"reasoning": "there is nothing to compare", "winner": "tie"}
    nearness = vectors_of([first, second]) @ vectors_of(shown).mean(axis=0)
    difference = float(nearness[0] - nearness[1])
    winner = "tie" if abs(difference) < _TIE else "a" if difference > 0 else "b"
    return {"reasoning": f"similarities {nearness[0]:.2f} and {nearness[1]:.2f}", "winner": winner}


def judge_score(evidence: Evidence) -> dict[str, Any]:
    """Answer `judge_score`: how near a statement is to its evidence, 1 to 5; of facets the first counts."""
    shown = _shown(evidence)
    stated = evidence.texts("facets")[:1] or evidence.texts(
        "statement", "summary", "names", "name", "parents", "clusters", "cluster"
    )
    if not shown or not stated:
        return {"reasoning": "there is nothing to compare", "score": 3}
    nearness = float((vectors_of(stated) @ vectors_of(shown).T).mean())
    score = 1 + sum(nearness >= step for step in _SCORE_STEPS)
    return {"reasoning": f"the mean similarity is {nearness:.2f}", "score": score}


def _shown(evidence: Evidence) -> list[str]:
    """What a judge is shown: members, requests or clusters one by one, a dialogue as what its customer said."""
    if evidence.items("dialogue"):
        said = _customer_text(evidence.items("dialogue"))
        return [said] if said else []
    return evidence.texts("members", "children", "requests")


def privacy_audit(evidence: Evidence) -> dict[str, Any]:
    """Answer `privacy_audit`: 1 where a contact or an account stands in a text, 2 a person's name, 3 a long number."""
    text = "\n".join(text for tag in evidence.tags for text in evidence.texts(tag))
    for pattern, score, what in ((_CONTACT, 1, "a contact or account"), (_NAME, 2, "a name"), (_NUMBER, 3, "a number")):
        if pattern.search(text):
            return {"reasoning": f"there is {what} in it", "score": score}
    return {"reasoning": "nothing in it looks like personal data", "score": 5}


def in_short(evidence: Evidence, messages: Sequence[Message]) -> str:
    """An answer in free text: the two most telling sentences of what was said."""
    shown = " ".join(text for tag in evidence.tags for text in evidence.texts(tag))
    said = shown or "\n".join(message["content"] for message in messages if message["role"] == "user")
    return " ".join(_central_sentences(said, n_sentences=2))


def _without_contacts(text: str) -> str:
    return _NUMBER.sub("…", _CONTACT.sub("…", text))
