"""Columns that a stage adds in place to the shards of another, shard by shard, by the commit protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.commit import HeldOutput, Identity, describe_changes, remove_stale_temporaries, write_json
from common.config import UserError
from common.extended_shard import Extension, write_extended_shard
from common.outputs import library_versions
from common.shard_writer import shard_entry
from common.shards import SUCCESS, Shard, ShardSet, Stamp, read_stamp

if TYPE_CHECKING:
    import pyarrow as pa

# The identity of shards that no stage of this suite made.
PLAIN_FOLDER = {"stage": "plain folder"}


@dataclass(frozen=True)
class LayerTask:
    """One shard to which columns are added in place."""

    shard: Shard
    layer: str
    identity: dict[str, Any]
    fingerprint: str
    folder_fingerprint: str = ""  # of the folder, for a shard without a stamp: it becomes a part of that folder

    def is_done(self) -> bool:
        """Whether the shard has the layer with this fingerprint."""
        return _has_layer(self.shard.path, self.layer, self.fingerprint)

    def write(self, compute: Callable[[pa.Table], pa.Table], *, reads: Sequence[str]) -> None:
        """Give the shard the columns that `compute` makes, row by row, of tables of the columns `reads`."""
        before = read_stamp(self.shard.path) or Stamp(PLAIN_FOLDER, self.folder_fingerprint, self.shard.n_rows)
        layers = {**before.layers, self.layer: {"identity": self.identity, "fingerprint": self.fingerprint}}
        stamp = Stamp(before.identity, before.fingerprint, before.n_rows, layers)
        extension = Extension(self.shard, self.shard.schema.names, reads, compute)
        write_extended_shard(self.shard.path, extension, stamp)


def _has_layer(path: Path, layer: str, fingerprint: str) -> bool:
    stamp = read_stamp(path)
    return stamp is not None and stamp.layers.get(layer, {}).get("fingerprint") == fingerprint


class LayerOutput(HeldOutput):
    """Columns added in place to the shards of another stage, shard by shard, under the lock of their folder.

    While a layer is being written, `_SUCCESS` says so and readers of its columns refuse; killed and started again, it
    goes on with the shards that lack it. Entering raises UserError where another configuration wrote the layer (and
    `overwrite` is off).
    """

    def __init__(self, shard_set: ShardSet, identity: Identity, *, overwrite: bool = False) -> None:
        self.shard_set = shard_set
        self.identity = identity
        self._overwrite = overwrite
        super().__init__(shard_set.folder, is_file=False)

    def _claim(self) -> None:
        remove_stale_temporaries(self.shard_set.folder)
        before = self.shard_set.layer(self.name)
        if before and before["identity"] != self.identity.to_dict() and not self._overwrite:
            changes = describe_changes(before["identity"], self.identity.to_dict())
            raise UserError(
                f"the shards in {self.shard_set.folder} already hold the result of {self.name} by another "
                f"configuration ({changes}); replace it with --overwrite, or write elsewhere with output_dir"
            )

    @property
    def name(self) -> str:
        """The layer's name: that of the stage which adds it."""
        return self.identity.stage

    @property
    def is_complete(self) -> bool:
        """Whether every shard has the layer by this configuration and `_SUCCESS` says so."""
        layer = self.shard_set.layer(self.name)
        whole = bool(layer and layer["complete"] and layer["fingerprint"] == self.identity.fingerprint)
        return whole and not self._overwrite and all(self.is_done(shard.path.name) for shard in self.shard_set.shards)

    def is_done(self, name: str) -> bool:
        """Whether one shard has the layer by this very configuration."""
        return not self._overwrite and _has_layer(self.shard_set.folder / name, self.name, self.identity.fingerprint)

    def task(self, shard: Shard) -> LayerTask:
        """The task of adding the layer to one shard."""
        identity = self.identity
        return LayerTask(shard, self.name, identity.to_dict(), identity.fingerprint, self.shard_set.fingerprint)

    def begin(self) -> None:
        """Mark the layer as being written, so that no reader takes half of it for the whole."""
        self._write_success(complete=False, totals={})

    def finish(self, totals: dict[str, Any]) -> Path:
        """Commit the layer; returns the path of `_SUCCESS`."""
        return self._write_success(complete=True, totals=totals)

    def _write_success(self, *, complete: bool, totals: dict[str, Any]) -> Path:
        folder = self.shard_set.folder
        success = dict(self.shard_set.success or self._adopted())
        layer = {
            "identity": self.identity.to_dict(),
            "fingerprint": self.identity.fingerprint,
            "complete": complete,
            "totals": totals,
        }
        success["layers"] = {**success.get("layers", {}), self.name: layer}
        success["shards"] = [shard_entry(shard.path) for shard in self.shard_set.shards]
        if not complete:  # each footer is about to change; until the end only its stamp is compared
            for entry in success["shards"]:
                del entry["footer_crc32"]
        write_json(folder / SUCCESS, success)
        return folder / SUCCESS

    def _adopted(self) -> dict[str, Any]:
        """`_SUCCESS` for a plain folder: its files, taken as they are when the first layer is added."""
        return {
            "stage": "plain folder",
            "fingerprint": self.shard_set.fingerprint,
            "identity": PLAIN_FOLDER,
            "versions": library_versions(),
            "totals": {"rows": self.shard_set.n_rows},
        }
