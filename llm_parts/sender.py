"""The one policy under which calls are sent: preflight, budget, rate, concurrency, retries, and what ends a run."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from common.config import UserError
from llm_parts.cache import AnswerCache, StoredReply
from llm_parts.framing import count_text_tokens, count_tokens, framed, with_schema_name
from llm_parts.ledger import Ledger, PromptLog, cost_of
from llm_parts.limits import Budget, RateLimiter
from llm_parts.settings import KEY_NAMES, LlmSettings
from llm_parts.wires.base import Capabilities, Reply, Wire, WireCall, shown_url
from llm_parts.wires.errors import WireError

log = logging.getLogger(__name__)

_LONGEST_BACKOFF_S = 30.0
_UNANSWERED_IN_A_ROW = 3  # calls given up one after the other: the server is gone, not unlucky
_SHORTEST_SECRET = 6  # a shorter key is a stand-in, and would be found in ordinary words

_PREFLIGHT = WireCall(
    messages=[
        {"role": "system", "content": "This is a test of the connection."},
        {"role": "user", "content": "Is water wet?"},
    ],
    schema={
        "title": "preflight",
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    },
    schema_name="preflight",
)


Keep = Callable[[StoredReply], None]


class Unanswered(Exception):
    """A call that got no reply although it was sent again and again; it is quarantined and the run goes on."""

    def __init__(self, error: WireError, n_attempts: int) -> None:
        super().__init__(error.message)
        self.kind, self.message, self.n_attempts = error.kind, error.message, n_attempts


class Sender:
    """Sends calls over one wire; safe between threads."""

    def __init__(self, wire: Wire, settings: LlmSettings, *, cache: AnswerCache, ledger: Ledger) -> None:
        self.wire, self.settings = wire, settings
        self._cache, self._ledger = cache, ledger
        self.prompts: PromptLog | None = None  # every attempt is written there
        self._budget = Budget(settings)
        self._rate = RateLimiter(settings.requests_per_minute)
        self._slots = threading.BoundedSemaphore(settings.concurrency)
        self.stopped = threading.Event()  # set: no retry waits or starts any more
        self._ended: UserError | None = None  # what the user must mend; nothing is sent after it
        self._preflight_lock = threading.Lock()
        self._is_known = not wire.needs_preflight
        self._count_lock = threading.Lock()
        self._n_unanswered_in_a_row = 0
        self._has_answered = False

    def send(self, call: WireCall, *, step: str, keep: Keep) -> StoredReply:
        """One reply, after as many attempts as `llm.max_attempts`; `keep` is called with it before anything else.

        Raises Unanswered where none came, BudgetExhausted, and UserError for what the user must mend.
        """
        self.preflight()
        return self._send_with_retries(call, step, keep)

    def stop(self) -> None:
        """Start no call and no retry any more; calls in flight come to their end."""
        self._end(UserError("the run was stopped"))
        self.stopped.set()

    def mask(self, text: str) -> str:
        """A text without the keys of the provider in it."""
        for secret in self.wire.secrets:
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text

    # --- What the model accepts --------------------------------------------------------------------------------------

    def preflight(self) -> None:
        """Ask the model once what it accepts; remembered in the cache. Raises UserError where it cannot be asked."""
        if self._is_known:
            return
        with self._preflight_lock:
            if self._is_known:
                return
            place = (self.wire.name, shown_url(getattr(self.wire, "url", "")), self.wire.model)
            record = self._cache.get_capabilities(*place)
            if record is not None:
                self.wire.capabilities = Capabilities(**json.loads(record))
            elif self._probe():
                self._cache.put_capabilities(*place, self.wire.capabilities.to_json())
                log.info("llm: %s %s accepts %s", self.wire.name, self.wire.model, self.wire.capabilities)
            self._is_known = True

    def _probe(self) -> bool:
        """Go down the modes until one binds the answer to its schema; False where the server was too busy to tell.

        The prompt does not ask for JSON, so that JSON in the reply proves that the schema was obeyed.
        """
        settings = self.settings
        call = replace(_PREFLIGHT, temperature=settings.temperature, top_p=settings.top_p)
        call = replace(call, max_tokens=settings.max_answer_tokens)
        while True:
            try:
                stored = self._send_with_retries(call, "preflight", keep=lambda stored: None)
            except Unanswered as problem:
                log.warning("llm: the preflight call got no answer (%s); going on by guess", problem.message)
                return False
            now = self.wire.capabilities
            lower = self.wire.next_mode(now)
            if now.mode == "prompt" or lower is None or _is_json_object(stored.reply.text):
                return True
            log.info("llm: %s %s ignores the schema in mode %s", self.wire.name, self.wire.model, now.mode)
            self.wire.capabilities = lower
            if lower.mode == "prompt":
                return True

    # --- Attempts ----------------------------------------------------------------------------------------------------

    def _send_with_retries(self, call: WireCall, step: str, keep: Keep) -> StoredReply:
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, WireError)),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.settings.max_attempts), tenacity.stop_when_event_set(self.stopped)
            ),
            wait=self._seconds_to_wait,
            sleep=tenacity.sleep_using_event(self.stopped),
            reraise=True,
        )
        try:
            stored = retrying(self._attempt, call, step, keep)
        except WireError as error:
            self._count_unanswered(error)
            raise Unanswered(error, retrying.statistics.get("attempt_number", 1)) from None
        with self._count_lock:
            self._n_unanswered_in_a_row = 0
            self._has_answered = True
        return stored

    def _seconds_to_wait(self, state: Any) -> float:
        error = state.outcome.exception()
        if error.retry_after is not None:
            # A little later than told, and not all at the same moment.
            return error.retry_after + random.uniform(0, 0.1 * self.settings.retry_wait_s)
        backoff = min(self.settings.retry_wait_s * 2 ** (state.attempt_number - 1), _LONGEST_BACKOFF_S)
        return backoff * random.uniform(0.5, 1.0)

    def _attempt(self, call: WireCall, step: str, keep: Keep) -> StoredReply:
        """One reply; what the server does not take is left out and sent again at once. Raises WireError to wait."""
        tried: set[Capabilities] = set()
        while True:
            capabilities = self.wire.capabilities
            tried.add(capabilities)
            try:
                return self._send_once(call, capabilities, step, keep)
            except WireError as error:
                if error.kind == "unreachable" and self._has_answered:
                    error.kind = "dropped"  # it was there a moment ago
                self._ledger.count_failure(step, error.kind)
                if error.retryable:
                    self._refuse_long_waits(error)
                    raise
                self._adapt(capabilities, error, tried)

    def _adapt(self, capabilities: Capabilities, error: WireError, tried: set[Capabilities]) -> None:
        try:
            self.wire.capabilities = self.wire.adapted(capabilities, error, tried)
        except WireError:
            raise self._end(self._explained(error)) from None
        log.info("llm: %s; trying %s", error.message, self.wire.capabilities)

    def _send_once(self, call: WireCall, capabilities: Capabilities, step: str, keep: Keep) -> StoredReply:
        if call.schema_name == _PREFLIGHT.schema_name:  # which says nothing of JSON
            sent = with_schema_name(call)
        else:
            sent = framed(call, mode=capabilities.mode, schema_in_prompt=self.wire.schema_in_prompt)
        n_tokens = count_tokens(sent.messages)
        self._rate.wait(self.stopped)
        with self._slots:
            if self._ended is not None:
                raise self._ended
            held = self._budget.reserve(n_tokens)
            self._ledger.count_call(step)
            started = time.perf_counter()
            try:
                reply = self._masked(self.wire.send(sent, capabilities))
            except WireError as error:
                self._budget.settle(held)
                error.message = self.mask(error.message)
                self._log(sent, capabilities, step, seconds=time.perf_counter() - started, error=error)
                if error.kind != "refusal":
                    raise
                reply = Reply(error.message, finish="refusal", tokens_in=0, tokens_out=0)
            except BaseException:
                self._budget.settle(held)
                raise
            stored = self._stored(reply, n_tokens, time.perf_counter() - started)
            keep(stored)  # before all else: a process that is killed from here on has not lost the answer
            used = {"tokens_in": stored.tokens_in, "tokens_out": stored.tokens_out}
            self._budget.settle(held, **used, answered=True)
        self._ledger.count_reply(step, **used, seconds=stored.seconds)
        self._log(sent, capabilities, step, seconds=stored.seconds, stored=stored)
        return stored

    def _masked(self, reply: Reply) -> Reply:
        # A cut one character over the limit is still too long, and spares the cache 10 MB.
        text = reply.text[: self.settings.max_answer_chars + 1]
        return replace(reply, text=self.mask(text))

    def _stored(self, reply: Reply, n_tokens: int, seconds: float) -> StoredReply:
        tokens_in = n_tokens if reply.tokens_in is None else reply.tokens_in
        tokens_out = count_text_tokens(reply.text) if reply.tokens_out is None else reply.tokens_out
        return StoredReply(reply, tokens_in, tokens_out, round(seconds, 4))

    def _log(
        self,
        sent: WireCall,
        capabilities: Capabilities,
        step: str,
        *,
        seconds: float,
        stored: StoredReply | None = None,
        error: WireError | None = None,
    ) -> None:
        if self.prompts is None:
            return
        record: dict[str, Any] = {"step": step, "schema": sent.schema_name, "provider": self.wire.name}
        record |= {"model": self.wire.model, "mode": capabilities.mode, "messages": sent.messages}
        record |= {"latency_s": round(seconds, 4), "cached": False}
        if error is not None:
            record |= {"failure": error.kind, "error": error.message}
        if stored is not None:
            record |= answer_record(stored, self._ledger)
        self.prompts.write(record)

    # --- What ends a run ---------------------------------------------------------------------------------------------

    def _count_unanswered(self, error: WireError) -> None:
        with self._count_lock:
            self._n_unanswered_in_a_row += 1
            gone = self._n_unanswered_in_a_row >= _UNANSWERED_IN_A_ROW and not self.stopped.is_set()
        if gone:
            message = (
                f"{self._place()} has stopped answering: {error.message} ({_UNANSWERED_IN_A_ROW} calls in a row, each "
                f"tried {self.settings.max_attempts} times); see to the server and start the same command again: what "
                "is answered is kept"
            )
            raise self._end(UserError(message))

    def _refuse_long_waits(self, error: WireError) -> None:
        if error.retry_after is not None and error.retry_after > self.settings.max_retry_wait_s:
            message = (
                f"{self._place()} asks to wait {error.retry_after:.0f} s ({error.message}), longer than "
                f"llm.max_retry_wait_s={self.settings.max_retry_wait_s:g}; start the same command again then, what is "
                "answered is kept"
            )
            raise self._end(UserError(message)) from None

    def _end(self, problem: UserError) -> UserError:
        """Send nothing more: every further call would meet the same problem, and some are paid for."""
        self._ended = self._ended or problem
        return problem

    def _explained(self, error: WireError) -> UserError:
        name = KEY_NAMES.get(self.wire.name, "the key")
        local = " (is it running? `ollama serve`)" if self.wire.name == "ollama" else ""
        pull = f" or run `ollama pull {self.wire.model}`" if self.wire.name == "ollama" else ""
        advice = {
            "unreachable": f"cannot be reached: {error.message}; start the server{local} or set llm.url",
            "auth": f"refuses the key: {error.message}; set {name} in the environment or in .env",
            "not_found": f"does not know the model {self.wire.model!r}: {error.message}; set llm.model or "
            f"llm.url{pull}",
            "quota": f"has no quota left: {error.message}; add credit or wait, then start the same command again: "
            "what is answered is kept",
            "rejected": f"does not take the request: {error.message}; see llm.model, llm.max_answer_tokens, "
            "llm.temperature",
        }
        return UserError(f"{self._place()} {advice.get(error.kind, error.message)}")

    def _place(self) -> str:
        url = getattr(self.wire, "url", "")
        return f"{self.wire.name} at {shown_url(url)}" if url else self.wire.name


def answer_record(stored: StoredReply, ledger: Ledger) -> dict[str, Any]:
    """The answer of a call as the prompt log keeps it."""
    return {
        "answer": stored.reply.text,
        "finish": stored.reply.finish,
        "tokens_in": stored.tokens_in,
        "tokens_out": stored.tokens_out,
        "cost": cost_of(ledger.price, stored.tokens_in, stored.tokens_out),
    }


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
