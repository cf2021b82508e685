"""The answers that a model gives, as pydantic models, and the JSON schema of each that is sent to a server.

A class is what we accept; `json_schema` is what we ask for. The two differ on purpose: servers refuse number bounds and
lengths in a schema, and some demand that every property is required, so bounds are checked here and nowhere else, and
an optional field is asked for but not insisted on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# field name -> the only values an answer may hold there, e.g. {"cluster_id": ["c-1", "c-2"]}
Choices = Mapping[str, Sequence[str]]

Text = Annotated[str, StringConstraints(strip_whitespace=True)]
FilledText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

# What strict servers refuse in a schema; checked on our side instead.
_BOUNDS = frozenset(
    (
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minItems", "maxItems", "uniqueItems", "default"),
    )
)


class AnswerModel(BaseModel):
    """Base of all answers: a field that we did not ask for is dropped, not an error."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ProposedCluster(AnswerModel):
    """One cluster that the Proposer suggests, with the requests it was seen in."""

    name: FilledText
    summary: Text
    criteria: Text
    request_ids: list[str]


class ProposerAnswer(AnswerModel):
    """Answer `proposer`: the clusters a batch needs that are not known yet; none is a valid answer."""

    reasoning: Text
    clusters: list[ProposedCluster]


class Decision(AnswerModel):
    """What the Judge decides on one request: assign (to `cluster_id`), new_cluster or skip."""

    request_id: str
    decision: Literal["assign", "new_cluster", "skip"]
    cluster_id: str | None = None
    confidence: float = Field(ge=0.0, le=1.0, allow_inf_nan=False)
    rationale: Text


class JudgeAnswer(AnswerModel):
    """Answer `judge`: one decision for each request of the prompt."""

    decisions: list[Decision]


class MergeAnswer(AnswerModel):
    """Answer `merge`: whether two clusters are the same, different, or the first a part of the second."""

    reasoning: Text
    decision: Literal["same", "different", "part_of"]


class CohesionAnswer(AnswerModel):
    """Answer `cohesion`: how well the members of a cluster belong together, 1 (not at all) to 5 (all one intent)."""

    reasoning: Text
    score: int = Field(ge=1, le=5)


class NameCheckAnswer(AnswerModel):
    """Answer `name_check`: the cluster among its siblings that a member fits by name; null where none does."""

    cluster_id: str | None


# Schemas of part one by the name that travels with them; other steps bring their own.
SCHEMAS: dict[str, type[AnswerModel]] = {
    "proposer": ProposerAnswer,
    "judge": JudgeAnswer,
    "merge": MergeAnswer,
    "cohesion": CohesionAnswer,
    "name_check": NameCheckAnswer,
}


def json_schema(model: type[BaseModel], *, schema_name: str, choices: Choices | None = None) -> dict[str, Any]:
    """The JSON schema to send for `model`: no references, no bounds, every property required, nothing besides them.

    `choices` puts an enum on each field so named, wherever it stands; a field that may be null stays so.
    Raises ValueError where `model` refers to itself (no server takes such a schema) or has no field of a choice's name.
    """
    schema = copy.deepcopy(_schema_of(model))
    schema["title"] = schema_name
    for name, values in (choices or {}).items():
        places = list(_fields_named(schema, name))
        if not places:
            raise ValueError(f"schema {schema_name} has no field {name!r} to choose values for")
        for properties in places:
            properties[name] = _with_enum(properties[name], values)
    return schema


@functools.lru_cache(maxsize=256)
def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    raw = model.model_json_schema()
    return _simplify(_inline(raw, raw.get("$defs", {}), depth=0))


def choice_errors(answer: BaseModel, choices: Choices | None) -> list[str]:
    """One line for each value of `answer` that stands in a field of `choices` and is none of its values."""
    errors = []
    for name, permitted in (choices or {}).items():
        allowed = set(permitted)
        for given in _values_named(answer.model_dump(), name):
            if given not in allowed:
                errors.append(f"{name}: {given!r} is not one of the {len(allowed)} permitted values")
    return errors


def _inline(node: Any, definitions: dict[str, Any], *, depth: int) -> Any:
    """Replace references by what they refer to; several servers do not follow `$ref`."""
    if depth > 50:
        raise ValueError("an answer model must not refer to itself")
    if isinstance(node, list):
        return [_inline(part, definitions, depth=depth + 1) for part in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = copy.deepcopy(definitions[node["$ref"].rsplit("/", 1)[-1]])
        return _inline({**target, **{k: v for k, v in node.items() if k != "$ref"}}, definitions, depth=depth + 1)
    return {key: _inline(value, definitions, depth=depth + 1) for key, value in node.items() if key != "$defs"}


def _simplify(node: Any) -> Any:
    """Drop bounds and titles, require every property and refuse others; names of properties are left alone."""
    if isinstance(node, list):
        return [_simplify(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: {name: _simplify(part) for name, part in value.items()} if key == "properties" else _simplify(value)
        for key, value in node.items()
        if key not in _BOUNDS and key not in ("title", "required", "additionalProperties")
    }
    kept.pop("description", None)
    if "properties" in kept:
        kept["required"] = list(kept["properties"])
        kept["additionalProperties"] = False
    return kept


def _fields_named(node: Any, name: str) -> Iterator[dict[str, Any]]:
    """Every `properties` mapping of a schema that holds `name`."""
    if isinstance(node, list):
        for part in node:
            yield from _fields_named(part, name)
    elif isinstance(node, dict):
        properties = node.get("properties", {})
        if name in properties:
            yield properties
        for part in node.values():
            yield from _fields_named(part, name)


def _with_enum(field: dict[str, Any], values: Sequence[str]) -> dict[str, Any]:
    if field.get("type") == "array":
        return {**field, "items": _with_enum(field["items"], values)}
    nullable = any(part.get("type") == "null" for part in field.get("anyOf", ()))
    text = {"type": "string", "enum": list(values)}
    if not values:  # an empty enum is no valid schema: only null is left, or any text that our check will refuse
        return {"type": "null"} if nullable else {"type": "string"}
    return {"anyOf": [text, {"type": "null"}]} if nullable else text


def _values_named(node: Any, name: str) -> Iterator[Any]:
    """Every value that is not null in a field `name`, lists taken apart."""
    if isinstance(node, list):
        for part in node:
            yield from _values_named(part, name)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key != name:
                yield from _values_named(value, name)
            elif isinstance(value, list):
                yield from value
            elif value is not None:
                yield value
