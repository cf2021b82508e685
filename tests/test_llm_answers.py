"""Answers in any dress, and the schema that is sent for them."""

from __future__ import annotations

import json

import pytest

from llm_parts.answers import InvalidAnswer, parse_answer
from llm_parts.schemas import MergeAnswer, ProposerAnswer, json_schema
from llm_parts.wires.base import Reply


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "r", "decision": "same"}',
        '\ufeff  {"reasoning": "r", "decision": "same"}\n',
        'Sure!\n```json\n{"reasoning": "r", "decision": "same"}\n```',
        '```\n{"reasoning": "r", "decision": "same"}\n```',
        'A draft: {"reasoning": "r", "decision": "different"} and now: {"reasoning": "r", "decision": "same"}',
        '<think>{"reasoning": "r", "decision": "different"}</think>{"reasoning": "r", "decision": "same"}',
        'thoughts without a head {"decision": 1}</think> {"reasoning": "r", "decision": "same"}',
        '{"reasoning": "the customer wrote </think> and ```json", "decision": "same"}',
        '{"reasoning": "r", "decision": "same", "extra": [1, 2]}',
        '{"a": {"b": 1}} {"reasoning": "r", "decision": "same"} {not json',
    ],
)
def test_the_answer_is_found_wherever_it_stands(text):
    assert parse_answer(Reply(text), schema=MergeAnswer).decision == "same"


@pytest.mark.parametrize("text", ["{" * 200_000, "[" * 200_000, '{"a":' * 100_000, "null", "[]", '"{}"', "{}", "\x00"])
def test_a_hostile_text_is_an_invalid_answer_and_nothing_worse(text):
    with pytest.raises(InvalidAnswer):
        parse_answer(Reply(text), schema=MergeAnswer)


def test_lone_surrogates_become_a_replacement_character():
    answer = parse_answer(Reply('{"reasoning": "\\ud83d", "decision": "same"}'), schema=MergeAnswer)
    assert answer.reasoning == "\ufffd"


def test_the_schema_that_is_sent_has_no_bounds_no_references_and_requires_all():
    schema = json_schema(ProposerAnswer, schema_name="proposer", choices={"request_ids": ["r1"]})
    text = json.dumps(schema)
    assert not any(word in text for word in ("$ref", "$defs", "minLength", "minimum"))
    cluster = schema["properties"]["clusters"]["items"]
    assert cluster["required"] == ["name", "summary", "criteria", "request_ids"]
    assert cluster["additionalProperties"] is False
    assert cluster["properties"]["request_ids"] == {"type": "array", "items": {"type": "string", "enum": ["r1"]}}
    with pytest.raises(ValueError, match="no field 'colour'"):
        json_schema(ProposerAnswer, schema_name="proposer", choices={"colour": ["red"]})
