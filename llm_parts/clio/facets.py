"""Facets: a few questions put to every dialogue, one call each, and what comes back made fit for its type.

The first facet is what is clustered, so an answer without it is not taken: the model is shown what is missing and asked
once more, then the dialogue is quarantined. Another facet that does not fit its type is left empty and counted.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import model_validator

from llm_parts.client import Answer, LlmClient, LlmRequest
from llm_parts.clio.conversations import Conversation
from llm_parts.clio.masking import Masker
from llm_parts.clio.prompts import build_messages, tagged
from llm_parts.clio.schemas import FacetsAnswer
from llm_parts.clio.settings import ClioSettings, Facet, PromptVariant
from llm_parts.extractive.words import clip, sentences_of
from llm_parts.requests import clean_text

log = logging.getLogger(__name__)

STEP = "facets"
MAX_SENTENCES = 2

INSTRUCTIONS = """
You read one dialogue between a user and an assistant and answer the questions of <facets> about it: for each facet its
name, copied exactly, and its value. A value of type text has two sentences at most and no more characters than
max_chars; it begins with `prefix` where one is given. A value of type number lies between minimum and maximum. A value
of type choice is one of choices, copied exactly.
""".strip()

_RULES = """
Describe what is done, not who does it: leave out names, places, companies, dates, amounts and identifiers.
Be specific about the topic: "asks how to renew a passport by mail" is good, "asks a question" is useless.
Judge by what the user wants in the end, not by how the dialogue begins. Where several things are wanted, take the one
that most of the dialogue is about. Do not judge whether the assistant was right. Where a dialogue is cut, or breaks
off, describe what there is.
""".strip()

_EXAMPLES = """
Examples of the value of a text facet that asks for the request:
Somebody pastes a stack trace of a web server and asks why it stops: "Find out why a web server stops with an error of
its database connection."
Somebody wants a reply to a landlord about a broken heater: "Write a firm but polite letter that asks a landlord to
repair the heating."
""".strip()

VARIANTS: dict[PromptVariant, str] = {
    "plain": INSTRUCTIONS,
    "detailed": f"{INSTRUCTIONS}\n\n{_RULES}",
    "examples": f"{INSTRUCTIONS}\n\n{_RULES}\n\n{_EXAMPLES}",
}


@dataclass
class FacetTable:
    """Answers for all dialogues in their order; None where there is none."""

    columns: dict[str, list[Any]]  # facet -> [n] str, or float for numbers
    errors: list[str | None]  # [n] why a dialogue has no facets
    unfit: Counter[str] = field(default_factory=Counter)  # facet -> answers that did not fit its type

    @property
    def n_quarantined(self) -> int:
        """Dialogues whose call gave no usable answer."""
        return sum(error is not None and error != "empty" for error in self.errors)

    def has_facets(self) -> list[int]:
        """The rows that were answered."""
        return [row for row, error in enumerate(self.errors) if error is None]

    def take(self, rows: Sequence[int]) -> FacetTable:
        """The table of some rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return FacetTable(columns, [self.errors[row] for row in rows])


def extract_facets(
    conversations: Sequence[Conversation],
    *,
    client: LlmClient,
    settings: ClioSettings,
    on_done: Callable[[], None] = lambda: None,
    step: str = STEP,
) -> FacetTable:
    """Ask the facets of every dialogue that has words; `on_done` is called as each is answered.

    Raises BudgetExhausted where the budget ends; what is answered by then is in the cache.
    """
    asked = [conversation for conversation in conversations if not conversation.is_empty]
    requests = FacetRequests(asked, settings=settings, step=step)
    answers = client.ask_many(requests, on_answer=lambda _index, _answer: on_done())
    by_position = {conversation.position: answer for conversation, answer in zip(asked, answers, strict=True)}
    table = FacetTable({facet.name: [] for facet in settings.facets}, [])
    masker = Masker(enabled=settings.mask, names=settings.mask_names)
    for conversation in conversations:
        _append(table, by_position.get(conversation.position), settings.facets, masker)
    odd = {"empty": table.errors.count("empty"), "quarantined": table.n_quarantined, "unfit": dict(table.unfit)}
    log.info("facets of %s dialogues: %s", f"{len(asked):,}", odd)
    return table


class FacetRequests(Sequence[LlmRequest[FacetsAnswer]]):
    """The question for each dialogue, made when it is asked: the prompts of all would fill the memory."""

    def __init__(self, conversations: Sequence[Conversation], *, settings: ClioSettings, step: str = STEP) -> None:
        self._conversations = conversations
        self._instructions = VARIANTS[settings.facet_prompt]
        self._facets = tagged("facets", [_card(facet) for facet in settings.facets])
        self._language = settings.output_language
        self._schema = answer_schema(settings.facets)
        self._step = step
        self._temperature, self._top_p = settings.temperature, settings.top_p

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        dialogue = tagged("dialogue", [turn.to_prompt() for turn in self._conversations[index].turns])
        prompt = f"{self._facets}\n\n{dialogue}"
        messages = build_messages(self._instructions, prompt, output_language=self._language)
        return LlmRequest(messages, self._schema, "facets", self._step, None, self._temperature, self._top_p)


def answer_schema(facets: Sequence[Facet]) -> type[FacetsAnswer]:
    """FacetsAnswer that is not valid without a text for the first facet."""
    main = facets[0].name

    class Answered(FacetsAnswer):
        @model_validator(mode="after")
        def _has_the_main_facet(self) -> Answered:
            if not any(facet.name == main and str(facet.value).strip() for facet in self.facets):
                raise ValueError(f"the facet {main!r} is missing or empty")
            return self

    return Answered


def _card(facet: Facet) -> dict[str, Any]:
    card: dict[str, Any] = {"name": facet.name, "type": facet.type, "question": facet.question}
    if facet.type == "choice":
        card["choices"] = list(facet.choices)
    elif facet.type == "number":
        card |= {"minimum": facet.minimum, "maximum": facet.maximum}
    else:
        card |= {"max_chars": facet.max_chars} | ({"prefix": facet.prefix} if facet.prefix else {})
    return card


def _append(table: FacetTable, answer: Answer[FacetsAnswer] | None, facets: Sequence[Facet], masker: Masker) -> None:
    given: dict[str, Any] = {}
    if answer is None:
        table.errors.append("empty")
    elif answer.failure is not None:
        table.errors.append(f"{answer.failure.kind}: {masker.mask(answer.failure.message)}"[:300])
    elif answer.value is not None:
        table.errors.append(None)
        given = {facet.name: facet.value for facet in answer.value.facets}
    for facet in facets:
        value = fit_value(facet, given.get(facet.name), masker)
        table.columns[facet.name].append(value)
        if value is None and table.errors[-1] is None:
            table.unfit[facet.name] += 1


def fit_value(facet: Facet, value: Any, masker: Masker) -> Any:
    """An answer as its type wants it, masked; None where it does not fit."""
    text = clean_text(value)
    if not text:
        return None
    if facet.type == "number":
        return _number(text, facet)
    if facet.type == "choice":
        return next((choice for choice in facet.choices if choice.casefold() == text.casefold()), None)
    return _with_prefix(facet, clip(" ".join(sentences_of(masker.mask(text))[:MAX_SENTENCES]), facet.max_chars))


def _number(text: str, facet: Facet) -> float | None:
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) and facet.minimum <= number <= facet.maximum else None


def _with_prefix(facet: Facet, text: str) -> str:
    prefix = facet.prefix.strip()
    if not prefix or text.casefold().startswith(prefix.casefold()):
        return text
    return f"{prefix} {text[:1].lower()}{text[1:]}"
