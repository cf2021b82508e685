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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.config import (
    CLUSTERING_SECTIONS,
    ConfigError,
    Section,
    UserError,
    load_settings,
    settings_to_yaml,
)
from common.numba_cache import ensure_cache_folder
from common.progress import Progress, Stopwatch

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
    arguments = _parse(doc, section, add_arguments, default_config, argv)
    given = vars(arguments)
    only_check, only_print = given.pop("check"), given.pop("print_config")
    overrides = [*(given.pop("assignments") or ()), *(given.pop("overrides", None) or ())]
    try:
        settings = load_settings(
            given.pop("config"), settings_class, section=section, overrides=overrides, known_sections=known_sections
        )
        _set_up_logging(getattr(settings, "log_level", "info"), script=run.__module__)
        if only_print:
            print(settings_to_yaml(settings, section=section), end="")
        elif only_check:
            print(json.dumps(check(settings), ensure_ascii=False, default=str))
        else:
            ensure_cache_folder()
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
    section: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None,
    default_config: str | None,
    argv: Sequence[str] | None,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = f"docs/{Path(parser.prog).stem}.md explains every key."
    what = f"YAML file; the section of this script is `{section}`" if section else "YAML file with the settings"
    what += f"; default: {default_config}" if default_config else ""
    parser.add_argument("--config", metavar="FILE", required=default_config is None, default=default_config, help=what)
    example = "section.key=value" if section else "key=value"
    parser.add_argument("assignments", nargs="*", metavar=example, help="override a key of the file")
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


def _set_up_logging(level: str, *, script: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Ours at the level asked for; libraries stay at warnings, their chatter helps nobody at night.
    for name in ("common", "image_parts", "llm_parts", "metric_parts", script):
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)


__all__ = ["ConfigError", "Progress", "Result", "Stopwatch", "UserError", "main"]
