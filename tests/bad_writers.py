"""Two ways to write shards that look right and are not: what the crash tests must catch, or they test nothing.

Both are resumable stages in the usual manner of scripts: a loop over shards that skips those it takes for done.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from common.config import StageSettings, UserError

N_SHARDS = 3
N_ROWS = 60


class Settings(StageSettings):
    """Section `bad_writer`."""

    output_dir: str
    skip_if: Literal["exists", "readable"]
    factor: int = 1
    fail_in_shard: int | None = Field(None, description="raise an error half-way through this shard")


def run(settings: Settings, *, overwrite: bool = False) -> Path:
    """Write the shards that are not "done"."""
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(N_SHARDS):
        path = folder / f"part-{index:05d}.parquet"
        if not _is_taken_for_done(path, settings.skip_if):
            _write(path, index, settings)
    (folder / "_SUCCESS").open("wb").close()
    return folder


def check(settings: Settings) -> dict[str, Any]:
    """Nothing to check."""
    return {"output_dir": settings.output_dir}


def _is_taken_for_done(path: Path, skip_if: str) -> bool:
    if skip_if == "exists":
        return path.exists()
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _write(path: Path, index: int, settings: Settings) -> None:
    schema = pa.schema([("value", pa.int64())])
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for table in _tables(index, settings):
            writer.write_table(table)


def _tables(index: int, settings: Settings) -> Iterator[pa.Table]:
    for half in range(2):
        if half == 1 and settings.fail_in_shard == index:
            raise UserError("the input went away")
        rows = range(half * N_ROWS // 2, (half + 1) * N_ROWS // 2)
        yield pa.table({"value": [settings.factor * (index * N_ROWS + row) for row in rows]})
