"""The output of a stage, a folder of shards or one file, from its first check to its `_SUCCESS`."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from common.commit import (
    HeldOutput,
    Identity,
    describe_changes,
    remove_stale_temporaries,
    sync_folder,
    write_json,
)
from common.config import Section, UserError, settings_to_dict
from common.shard_writer import ShardTask, shard_entry
from common.shards import SUCCESS, Stamp, read_stamp, read_success

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

_VERSIONED_PACKAGES = ("numpy", "pyarrow", "scikit-learn", "torch", "transformers")


class StageOutput(HeldOutput):
    """The output folder of a stage, held under its lock from the first check to `_SUCCESS`.

        with StageOutput(folder, identity, overwrite=overwrite) as output:
            if not output.is_complete:
                todo = [name for name in names if not output.is_done(name)]
                ...
                output.finish(names, settings, totals)

    Entering raises UserError where the folder holds the result of another configuration (and `overwrite` is off) or
    parquet files of somebody else, and LockHeld where another run is writing to it.
    """

    def __init__(
        self, folder: str | Path, identity: Identity, *, overwrite: bool = False, source: Path | None = None
    ) -> None:
        self.folder = Path(folder)
        self.identity = identity
        self._overwrite = overwrite
        self._source = source  # the folder that the stage reads
        super().__init__(self.folder, is_file=False)

    def __enter__(self) -> Self:
        if self._source is not None and self._source.resolve() == self.folder.resolve():
            raise UserError(f"output folder {self.folder} is also the input; choose another output folder")
        return super().__enter__()

    def _claim(self) -> None:
        remove_stale_temporaries(self.folder)
        self._refuse_foreign_files()
        self._refuse_other_configuration()
        if self._overwrite:
            self._clear()

    @property
    def success(self) -> dict[str, Any] | None:
        """The `_SUCCESS` of this output, or None where it is unfinished."""
        return read_success(self.folder) if (self.folder / SUCCESS).exists() else None

    @property
    def is_complete(self) -> bool:
        """Whether every shard that `_SUCCESS` lists is there and whole."""
        success = self.success
        return success is not None and all(self.is_done(entry["name"]) for entry in success["shards"])

    def is_done(self, name: str) -> bool:
        """Whether one shard was committed by this very configuration; a damaged one counts as not done."""
        path = self.folder / name
        if not path.exists():
            return False
        try:
            stamp = read_stamp(path)
        except UserError as problem:
            log.warning("%s; it is written again", problem)
            return False
        return stamp is not None and stamp.fingerprint == self.identity.fingerprint

    def task(self, name: str, n_rows: int) -> ShardTask:
        """The task of writing one shard of this output."""
        identity = self.identity
        return ShardTask(self.folder / name, Stamp(identity.to_dict(), identity.fingerprint, n_rows))

    def finish(self, names: Sequence[str], settings: Section, totals: dict[str, Any]) -> Path:
        """Commit the folder: write `_SUCCESS` over the shards `names`, in order; returns its path."""
        entries = [shard_entry(self.folder / name) for name in names]
        success = _success(self.identity, settings, entries, totals) | {"layers": {}}
        write_json(self.folder / SUCCESS, success)
        return self.folder / SUCCESS

    def _own_shards(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _refuse_foreign_files(self) -> None:
        if (self.folder / SUCCESS).exists():
            return
        for path in self.folder.glob("*.parquet"):
            try:
                ours = path.name.startswith("part-") and read_stamp(path) is not None
            except UserError:
                ours = path.name.startswith("part-")
            if not ours:
                raise UserError(
                    f"output folder {self.folder} holds {path.name}, which no stage of this suite wrote; "
                    f"choose another output folder"
                )

    def _clear(self) -> None:
        # `_SUCCESS` goes first: from then on nobody takes the rest for a finished result.
        (self.folder / SUCCESS).unlink(missing_ok=True)
        sync_folder(self.folder)
        for path in self._own_shards():
            path.unlink()

    def _refuse_other_configuration(self) -> None:
        before = self._identity_before()
        if before is None or before == self.identity.to_dict():
            return
        if before.get("stage") != self.identity.stage:  # whose work --overwrite must not destroy either
            raise UserError(
                f"output folder {self.folder} holds the result of {before.get('stage')!r}; choose another output folder"
            )
        if not self._overwrite:
            changes = describe_changes(before, self.identity.to_dict())
            raise UserError(
                f"output folder {self.folder} holds the result of another configuration ({changes}); "
                f"choose another output folder, or replace it with --overwrite"
            )

    def _identity_before(self) -> dict[str, Any] | None:
        try:
            success = self.success
        except UserError:
            if not self._overwrite:
                raise
            success = None  # a damaged one is replaced like everything else
        return (success or {}).get("identity") or next(self._identities_of_shards(), None)

    def _identities_of_shards(self) -> Iterator[dict[str, Any]]:
        for path in self._own_shards():
            try:
                stamp = read_stamp(path)
            except UserError:
                continue  # a damaged shard is found again, and told, by is_done
            if stamp is not None:
                yield stamp.identity


def _success(
    identity: Identity, settings: Section, entries: list[dict[str, Any]], totals: dict[str, Any]
) -> dict[str, Any]:
    return {
        "stage": identity.stage,
        "fingerprint": identity.fingerprint,
        "identity": identity.to_dict(),
        "config": settings_to_dict(settings),
        "versions": library_versions(),
        "shards": entries,
        "totals": totals,
    }


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose numbers end up in the shards."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


# --- Outputs of a single file ----------------------------------------------------------------------------------------


class FileOutput(HeldOutput):
    """One parquet file as the output of a stage, held under its lock; the file is its own proof of being done.

    Entering raises UserError where the file holds the result of another configuration or of another program (and
    `overwrite` is off), and LockHeld where another run is writing it.
    """

    def __init__(self, path: str | Path, identity: Identity, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.identity = identity
        self._overwrite = overwrite
        super().__init__(self.path, is_file=True)

    def __enter__(self) -> Self:
        if self.path.is_dir():
            raise UserError(f"output {self.path} is a folder; give the path of a file")
        return super().__enter__()

    def _claim(self) -> None:
        remove_stale_temporaries(self.path.parent)
        self._refuse_other_content()

    @property
    def is_complete(self) -> bool:
        """Whether the file is there, made by this very configuration."""
        stamp = read_stamp(self.path) if self.path.exists() and not self._overwrite else None
        return stamp is not None and stamp.fingerprint == self.identity.fingerprint

    @property
    def success(self) -> dict[str, Any] | None:
        """What `finish` wrote beside the file for this configuration, or None."""
        path = self.path.with_suffix(".json")
        if not path.exists():
            return None
        try:
            success = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None  # damaged; it is written again
        return dict(success) if success.get("fingerprint") == self.identity.fingerprint else None

    def is_done(self, _name: str) -> bool:
        """Whether the file is there; the same question as of a folder's shards."""
        return self.is_complete

    def task(self, _name: str, n_rows: int) -> ShardTask:
        """The task of writing the file."""
        return ShardTask(self.path, Stamp(self.identity.to_dict(), self.identity.fingerprint, n_rows))

    def write(self, table: pa.Table) -> None:
        """Commit the file."""
        self.task(self.path.name, table.num_rows).write(table.schema, [table])

    def finish(self, _names: Sequence[str], settings: Section, totals: dict[str, Any]) -> Path:
        """Write what was made, and from what, as JSON beside the file; returns its path."""
        path = self.path.with_suffix(".json")
        write_json(path, _success(self.identity, settings, [shard_entry(self.path)], totals))
        return path

    def _refuse_other_content(self) -> None:
        if not self.path.exists():
            return
        try:
            stamp = read_stamp(self.path)
        except UserError:
            if self._overwrite:
                return
            raise
        if stamp is not None and stamp.identity.get("stage") != self.identity.stage:
            raise UserError(
                f"output {self.path} holds the result of {stamp.identity.get('stage')!r}; choose another path"
            )
        if self._overwrite:
            return
        if stamp is None:
            raise UserError(
                f"output {self.path} exists and no stage of this suite wrote it; choose another path or --overwrite"
            )
        if stamp.identity != self.identity.to_dict():
            changes = describe_changes(stamp.identity, self.identity.to_dict())
            raise UserError(
                f"output {self.path} holds the result of another configuration ({changes}); "
                f"choose another path, or replace it with --overwrite"
            )
