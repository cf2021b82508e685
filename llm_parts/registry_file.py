"""The registry on disk: one JSON file, replaced as a whole, with the generation before it kept beside it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.commit import write_bytes
from common.config import UserError
from llm_parts.registry import BatchEntry, ClusterRecord, ClusterRegistry

log = logging.getLogger(__name__)

REGISTRY_FORMAT = 1


class _Damaged(Exception):
    """The file is not a whole registry."""


class RegistryFile:
    """Loads and saves one registry file; the caller holds its lock.

    A file that is cut in half, or is no registry, is answered with the generation before it and a loud warning, which
    is kept in `warning`. A file of another format is refused: nobody knows what it would lose.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.previous_path = self.path.with_name(f"{self.path.name}.previous")
        self.warning = ""
        self._good: bytes | None = None  # the last whole content we know of, the next `previous`

    def load(self) -> ClusterRegistry:
        """The registry of the file, empty where there is none; raises UserError where no generation can be read."""
        if not self.path.exists():
            if self.previous_path.exists():
                self._warn(f"registry {self.path} is gone, {self.previous_path} is still there; starting an empty one")
            return ClusterRegistry()
        content = self.path.read_bytes()
        try:
            registry = parse_registry(content, where=self.path)
        except _Damaged as problem:
            return self._load_previous(str(problem))
        self._good = content
        return registry

    def save(self, registry: ClusterRegistry) -> None:
        """Write the registry; the content before it becomes the previous generation."""
        self.save_bytes(render_registry(registry))

    def save_bytes(self, content: bytes) -> None:
        """Write what `render_registry` made."""
        if self._good is not None and self._good != content:
            write_bytes(self.previous_path, self._good)
        write_bytes(self.path, content)
        self._good = content

    def fingerprint(self) -> str:
        """sha256 of the file, or "" where there is none."""
        return fingerprint_bytes(self.path.read_bytes()) if self.path.exists() else ""

    def _load_previous(self, problem: str) -> ClusterRegistry:
        advice = "restore it from a backup, or give another registry_path"
        if not self.previous_path.exists():
            raise UserError(f"registry {self.path} is damaged ({problem}) and has no previous generation; {advice}")
        content = self.previous_path.read_bytes()
        try:
            registry = parse_registry(content, where=self.previous_path)
        except _Damaged as again:
            raise UserError(
                f"registry {self.path} is damaged ({problem}) and so is {self.previous_path} ({again}); {advice}"
            ) from None
        self._warn(
            f"registry {self.path} is DAMAGED ({problem}); going on with the generation before it, "
            f"{self.previous_path}: {len(registry)} clusters, revision {registry.revision}"
        )
        self._good = content
        return registry

    def _warn(self, message: str) -> None:
        self.warning = message
        log.warning("%s", message)


def render_registry(registry: ClusterRegistry) -> bytes:
    """A registry as the bytes of its file."""
    values = {
        "format": REGISTRY_FORMAT,
        "revision": registry.revision,
        "batches": [entry.model_dump() for entry in registry.batches],
        "clusters": [record.model_dump() for record in registry.all_records()],
    }
    return (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode()


def parse_registry(content: bytes, *, where: str | Path) -> ClusterRegistry:
    """The registry of a file's bytes; raises UserError for another format, _Damaged for anything that is not whole."""
    try:
        values: Any = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError) as problem:
        raise _Damaged(f"not whole JSON, {len(content)} bytes: {problem}") from None
    if not isinstance(values, dict) or "format" not in values:
        raise _Damaged("no registry: it has no field `format`")
    if values["format"] != REGISTRY_FORMAT:
        raise UserError(
            f"registry {where} has format {values['format']!r}, this version reads format {REGISTRY_FORMAT}; "
            f"use the version that wrote it, or give another registry_path"
        )
    try:
        records = [ClusterRecord.model_validate(item) for item in values["clusters"]]
        batches = [BatchEntry.model_validate(item) for item in values.get("batches", [])]
        revision = int(values.get("revision", 0))
    except (ValidationError, KeyError, TypeError, ValueError) as problem:
        raise _Damaged(" ".join(str(problem).split())[:200]) from None
    if len({record.cluster_id for record in records}) < len(records):
        raise _Damaged("two clusters have one id")
    return ClusterRegistry(records, batches=batches, revision=revision)


def fingerprint_bytes(content: bytes) -> str:
    """sha256 of a registry's bytes."""
    return hashlib.sha256(content).hexdigest()
