"""The one way to ask a model: cached, counted, limited, retried and validated, whoever the provider is.

    with LlmClient(settings.llm, prompts_path=output_dir / "prompts" / "batch-001.jsonl") as client:
        client.preflight()   # a wrong key, url or model ends the run here
        answer = client.ask(messages, schema=JudgeAnswer, schema_name="judge", step="judge",
                            choices={"cluster_id": ids_on_the_shortlist})
        if answer.failure: ...quarantine...
        else: answer.value.decisions

What a caller need not do: say `schema: NAME`, paste the JSON schema, or ask for JSON. The client puts `schema: NAME` at
the head of the system message (one is made where there is none) and the instruction that the mode of the provider needs
at the end of the last user message. Same messages, same schema and same settings give the same answer from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from common.config import UserError
from llm_parts.schemas import Choices
from llm_parts.settings import LlmSettings
from llm_parts.wires.base import BaseLLMProvider, Message

AnyAnswer = TypeVar("AnyAnswer", bound=BaseModel)


class BudgetExhausted(UserError):
    """llm.max_calls, llm.max_cost or llm.max_tokens is used up; what was answered is in the cache."""


@dataclass(frozen=True)
class Failure:
    """Why a call was quarantined: its kind, one line that says more, and how often it was tried."""

    kind: str  # invalid_json, schema, invented_value, empty, truncated, refusal, too_long, rate_limited, server, …
    message: str
    n_attempts: int


@dataclass(frozen=True)
class Answer(Generic[AnyAnswer]):
    """A validated value, or the failure that quarantined the call; exactly one of the two is None."""

    value: AnyAnswer | None
    failure: Failure | None
    text: str = ""  # the last reply as it came, cut to 2,000 characters, for the quarantine file
    cached: bool = False  # True where nothing was sent

    @property
    def ok(self) -> bool:
        """Whether there is a value."""
        return self.value is not None


@dataclass(frozen=True)
class LlmRequest(Generic[AnyAnswer]):
    """One question: the messages, the model its answer is validated by and the step it is counted under."""

    messages: list[Message]
    schema: type[AnyAnswer]
    schema_name: str
    step: str
    choices: Choices | None = None  # field name -> permitted values: an enum in the schema, checked in the answer


@dataclass(frozen=True)
class StepEstimate:
    """What a step will take: calls, tokens and money (None where the price of the model is not known)."""

    step: str
    n_calls: int
    tokens_in: int
    tokens_out: int
    cost: float | None


def count_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a prompt, estimated from its UTF-8 bytes (four a token); servers that count are believed instead."""
    raise NotImplementedError


class LlmClient:
    """Asks one model; safe to share between threads. Raises UserError for what the user must mend before going on.

    `provider` is an object of one's own; None makes the one that `settings.provider` names, at its first call.
    `prompts_path` is the JSONL that every prompt and answer is appended to; None logs none.
    """

    def __init__(
        self, settings: LlmSettings, *, provider: BaseLLMProvider | None = None, prompts_path: Path | None = None
    ) -> None:
        raise NotImplementedError

    def preflight(self) -> None:
        """Ask the model once what it accepts (remembered in the cache); raises UserError for no server or a bad key."""
        raise NotImplementedError

    def ask(
        self,
        messages: list[Message],
        *,
        schema: type[AnyAnswer],
        schema_name: str,
        step: str,
        choices: Choices | None = None,
    ) -> Answer[AnyAnswer]:
        """One question to one answer; raises BudgetExhausted before the call that would pass the budget."""
        raise NotImplementedError

    def ask_many(
        self, requests: Sequence[LlmRequest[Any]], *, on_answer: Callable[[int, Answer[Any]], None] | None = None
    ) -> list[Answer[Any]]:
        """Answers in the order of `requests`, at most `llm.concurrency` in flight; `on_answer(i, answer)` as they come.

        `on_answer` is called in the thread of the caller. Where the budget ends, calls in flight are finished and kept
        in the cache, then BudgetExhausted is raised.
        """
        raise NotImplementedError

    def estimate(self, step: str, *, n_calls: int, tokens_in: int, tokens_out: int) -> StepEstimate:
        """What a step will cost by the price table, from its total tokens; nothing is sent, no key is needed."""
        raise NotImplementedError

    def close(self) -> None:
        """Close connections, cache and log; calls in flight are waited for."""
        raise NotImplementedError

    @property
    def ledger(self) -> Any:
        """`.summary()` gives, JSON-ready: calls, cached, tokens_in, tokens_out, cost (None: price unknown), seconds,
        failures {attempts: {kind: n}, quarantined: n}, and steps {step: the same}; `quarantined` counts calls."""
        raise NotImplementedError

    def __enter__(self) -> LlmClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# name -> factory(settings); add one's own: PROVIDERS["mine"] = lambda settings: MyProvider(...)
PROVIDERS: dict[str, Callable[[LlmSettings], BaseLLMProvider]] = {}


def get_llm_provider(name: str | None = None, settings: Any = None) -> BaseLLMProvider:
    """The provider of that name (default: that of the settings); `settings` is LlmSettings or Settings or None."""
    raise NotImplementedError
