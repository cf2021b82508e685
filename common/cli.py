"""What all scripts share on the command line: arguments, logging, progress and exit codes.

Exit codes: 0 done, 1 an error the user can mend, 2 wrong config or arguments, 75 another run holds the output,
130 Ctrl-C. A bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from common.config import (
    CLUSTERING_SECTIONS,
    ConfigError,
    Section,
    UserError,
    load_settings,
    settings_to_yaml,
)

log = logging.getLogger(__name__)

Result = str | Path | dict[str, Any]

# What the operating system refuses through no fault of ours; everything else from it is a bug and keeps its traceback.
_MENDABLE_OS_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space and start again, finished shards are kept",
    errno.EDQUOT: "the disk quota is used up; free some space and start again, finished shards are kept",
    errno.EACCES: "permission denied; check the owner and the mode of this path",
    errno.EPERM: "not permitted; check the owner and the mode of this path",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.EFBIG: "the file would be larger than this file system or the limit of this shell (ulimit -f) allows",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "the path is too long for this file system",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "this is a folder, not a file",
}


def main(
    settings_class: type[Section],
    run: Callable[..., Result],
    *,
    doc: str | None,
    section: str | None,
    check: Callable[..., dict[str, Any]],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    default_config: str | None = None,
    known_sections: Sequence[str] = CLUSTERING_SECTIONS,
    argv: Sequence[str] | None = None,
) -> int:
    """Run one script: parse, load the settings, call `run`, print its result as the last line; returns the exit code.

    `run(settings, overwrite=…)` returns a path, or a dict that is printed as one JSON line. `check(settings)` validates
    the inputs and returns the plan that `--check` prints. Arguments added by `add_arguments` reach `run` by keyword;
    one whose `dest` is "overrides" is a `section.key=value` string and becomes an override of the file.
    """
    arguments = _parse(doc, add_arguments, default_config, argv)
    given = vars(arguments)
    only_check, only_print = given.pop("check"), given.pop("print_config")
    overrides = [*(given.pop("assignments") or ()), *(given.pop("overrides", None) or ())]
    try:
        settings = load_settings(
            given.pop("config"), settings_class, section=section, overrides=overrides, known_sections=known_sections
        )
        _set_up_logging(getattr(settings, "log_level", "info"))
        if only_print:
            print(settings_to_yaml(settings, section=section), end="")
        elif only_check:
            print(json.dumps(check(settings), ensure_ascii=False, default=str))
        else:
            result = run(settings, **given)
            print(json.dumps(result, ensure_ascii=False, default=str) if isinstance(result, dict) else result)
        sys.stdout.flush()
    except UserError as problem:
        return _fail(str(problem), problem.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; start the same command again to go on where it stopped", 130)
    except OSError as problem:
        if problem.errno not in _MENDABLE_OS_ERRORS:
            raise
        where = problem.filename or problem.filename2 or "output"
        return _fail(f"{where}: {_MENDABLE_OS_ERRORS[problem.errno]}", 1)
    return 0


def _parse(
    doc: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None,
    default_config: str | None,
    argv: Sequence[str] | None,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=default_config is None, default=default_config)
    parser.add_argument("assignments", nargs="*", metavar="section.key=value", help="override a key of the file")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that another config made")
    parser.add_argument(
        "--check", action="store_true", help="validate config and inputs, print the plan, write nothing"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and stop")
    if add_arguments:
        add_arguments(parser)
    return parser.parse_intermixed_args(argv)


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code


def _set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Ours at the level asked for; libraries stay at warnings, their chatter helps nobody at night.
    for name in ("common", "image_parts", "llm_parts", "metric_parts", "__main__"):
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)


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
                "%s: %s of %s %s, %.0f/s, %.0f s left",
                self.label,
                f"{self.done:,}",
                f"{self.total:,}",
                self.unit,
                rate,
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


__all__ = ["ConfigError", "Progress", "Result", "Stopwatch", "UserError", "main"]
