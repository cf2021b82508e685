"""Dialogues as they come in a table: turns, masked and cut from the middle, with counts of what was odd about them.

A row is never dropped: a dialogue without a word stays, is marked as empty and is counted; an unknown role stays as
"other"; a dialogue that is too long keeps its beginning and its end and says how much is missing between them.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import UserError
from llm_parts.clio.masking import Masker
from llm_parts.requests import clean_text

if TYPE_CHECKING:
    from common.tables import Table
    from llm_parts.clio.settings import ClioSettings

log = logging.getLogger(__name__)

NOTE = "note"  # the role of what we say in a dialogue ourselves
OTHER = "other"
_READ_ROWS = 4096
_ROLES = {
    **dict.fromkeys(("user", "customer", "client", "human", "caller", "visitor"), "user"),
    **dict.fromkeys(("assistant", "agent", "operator", "bot", "ai", "model", "support"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function"), "tool"),
}


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str  # user, assistant, system, tool, other, or note
    content: str

    def to_prompt(self) -> dict[str, str]:
        """The turn as it stands in a prompt."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """One row of the input."""

    position: int  # row of the input, from 0
    conversation_id: str  # as given, or conv-{position}
    turns: tuple[Turn, ...]  # masked and cut
    n_left_out: int = 0  # characters that were cut from the middle
    user_id: str | None = None
    language: str | None = None
    label: str | None = None  # only for reports

    @property
    def is_empty(self) -> bool:
        """Whether nobody says a word."""
        return not self.turns

    def to_text(self) -> str:
        """The dialogue as lines, for a reader."""
        return "\n".join(f"{turn.role}: {turn.content}" for turn in self.turns)


@dataclass
class ConversationTable:
    """All dialogues in the order of the input, and how many were odd."""

    conversations: list[Conversation] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)  # empty, cut, unknown_roles, one_message, repeated_ids, …
    has_users: bool = False
    masked: dict[str, int] = field(default_factory=dict)  # kind -> places

    def __len__(self) -> int:
        return len(self.conversations)

    def counts(self) -> dict[str, int]:
        """How many dialogues there are, and how many of them were odd in which way."""
        return {"conversations": len(self), **{name: n for name, n in sorted(self.odd.items()) if n}}

    def labels(self) -> list[str] | None:
        """The true labels, "" where a row has none; None where there are none at all."""
        found = [conversation.label or "" for conversation in self.conversations]
        return found if any(found) else None


def load_conversations(settings: ClioSettings) -> ConversationTable:
    """Read the input; raises UserError where it has neither messages nor texts, and for a column that is not there."""
    from common.tables import open_table

    masker = Masker(enabled=settings.mask, names=settings.mask_names)
    with tempfile.TemporaryDirectory(prefix="clio-") as folder:
        opened = open_table(settings.input_path, copy_folder=Path(folder))
        source = _source_column(opened, settings)
        if settings.label_column not in (None, *opened.schema.names):
            raise UserError(
                f"input {settings.input_path} has no column {settings.label_column!r} "
                f"(has: {', '.join(opened.schema.names)}); set clio.label_column"
            )
        optional = ("conversation_id", "user_id", "language")
        given = [name for name in optional if name in opened.schema.names]
        labels = [settings.label_column] if settings.label_column is not None else []
        names = list(dict.fromkeys([source, *given, *labels]))
        n_rows = opened.n_rows if settings.limit is None else min(settings.limit, opened.n_rows)
        blocks = (
            opened.read_rows(start, min(start + _READ_ROWS, n_rows), names).to_pydict()
            for start in range(0, n_rows, _READ_ROWS)
        )
        table = read_conversations(
            blocks, source=source, label_column=settings.label_column, max_chars=settings.max_chars, masker=masker
        )
    log.info("read %s", ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in table.counts().items()))
    return table


def _source_column(opened: Table, settings: ClioSettings) -> str:
    for name in (settings.messages_column, settings.text_column):
        if name in opened.schema.names:
            return name
    raise UserError(
        f"input {settings.input_path} has neither a column {settings.messages_column!r} nor {settings.text_column!r} "
        f"(has: {', '.join(opened.schema.names)}); set clio.messages_column or clio.text_column"
    )


def read_conversations(
    blocks: Iterator[Mapping[str, Sequence[Any]]] | Sequence[Mapping[str, Sequence[Any]]],
    *,
    source: str,
    max_chars: int,
    masker: Masker,
    label_column: str | None = None,
) -> ConversationTable:
    """Dialogues of blocks of columns; `source` holds lists of {role, content}, the same as JSON, or plain texts."""
    table = ConversationTable()
    seen: set[str] = set()
    for columns in blocks:
        for row, raw in enumerate(columns[source]):
            given = {name: _cell(columns, name, row) for name in ("conversation_id", "user_id", "language")}
            label = _cell(columns, label_column, row) if label_column else ""
            turns, n_left_out = _turns_of(raw, table.odd, max_chars=max_chars, masker=masker)
            conversation_id = given["conversation_id"] or f"conv-{len(table)}"
            table.odd["repeated_ids"] += conversation_id in seen
            seen.add(conversation_id)
            table.has_users |= bool(given["user_id"])
            table.conversations.append(
                Conversation(
                    position=len(table),
                    conversation_id=conversation_id,
                    turns=tuple(turns),
                    n_left_out=n_left_out,
                    user_id=given["user_id"] or None,
                    language=given["language"] or None,
                    label=label or None,
                )
            )
    table.masked = dict(sorted(masker.counts.items()))
    return table


def _cell(columns: Mapping[str, Sequence[Any]], name: str, row: int) -> str:
    return clean_text(columns[name][row]) if name in columns else ""


def _turns_of(raw: Any, odd: Counter[str], *, max_chars: int, masker: Masker) -> tuple[list[Turn], int]:
    """The turns of one cell, without empty ones, masked and then cut: a number cut in two would pass unmasked."""
    said = [turn for turn in map(_turn, _messages(raw)) if turn.content]
    odd["empty"] += not said
    odd["one_message"] += len(said) == 1
    odd["unknown_roles"] += any(turn.role == OTHER for turn in said)
    masked = [Turn(turn.role, masker.mask(turn.content)) for turn in said]
    kept, n_left_out = cut_middle(masked, max_chars=max_chars)
    odd["cut"] += n_left_out > 0
    return kept, n_left_out


def _messages(raw: Any) -> list[Any]:
    """The messages of a cell: a list, JSON of one, an object that holds one, or a text that is one message."""
    if isinstance(raw, str):
        raw = _from_json(raw)
    if isinstance(raw, Mapping):
        raw = raw["messages"] if isinstance(raw.get("messages"), list) else [raw]
    if isinstance(raw, list | tuple):
        return list(raw)
    return [{"role": "user", "content": raw}]


def _from_json(text: str) -> Any:
    """The list or object that a text spells; the text itself where it spells none."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    looks_like_turns = isinstance(found, list) and all(isinstance(part, dict | str) for part in found)
    return found if looks_like_turns or (isinstance(found, dict) and isinstance(found.get("messages"), list)) else text


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        return Turn(OTHER, clean_text(message))
    role = str(message.get("role") or "").strip().casefold()
    return Turn(_ROLES.get(role, OTHER), _content(message.get("content")))


def _content(value: Any) -> str:
    """The text of a message; of a list of parts, as multimodal models take them, the texts."""
    if isinstance(value, list | tuple):
        return "\n".join(filter(None, map(_content, value)))
    if isinstance(value, Mapping):
        return _content(value.get("text"))
    return clean_text(value)


def cut_middle(turns: Sequence[Turn], *, max_chars: int) -> tuple[list[Turn], int]:
    """The first and the last `max_chars` / 2 characters of a dialogue, and how many were left out between them."""
    n_chars = sum(len(turn.content) for turn in turns)
    if n_chars <= max_chars:
        return list(turns), 0
    head_end, tail_start = max_chars // 2, n_chars - (max_chars - max_chars // 2)
    head, tail, position = [], [], 0
    for turn in turns:
        before = turn.content[: max(0, head_end - position)]
        after = turn.content[max(0, tail_start - position) :]
        head += [Turn(turn.role, before)] if before else []
        tail += [Turn(turn.role, after)] if after else []
        position += len(turn.content)
    n_left_out = tail_start - head_end
    return [*head, Turn(NOTE, f"[{n_left_out} characters left out here]"), *tail], n_left_out
