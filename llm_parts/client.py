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

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from llm_parts.answers import InvalidAnswer, parse_answer
from llm_parts.cache import AnswerCache, SingleFlight, StoredReply, cache_key
from llm_parts.crew import Crew, Talk
from llm_parts.framing import asked_again, count_text_tokens, count_tokens
from llm_parts.ledger import Ledger, PromptLog, cost_of
from llm_parts.limits import BudgetExhausted
from llm_parts.schemas import Choices, json_schema
from llm_parts.sender import Sender, Unanswered, answer_record
from llm_parts.settings import LlmSettings, Settings
from llm_parts.wires import PROVIDERS, get_llm_provider, require_provider
from llm_parts.wires.base import BaseLLMProvider, Message, Wire, WireCall
from llm_parts.wires.custom_wire import CustomWire

__all__ = [
    "PROVIDERS",
    "Answer",
    "BaseLLMProvider",
    "BudgetExhausted",
    "Failure",
    "LlmClient",
    "LlmRequest",
    "LlmSettings",
    "Message",
    "Settings",
    "StepEstimate",
    "count_text_tokens",
    "count_tokens",
    "get_llm_provider",
]

log = logging.getLogger(__name__)

AnyAnswer = TypeVar("AnyAnswer", bound=BaseModel)

_KEPT_CHARS = 2000  # of an answer that was quarantined


@dataclass(frozen=True)
class Failure:
    """Why a call was quarantined.

    Kinds of answers: invalid_json, schema, invented_value, empty, truncated, refusal, too_long; of the network:
    rate_limited, server_error, timeout, dropped, bad_reply.
    """

    kind: str
    message: str
    n_attempts: int


@dataclass(frozen=True)
class Answer(Generic[AnyAnswer]):
    """A validated value, or the failure that quarantined the call; exactly one of the two is None."""

    value: AnyAnswer | None
    failure: Failure | None
    text: str = ""  # the last reply as it came, cut to 2,000 characters, for the quarantine file
    cached: bool = False  # nothing was sent

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
    temperature: float | None = None  # None: llm.temperature
    top_p: float | None = None  # None: llm.top_p


@dataclass(frozen=True)
class StepEstimate:
    """What a step will take: calls, tokens and money (None where the price of the model is not known)."""

    step: str
    n_calls: int
    tokens_in: int
    tokens_out: int
    cost: float | None


def add_up(steps: Sequence[StepEstimate]) -> dict[str, Any]:
    """`calls` per step, the steps whole, and the totals; the cost is None where one step's is."""
    costs = [step.cost for step in steps]
    return {
        "calls": {step.step: step.n_calls for step in steps},
        "total_calls": sum(step.n_calls for step in steps),
        "tokens_in": sum(step.tokens_in for step in steps),
        "tokens_out": sum(step.tokens_out for step in steps),
        "cost": None if None in costs else sum(cost for cost in costs if cost is not None),
        "steps": [asdict(step) for step in steps],
    }


class LlmClient:
    """Asks one model; safe to share between threads. Raises UserError for what the user must mend before going on.

    `provider` is an object of one's own; None makes the one that `settings.provider` names, at its first call.
    `prompts_path` is the JSONL that every prompt and answer is appended to; None logs none. `default_cache_path` is
    where answers are kept when `llm.cache_path` names no file; None keeps them in memory.

    Raises UserError at once for a provider that there is not; a missing key is found at the first call.
    """

    def __init__(
        self,
        settings: LlmSettings,
        *,
        provider: BaseLLMProvider | None = None,
        prompts_path: Path | None = None,
        default_cache_path: Path | None = None,
    ) -> None:
        if provider is None:
            require_provider(settings.provider)
        self.settings = settings
        self.ledger = Ledger(settings.price)
        self._provider = provider
        self._prompts_path = prompts_path
        self._cache_path = Path(settings.cache_path) if settings.cache_path else default_cache_path
        self._parts_lock = threading.Lock()
        self._parts: tuple[Sender, AnswerCache, PromptLog | None] | None = None
        self._flights = SingleFlight()

    # --- Asking ------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the provider and open cache and log; asks nothing. Raises UserError for a key that is not set."""
        self._opened()

    def preflight(self) -> None:
        """Ask the model once what it accepts (remembered in the cache); raises UserError for no server or a bad key."""
        self._sender.preflight()

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
        return self.answer(LlmRequest(messages, schema, schema_name, step, choices))

    def answer(self, request: LlmRequest[AnyAnswer]) -> Answer[AnyAnswer]:
        """The answer to one request: from the cache, else by a call; asked once more where it cannot be used."""
        answer = self._answer(request, fresh=False)
        if answer.failure and answer.cached and self.settings.retry_quarantined:
            answer = self._answer(request, fresh=True)
        if answer.failure:
            self.ledger.count_quarantined(request.step)
        return answer

    def ask_many(
        self, requests: Sequence[LlmRequest[Any]], *, on_answer: Callable[[int, Answer[Any]], None] | None = None
    ) -> list[Answer[Any]]:
        """Answers in the order of `requests`, at most `llm.concurrency` in flight; `on_answer(i, answer)` as they come.

        `on_answer` is called in the thread of the caller. Where the budget ends, calls in flight are finished and kept
        in the cache, then BudgetExhausted is raised.
        """
        answers: dict[int, Answer[Any]] = {}

        def talk(index: int, request: LlmRequest[Any]) -> Talk[None]:
            (answers[index],) = yield [request]
            if on_answer:
                on_answer(index, answers[index])

        try:
            with self.crew() as crew:
                crew.results([crew.start(talk(index, request)) for index, request in enumerate(requests)])
        except BudgetExhausted as exhausted:
            raise exhausted.with_left(len(requests) - len(answers), len(requests)) from None
        return [answers[index] for index in range(len(requests))]

    @contextmanager
    def crew(self) -> Iterator[Crew[LlmRequest[Any], Answer[Any]]]:
        """For conversations in which one question follows from the answer to another; see llm_parts.crew.

        At most `llm.concurrency` calls are in flight. Where the budget ends, those in flight are finished and kept in
        the cache, then BudgetExhausted is raised.
        """
        # A few more threads than calls in flight: while some prepare or wait to retry, others keep the server busy.
        # Not many more: what they have taken already is sent before what turns out to be more urgent.
        n_threads = self.settings.concurrency + 1 + self.settings.concurrency // 2
        made: Crew[LlmRequest[Any], Answer[Any]] = Crew(self.answer, n_threads=n_threads)
        with made as crew:
            try:
                yield crew
            except KeyboardInterrupt:
                self._sender.stop()
                log.warning("llm: waiting for the calls in flight; Ctrl-C once more leaves them")
                raise

    def estimate(self, step: str, *, n_calls: int, tokens_in: int, tokens_out: int) -> StepEstimate:
        """What a step will cost by the price table, from its total tokens; nothing is sent, no key is needed."""
        return StepEstimate(step, n_calls, tokens_in, tokens_out, cost_of(self.settings.price, tokens_in, tokens_out))

    def close(self) -> None:
        """Close connections, cache and log."""
        if self._parts is not None:
            sender, cache, prompts = self._parts
            sender.wire.close()
            cache.close()
            if prompts is not None:
                prompts.close()
            self._parts = None

    def __enter__(self) -> LlmClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- One request -------------------------------------------------------------------------------------------------

    def _answer(self, request: LlmRequest[AnyAnswer], *, fresh: bool) -> Answer[AnyAnswer]:
        call = self._call(request)
        all_cached, failure, text = True, None, ""
        for n_attempts in (1, 2):
            key = self._key(call)
            try:
                stored, cached = self._fetch(call, request, key=key, fresh=fresh)
            except Unanswered as problem:
                return Answer(None, Failure(problem.kind, problem.message, problem.n_attempts), text)
            all_cached &= cached
            text = stored.reply.text[:_KEPT_CHARS]
            try:
                value = parse_answer(
                    stored.reply,
                    schema=request.schema,
                    choices=request.choices,
                    max_chars=self.settings.max_answer_chars,
                )
            except InvalidAnswer as invalid:
                self.ledger.count_unusable(request.step, invalid.kind, key=key)
                failure = Failure(invalid.kind, invalid.message, n_attempts)
                call = asked_again(call, text=stored.reply.text, invalid=invalid)
                continue
            return Answer(value, None, text, all_cached)
        return Answer(None, failure, text, all_cached)

    def _call(self, request: LlmRequest[Any]) -> WireCall:
        settings = self.settings
        return WireCall(
            messages=request.messages,
            schema=json_schema(request.schema, schema_name=request.schema_name, choices=request.choices),
            schema_name=request.schema_name,
            temperature=settings.temperature if request.temperature is None else request.temperature,
            top_p=settings.top_p if request.top_p is None else request.top_p,
            max_tokens=settings.max_answer_tokens,
        )

    def _key(self, call: WireCall) -> str:
        wire = self._sender.wire
        return cache_key(call, provider=wire.name, model=wire.model, seed=self.settings.seed)

    def _fetch(self, call: WireCall, request: LlmRequest[Any], *, key: str, fresh: bool) -> tuple[StoredReply, bool]:
        """A reply and whether it was in the cache; a new one is in the cache before it is returned."""
        sender, cache, prompts = self._opened()
        with self._flights.hold(key):
            stored = None if fresh else cache.get(key)
            if stored is None:
                keep = partial(cache.put, key, step=request.step)
                return sender.send(call, step=request.step, keep=keep), False
        self.ledger.count_cached(request.step, tokens_in=stored.tokens_in, tokens_out=stored.tokens_out)
        if prompts is not None:
            record: dict[str, Any] = {"step": request.step, "schema": request.schema_name, "provider": sender.wire.name}
            record |= {"model": sender.wire.model, "messages": call.messages, "latency_s": 0.0, "cached": True}
            prompts.write(record | answer_record(stored, self.ledger))
        return stored, True

    # --- Parts, made at the first call -------------------------------------------------------------------------------

    @property
    def _sender(self) -> Sender:
        return self._opened()[0]

    def _opened(self) -> tuple[Sender, AnswerCache, PromptLog | None]:
        with self._parts_lock:
            if self._parts is None:
                wire = self._wire()
                cache = AnswerCache(self._cache_path)
                sender = Sender(wire, self.settings, cache=cache, ledger=self.ledger)
                prompts = PromptLog(self._prompts_path, mask=sender.mask) if self._prompts_path else None
                sender.prompts = prompts
                self._parts = (sender, cache, prompts)
            return self._parts

    def _wire(self) -> Wire:
        provider = self._provider or get_llm_provider(self.settings.provider, self.settings)
        return provider if isinstance(provider, Wire) else CustomWire(self.settings, provider)
