"""The command line of the generators: how many rows, which seed, and a file that is never replaced unasked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.commit import write_bytes
from common.config import UserError


def write_by_command(
    make_content: Callable[[int, int], bytes],
    *,
    what: str,
    default_rows: int,
    arguments: Sequence[str] | None,
) -> int:
    """Write what `make_content(rows, seed)` returns to --out, print the path, and return the exit code."""
    parser = argparse.ArgumentParser(description=f"Write invented {what}.")
    parser.add_argument("--out", type=Path, required=True, help="path of the file to write")
    parser.add_argument("--rows", type=int, default=default_rows, help=f"number of rows (default {default_rows})")
    parser.add_argument("--seed", type=int, default=7, help="seed of all random choices (default 7)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that differs")
    options = parser.parse_args(arguments)
    try:
        write_once(options.out, make_content(options.rows, options.seed), overwrite=options.overwrite)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


def write_once(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write content, leave an equal file alone, and refuse to replace a different one unless told to."""
    if path.is_file() and not overwrite:
        if path.read_bytes() == content:
            print(f"{path} is already there, with the same rows", file=sys.stderr)
            return
        raise UserError(f"{path} exists and holds something else; choose another --out or add --overwrite")
    write_bytes(path, content)
