"""What the client says around a caller's messages: the name of the schema, how to answer, what was wrong last time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

from llm_parts.answers import InvalidAnswer
from llm_parts.wires.base import Message, Mode, WireCall

_BYTES_PER_TOKEN = 4  # English; other scripts take more bytes a character and more tokens too
_SHOWN_CHARS = 2000  # of an answer that could not be used


def count_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a prompt, estimated from its UTF-8 bytes (four a token); servers that count are believed instead."""
    return sum(count_text_tokens(message["content"]) for message in messages)


def count_text_tokens(text: str) -> int:
    """Tokens of a text, estimated from its UTF-8 bytes."""
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)


def framed(call: WireCall, *, mode: Mode, schema_in_prompt: bool) -> WireCall:
    """The call as it is sent: `schema: NAME` at the head of the system message, how to answer after the last text.

    The instruction comes last so that nothing in the texts before it has the last word.
    """
    if call.schema is None:
        return call
    named = with_schema_name(call)
    return replace(named, messages=_appended(named.messages, _instruction(call, mode, schema_in_prompt)))


def with_schema_name(call: WireCall) -> WireCall:
    """The call with `schema: NAME` at the head of its system message, for servers that are told in no other place."""
    head = f"schema: {call.schema_name}"
    messages = [dict(message) for message in call.messages]
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] = f"{head}\n\n{messages[0]['content']}"
    else:
        messages.insert(0, {"role": "system", "content": head})
    return replace(call, messages=messages)


def asked_again(call: WireCall, *, text: str, invalid: InvalidAnswer) -> WireCall:
    """The call that shows a model what was wrong with its answer; a cut-off answer is given twice the room."""
    complaint = f"Your answer cannot be used: {invalid.message}. Give the whole answer again, corrected."
    shown = text.strip()
    if invalid.kind in ("truncated", "too_long") or not shown:
        room = call.max_tokens * 2 if invalid.kind == "truncated" else call.max_tokens
        return replace(call, messages=_appended(call.messages, complaint), max_tokens=room)
    cut = shown if len(shown) <= _SHOWN_CHARS else shown[:_SHOWN_CHARS] + " …"
    turns: list[Message] = [{"role": "assistant", "content": cut}, {"role": "user", "content": complaint}]
    return replace(call, messages=[*call.messages, *turns])


def _instruction(call: WireCall, mode: Mode, schema_in_prompt: bool) -> str:
    if mode == "tool":
        return f"Answer by calling the tool {call.schema_name}."
    if mode == "schema" and not schema_in_prompt:
        return f"Answer for schema: {call.schema_name} with one JSON object."
    schema = json.dumps(call.schema, ensure_ascii=False, separators=(",", ":"))
    return (
        f"Answer for schema: {call.schema_name} with one JSON object and no word before or after it. "
        f"It must be valid under this JSON schema:\n{schema}"
    )


def _appended(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with `text` at the end of the last turn of the user; such a turn is added where the last is none."""
    copies = [dict(message) for message in messages]
    if copies and copies[-1]["role"] == "user":
        copies[-1]["content"] = f"{copies[-1]['content']}\n\n{text}"
        return copies
    return [*copies, {"role": "user", "content": text}]
