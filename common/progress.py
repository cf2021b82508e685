"""Progress of long work, and the stopwatch behind every rows/s in the log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)


class Progress:
    """Progress of a known number of units: a tqdm bar on a terminal, a log line now and then elsewhere.

    with Progress(n_rows, label="embed", unit="rows", enabled=settings.progress) as progress:
        progress.update(64)
    """

    _SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, total: int, *, label: str, unit: str = "rows", enabled: bool = True, done: int = 0) -> None:
        self.total, self.label, self.unit, self.done = total, label, unit, done
        self._done_before = done
        self._started = self._last_line = time.monotonic()
        self._enabled = enabled
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, initial=self.done, desc=self.label, unit=f" {self.unit}", unit_scale=True
            )
        return self

    def update(self, n: int) -> None:
        """Count `n` more units as done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._enabled and time.monotonic() - self._last_line > self._SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            rate = (self.done - self._done_before) / max(self._last_line - self._started, 1e-9)
            left = (self.total - self.done) / rate if rate else float("inf")
            log.info(
                "%s: %s of %s %s, %s/s, %.0f s left",
                self.label,
                f"{self.done:,}",
                f"{self.total:,}",
                self.unit,
                f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
                left,
            )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class Stopwatch:
    """Seconds since it was made, for the rows/s that every stage logs."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far, never zero."""
        return max(time.monotonic() - self._start, 1e-9)
