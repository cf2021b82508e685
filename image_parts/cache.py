"""Features on disk: append-only parquet shards in one folder for each way of making them.

    cache = FeatureCache(Path(".cache"), key)          # key: model, revision, preprocessing, …
    found = cache.read_into(vectors, RowKeys.of(keys)) # what is there already
    with cache.writer(dimension) as writer: writer.add(row_key, vector)

A row is found by the content hash of its image, so new, moved and renamed images cost only what is new. A shard is
written whole or not at all; nothing that lies there is ever changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from common.columns import read_vectors, vector_array
from common.commit import atomic_file, describe_changes, make_folder, remove_stale_temporaries, write_json
from common.config import UserError, canonical_json
from common.mapped import release

log = logging.getLogger(__name__)

# A kill loses at most this many images, or what this many seconds computed.
_SHARD_ROWS = 1024
_SHARD_SECONDS = 60.0


@dataclass(frozen=True)
class RowKeys:
    """Distinct row keys, each of a row; they are told apart by hashes of 128 bits, 24 bytes each with their row."""

    hashes: np.ndarray  # [u] V16, sorted
    rows: np.ndarray  # [u] int64

    @classmethod
    def of(cls, keys: Iterable[str]) -> tuple[RowKeys, np.ndarray]:
        """Number keys in the order in which they first come; returns them, and the row of each key that was given."""
        hashes, first, of = np.unique(_hash_all(keys), return_index=True, return_inverse=True)
        rows = np.empty(len(hashes), np.int64)
        rows[np.argsort(first)] = np.arange(len(hashes))
        return cls(hashes, rows), rows[of]

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, keys: Iterable[str]) -> np.ndarray:
        """The rows of some keys, [m] int64; -1 for those that are none of these."""
        hashes = _hash_all(keys)
        places = np.minimum(np.searchsorted(self.hashes, hashes), max(len(self) - 1, 0))
        return np.where(self.hashes[places] == hashes, self.rows[places], -1) if len(self) else places - 1


def _hash_all(keys: Iterable[str]) -> np.ndarray:
    packed = bytearray()
    for key in keys:
        packed += hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.frombuffer(packed, "V16")


class FeatureCache:
    """The features of one model with one preprocessing, below `cache_dir`."""

    def __init__(self, cache_dir: Path, key: dict[str, Any]) -> None:
        self.key = key
        self.folder = cache_dir / "features" / hashlib.sha256(canonical_json(key).encode()).hexdigest()[:16]

    def dimension(self) -> int | None:
        """Length of the vectors that lie here; None where there are none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in sorted(self.folder.glob("part-*.parquet")):
            try:
                return int(pq.read_schema(path).field("vector").type.list_size)
            except (pa.ArrowException, OSError, KeyError):
                continue  # damaged; read_into says so
        return None

    def read_into(self, vectors: np.ndarray, wanted: RowKeys) -> np.ndarray:
        """Fill the rows of `vectors` [u, d] whose keys are on disk; returns which are: [u] bool.

        Shards are read one after the other, so memory does not grow with the cache.
        Raises UserError where the folder says of itself that its features were made in another way.
        """
        found = np.zeros(len(vectors), bool)
        if not self.folder.is_dir():
            return found
        self._refuse_other_features()
        remove_stale_temporaries(self.folder)
        for path in sorted(self.folder.glob("part-*.parquet")):
            if found.all():
                break
            self._read_shard(path, vectors, wanted, found)
        return found

    def writer(self, dimension: int) -> FeatureWriter:
        """A writer that appends shards to this cache."""
        make_folder(self.folder)
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", self.key)
        return FeatureWriter(self.folder, dimension)

    def _refuse_other_features(self) -> None:
        """A folder that was copied or renamed by hand holds rows for the same images, which nothing else would tell."""
        path = self.folder / "key.json"
        try:
            there = json.loads(path.read_bytes())
        except FileNotFoundError:
            return
        except ValueError as damage:
            log.warning("%s is damaged; its features are taken for what the name of the folder says: %s", path, damage)
            return
        if canonical_json(there) != canonical_json(self.key):
            changes = describe_changes({"keys": _flat(there)}, {"keys": _flat(self.key)})
            raise UserError(
                f"{self.folder} holds features that were made in another way ({changes}); remove this folder, or set "
                f"another cache.cache_dir"
            )

    def _read_shard(self, path: Path, vectors: np.ndarray, wanted: RowKeys, found: np.ndarray) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                rows = wanted.find(file.read(columns=["key"]).column("key").to_pylist())
                if not (rows >= 0).any():
                    return
                column = read_vectors(file.read(columns=["vector"]).column("vector"), where=str(path))
        except (pa.ArrowException, OSError) as problem:
            log.warning(
                "feature shard %s is damaged and is passed over; its images are computed again: %s", path, problem
            )
            return
        if column.vectors.shape[1] != vectors.shape[1]:
            log.warning("feature shard %s holds %d dimensions and is passed over", path, column.vectors.shape[1])
            return
        usable = (rows >= 0) & column.valid
        vectors[rows[usable]] = column.vectors[usable]
        release(vectors)  # the shard's rows lie anywhere in it
        found[rows[usable]] = True


def _flat(key: dict[str, Any]) -> dict[str, Any]:
    """`model.source` and so on, one level deep."""
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in key.items()}
    return {f"{name}.{inner}".rstrip("."): value for name, values in parts.items() for inner, value in values.items()}


class FeatureWriter:
    """Collects rows and commits them shard by shard; what was collected is committed on every way out."""

    def __init__(self, folder: Path, dimension: int) -> None:
        self._folder, self._dimension = folder, dimension
        self._keys: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._last_commit = time.monotonic()

    def __enter__(self) -> FeatureWriter:
        return self

    def add(self, key: str, vector: np.ndarray) -> None:
        """Append one row, `vector` [d] float32."""
        self._keys.append(key)
        self._vectors.append(vector)
        if len(self._keys) >= _SHARD_ROWS or time.monotonic() - self._last_commit > _SHARD_SECONDS:
            self._commit()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._commit()

    def _commit(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._last_commit = time.monotonic()
        if not self._keys:
            return
        matrix = np.stack(self._vectors).astype(np.float32, copy=False)
        table = pa.table({"key": pa.array(self._keys, pa.string()), "vector": vector_array(matrix)})
        # A random name, so that two runs that share a cache never meet.
        with atomic_file(self._folder / f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet") as file:
            pq.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
        self._keys, self._vectors = [], []
