"""A scripted brain for mode clio: it reads the topic of what stands in the tags, and answers every schema by it.

It never sees labels. What a dialogue wants it tells in English, in words of its own; names of clusters it words in
several ways, so that they must be told apart and sorted by what they mean. Between a topic and its wordings it knows
themes, two of each topic, so that it has names for two levels over base clusters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Any

from clio_dialogues import DETAILS, TOPICS

from llm_parts.wires.base import BaseLLMProvider

WORDINGS = ("{}", "Help with {}", "{}: advice", "Questions on {}", "{} for everyday life")
OPENINGS = ("The user asked how to {}.", "The user wanted to {}.", "The request was to {}.")
THEMES = ("first steps", "hard cases")  # of every topic: its first wordings, and its last
_TAG = re.compile(r"<(?P<tag>[a-z]+)>(?P<json>.*?)</(?P=tag)>", re.DOTALL)


def tags_of(prompt: str) -> dict[str, Any]:
    """The JSON inside each tag; fails where a text broke out of its tag."""
    found = {match["tag"]: json.loads(match["json"]) for match in _TAG.finditer(prompt)}
    assert len(found) == prompt.count("</"), "a text broke out of its tag"
    return found


class ClioBrain:
    """Answers by topic; `n_calls` counts what was asked by schema. `wrong` is the share of facets on another topic."""

    def __init__(self, *, wrong: float = 0.0) -> None:
        self.wrong = wrong
        self.n_calls: Counter[str] = Counter()

    def __call__(self, schema_name: str, messages: list[dict[str, str]], schema: Any) -> dict[str, Any]:
        prompt = next(message["content"] for message in messages if message["role"] == "user")
        self.n_calls[schema_name] += 1
        draw = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
        return getattr(self, schema_name)(tags_of(prompt), prompt, draw)

    # --- One method per schema ---

    def facets(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        said = " ".join(turn["content"] for turn in tags["dialogue"])
        topic, place = wording_in(said)
        if topic is None:
            request = "The user said nothing that could be understood."
        else:
            if draw % 1000 < 1000 * self.wrong:
                topic = list(TOPICS)[draw // 1000 % len(TOPICS)]
            detail = next((english for english, russian in DETAILS if english in said or russian in said), "")
            wish = f"{TOPICS[topic][place][0]} {detail}".strip()
            request = OPENINGS[draw % len(OPENINGS)].format(wish)
        language = "Russian" if re.search("[а-я]", said) else "English"
        answers = {"request": request, "task": request, "language": language, "concern": 1}
        return {"facets": [{"name": one["name"], "value": answers.get(one["name"], "")} for one in tags["facets"]]}

    def cluster_name(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        return self._named(tags["members"], draw)

    def hierarchy_propose(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        wanted = int(re.search(r"Propose (\d+) name", prompt)[1])
        return {"reasoning": "by topic", "names": names_for(tags["children"], wanted) or ["Unclear"]}

    def hierarchy_dedupe(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        wanted = int(re.search(r"About (\d+) should", prompt)[1])
        unclear = [name["name"] for name in tags["names"] if topic_of(name) is None]
        return {"names": [*names_for(tags["names"], wanted), *dict.fromkeys(unclear)]}

    def hierarchy_assign(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        child, parents = tags["children"][0], tags["parents"]
        of_topic = [parent for parent in parents if topic_of(parent) == topic_of(child)]
        of_theme = [parent for parent in of_topic if theme_of(parent) in (None, theme_of(child))]
        return {"reasoning": "by topic", "parent": (of_theme or of_topic or parents)[0]["name"]}

    def hierarchy_rename(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        return self._named(tags["children"], draw)

    def judge_pair(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        shown = tags.get("members") or tags.get("children") or tags["dialogue"]
        wanted = majority(shown) if "dialogue" not in tags else wording_in(json.dumps(shown, ensure_ascii=False))[0]
        fits = [topic_of(option) == wanted for option in tags.get("names") or tags["parents"]]
        return {"reasoning": "by topic", "winner": "tie" if fits[0] == fits[1] else "a" if fits[0] else "b"}

    def judge_score(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        said = " ".join(turn["content"] for turn in tags["dialogue"])
        right = wording_in(said)[0] == wording_in(str(tags["facets"][0]["value"]))[0]
        return {"reasoning": "by topic", "score": 5 if right else 1}

    def privacy_audit(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        return {"reasoning": "nothing personal", "score": 1 if "@" in prompt else 5}

    def _named(self, cards: list[dict[str, Any]], draw: int) -> dict[str, Any]:
        topic = majority(cards) or "Unclear matters"
        themes = {theme_of(card) for card in cards if topic_of(card) == topic} - {None}
        subject = f"{topic}, {themes.pop()}" if len(themes) == 1 else topic
        examples = Counter(example for card in cards if (example := wording_in(str(card))[1]) >= 0)
        place = examples.most_common(1)[0][0] if examples else -1
        summary = f"Users asked for {topic.lower()}, mostly how to {TOPICS[topic][place][0]}." if place >= 0 else topic
        return {"reasoning": "by topic", "summary": summary, "name": WORDINGS[draw % len(WORDINGS)].format(subject)}


class BrainProvider(BaseLLMProvider):
    """The brain as a user's own provider, for runs that need no wire."""

    def __init__(self, brain: ClioBrain) -> None:
        self.brain = brain
        self.prompts: list[str] = []

    def chat_completion(self, messages: Any, temperature: Any = None, max_tokens: Any = None) -> str:
        self.prompts.append("\n".join(message["content"] for message in messages))
        name = re.search(r"schema: (\w+)", messages[0]["content"])[1]
        return json.dumps(self.brain(name, messages, None), ensure_ascii=False)


def wording_in(text: str) -> tuple[str | None, int]:
    """The topic whose wording stands in a text, and the number of that wording; (None, -1) where none does."""
    for topic, wordings in TOPICS.items():
        for place, pair in enumerate(wordings):
            if any(wording in text for wording in pair):
                return topic, place
    return None, -1


def topic_of(card: dict[str, Any]) -> str | None:
    """The topic that a card names, or tells of."""
    told = str(card.get("name") or "")
    return next((topic for topic in TOPICS if topic in told), None) or wording_in(str(card))[0]


def theme_of(card: dict[str, Any]) -> str | None:
    """The theme of its topic that a card names, or tells of; None where it is about the topic as a whole."""
    told = str(card.get("name") or "")
    if any(topic in told for topic in TOPICS):
        return next((theme for theme in THEMES if theme in told), None)
    place = wording_in(str(card))[1]
    return THEMES[place * len(THEMES) // 4] if place >= 0 else None


def names_for(cards: list[dict[str, Any]], n_wanted: int) -> list[str]:
    """The topics of cards, or their themes, whichever are nearer in number to what is wanted; most frequent first."""
    known = [(topic, theme_of(card)) for card in cards if (topic := topic_of(card))]
    topics = Counter(topic for topic, _ in known)
    themes = Counter(f"{topic}, {theme}" if theme else topic for topic, theme in known)
    nearer = min((topics, themes), key=lambda names: abs(len(names) - n_wanted))
    return [name for name, _ in nearer.most_common()]


def majority(cards: list[dict[str, Any]]) -> str | None:
    """The topic of most cards."""
    topics = Counter(topic for topic in map(topic_of, cards) if topic)
    return topics.most_common(1)[0][0] if topics else None
