"""Customer requests as they come in a table: ids, texts cut to length, context, and counts of what was odd about them.

A row is never dropped: one without text stays, is marked as empty and is counted; a text that is too long is cut and
says how much is missing; ids that occur twice stay as given and are told apart in prompts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config import UserError

MAX_CONTEXT_CHARS = 200  # of one context column in a prompt


@dataclass(frozen=True)
class Request:
    """One row of the input."""

    position: int  # row of the whole input, from 0
    request_id: str  # as given, or req-{batch_id}-{position}
    prompt_id: str  # what the model sees: the request_id, made unique
    text: str  # cleaned and cut; "" where there is none
    n_left_out: int  # characters that were cut off
    context: tuple[tuple[str, str], ...] = ()
    label: str | None = None  # only for reports

    @property
    def is_empty(self) -> bool:
        """Whether there is no text to cluster by."""
        return not self.text

    def to_prompt(self, *, max_chars: int | None = None) -> dict[str, Any]:
        """What a prompt says of this request, its text cut to `max_chars`."""
        text = self.text if max_chars is None else cut_text(self.text, max_chars=max_chars)[0]
        return {"request_id": self.prompt_id, "text": text, **({"context": dict(self.context)} if self.context else {})}


@dataclass(frozen=True)
class RequestTable:
    """All requests of a batch in input order, and how many of them were odd."""

    requests: list[Request]
    n_empty: int
    n_cut: int
    n_duplicate_ids: int


def read_requests(
    columns: Mapping[str, Sequence[Any]],
    *,
    text_column: str,
    batch_id: str,
    max_chars: int,
    context_columns: Sequence[str] = (),
    label_column: str | None = None,
    where: str = "the input",
) -> RequestTable:
    """Make requests of columns of equal length; `request_id` is taken where there is one.

    Raises UserError for a column that is not there.
    """
    for wanted in [text_column, *context_columns, *([label_column] if label_column else [])]:
        if wanted not in columns:
            raise UserError(f"{where} has no column {wanted!r} (it has: {', '.join(columns)}); check the column names")
    ids = columns.get("request_id")
    labels = columns[label_column] if label_column else None
    requests: list[Request] = []
    seen: dict[str, int] = {}  # how often an id came
    for position, raw in enumerate(columns[text_column]):
        text, n_left_out = cut_text(clean_text(raw), max_chars=max_chars)
        given = clean_text(ids[position]) if ids is not None else ""
        request_id = given or f"req-{batch_id}-{position}"
        prompt_id = _unique(request_id, seen)
        context = ((name, clean_text(columns[name][position])[:MAX_CONTEXT_CHARS]) for name in context_columns)
        requests.append(
            Request(
                position=position,
                request_id=request_id,
                prompt_id=prompt_id,
                text=text,
                n_left_out=n_left_out,
                context=tuple((name, value) for name, value in context if value),
                label=(clean_text(labels[position]) or None) if labels is not None else None,
            )
        )
    return RequestTable(
        requests,
        n_empty=sum(request.is_empty for request in requests),
        n_cut=sum(request.n_left_out > 0 for request in requests),
        n_duplicate_ids=sum(request.request_id != request.prompt_id for request in requests),
    )


def clean_text(value: Any) -> str:
    """A cell as text without NULs, lone surrogates and outer space; null and NaN are empty, 7.0 is 7."""
    if value is None or value != value or type(value).__name__ == "NAType":  # NaN is the value unlike itself
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).replace("\x00", "").encode("utf-8", "replace").decode("utf-8").strip()


def cut_text(text: str, *, max_chars: int) -> tuple[str, int]:
    """The text cut to `max_chars` characters with a note of how many are missing, and that number."""
    if len(text) <= max_chars:
        return text, 0
    n_left_out = len(text) - max_chars
    return f"{text[:max_chars].rstrip()}… [{n_left_out} more characters]", n_left_out


def _unique(request_id: str, seen: dict[str, int]) -> str:
    """The id, or id#2, id#3 … where it came before."""
    prompt_id = request_id
    while prompt_id in seen:
        seen[request_id] += 1
        prompt_id = f"{request_id}#{seen[request_id]}"
    seen[prompt_id] = 1
    return prompt_id
