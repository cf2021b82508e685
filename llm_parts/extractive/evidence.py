"""What a prompt holds: the JSON inside its tags, as an extractive answer reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from llm_parts.schemas import Message

_TAG = re.compile(r"<(?P<tag>[a-z_]+)>(?P<json>.*?)</(?P=tag)>", re.DOTALL)
# Where an item keeps its words, the most telling first.
_TEXT_KEYS = ("text", "facet", "content", "value", "summary", "description", "name")
_AT_MOST = re.compile(r"\b(\d+)\b(?=[^.\n<>]{0,40}\b(?:at most|or fewer|names|clusters|items)\b)", re.IGNORECASE)


class Evidence:
    """The tagged data of a prompt; what stands outside the tags is read for one number only."""

    def __init__(self, messages: Sequence[Message]) -> None:
        # Only the first turn of the user holds data: later ones show an answer of ours that was not taken.
        turns = [message["content"] for message in messages if message["role"] == "user"]
        self._prompt = turns[0] if turns else ""
        self.tags = dict(_tagged(self._prompt))

    def items(self, *tags: str) -> list[Any]:
        """The list inside the first of `tags` that the prompt has; a single value counts as a list of one."""
        for tag in tags:
            if tag in self.tags:
                value = self.tags[tag]
                return value if isinstance(value, list) else [value]
        return []

    def cards(self, *tags: str) -> list[dict[str, Any]]:
        """The objects inside the first of `tags` that the prompt has."""
        return [item for item in self.items(*tags) if isinstance(item, dict)]

    def texts(self, *tags: str) -> list[str]:
        """One text for each item inside the first of `tags` that the prompt has; items without words are left out."""
        found = (text_of(item) for item in self.items(*tags))
        return [text for text in found if text]

    def number(self, default: int) -> int:
        """The number of names or clusters that the words of the prompt ask for."""
        spoken = _TAG.sub(" ", self._prompt)
        found = _AT_MOST.search(spoken)
        return int(found[1]) if found else default


def text_of(item: Any) -> str:
    """The words of an item: a string, an object with a text, or a list of turns."""
    if isinstance(item, str):
        return item.strip()
    if isinstance(item, list):
        return "\n".join(filter(None, map(text_of, item)))
    if isinstance(item, dict):
        if isinstance(item.get("messages"), list):
            return text_of(item["messages"])
        name, summary = item.get("name"), item.get("summary")
        if isinstance(name, str) and isinstance(summary, str):
            return f"{name}. {summary}".strip()
        return next((text_of(item[key]) for key in _TEXT_KEYS if item.get(key)), "")
    return "" if item is None else str(item)


def _tagged(prompt: str) -> Iterator[tuple[str, Any]]:
    for match in _TAG.finditer(prompt):
        try:
            yield match["tag"], json.loads(match["json"])
        except ValueError:
            yield match["tag"], match["json"].strip()
