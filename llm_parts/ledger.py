"""What a run asked, got, paid and lost, by step; and the log of every prompt and answer."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.commit import make_folder
from llm_parts.settings import Price


def cost_of(price: Price | None, tokens_in: int, tokens_out: int) -> float | None:
    """Tokens times price; None where the price is not known."""
    return None if price is None else (tokens_in * price.input + tokens_out * price.output) / 1e6


@dataclass
class StepLedger:
    """Counts of one step."""

    calls: int = 0  # sent, retries included
    answered: int = 0  # replies that came
    cached: int = 0  # answers that were not asked for again
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens_in: int = 0  # what the cached answers had taken when they were paid
    cached_tokens_out: int = 0
    seconds: float = 0.0  # summed over calls, which overlap
    attempts: Counter[str] = field(default_factory=Counter)  # failed attempts by kind
    quarantined: int = 0  # calls that were given up

    def to_dict(self, price: Price | None) -> dict[str, Any]:
        """JSON-ready counts; costs are None where the price is not known."""
        return {
            "calls": self.calls,
            "answered": self.answered,
            "cached": self.cached,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "cost": cost_of(price, self.tokens_in, self.tokens_out),
            "cached_cost": cost_of(price, self.cached_tokens_in, self.cached_tokens_out),
            "seconds": round(self.seconds, 3),
            "failures": {"attempts": dict(sorted(self.attempts.items())), "quarantined": self.quarantined},
        }


class Ledger:
    """The counts of a run; safe between threads."""

    def __init__(self, price: Price | None) -> None:
        self.price = price
        self._lock = threading.Lock()
        self._steps: dict[str, StepLedger] = {}
        self._unusable: set[str] = set()  # keys of the replies that were counted as failures

    def count_call(self, step: str) -> None:
        """A call is sent."""
        with self._lock:
            self._step(step).calls += 1

    def count_reply(self, step: str, *, tokens_in: int, tokens_out: int, seconds: float) -> None:
        """A reply came."""
        with self._lock:
            counts = self._step(step)
            counts.answered += 1
            counts.tokens_in += tokens_in
            counts.tokens_out += tokens_out
            counts.seconds += seconds

    def count_cached(self, step: str, *, tokens_in: int, tokens_out: int) -> None:
        """An answer was in the cache."""
        with self._lock:
            counts = self._step(step)
            counts.cached += 1
            counts.cached_tokens_in += tokens_in
            counts.cached_tokens_out += tokens_out

    def count_failure(self, step: str, kind: str) -> None:
        """An attempt failed by the network or the server."""
        with self._lock:
            self._step(step).attempts[kind] += 1

    def count_unusable(self, step: str, kind: str, *, key: str) -> None:
        """A reply could not be used; one reply counts once, however often the cache gives it."""
        with self._lock:
            if key not in self._unusable:
                self._unusable.add(key)
                self._step(step).attempts[kind] += 1

    def count_quarantined(self, step: str) -> None:
        """A call was given up."""
        with self._lock:
            self._step(step).quarantined += 1

    def summary(self) -> dict[str, Any]:
        """Totals, and `steps` with the same counts for each step; JSON-ready."""
        with self._lock:
            total = StepLedger()
            for counts in self._steps.values():
                _add(total, counts)
            steps = {name: counts.to_dict(self.price) for name, counts in self._steps.items()}
            return {**total.to_dict(self.price), "steps": steps}

    def _step(self, step: str) -> StepLedger:
        return self._steps.setdefault(step, StepLedger())


def _add(total: StepLedger, counts: StepLedger) -> None:
    for name, value in vars(counts).items():
        if isinstance(value, Counter):
            getattr(total, name).update(value)
        else:
            setattr(total, name, getattr(total, name) + value)


class PromptLog:
    """Every prompt and answer as a line of JSON, appended whole; `mask` takes the keys out of it."""

    def __init__(self, path: Path, *, mask: Callable[[str], str]) -> None:
        make_folder(path.parent)
        self._mask = mask
        self._lock = threading.Lock()
        half = path.is_file() and path.stat().st_size > 0 and not _ends_with_newline(path)
        self._file = path.open("ab", buffering=0)
        if half:  # a run was killed while it wrote
            self._file.write(b"\n")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record with the time of day."""
        stamped = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **record}
        line = self._mask(json.dumps(stamped, ensure_ascii=False)) + "\n"
        with self._lock:
            self._file.write(line.encode("utf-8", "replace"))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
