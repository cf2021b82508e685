"""Run a main in this process on values for its section, and see what a user would: exit code and both streams."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from common import cli

SECTIONS = {
    "cluster_supervise": "supervise",
    "cluster_normalize_and_pca": "normalize_and_pca",
    "cluster_train_clusters": "train",
    "cluster_purity_counter": "purity_counter",
    "cluster_update_dataset": "update_dataset",
}


@dataclass(frozen=True)
class Result:
    """How one main ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The error, without its `error: `; fails the test where the main did not end in exactly one."""
        assert self.exit_code != 0, self.stderr
        assert self.stderr.count("error: ") == 1, self.stderr
        return self.stderr.partition("error: ")[2].strip()

    @property
    def last_line(self) -> str:
        """The last line on stdout: the result."""
        assert self.exit_code == 0, self.stderr
        return self.stdout.splitlines()[-1]

    @property
    def json(self) -> dict[str, Any]:
        """The last line on stdout, as JSON."""
        return dict(json.loads(self.last_line))


def run_main(script: str, config: Path, *arguments: str) -> Result:
    """Run the main of a script on a config file; a traceback fails the test."""
    module = importlib.import_module(script)
    stdout, stderr = io.StringIO(), io.StringIO()
    with own_logging(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            exit_code = cli.main(
                module.Settings,
                module.run,
                doc=module.__doc__,
                section=SECTIONS[script],
                check=module.check,
                argv=["--config", str(config), *arguments],
            )
        except SystemExit as end:  # argparse
            exit_code = int(end.code or 0)
    return Result(exit_code, stdout.getvalue(), stderr.getvalue())


def run_stage(script: str, folder: Path, values: dict[str, Any], *arguments: str) -> Result:
    """Run a script on values for its section; the config is written into `folder`."""
    config = folder / f"{SECTIONS[script]}.yaml"
    config.write_text(yaml.safe_dump({SECTIONS[script]: {"progress": False} | values}, allow_unicode=True))
    return run_main(script, config, *arguments)


@contextlib.contextmanager
def own_logging() -> Iterator[None]:
    """Give logging back as it was: a main sets it up for its process."""
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in (*logging.root.manager.loggerDict, "common", *SECTIONS))]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        logging.captureWarnings(False)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """Write columns as one parquet file, as another program would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def read_folder(folder: str | Path) -> pa.Table:
    """All shards of a folder, in order, read by pyarrow alone."""
    shards = sorted(path for path in Path(folder).glob("*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in shards])


def error_lines(result: Result) -> Sequence[str]:
    """The problems of a config error, one a line, without the file's name."""
    assert result.exit_code == 2, result.stderr
    return [line.strip() for line in result.error.splitlines()[1:]]


def counted(log: str, what: str) -> int:
    """The number that the log gives after `what`, such as "rows in"."""
    found = re.search(rf"{re.escape(what)} ([\d,]+)", log)
    assert found, f"no {what!r} in the log:\n{log}"
    return int(found[1].replace(",", ""))
