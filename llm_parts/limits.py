"""How much and how fast: the budget of a run and the rate of its calls."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from common.config import UserError
from llm_parts.ledger import cost_of
from llm_parts.settings import LlmSettings

_FIRST_GUESS_OF_AN_ANSWER = 200  # tokens; the mean of the answers so far takes its place


class BudgetExhausted(UserError):
    """llm.max_calls, llm.max_cost or llm.max_tokens is used up; what was answered is in the cache.

    `key` names the limit; `n_left` is how many requests of the step are still open, where that is known.
    """

    def __init__(self, key: str, limit: float, spent: str, *, n_left: int | None = None, n_all: int = 0) -> None:
        left = f"; {n_left} of {n_all} requests of this step are left" if n_left is not None else ""
        super().__init__(
            f"the budget {key}={limit:g} is used up ({spent}){left}; raise it and start the same command again: "
            "what is answered is kept and not asked again"
        )
        self.key, self.limit, self.spent, self.n_left = key, limit, spent, n_left

    def with_left(self, n_left: int, n_all: int) -> BudgetExhausted:
        """The same, saying how many requests of the step are left."""
        return BudgetExhausted(self.key, self.limit, self.spent, n_left=n_left, n_all=n_all)


@dataclass(frozen=True)
class Reservation:
    """Tokens set aside for a call in flight."""

    tokens_in: int
    tokens_out: int


class Budget:
    """What a run may still spend; a call is paid for in advance by what such calls took so far."""

    def __init__(self, settings: LlmSettings) -> None:
        self._max_calls, self._max_cost, self._max_tokens = settings.max_calls, settings.max_cost, settings.max_tokens
        self._price = settings.price
        self._lock = threading.Lock()
        self._n_calls = self._n_answers = 0
        self._tokens_in = self._tokens_out = 0  # spent
        self._held_in = self._held_out = 0  # set aside

    def reserve(self, tokens_in: int) -> Reservation:
        """Set tokens aside for one call; raises BudgetExhausted where it would pass a limit."""
        with self._lock:
            mean = self._tokens_out / self._n_answers if self._n_answers else _FIRST_GUESS_OF_AN_ANSWER
            wanted = Reservation(tokens_in, round(mean))
            self._check(wanted)
            self._n_calls += 1
            self._held_in += wanted.tokens_in
            self._held_out += wanted.tokens_out
            return wanted

    def settle(self, held: Reservation, *, tokens_in: int = 0, tokens_out: int = 0, answered: bool = False) -> None:
        """Replace what was set aside by what was really used; a call without a reply used nothing."""
        with self._lock:
            self._held_in -= held.tokens_in
            self._held_out -= held.tokens_out
            self._tokens_in += tokens_in
            self._tokens_out += tokens_out
            self._n_answers += answered

    def _check(self, wanted: Reservation) -> None:
        tokens_in = self._tokens_in + self._held_in + wanted.tokens_in
        tokens_out = self._tokens_out + self._held_out + wanted.tokens_out
        if self._max_calls is not None and self._n_calls + 1 > self._max_calls:
            raise BudgetExhausted("llm.max_calls", self._max_calls, self._spent())
        if self._max_tokens is not None and tokens_in + tokens_out > self._max_tokens:
            raise BudgetExhausted("llm.max_tokens", self._max_tokens, self._spent())
        cost = cost_of(self._price, tokens_in, tokens_out)
        if self._max_cost is not None and cost is not None and cost > self._max_cost:
            raise BudgetExhausted("llm.max_cost", self._max_cost, self._spent())

    def _spent(self) -> str:
        cost = cost_of(self._price, self._tokens_in, self._tokens_out)
        money = f", cost {cost:.4f}" if cost is not None else ""
        return f"{self._n_calls} calls, {self._tokens_in + self._tokens_out} tokens{money}"


class RateLimiter:
    """At most so many calls a minute, evenly spaced after a burst of one second's worth; no limit where it is None."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._spacing_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._lock = threading.Lock()
        self._next = time.monotonic()

    def wait(self, stop: threading.Event) -> None:
        """Sleep until it is this call's turn, or until `stop` is set."""
        if not self._spacing_s:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now - 1.0)  # unused turns of the last second may be made up for
            self._next = turn + self._spacing_s
        stop.wait(max(0.0, turn - now))
